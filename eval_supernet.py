"""Evaluate a supernet and its subnets.

    python eval_supernet.py --superspace onnxw --supernet_choice 121122-133333 --mode acc \\
        --resume ./checkpoints/supernet_training --dataset_dir ./dataset --subnet_choice max min --quant_mode
    python eval_supernet.py --superspace onnxw --supernet_choice 121122-133333 --mode lat \\
        --subnet_choice <subnet1> <subnet2>

--mode acc: test accuracy of subnets (an encoding, max or min; both without --subnet_choice), each with batch-norm
statistics of its own; with --valid_size N accuracy on N held-out training images. --mode lat predicts INT8 latencies:
of given subnets a breakdown by block, without any the distribution of random subnets with its picture. Both write a CSV
below --output_path.
"""
import os
import random

from tqdm import trange

from modules.cli import is_main_process, parser, positive, run
from modules.files import write_csv
from modules.latency import open_predictor
from modules.latency.report import breakdown, draw_cdf, percentiles
from modules.search_space.encoding import subnet_config
from modules.search_space.named import EXTREMES, choose_subnet, find_supernet
from modules.search_space.sampling import sample_subnet
from modules.search_space.superspace import SUPERSPACES
from modules.settings import settings_of
from modules.subnets.evaluate import (
    EvaluationSettings,
    add_confusion,
    add_evaluation_arguments,
    evaluate_all,
    open_supernet,
    prepare,
)
from modules.training.checkpoint import precision
from modules.training.classes import class_names
from modules.training.data import VALID_SIZE
from modules.training.distributed import distributed_job
from modules.zoo import CHECKPOINTS, find_checkpoint


def get_args():
    p = parser(__doc__)
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), help='not needed with a full supernet name')
    p.add_argument('--supernet_choice', required=True, nargs='+', metavar='CHOICE',
                   help='supernets, such as 121122-133333 or spaceevo@vnni')
    p.add_argument('--mode', choices=['acc', 'lat'], default='acc', help='what to evaluate')
    p.add_argument('--subnet_choice', nargs='+', default=[], metavar='SUBNET', help='subnet encodings, max or min')
    p.add_argument('--resume', '--checkpoint_path', dest='resume', default=CHECKPOINTS, metavar='PATH',
                   help='root of the checkpoints, <root>/<supernet>-align0/, or a checkpoint file')
    p.add_argument('--align_sample', action='store_true', help='all blocks of a stage share k, w, e; -align1')
    p.add_argument('--num_samples', type=positive(int), default=1000, help='random subnets of the distribution')
    p.add_argument('--output_path', default='./checkpoints/eval_supernet', help='folder of picture and CSV')
    add_evaluation_arguments(p)
    add_confusion(p)
    p.set_defaults(valid_size=None)
    args = p.parse_args()
    args.held_out, args.valid_size = bool(args.valid_size), VALID_SIZE if args.valid_size is None else args.valid_size
    return args


def main(args):
    supernets = [find_supernet(choice, args.superspace) for choice in args.supernet_choice]
    if args.mode == 'lat':
        for supernet in supernets if is_main_process() else ():         # latencies need one process only
            print_latencies(supernet, args)
        return
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        for supernet in supernets:
            print_accuracy(supernet, args, job)


def print_accuracy(supernet, args, job):
    """Accuracy, size and predicted latency of each chosen subnet, all of them checked before the first is run."""
    predictor, settings = open_predictor(args, supernet.superspace), settings_of(EvaluationSettings, args)
    subnets = {choice: choose_subnet(supernet, choice) for choice in args.subnet_choice or EXTREMES}
    latencies = {name: predictor.predict_subnet(subnet_config(supernet, s)) for name, s in subnets.items()}
    path, kind = find_checkpoint(supernet, args.quant_mode, args.resume, args.align_sample), precision(args.quant_mode)
    model, data = open_supernet(supernet, path, args.quant_mode, args.dataset_path, args.dataset, args.valid_size)
    images = prepare(f'{supernet} in {kind} from {path}', model, data, subnets, settings, job, args.held_out)
    evaluate_all(model, subnets, images, job, latencies, os.path.join(
        args.output_path, str(supernet), f'accuracy_{kind}.csv'), class_names(data), confusion=args.confusion)


def print_latencies(supernet, args):
    """Predicted latencies of the chosen subnets by block, or of random ones."""
    predictor = open_predictor(args, supernet.superspace)
    if args.subnet_choice:
        print_breakdowns(supernet, args.subnet_choice, predictor)
    else:
        draw_distribution(supernet, predictor, args.num_samples, random.Random(args.seed),
                          os.path.join(args.output_path, str(supernet)), args.align_sample)


def print_breakdowns(supernet, choices, predictor):
    """Latency by block of each chosen subnet, all of them checked before the first is shown."""
    subnets = [choose_subnet(supernet, choice, 'stage') for choice in choices]
    tables = [breakdown(supernet, subnet, predictor) for subnet in subnets]
    for subnet, table in zip(subnets, tables):
        print(f'{supernet} on {predictor.platform}: {subnet}', *table, sep='\n', end='\n\n')


def draw_distribution(supernet, predictor, num_samples, rng, folder, align_sample=False):
    """CDF picture and CSV (subnet, ms) of random subnets, with the largest and smallest one's latency marked."""
    marks = {name: predictor.predict_subnet(subnet_config(supernet, pick(supernet)))
             for name, pick in EXTREMES.items()}
    rows = []
    for _ in trange(num_samples, desc='random subnets', leave=False, disable=None):
        subnet = sample_subnet(supernet, rng, align_sample)
        rows.append((str(subnet), predictor.predict_subnet(subnet_config(supernet, subnet))))
    latencies = [ms for _, ms in rows]
    platform = os.path.basename(predictor.platform).removesuffix('.json')
    csv, picture = (os.path.join(folder, f'latency_{platform}{ending}') for ending in ('.csv', '.png'))
    write_csv(csv, ('subnet', 'ms'), [(subnet, f'{ms:.4f}') for subnet, ms in rows])
    draw_cdf(latencies, marks, f'{supernet}, {num_samples} random subnets on {platform}', picture, predictor.unit)
    print(f'{supernet} on {predictor.platform}: {num_samples} random subnets')
    print('  ' + '  '.join(f'{p}%: {ms:.2f} {predictor.unit}' for p, ms in percentiles(latencies)))
    print('  ' + '  '.join(f'{name} subnet: {ms:.2f} {predictor.unit}' for name, ms in marks.items()))
    print(f'  {picture}\n  {csv}')


if __name__ == '__main__':
    run(main, get_args)
