"""Do two latency platforms rank blocks and networks alike? Rank correlations, and where they differ most.

    python benchmarks/compare_platforms.py --platforms epyc_zen3_ort1.32_1t onnx_lut --superspace onnxw
    python benchmarks/compare_platforms.py --platforms epyc_zen3_ort1.32_1t onnx_lut --superspace onnxw \\
        --published ../shared/reference/latency/onnx_lut_blocks.json.gz

Spearman's correlation by block type and of --subnets random subnets of random supernets, the median ratio of the first
platform's ms to the second's, and the shares of blocks that are within 5 and 10 % of the second's times that ratio.
--published: a gzipped block table of measurements (nn-Meter's format), of whose blocks both predictions are compared
with the figures. Writes <output>.md and <output>.png.
"""
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from scipy.stats import spearmanr

from modules.cli import SEED, parser, positive, run
from modules.figures import new_figure, save_figure
from modules.files import write_text
from modules.latency import LatencyPredictor
from modules.latency.candidates import random_network, space_blocks
from modules.latency.tables import read_table
from modules.latency.validation import CLOSE, WITHIN, Errors


def get_args():
    p = parser(__doc__)
    p.add_argument('--platforms', nargs=2, required=True, help='platforms, or block tables *.json')
    p.add_argument('--superspace', default='onnxw', help='hyperspace')
    p.add_argument('--published', metavar='FILE', help='gzipped block table of measurements')
    p.add_argument('--subnets', type=positive(int), default=1000, help='random subnets')
    p.add_argument('--seed', type=SEED, default=0, help='seed of the subnets')
    p.add_argument('--output', default=os.path.join('checkpoints', 'benchmarks', 'compare_platforms'),
                   help='path of the results without ending')
    return p.parse_args()


def by_type(blocks):
    """{block type: indices} of Blocks, those of all first."""
    groups = {'all blocks': range(len(blocks))}
    for i, block in enumerate(blocks):
        groups.setdefault(block.name, []).append(i)
    return {name: np.array(indices) for name, indices in groups.items() if len(indices) > 2}


def rank(a, b):
    return spearmanr(a, b).statistic


def near(predicted, ms):
    """Cells: shares of predictions within 5 and 10 % of ms."""
    errors = Errors(zip(predicted, ms))
    return ' | '.join(f'{errors.within(share):.1%}'.replace('%', ' %') for share in (CLOSE, WITHIN))


def compared(name, a, b):
    """A line of the first table: ms of the two platforms."""
    ratio = np.median(a / b)
    return f'| {name} | {len(a)} | {rank(a, b):.3f} | {ratio:.2f} | {near(a, ratio * b)} |'


def main(args):
    first, second = map(LatencyPredictor, args.platforms)
    blocks = space_blocks(args.superspace)
    a, b = (np.array(platform.predict_blocks(blocks)) for platform in (first, second))
    lines = [f'{args.superspace}: {args.platforms[0]} and {args.platforms[1]}', '',
             '| blocks | number | Spearman | median ratio | within ±5 % of the ratio | within ±10 % |',
             '|---|---|---|---|---|---|']
    lines += [compared(name, a[i], b[i]) for name, i in by_type(blocks).items()]
    rng = random.Random(args.seed)
    nets = [random_network(args.superspace, rng) for _ in range(args.subnets)]
    x, y = (np.array([sum(platform.predict_blocks(net)) for net in nets]) for platform in (first, second))
    lines.append(compared('random subnets', x, y))
    if args.published:
        measured, ms = zip(*read_table(args.published).items())
        ms, predicted = np.array(ms), [np.array(platform.predict_blocks(measured)) for platform in (first, second)]
        lines += ['', f'Spearman with the {len(ms)} published measurements, and shares within 5 and 10 % of them:', '',
                  '| blocks | number | ' + ' | '.join(f'{name} | ±5 % | ±10 %' for name in args.platforms) + ' |',
                  '|---' * 8 + '|']
        lines += [f'| {name} | {len(i)} | ' + ' | '.join(f'{rank(p[i], ms[i]):.3f} | {near(p[i], ms[i])}'
                                                        for p in predicted) + ' |'
                  for name, i in by_type(measured).items()]
    print('\n'.join(lines))
    write_text(args.output + '.md', '\n'.join(lines) + '\n')
    draw(args, blocks, a, b, x, y)


def draw(args, blocks, a, b, x, y):
    """Scatter of the two platforms' ms, blocks by type and subnets."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 5), layout='constrained')
    for name, indices in list(by_type(blocks).items())[1:]:
        some = indices[::-(-len(indices) // 600)]
        left.scatter(b[some], a[some], s=5, alpha=0.5, label=name.removesuffix('Block'))
    right.scatter(y, x, s=8, alpha=0.6)
    for axes, title in ((left, f'blocks of {args.superspace}'), (right, f'{len(x)} random subnets, '
                                                                 f'Spearman {rank(x, y):.3f}')):
        axes.set(xscale='log', yscale='log', xlabel=f'{args.platforms[1]} (ms)', ylabel=f'{args.platforms[0]} (ms)',
                 title=title)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    save_figure(figure, args.output + '.png')


if __name__ == '__main__':
    run(main, get_args)
