"""The whole of SpaceEvo on this machine: from a pretrained teacher to INT8 networks that were measured here.

    python demo.py
    python demo.py --dataset imagenet --dataset_path my_pictures              # train/ and val/ with a folder a class
    python demo.py --platform onnx_lut --output_path checkpoints/demo_lut     # without measuring this machine

Runs the scripts that users run, some side by side, on the small `demo` hyperspace: block KD and its LSQ+, a latency
predictor of this machine, block LUTs, the space search by INT8 latency and, to compare, by FLOPs, both supernets from
block KD, subnet searches, fine-tuning of what was found, and its INT8 deployment beside ready-made networks. Twenty
minutes on two cores. Ctrl-C is harmless: the same command goes on. Ends with <output_path>/summary.md and summary.html.

Pictures: CIFAR-10; where it is not here and cannot be downloaded, Fashion-MNIST (files, torchvision's download,
Debian's package, for which nobody has to be root), or the solar cells of PyPI's elpv-dataset.
"""
import os

from modules import ROOT
from modules.cli import SEED, parser, run
from modules.demo.data import choose_data, keep_data
from modules.demo.runner import alone, run_steps
from modules.demo.steps import FULL, MEASURED, QUICK, STEPS, Demo
from modules.demo.summary import write_summary
from modules.deploy.onnx_run import sums_are_exact


def get_args():
    p = parser(__doc__)
    p.add_argument('--output_path', default=os.path.join(ROOT, 'checkpoints', 'demo'), help='folder of everything made')
    p.add_argument('--dataset_path', default=os.path.join(ROOT, 'dataset'), help='folder of the data set')
    p.add_argument('--dataset', help='as for the scripts: CIFAR10, fashion-mnist, elpv, digits, imagenet for a folder '
                   'of your own, …; default: the first of the first three that can be had')
    p.add_argument('--platform', help='a latency platform, instead of measuring this machine')
    p.add_argument('--measured_name', default=MEASURED, help='platform that this machine is registered as')
    p.add_argument('--quick', action='store_true', help='a few steps of everything: shows that it runs, finds nothing')
    p.add_argument('--seed', type=SEED, default=0, help='of the searches, the supernets and the fine-tuning')
    return p.parse_args()


def main(args):
    folder, dataset_path = (os.path.relpath(path, ROOT) if os.path.abspath(path).startswith(ROOT + os.sep) else
                            os.path.abspath(path) for path in (args.output_path, args.dataset_path))
    os.chdir(ROOT)
    record = os.path.join(folder, 'data.json')
    data = choose_data(dataset_path, args.dataset, record)
    demo = Demo(folder, data, QUICK if args.quick else FULL, args.platform, args.measured_name, args.seed,
                reduce_range=not sums_are_exact())
    demo.check()
    with alone(folder) as lock:
        keep_data(data, record)
        try:
            seconds = run_steps(demo, STEPS, lock, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            print('\nstopped; the same command goes on from here', flush=True)
            raise
        print('\n' + write_summary(demo, list(zip(STEPS, seconds))) + f'\n{demo.path("summary.html")}')


if __name__ == '__main__':
    run(main, get_args)
