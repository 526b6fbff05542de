"""The whole of SpaceEvo on this machine: from a pretrained teacher to INT8 networks that were measured here.

    python demo.py
    python demo.py --platform onnx_lut --output_path checkpoints/demo_lut     # without measuring this machine

Runs the scripts that users run, some side by side, on the small `demo` hyperspace with Fashion-MNIST: block KD and its
LSQ+, a latency predictor of this machine, block LUTs, the space search, two supernets (of the space found and of a
random one), subnet searches, and the INT8 deployment of what was found beside hand-made baselines. Twenty minutes on
two cores. Ctrl-C is harmless: the same command goes on. Ends with <output_path>/summary.md and its pictures.

Fashion-MNIST: files under --dataset_path, Debian's package dataset-fashion-mnist where it is installed, torchvision's
download, that package's download (nobody has to be root); where none of them can be had, scikit-learn's digits.
"""
import os

from modules import ROOT
from modules.cli import SEED, parser, run
from modules.demo.runner import alone, run_steps
from modules.demo.steps import FULL, MEASURED, QUICK, STEPS, Demo
from modules.demo.summary import write_summary
from modules.errors import UserError


def get_args():
    p = parser(__doc__)
    p.add_argument('--output_path', default=os.path.join(ROOT, 'checkpoints', 'demo'), help='folder of everything made')
    p.add_argument('--dataset_path', default=os.path.join(ROOT, 'dataset'), help='folder of the data set')
    p.add_argument('--dataset', choices=['fashion-mnist', 'digits'], help='default: the first that can be had')
    p.add_argument('--platform', help='a latency platform, instead of measuring this machine')
    p.add_argument('--measured_name', default=MEASURED, help='platform that this machine is registered as')
    p.add_argument('--quick', action='store_true', help='a few steps of everything: shows that it runs, finds nothing')
    p.add_argument('--seed', type=SEED, default=0, help='of the random space and subnets')
    return p.parse_args()


def main(args):
    folder, dataset_path = (os.path.relpath(path, ROOT) if os.path.abspath(path).startswith(ROOT + os.sep) else
                            os.path.abspath(path) for path in (args.output_path, args.dataset_path))
    os.chdir(ROOT)
    dataset = args.dataset or find_dataset(dataset_path)
    demo = Demo(folder, dataset, dataset_path, QUICK if args.quick else FULL, args.platform, args.measured_name,
                args.seed)
    demo.check()
    with alone(folder) as lock:
        try:
            seconds = run_steps(demo, STEPS, lock, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            print('\nstopped; the same command goes on from here', flush=True)
            raise
        print('\n' + write_summary(demo, list(zip(STEPS, seconds))) + f'\n{demo.path("summary.md")}')


def find_dataset(path):
    """fashion-mnist where it is here or can be downloaded, else digits."""
    from modules.training.data import open_data  # not above: the demo itself needs no torch
    try:
        open_data(path, 'fashion-mnist', 5000)
        return 'fashion-mnist'
    except UserError as error:
        print(f'no Fashion-MNIST here ({error}): scikit-learn\'s digits instead, with which accuracies say little')
        return 'digits'


if __name__ == '__main__':
    run(main, get_args)
