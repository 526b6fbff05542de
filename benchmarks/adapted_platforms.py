"""How many measurements a new host needs: errors on held-out blocks over the number of blocks that were fitted to.

    python benchmarks/adapted_platforms.py --measurements checkpoints/predictor/my_host/measurements.jsonl

Of a measurements.jsonl of build_predictor.py, --numbers of blocks are drawn --draws times; nets are fitted to them from
nothing, or those of --from_platforms are trained on, as --from_platform of build_predictor.py does. Beside it: the
platform's predictions times a factor of each block type. Errors are of the held-out blocks, each measured alone, means
and standard errors over the draws. Writes <output>.md and <output>.png.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

from modules.cli import SEED, parser, positive, run
from modules.figures import new_figure, save_figure
from modules.files import write_text
from modules.latency.builder import FIT, HELD_OUT, adapted
from modules.latency.profiling import quiet_rows
from modules.latency.regression import Design
from modules.latency.tables import DATA, load_platform
from modules.latency.validation import CLOSE, WITHIN, Errors


def get_args():
    p = parser(__doc__)
    p.add_argument('--measurements', required=True, metavar='FILE', help='file of build_predictor.py')
    p.add_argument('--from_platforms', nargs='+', default=['epyc_zen3_ort1.32_1t', 'onnx_lut'], help='in data/latency')
    p.add_argument('--numbers', nargs='+', type=positive(int), default=[10, 20, 40, 80, 160, 320],
                   help='numbers of blocks that are measured')
    p.add_argument('--draws', type=positive(int), default=5, help='draws of each number')
    p.add_argument('--seed', type=SEED, default=0, help='seed of the draws')
    p.add_argument('--output', default=os.path.join('checkpoints', 'benchmarks', 'adapted_platforms'),
                   help='path of the results without ending')
    return p.parse_args()


def scaled_by_type(blocks, ms, base, held):
    """ms of held-out Blocks: the base's times the median ratio of their type, of all types where none was measured."""
    ratios = ms / base.predict_blocks(blocks)
    types = np.array([block.name for block in blocks])
    factors = {name: np.median(ratios[types == name]) for name in set(types)}
    return base.predict_blocks(held) * [factors.get(block.name, np.median(ratios)) for block in held]


def main(args):
    torch.set_num_threads(1)
    rows = quiet_rows(args.measurements)
    fit, held = ([row for row in rows if row.use == use] for use in (FIT, HELD_OUT))
    held_blocks, held_ms = [row.blocks[0] for row in held], [row.ms for row in held]
    bases = {name: load_platform(os.path.join(DATA, name))[1] for name in args.from_platforms}
    ways = {f'{name}, {way}': (base, way) for name, base in bases.items() for way in ('by type', 'trained on')}
    ways = {'from nothing': (None, 'trained on'), **ways}
    lines = [f'{len(held)} held-out blocks, {args.draws} draws', '',
             '| blocks | way | median error | within ±5 % | within ±10 % |', '|---|---|---|---|---|']
    curves = {way: [] for way in ways}
    for number in args.numbers:
        scores = {way: [] for way in ways}
        for draw in range(args.draws):
            rng = np.random.default_rng((args.seed, draw))
            chosen = [fit[i] for i in rng.permutation(len(fit))[:number]]
            blocks, ms = [row.blocks[0] for row in chosen], np.array([row.ms for row in chosen])
            for way, (base, kind) in ways.items():
                predicted = (scaled_by_type(blocks, ms, base, held_blocks) if kind == 'by type' else Design(
                    [[block] for block in held_blocks]).predict(adapted(blocks, ms, base, draw)))
                errors = Errors(zip(predicted, held_ms))
                scores[way].append((errors.median, errors.within(CLOSE), errors.within(WITHIN)))
        for way, values in scores.items():
            mean, error = np.mean(values, 0), np.std(values, 0, ddof=min(1, args.draws - 1)) / args.draws ** 0.5
            curves[way].append((mean, error))
            lines.append(f'| {number} | {way} | ' + ' | '.join(
                f'{100 * m:.1f} ± {100 * e:.1f} %' for m, e in zip(mean, error)) + ' |')
            print(lines[-1], flush=True)
    write_text(args.output + '.md', '\n'.join(lines) + '\n')
    _draw(args, curves)


def _draw(args, curves):
    """Median error and share within 10 % over the number of blocks."""
    figure, axes = new_figure(1, 2, figsize=(11, 4.5), layout='constrained')
    for panel, column, title in zip(axes, (0, 2), ('median error (%)', 'held-out blocks within ±10 % (%)')):
        for way, points in curves.items():
            mean, error = ([100 * point[i][column] for point in points] for i in (0, 1))
            panel.errorbar(args.numbers, mean, error, marker='o', capsize=3, label=way,
                           linestyle='--' if way.endswith('by type') else '-')
        panel.set(xscale='log', xlabel='blocks that were measured', title=title)
        panel.set_xticks(args.numbers, map(str, args.numbers), minor=False)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, args.output + '.png')


if __name__ == '__main__':
    run(main, get_args)
