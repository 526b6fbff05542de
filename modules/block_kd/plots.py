"""Pictures of the space search (matplotlib, no display needed)."""
import os

import numpy as np

from ..figures import new_figure, save_figure
from ..latency import unit_of
from .searcher import lut_ids

# one colour a block family, the variants of a family are shades of it
COLOURS = {'MobileNetV1DualBlock': '#cfcfcf', 'MobileNetV1Block': '#cfcfcf',
           'MobileNetV2Block': '#9ecae1', 'MobileNetV2ResBlock': '#9ecae1', 'MobileNetV2K3ResBlock': '#d6e9f5',
           'MobileNetV3Block': '#a1d99b', 'MobileNetV3ResBlock': '#a1d99b', 'MobileNetV3K3ResBlock': '#dbf1d6',
           'ResNetBlock': '#fdbe85', 'ResNetSEBlock': '#fde3cb',
           'FusedMBConvResBlock': '#cab8e6', 'FusedMBConvSEResBlock': '#cab8e6'}
SHORT = {'MobileNetV1DualBlock': 'V1 dual', 'MobileNetV1Block': 'V1', 'MobileNetV2Block': 'V2',
         'MobileNetV2ResBlock': 'V2 res', 'MobileNetV2K3ResBlock': 'V2 res K3', 'MobileNetV3Block': 'V3 SE',
         'MobileNetV3ResBlock': 'V3 res SE', 'MobileNetV3K3ResBlock': 'V3 res SE K3', 'ResNetBlock': 'ResNet',
         'ResNetSEBlock': 'ResNet SE', 'FusedMBConvResBlock': 'Fused res', 'FusedMBConvSEResBlock': 'Fused res SE'}


def plot_search(path, scores, population_size, title):
    """Best score so far, and the mean score of the population alive, over the number of scored spaces."""
    scores = np.asarray(scores, float)
    sums = np.concatenate([[0], np.cumsum(scores)])
    stop = np.arange(1, len(scores) + 1)
    start = np.maximum(0, stop - population_size)
    figure, axis = new_figure(figsize=(8, 4.5))
    axis.plot(stop, scores, '.', ms=2, color='#bbbbbb', label='each space')
    axis.plot(stop, (sums[stop] - sums[start]) / (stop - start), color='#1f77b4', label='mean of the population')
    axis.plot(stop, np.maximum.accumulate(scores), color='#d62728', label='best so far')
    axis.axvline(min(population_size, len(scores)), color='black', lw=0.8, ls=':')
    bottom = float(np.quantile(scores, 0.03))           # spaces with next to none under the constraint are cut off
    axis.annotate(' end of the first population', (min(population_size, len(scores)), bottom), fontsize=8)
    axis.set(xlabel='spaces scored', ylabel='score', title=title, ylim=(bottom, None))
    axis.legend(loc='lower right')
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def plot_cdfs(path, latency, loss, constraints, tails, title, unit='ms'):
    """Latency and loss CDFs of random subnets of one space, the constraints and what they let through marked.

    latency (in `unit`), loss: (subnets,). tails: score.Tail for each constraint.
    """
    figure, (left, right) = new_figure(1, 2, figsize=(12, 4.5))
    share = np.arange(1, len(latency) + 1) / len(latency)
    left.plot(np.sort(latency), share, color='black')
    last = 0.0
    right.plot(np.sort(loss), share, color='black', label='all subnets')
    for i, (constraint, tail) in enumerate(zip(constraints, tails)):
        colour = f'C{i}'
        left.axvline(constraint, color=colour, ls='--', label=f'{constraint:g} {unit}: {tail.p:.2%} of the subnets')
        feasible = np.sort(loss[latency <= constraint])
        if len(feasible):
            last = max(last, feasible[-1])
            right.plot(feasible, np.arange(1, len(feasible) + 1) / len(feasible), color=colour,
                       label=f'at most {constraint:g} {unit}')
            right.axvline(tail.loss, color=colour, ls='--', label=f'mean of the best: {tail.loss:.4f}')
    left.set(xlabel='latency (ms)' if unit == 'ms' else unit, ylabel='share of subnets',
             xlim=(0, max(1.25 * max(constraints), float(np.quantile(latency, 0.9)))))
    right.set(xlabel='NSR loss (sum over stages)', ylabel='share of subnets',
              xlim=(None, float(max(np.quantile(loss, 0.999), last))))
    for axis in (left, right):
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc='upper left')
    figure.suptitle(title)
    save_figure(figure, path)


def plot_spaces(path, supernets, notes, title):
    """A table of spaces: a row each, block type (colour and name) and widths of every searchable stage.

    supernets: Supernets, best first. notes: a line of text for each, shown at its right.
    """
    from matplotlib.patches import Rectangle
    figure, axis = new_figure(figsize=(16.5, 1.2 + 0.62 * len(supernets)))
    used, stages = {}, supernets[0].superspace.searchable_stages
    for row, (supernet, note) in enumerate(zip(supernets, notes)):
        axis.text(-0.08, row, f'{row + 1}.  {supernet.choice.replace("_", "-")}', ha='right', va='center',
                  family='monospace', fontsize=11)
        for column, stage in enumerate(stages):
            name, widths = supernet.block_type(stage).name, supernet.widths(stage)
            used[supernet.block_types[column]] = name
            axis.add_patch(Rectangle((column + 0.02, row - 0.44), 0.96, 0.88, lw=0,
                                            facecolor=COLOURS.get(name, 'white')))
            axis.text(column + 0.5, row - 0.16, SHORT.get(name, name), ha='center', va='center', fontsize=11,
                      weight='bold')
            span = f'{widths[0]}–{widths[-1]}' if len(widths) > 1 else str(widths[0])
            axis.text(column + 0.5, row + 0.22, f'width {span}', ha='center', va='center', fontsize=9.5)
        axis.text(len(stages) + 0.08, row, note, ha='left', va='center', fontsize=10)
    for column, stage in enumerate(stages):
        axis.text(column + 0.5, -0.62, stage, ha='center', va='bottom', fontsize=11)
    axis.set(xlim=(-1.6, len(stages) + 2.6), ylim=(len(supernets) - 0.3, -1.1))
    axis.axis('off')
    handles = [Rectangle((0, 0), 1, 1, facecolor=COLOURS.get(name, 'white'), label=f'{digit}: {name}')
               for digit, name in sorted(used.items())]
    axis.legend(handles=handles, loc='upper center', bbox_to_anchor=(0.5, 0.02), ncols=4, frameon=False)
    axis.set_title(title)
    save_figure(figure, path)


def draw_best(searcher, supernets, folder, rng):
    """top10.png of the best Supernets, cdf.png of the first; rng: numpy Generator that draws its subnets."""
    results = [searcher.evaluate(supernet) for supernet in supernets]
    latency, loss = searcher.tables.draw(lut_ids(supernets[0]), 100_000, rng)
    plot_cdfs(os.path.join(folder, 'cdf.png'), latency, loss, searcher.constraints, results[0].tails,
              f'{supernets[0]}: 100,000 random subnets', unit_of(searcher.platform))
    notes, unit = [], unit_of(searcher.platform)
    for supernet, result in zip(supernets, results):
        low, high = searcher.latency_range(supernet)
        shares = ', '.join(f'{tail.p:.1%}' for tail in result.tails)
        notes.append(f'score {result.score:.5f}\n{shares} feasible; {low:.1f} to {high:.1f} {unit}')
    plot_spaces(os.path.join(folder, 'top10.png'), supernets, notes, f'The best spaces: {searcher.name()}')
