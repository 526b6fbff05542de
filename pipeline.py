"""The whole of SpaceEvo with one command: from a pretrained teacher to INT8 networks measured on this machine.

    python pipeline.py --config-file pipelines/demo.yaml
    python pipeline.py --config-file pipelines/laptop.yaml --dataset_path my_pictures --latency 5
    python pipeline.py --config-file pipelines/cluster.yaml --dataset_path imagenet --nproc_per_node 8 --dry_run

Runs the scripts that users run, some side by side: block KD and its LSQ+, a latency predictor of this machine, block
LUTs, the space search, supernets, subnet searches, fine-tuning of what was found and its INT8 deployment, beside
ready-made networks. The YAML file says what is searched for, and under each step the flags of its script.
Ctrl-C is harmless: the same command continues. Ends with <output_path>/summary.md and summary.html.

--dataset_path is a folder of your own with a folder a class (docs/your_pictures.md), or where torchvision's data sets
lie. --dry_run prints every command, with capital letters for what is not known yet.
"""
import os
import signal

from modules import ROOT
from modules.cli import parser, run
from modules.deploy.runtimes import sums_are_exact
from modules.pipeline.data import choose_data, keep_data
from modules.pipeline.runner import alone, check_flags, chosen_steps, print_steps, run_steps
from modules.pipeline.settings import OWN_FLAGS, Settings, load_settings
from modules.pipeline.steps import STEPS, Pipeline
from modules.pipeline.summary import write_summary
from modules.settings import add_settings


def get_args():
    p = parser(__doc__)
    p.add_argument('--config-file', '--config_file', dest='config_file', required=True, help='pipelines/*.yaml')
    p.add_argument('--output_path', help="folder of everything made; default: checkpoints/<the config file's name>")
    p.add_argument('--dataset', help='CIFAR10, fashion-mnist, elpv, digits, imagenet for a folder of your own, …; '
                   "default: the config file's")
    p.add_argument('--dry_run', action='store_true', help='print the commands, run nothing')
    add_settings(p, Settings, skip=OWN_FLAGS, from_file=True)
    return p.parse_args()


def main(args):
    overrides = {key: value for key, value in vars(args).items() if key in Settings.__dataclass_fields__}
    settings = load_settings(args.config_file, overrides)
    name = os.path.splitext(os.path.basename(args.config_file))[0]
    folder, dataset_path = map(_from_root, (args.output_path or os.path.join(ROOT, 'checkpoints', name),
                                            args.dataset_path or os.path.join(ROOT, settings.dataset_path)))
    plugins = [os.path.abspath(path) for path in args.plugin or ()]
    os.chdir(ROOT)
    record = os.path.join(folder, 'data.json')
    data = choose_data(dataset_path, [args.dataset] if args.dataset else settings.datasets, settings.valid_size, record)
    narrow = not sums_are_exact()
    pipeline, dry = (Pipeline(folder, data, settings, narrow, dry, plugins) for dry in (False, True))
    steps = chosen_steps(pipeline, STEPS)
    check_flags(dry, steps)
    if args.dry_run:
        return print_steps(dry, steps)
    pipeline.check()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with alone(folder) as lock:
        keep_data(data, record)
        try:
            seconds = run_steps(pipeline, steps, lock, lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            print('\nstopped; the same command continues from here', flush=True)
            raise
        print('\n' + write_summary(pipeline, list(zip(steps, seconds))) + f'\n{pipeline.path("summary.html")}')
    return None


def _from_root(path):
    """A path as commands show it: from the repository's folder where it is inside, else absolute."""
    path = os.path.abspath(path)
    return os.path.relpath(path, ROOT) if path.startswith(ROOT + os.sep) else path


if __name__ == '__main__':
    run(main, get_args)
