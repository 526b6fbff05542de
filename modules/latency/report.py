"""What a person wants to see of predicted latencies: a network's breakdown, a space's distribution."""
import numpy as np

from ..figures import new_figure, save_figure
from ..modeling.complexity import block_complexity
from ..search_space.encoding import subnet_config


def breakdown(supernet, subnet, predictor):
    """Lines of a table: predicted ms, share, MFLOPs and Mparams of every block of a subnet, and their sums."""
    config = subnet_config(supernet, subnet)
    total = predictor.predict_subnet(config)
    lines = [f'{"stage":<12} {"block":<22} {"input":>14} {"out":>5} {"k":>2} {"e":>4} {"s":>2}'
             f' {"ms":>8} {"%":>5} {"MFLOPs":>8} {"Mparams":>8}']
    sums = [0, 0]
    for stage, block in ((stage, block) for stage, blocks in config.stages.items() for block in blocks):
        ms, = predictor.predict_blocks([block])
        counts = [n / 1e6 for n in block_complexity(block)]
        sums = [a + b for a, b in zip(sums, counts)]
        shape = f'{block.cin}x{block.hw}x{block.hw}'
        e = '-' if block.expand is None else block.expand
        lines.append(f'{stage:<12} {block.name:<22} {shape:>14} {block.cout:>5} {block.kernel:>2} {e:>4}'
                     f' {block.stride:>2} {ms:8.3f} {100 * ms / total:5.1f} {counts[0]:8.2f} {counts[1]:8.3f}')
    lines.append(f'{"total":<67} {total:8.3f} {100:5.1f} {sums[0]:8.2f} {sums[1]:8.3f}')
    return lines


def percentiles(latencies, points=(0, 5, 25, 50, 75, 95, 100)):
    """[(percentile, ms), …] as plain floats."""
    return [(p, float(v)) for p, v in zip(points, np.percentile(latencies, points))]


def draw_cdf(latencies, marks, title, path, unit='ms'):
    """Write the picture of the distribution of `latencies`, in `unit`; marks: {label: latency}, vertical lines."""
    figure, axes = new_figure(figsize=(7, 4.2), layout='constrained')
    axes.ecdf(latencies, color='#1f6f8b', linewidth=2)
    for (label, ms), colour in zip(marks.items(), ('#666666', '#d1495b', '#edae49', '#00798c', '#30638e') * 20):
        axes.axvline(ms, linestyle='--', color=colour, linewidth=1.2, label=f'{label}: {ms:.2f} {unit}')
    axes.set(xlabel='predicted INT8 latency (ms)' if unit == 'ms' else unit,
             ylabel='share of subnets at most this slow', title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right', fontsize=8)
    save_figure(figure, path)
