"""Does the space search find better spaces? Supernets of the best space and of random ones, trained alike.

    python benchmarks/demo_spaces.py --search checkpoints/demo/block_kd/search/demo/c0.201_t0.1_a0.01
    python benchmarks/demo_spaces.py --search … --spaces 8 --steps 1120
    python benchmarks/demo_spaces.py --search … --steps 150 --init_block_kd checkpoints/demo/block_kd

After a demo (its search and its platform are needed; with --init_block_kd also a stem, by train_block_kd.py). Each
space's supernet is trained in fp32 by the demo's recipe, or from the blocks of --init_block_kd by block_kd_short.yaml,
for --steps steps; then --subnets random subnets whose predicted latency is in the window up to the search's constraint,
the largest and the smallest subnet are evaluated on held-out images. Prints a table and how well the search's scores
rank the spaces. A process a core; a run that was stopped continues.
"""
import functools
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.supernet_start import recipe_of, trained
from modules import ROOT, usable_cores
from modules.cli import SEED, parser, positive, run
from modules.errors import UserError
from modules.history import read_history
from modules.latency import LatencyPredictor
from modules.search_space.encoding import parse_supernet, subnet_config
from modules.search_space.sampling import max_subnet, min_subnet, sample_subnet
from modules.training.data import calibration_batches, eval_loader
from modules.training.distributed import Job
from modules.training.evaluate import DecodedImages, evaluate_subnet
from modules.training.sources import plain_name

WIDTH = 0.15                            # of the window, as in the demo
DRAWS = 20000
BEST = 4


def get_args():
    p = parser(__doc__)
    p.add_argument('--search', required=True, help='folder of a space search of the demo')
    p.add_argument('--spaces', type=positive(int), default=8, help='random spaces beside the best one')
    p.add_argument('--steps', type=positive(int), default=560, help='steps of training, 32 images each')
    p.add_argument('--subnets', type=positive(int), default=24, help='random subnets of each space')
    p.add_argument('--images', type=positive(int), default=1500, help='held-out images')
    p.add_argument('--init_block_kd', metavar='FOLDER', help='blocks to start from; default: random weights')
    p.add_argument('--dataset', default='fashion-mnist', help='data set of train_supernet.py')
    p.add_argument('--dataset_path', default=os.path.join(ROOT, 'dataset'), help='folder of the data')
    p.add_argument('--seed', type=SEED, default=0, help='seed of the spaces and subnets')
    p.add_argument('--output', default=os.path.join('checkpoints', 'benchmarks', 'demo_spaces'), help='checkpoints')
    return p.parse_args()


def scored_spaces(folder):
    """([(Supernet, score)] best first, latency constraint in ms, LatencyPredictor) of a space search."""
    settings, rows = read_history(folder)
    rows = [(parse_supernet(row['encoding']), float(row['score'])) for row in rows]
    if settings['superspace'] != 'demo' or len(settings['latency_constraint']) != 1:
        raise UserError(f'--search {folder}: expected a search of the demo space under one latency constraint')
    return (sorted(rows, key=lambda row: -row[1]), settings['latency_constraint'][0],
            LatencyPredictor(settings['platform']))


def window_subnets(supernet, predictor, constraint, count, seed):
    """Up to `count` random subnets with a predicted latency in the window, all blocks of a stage alike."""
    rng, found = random.Random(f'{seed} {supernet}'), {}
    for _ in range(DRAWS):
        subnet = sample_subnet(supernet, rng, align=True)
        if (1 - WIDTH) * constraint <= predictor.predict_subnet(subnet_config(supernet, subnet)) <= constraint:
            found[subnet] = None
        if len(found) == count:
            break
    return list(found)


def measure(supernet, constraint, predictor, args):
    """(top-1 of the subnets in the window, best first, of the largest, of the smallest) of a space, in percent."""
    start = 'block_kd' if args.init_block_kd else 'scratch'
    folder = os.path.join(args.output, f'{plain_name(args.dataset)}-{start}-{args.steps}', str(supernet))
    model, data = trained(supernet, recipe_of(args.init_block_kd, max_steps=args.steps), folder, args.dataset,
                          args.dataset_path, args.init_block_kd)
    calibration = DecodedImages(calibration_batches(data.train, 64, 8, args.seed))
    valid = DecodedImages(eval_loader(data.valid, 64, limit_images=args.images))

    def top1(subnet):
        return evaluate_subnet(model, subnet, calibration, valid, Job()).top1
    subnets = window_subnets(supernet, predictor, constraint, args.subnets, args.seed)
    return sorted(map(top1, subnets), reverse=True), top1(max_subnet(supernet)), top1(min_subnet(supernet))


def main(args):
    scored, constraint, predictor = scored_spaces(args.search)
    rest = [place for place in range(1, len(scored))
            if window_subnets(scored[place][0], predictor, constraint, 1, args.seed)]
    if len(rest) < args.spaces:
        raise UserError(f'--spaces {args.spaces}: only {len(rest)} others have subnets of {constraint} ms')
    places = [0, *sorted(random.Random(args.seed).sample(rest, args.spaces))]
    with ProcessPoolExecutor(usable_cores(), multiprocessing.get_context('spawn'), torch.set_num_threads, (1,)) as pool:
        results = list(pool.map(functools.partial(measure, constraint=constraint, predictor=predictor, args=args),
                                [scored[place][0] for place in places]))
    columns = {f'best {BEST}': [np.mean(window[:BEST]) for window, *_ in results],
               'mean': [np.mean(window) for window, *_ in results],
               'largest': [largest for _, largest, _ in results], 'smallest': [smallest for *_, smallest in results]}
    print(f'\nwindow {(1 - WIDTH) * constraint:.3g} to {constraint:g} ms, {args.steps} steps\n')
    print(f'| place of {len(scored)} | space | score | subnets | ' + ' | '.join(columns) + ' |')
    print('|---' * (4 + len(columns)) + '|')
    for i, place in enumerate(places):
        supernet, score = scored[place]
        print(f'| {place + 1} | {supernet.choice} | {score:.4f} | {len(results[i][0])} | '
              + ' | '.join(f'{values[i]:.2f}' for values in columns.values()) + ' |')
    print('| | mean of the random ones | | | '
          + ' | '.join(f'{np.mean(values[1:]):.2f}' for values in columns.values()) + ' |')
    print('| | Spearman with the score | | | '
          + ' | '.join(f'{spearmanr([scored[place][1] for place in places], values).statistic:.2f}'
                       for values in columns.values()) + ' |')


if __name__ == '__main__':
    run(main, get_args)
