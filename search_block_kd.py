"""Search the spaces of a hyperspace by their Q-T score, or score given spaces, from block LUTs.

    python search_block_kd.py --superspace onnxw --latency_constraint 10 --platform onnx_lut \\
        --latency_loss_t 0.08 --latency_loss_a 0.01 --lut_path data/block_lut --output_dir checkpoints/block_kd/search
    python search_block_kd.py --superspace onnxw --latency_constraint 15 --supernet_choices 111111_000000 222222

Writes to <output_dir>/<superspace>/c10_t0.08_a0.01/: history.csv (every space as it is scored), top50.csv, search.log,
search.png, cdf.png, top10.png and TensorBoard events; with --supernet_choices only supernet_choices.csv.
A killed search continues with --resume. docs/space_search.md has the method.
"""
import glob
import os
import random
import shlex
from dataclasses import dataclass

import numpy as np

from modules import cli
from modules.block_kd import plots
from modules.block_kd.lut import SHIPPED
from modules.block_kd.searcher import (
    ESTIMATORS,
    BlockKDSearcher,
    describe,
    lut_ids,
    num_spaces,
    search_spaces,
    write_table,
)
from modules.errors import UserError
from modules.history import History
from modules.latency import add_platform_arguments
from modules.latency.predictor import MFLOPS
from modules.search_space.named import find_supernet
from modules.settings import add_settings, deciding, setting, settings_of
from modules.training.log import add_scalars, light_curves, progress, run_log

LOG_EVERY = 500


@dataclass(frozen=True)
class SpaceSearch:
    """How many spaces are searched, and how."""
    num_spaces: int = setting(5000, 'spaces to score', least=1, decides=False)
    population_size: int = setting(500, 'spaces alive at a time', least=1)
    parent_sample_size: int = setting(125, 'random spaces whose best is the next parent', least=1)
    seed: int = setting(0, 'seed of the search and of draws', most=2 ** 32 - 1)
    resume: bool = setting(False, 'continue with the history in the output directory', decides=False)


def get_args():
    parser = cli.parser(__doc__)
    parser.add_argument('--superspace', required=True, help='mobilew, onnxw, …')
    parser.add_argument('--latency_constraint', type=cli.positive(float), nargs='+', required=True,
                        help='latency constraints in ms (of --platform mflops: MFLOPs); scores under several add up')
    add_platform_arguments(parser)
    parser.add_argument('--latency_loss_t', type=cli.positive(float), default=0.1, help='t of max(1, (t/p)^a)')
    parser.add_argument('--latency_loss_a', type=cli.positive(float), default=0.01, help='a of max(1, (t/p)^a)')
    parser.add_argument('--lut_path', default=SHIPPED,
                        help='folder that holds <superspace>/stage*_*_*.csv[.gz]')
    parser.add_argument('--output_dir', default='checkpoints/block_kd/search', help='where results are written')
    parser.add_argument('--supernet_choices', nargs='+', metavar='CHOICE',
                        help='score these spaces only, e.g. 111111_000000 or spaceevo@vnni')
    parser.add_argument('--estimator', choices=list(ESTIMATORS), default='exact',
                        help='exact: expectation of the score without drawing; independent: 100,000 draws for '
                             'every space, as published (slow)')
    add_settings(parser, SpaceSearch)
    cli.add_local_rank(parser)
    return parser.parse_args()


def score_choices(searcher, supernets, folder):
    """--supernet_choices: score the given Supernets, print them and write supernet_choices.csv."""
    numbers = [searcher.evaluate(supernet).numbers() for supernet in supernets]
    path = os.path.join(folder, 'supernet_choices.csv')
    write_table(path, searcher, supernets, numbers)
    for supernet, values in zip(supernets, numbers):
        print(f'{supernet}  ' + '  '.join(f'{name} {value:.5g}' for name, value in zip(searcher.columns(), values)))
    print(path)


