"""Time and memory of the space search, and its estimators against the definition, as Markdown tables.

    python benchmarks/space_search.py
    python benchmarks/space_search.py --lut_path ../shared/reference/lut --spaces 40 --seeds 200

Definition: independent draws of 100,000 subnets (`--estimator independent`), its mean over --seeds of them. Only
spaces whose feasible share p is 1e-5 or more are compared (a definition of one draw can say nothing of others).
About 4 minutes on 2 cores. docs/results.md has the figures of a run.
"""
import os
import random
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from modules import cli  # noqa: E402
from modules.block_kd.score import ExactEstimator, IndependentEstimator  # noqa: E402
from modules.block_kd.searcher import BlockKDSearcher, lut_ids  # noqa: E402
from modules.search_space.sampling import sample_supernet  # noqa: E402

SEARCHES = (('onnxw', (10,)), ('mobilew', (15, 20)))
COMPARED = {'onnxw': (8, 10, 15, 20), 'mobilew': (10, 15, 20, 25)}


def full_search(superspace, constraints, lut_path):
    """(wall seconds, peak MiB, best line) of search_block_kd.py as a user runs it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, os.path.join(ROOT, 'search_block_kd.py'), '--superspace', superspace,
                   '--latency_constraint', *map(str, constraints), '--latency_loss_t', '0.08',
                   '--lut_path', lut_path, '--output_dir', folder]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = process.stdout.read().replace('\r', '\n').split('\n')
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit('\n'.join(lines))
        best = [line.partition('] ')[2] for line in lines if '] best ' in line][-1]
        return time.perf_counter() - started, usage.ru_maxrss / 1024, best


def statistics(estimators, supernet):
    """[(mean p, losses of all seeds)] by constraint of one space; draws without a feasible subnet have no loss."""
    draws = [estimator.tails(lut_ids(supernet)) for estimator in estimators]
    return [(np.mean([tails[i].p for tails in draws]), np.array([tails[i].loss for tails in draws if tails[i].p]))
            for i in range(len(draws[0]))]


def compare(superspace, lut_path, num_spaces, num_seeds):
    """Print the rows of the accuracy table of one superspace."""
    constraints = COMPARED[superspace]
    tables = BlockKDSearcher(lut_path, superspace, None, constraints).tables
    rng = random.Random(0)
    supernets = [sample_supernet(superspace, rng) for _ in range(num_spaces)]
    families = {'exact': [ExactEstimator(tables, constraints)],
                'independent': [IndependentEstimator(tables, constraints, seed) for seed in range(num_seeds)]}
    results, seconds = {}, {}
    for name, estimators in families.items():
        for _ in range(2):                                         # the first builds what spaces share
            started = time.process_time()
            for supernet in supernets:
                estimators[0].tails(lut_ids(supernet))
        seconds[name] = (time.process_time() - started) / num_spaces
        results[name] = []
        for supernet in supernets:
            results[name].append(statistics(estimators, supernet))
    for i, constraint in enumerate(constraints):
        for tight in (True, False):
            rows = [row for row in range(num_spaces) if (1e-5 <= results['independent'][row][i][0] < 1e-3) == tight
                    and results['independent'][row][i][0] >= 1e-5]
            if not rows:
                continue
            mean = np.array([results['independent'][row][i][1].mean() for row in rows])
            scatter = {name: np.mean([results[name][row][i][1].std() / results[name][row][i][1].mean()
                                      for row in rows]) for name in families}
            off = {name: np.array([results[name][row][i][1].mean() for row in rows]) / mean - 1 for name in families}
            noise = scatter['independent'] / num_seeds ** 0.5
            print(f'| {superspace} | {constraint} | {"< 0.1 %" if tight else ">= 0.1 %"} | {len(rows)} '
                  f'| {off["exact"].mean():+.3%} | {abs(off["exact"]).max():.3%} '
                  f'| {noise:.3%} | {scatter["independent"]:.3%} |', flush=True)
    return seconds


def get_args():
    parser = cli.parser(__doc__)
    parser.add_argument('--lut_path', default=os.path.join(ROOT, 'data', 'block_lut'), help='folder of the block LUTs')
    parser.add_argument('--spaces', type=cli.positive(int), default=20, help='random spaces to compare')
    parser.add_argument('--seeds', type=cli.positive(int), default=60, help='draws of the definition for each')
    parser.add_argument('--skip_search', action='store_true', help='compare the estimators only')
    parser.add_argument('--skip_compare', action='store_true', help='run the full searches only')
    return parser.parse_args()


def main(args):
    if not args.skip_search:
        print('| space | constraints (ms) | wall (s) | peak memory (MiB) | result |\n|---|---|---|---|---|')
        for superspace, constraints in SEARCHES:
            wall, peak, best = full_search(superspace, constraints, args.lut_path)
            print(f'| {superspace} | {" + ".join(map(str, constraints))} | {wall:.1f} | {peak:.0f} | {best} |',
                  flush=True)
    if not args.skip_compare:
        print('\nL against the definition: mean and largest error over the spaces, the part of it that is the '
              "definition's own noise, scatter between seeds (standard deviation over mean)\n\n"
              '| space | ms | p | spaces | mean | max | noise of the comparison | scatter of the definition |\n'
              '|---|---|---|---|---|---|---|---|')
        seconds = {name: compare(name, args.lut_path, args.spaces, args.seeds) for name in COMPARED}
        print('\n| CPU ms a space (4 constraints) | exact | independent |\n|---|---|---|')
        for name, values in seconds.items():
            print(f'| {name} | ' + ' | '.join(f'{values[key] * 1e3:.1f}' for key in ('exact', 'independent'))
                  + ' |')


if __name__ == '__main__':
    cli.run(main, get_args)
