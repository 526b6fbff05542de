"""What a measured platform is worth: scores on what was held out, a picture, a report; and putting it in its place."""
import os

import numpy as np
from scipy.stats import spearmanr

from ..errors import UserError
from ..figures import new_figure, save_figure
from ..files import new_folder, write_text
from .candidates import space_blocks
from .predictor import MFLOPS
from .tables import DATA, save_platform

REPORT, PICTURE = 'report.md', 'validation.png'
CLOSE, WITHIN = 0.05, 0.1    # relative errors whose shares are shown
LONGEST = 100               # characters of a name


class Errors:
    """Relative errors of pairs (predicted, measured) in ms."""

    def __init__(self, pairs):
        self.errors = np.array([predicted / measured - 1 for predicted, measured in pairs])

    @property
    def median(self):
        return float(np.median(np.abs(self.errors)))

    @property
    def worst(self):
        return float(np.abs(self.errors).max())

    def within(self, error):
        """Share of the errors that are at most `error`."""
        return float(np.mean(np.abs(self.errors) <= error))


def pairs_of(entries):
    """[(predicted, measured)] of [(name, predicted, measured)]."""
    return [entry[1:] for entry in entries]


def spearman(networks):
    """Rank correlation of [(name, predicted, measured)]."""
    return float(spearmanr(*zip(*pairs_of(networks))).statistic)


def named(networks):
    """The published ones of [(name, predicted, measured)]."""
    return [entry for entry in networks if '@' in entry[0]]


def report_lines(platform, details, disturbed):
    """Lines of the report on a builder.Platform; details: {what: value}; disturbed: share of chunks."""
    counts = ', '.join(f'{len(rows)} {use}' for use, rows in platform.rows.items())
    blocks, networks = Errors(pairs_of(platform.held_out)), Errors(pairs_of(platform.networks))
    lines = [f'# {platform.name}', '', *(f'- {key}: {value}' for key, value in details.items()),
             f'- measured undisturbed: {counts}; {disturbed:.0%} of the chunks were disturbed and left out',
             f'- a block alone becomes one of a network: + {platform.context.rate:.4f} ms per MB of weights (a loop of '
             f'one block keeps them in the caches), {-1000 * platform.context.call:+.2f} µs (its call, beyond an empty '
             'one)',
             '', 'Errors on what was held out, the prediction over the measurement:', '',
             '| what | number | median error | within ±5 % | within ±10 % | largest |', '|---|---|---|---|---|---|',
             _score('blocks', blocks)]
    by_type = {}
    for block, *pair in platform.held_out:
        by_type.setdefault(block.name, []).append(pair)
    lines += [_score(f'– {name}', Errors(pairs)) for name, pairs in sorted(by_type.items())]
    if platform.again:
        lines.append(_score('the same blocks measured twice', Errors(platform.again)))
    rank = spearman(platform.networks)
    lines += [_score('networks', networks), '',
              f'Rank correlation (Spearman) of {len(platform.networks)} networks: {rank:.4f}', '']
    if named(platform.networks):
        lines += ['| network | predicted (ms) | measured (ms) | error |', '|---|---|---|---|']
        lines += [f'| {name} | {predicted:.3f} | {measured:.3f} | {100 * (predicted / measured - 1):+.1f} % |'
                  for name, predicted, measured in sorted(named(platform.networks))]
    return [*lines, '', f'![predicted over measured]({PICTURE})']


def _score(title, errors):
    return (f'| {title} | {len(errors.errors)} | {errors.median:.2%} | {errors.within(CLOSE):.1%} | '
            f'{errors.within(WITHIN):.1%} | {errors.worst:.1%} |'.replace('%', ' %'))


def draw(platform, path):
    """Write the picture of a builder.Platform: predicted over measured, held-out blocks and whole networks."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 5), layout='constrained')
    by_type = {}
    for block, *pair in platform.held_out:
        by_type.setdefault(block.name.removesuffix('Block'), []).append(pair)
    for name, pairs in sorted(by_type.items()):
        left.scatter(*_points(pairs), s=9, alpha=0.6, label=name)
    published = named(platform.networks)
    random = [entry for entry in platform.networks if entry not in published]
    for entries, label, marker in ((random, 'random subnets', 'o'), (published, 'published networks', '*')):
        if entries:
            right.scatter(*_points(pairs_of(entries)), s=60 if marker == '*' else 16, marker=marker, label=label)
    blocks, networks = Errors(pairs_of(platform.held_out)), Errors(pairs_of(platform.networks))
    titles = (f'{len(platform.held_out)} held-out blocks: {blocks.within(CLOSE):.1%} within ±5 %, '
              f'{blocks.within(WITHIN):.1%} within ±10 %',
              f'{len(platform.networks)} networks: Spearman {spearman(platform.networks):.3f}, '
              f'largest error {networks.worst:.1%}')
    for axes, title, entries in zip((left, right), titles, (platform.held_out, platform.networks)):
        ends = np.array([min(min(pair) for pair in pairs_of(entries)), max(max(pair) for pair in pairs_of(entries))])
        axes.plot(ends, ends, color='#444444', linewidth=1)
        axes.fill_between(ends, ends * (1 - WITHIN), ends * (1 + WITHIN), color='#bbbbbb', alpha=0.4, label='±10 %')
        axes.set(xscale='log', yscale='log', xlabel='measured (ms)', ylabel='predicted (ms)', title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(platform.name)
    save_figure(figure, path)


def _points(pairs):
    predicted, measured = zip(*pairs)
    return measured, predicted


def check_name(name, data=DATA, force=False):
    """Path of a platform's folder; UserError for a name that cannot be one, or that there is already."""
    if (not 0 < len(name) <= LONGEST or name.startswith('.') or os.path.basename(name) != name
            or name.endswith('.json') or name == MFLOPS):
        raise UserError(f'{name!r}: a platform is named such as my_host: the name of a folder in {data}')
    folder = os.path.join(data, name)
    if os.path.lexists(folder) and not force:
        raise UserError(f'{folder}: there is such a platform already; --force replaces it')
    return folder


def register(platform, folder, superspaces, lines):
    """Write a builder.Platform: model, predictions of every block of the hyperspaces, picture and report."""
    blocks = space_blocks(*superspaces)
    with new_folder(folder) as temporary:
        save_platform(temporary, platform.model, blocks)
        draw(platform, os.path.join(temporary, PICTURE))
        write_text(os.path.join(temporary, REPORT), '\n'.join(lines) + '\n')