def search(searcher, folder, sizes, plugins=()):
    """The space search; writes everything named in the module's docstring. sizes: SpaceSearch."""
    total, population_size = min(sizes.num_spaces, num_spaces(searcher.superspace)), sizes.population_size
    settings = searcher.settings | deciding(sizes)
    found, scores, best = [], [], -1.0
    with History(folder, searcher.columns(), settings, sizes.resume, searcher.check_entry) as history, \
            progress(total, 'spaces') as bar, \
            run_log(os.path.join(folder, 'search.log'), sizes.resume, show=bar.write) as say:
        known = len(history)
        if not known:                   # nothing of an older search stays beside the new one
            for name in ('events.out.tfevents.*', 'top50.csv', '*.png'):
                for path in glob.glob(os.path.join(glob.escape(folder), name)):
                    os.remove(path)
        events = light_curves(folder)

        say(f'{searcher.superspace.name}: {total} spaces, {known} of them scored before; {settings}')
        for supernet, numbers in search_spaces(searcher, history, random.Random(sizes.seed), total, population_size,
                                               sizes.parent_sample_size):
            found.append((supernet, numbers))
            scores.append(numbers[0])
            best, count = max(best, numbers[0]), len(scores)
            bar.update()
            if count % 50 == 0 or count == total:
                mean = float(np.mean(scores[-population_size:]))
                bar.set_postfix(best=f'{best:.5f}', mean=f'{mean:.5f}', refresh=False)
                if count > known:
                    add_scalars(events, count, {'score/best': best, 'score/mean': mean})
                if count % LOG_EVERY == 0 or count == total:
                    say(f'{count:6d} spaces  best {best:.6f}  mean of the population {mean:.6f}')
        events.close()
        found.sort(key=lambda entry: -entry[1][0])
        ranked = [supernet for supernet, _ in found[:50]]
        write_table(os.path.join(folder, 'top50.csv'), searcher, ranked, [numbers for _, numbers in found[:50]])
        plots.plot_search(os.path.join(folder, 'search.png'), scores, population_size,
                          f'Space search: {searcher.name()}')
        plots.draw_best(searcher, ranked[:10], folder, np.random.default_rng(sizes.seed))
        say(f'best {ranked[0]}  score {best:.6f}')
    if best <= 0:
        raise UserError(f'no subnet of any of the {len(found)} spaces meets {searcher.name()}; results: {folder}')
    files = [os.path.join(folder, name) for name in ('top10.png', 'cdf.png', 'search.png', 'top50.csv')]
    print('\n'.join(['', f'The best space of {len(found)}: {ranked[0]}, score {best:.5f}', *describe(ranked[0]),
                     'Pictures, tables and TensorBoard log:',
                     *(f'  {file}' for file in files),
                     'Next: look at its latencies, and train it as a supernet (from block KD: --init_block_kd):',
                     *next_commands(ranked[0], searcher.latency.predictor.platform, plugins)]))


def next_commands(supernet, platform, plugins=()):
    """Shell lines that continue with a space; plugins: files of --plugin."""
    flags = ''.join(f' --plugin {shlex.quote(path)}' for path in plugins or ())
    flags += f' --superspace {supernet.superspace.name} --supernet_choice {supernet.choice}'
    where = '' if platform == MFLOPS else f' --platform {shlex.quote(platform)}'
    return [f'  python eval_supernet.py{flags} --mode lat{where}',
            f'  python train_supernet.py --config-file supernet_training_configs/train.yaml{flags} '
            '--dataset_path dataset --resume']


def main(args):
    if not cli.is_main_process():               # the search needs one process only
        return
    supernets = {str(s): s for s in (find_supernet(c, args.superspace) for c in args.supernet_choices or [])}
    wanted = sorted({lut_id for supernet in supernets.values() for lut_id in lut_ids(supernet)}) or None
    searcher = BlockKDSearcher(args.lut_path, args.superspace, args.platform, args.latency_constraint,
                               args.latency_loss_t, args.latency_loss_a, args.estimator, args.seed, wanted,
                               args.trust_pickles)
    constraints = '+'.join(f'{constraint:g}' for constraint in args.latency_constraint)
    folder = os.path.join(args.output_dir, args.superspace,
                          f'c{constraints}_t{args.latency_loss_t:g}_a{args.latency_loss_a:g}')
    if supernets:
        score_choices(searcher, list(supernets.values()), folder)
    else:
        search(searcher, folder, settings_of(SpaceSearch, args), args.plugin)


if __name__ == '__main__':
    cli.run(main, get_args)
