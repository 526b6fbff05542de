"""Evaluate a supernet and its subnets.

    python eval_supernet.py --superspace onnxw --supernet_choice 121122-133333 --mode lat \\
        --subnet_choice <subnet1> <subnet2>

--mode lat predicts INT8 latencies: with --subnet_choice a breakdown by block of each subnet (an encoding, max or
min), without it the distribution of random subnets, with its picture and a CSV under --output_path.
"""
import os
import random

from tqdm import trange

from modules.cli import add_local_rank, is_main_process, parser, positive, run
from modules.files import write_text
from modules.latency import LatencyPredictor
from modules.latency.report import breakdown, draw_cdf, percentiles
from modules.search_space.encoding import subnet_config
from modules.search_space.named import find_supernet
from modules.search_space.sampling import max_subnet, min_subnet, sample_subnet
from modules.search_space.superspace import SUPERSPACES

EXTREMES = {'max': max_subnet, 'min': min_subnet}


def get_args():
    p = parser(__doc__)
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), help='not needed with a full supernet name')
    p.add_argument('--supernet_choice', required=True, help='supernet, such as 121122-133333 or spaceevo@vnni')
    p.add_argument('--mode', choices=['lat'], default='lat', help='what to evaluate')
    p.add_argument('--subnet_choice', nargs='+', default=[], metavar='SUBNET', help='subnet encodings, max or min')
    p.add_argument('--platform', help="latency platform, or a block table *.json; default: the superspace's")
    p.add_argument('--fallback', action='store_true', help='predict the blocks that a block table lacks')
    p.add_argument('--trust_pickles', action='store_true', help="open nn-Meter's pickles, which are code")
    p.add_argument('--num_samples', type=positive(int), default=1000, help='random subnets of the distribution')
    p.add_argument('--seed', type=int, default=0, help='of the random subnets')
    p.add_argument('--output_path', default='./checkpoints/eval_supernet', help='folder of picture and CSV')
    add_local_rank(p)
    return p.parse_args()


def main(args):
    if not is_main_process():                   # latencies need one process only
        return
    supernet = find_supernet(args.supernet_choice, args.superspace)
    platform = args.platform or supernet.superspace.platform
    predictor = LatencyPredictor(platform, args.fallback, args.trust_pickles)
    if args.subnet_choice:
        print_breakdowns(supernet, args.subnet_choice, predictor)
    else:
        folder = os.path.join(args.output_path, str(supernet))
        draw_distribution(supernet, predictor, args.num_samples, random.Random(args.seed), folder)


def print_breakdowns(supernet, choices, predictor):
    """Latency by block of each chosen subnet, all of them checked before the first is shown."""
    subnets = [EXTREMES[choice](supernet) if choice in EXTREMES else choice for choice in choices]
    tables = [breakdown(supernet, subnet, predictor) for subnet in subnets]
    for subnet, table in zip(subnets, tables):
        print(f'{supernet} on {predictor.platform}: {subnet}', *table, sep='\n', end='\n\n')


def draw_distribution(supernet, predictor, num_samples, rng, folder):
    """CDF picture and CSV (subnet, ms) of random subnets, with the largest and smallest one's latency marked."""
    marks = {name: predictor.predict_subnet(subnet_config(supernet, pick(supernet)))
             for name, pick in EXTREMES.items()}
    rows = []
    for _ in trange(num_samples, desc='random subnets', leave=False, disable=None):
        subnet = sample_subnet(supernet, rng)
        rows.append((str(subnet), predictor.predict_subnet(subnet_config(supernet, subnet))))
    latencies = [ms for _, ms in rows]
    platform = os.path.splitext(os.path.basename(predictor.platform))[0]
    csv, picture = (os.path.join(folder, f'latency_{platform}{ending}') for ending in ('.csv', '.png'))
    write_text(csv, 'subnet,ms\n' + ''.join(f'{subnet},{ms:.4f}\n' for subnet, ms in rows))
    draw_cdf(latencies, marks, f'{supernet}, {num_samples} random subnets on {platform}', picture)
    print(f'{supernet} on {predictor.platform}: {num_samples} random subnets')
    print('  ' + '  '.join(f'{p}%: {ms:.2f} ms' for p, ms in percentiles(latencies)))
    print('  ' + '  '.join(f'{name} subnet: {ms:.2f} ms' for name, ms in marks.items()))
    print(f'  {picture}\n  {csv}')


if __name__ == '__main__':
    run(main, get_args)
