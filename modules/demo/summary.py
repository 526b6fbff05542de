"""What the demo found: summary.md with the table of deployed networks, and its pictures."""
import csv
import os
import random
import shutil

import numpy as np

from ..errors import UserError
from ..files import write_text
from ..latency.report import percentiles
from ..pictures import new_figure, pareto_front, save_figure
from ..search_space.encoding import subnet_config
from ..search_space.sampling import sample_subnet
from .steps import ALIGN, RANDOM

COLOURS = {'found': '#d1495b', 'best of random space': '#1f6f8b', 'random subnet': '#999999',
           'largest subnet': '#edae49', 'smallest subnet': '#66a182'}


def write_summary(demo, steps):
    """Write summary.md and pictures beside it; returns its text."""
    networks = demo.deployed()
    accuracy = _measured(demo.path('accuracy.csv'), networks, 2)[1::2]              # fp32, int8 in turns
    latency = _measured(demo.path('latency.csv'), networks, 1, header=False)
    rows = [(network, float(acc['onnx']), float(acc['torch']), float(acc['agree']), float(ms[1]), float(ms[2]))
            for network, acc, ms in zip(networks, accuracy, latency)]
    _draw_front(demo, rows)
    _draw_breakdown(demo, networks)
    _draw_cdfs(demo)
    for name, source in {'space_search.png': demo.search_folder, 'subnet_search.png':
                         demo.path('search_subnet', f'{demo.found_space}-align1')}.items():
        shutil.copyfile(os.path.join(source, 'search.png'), demo.path(name))
    text = _text(demo, steps, rows)
    write_text(demo.path('summary.md'), text)
    return text


def _measured(path, networks, each, header=True):
    """The last rows of a CSV, `each` of them for each network; UserError where they are of others."""
    with open(path, encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f) if header else csv.reader(f))[-each * len(networks):]
    names = [row['subnet'] if header else row[0].rpartition('-')[2] for row in rows]
    if names != [str(network.subnet) for network in networks for _ in range(each)]:
        raise UserError(f'{path}: not of the networks that the demo deploys')
    return rows


def _text(demo, steps, rows):
    (c, d), lines = demo.window, []
    lines += ['# The demo', '',
              f'Found space: `{demo.found_space}`; drawn at random to compare: {_placed(demo)}. '
              f'Latency window: {c - d:.3g} to {c:.3g} ms of INT8, predicted by `{demo.platform}`.', '',
              '| network | predicted ms | INT8 ms | fp32 ms | speed-up | INT8 top-1 | int8 torch | same answer |',
              '|---|---|---|---|---|---|---|---|']
    for network, top1, torch, agree, fp32_ms, int8_ms in rows:
        lines.append(f'| {network.what} | {demo.predict(*network[1:]):.3f} | {int8_ms:.3f} | {fp32_ms:.3f} | '
                     f'{fp32_ms / int8_ms:.2f} | {top1:.2f} | {torch:.2f} | {agree:.2f} % |')

    def best(kind):
        return max((top1 for network, top1, *_ in rows if network.what.startswith(kind)), default=float('nan'))
    drawn = demo.random_subnets(demo.found_space, RANDOM)           # some of which a search may have found too
    random_ones = [top1 for network, top1, *_ in rows if network.supernet == demo.found_space
                   and network.subnet in drawn] or [float('nan')]
    others = [best(f'best of random space {i},') for i in range(1, len(demo.random_spaces) + 1)]
    lines += ['', 'INT8 ms, fp32 ms, INT8 top-1: of ONNX Runtime here, one thread, one image; test images.', '',
              f'- Searching the **space**: best found network {best("found"):.2f} %, best of a random space '
              f'{", ".join(f"{top1:.2f} %" for top1 in others)}.',
              f'- Searching the **subnet**: best found network {best("found"):.2f} %, random subnets of the same '
              f'space and window {np.mean(random_ones):.2f} %, the best of them {max(random_ones):.2f} %.',
              '']
    lines += [f'![{title}]({name})\n' for title, name in (
        ('accuracy over latency', 'front.png'), ('where the latency goes', 'breakdown.png'),
        ('latencies of the spaces', 'cdf.png'), ('the space search', 'space_search.png'),
        ('the subnet search', 'subnet_search.png'))]
    lines += ['| step | minutes |', '|---|---|']
    lines += [f'| {step.title} | {seconds / 60:.1f} |' for step, seconds in steps]
    lines += [f'| all | {sum(seconds for _, seconds in steps) / 60:.1f} |', '', 'Encodings:', '']
    lines += [f'- {network.what}: `{network.supernet}` `{network.subnet}`' for network, *_ in rows]
    return '\n'.join(lines) + '\n'


def _placed(demo):
    """The random spaces and their places in the space search."""
    places = ((space, *demo.place(space)) for space in demo.random_spaces)
    return ', '.join(f'`{space}` ({f"place {place} of {count} by score" if place else "not scored"})'
                     for space, place, count in places)


def _draw_front(demo, rows):
    """Measured accuracy over measured latency, with the Pareto front."""
    figure, axes = new_figure(figsize=(8, 5), layout='constrained')
    shown = set()
    for network, top1, *_, int8_ms in rows:
        kind = next(kind for kind in COLOURS if network.what.startswith(kind))
        axes.scatter(int8_ms, top1, s=60, color=COLOURS[kind], label=None if kind in shown else kind, zorder=3)
        shown.add(kind)
    front = pareto_front([(int8_ms, top1) for _, top1, *_, int8_ms in rows], tuple)
    axes.plot(*zip(*front), color='#333333', linewidth=1, drawstyle='steps-post', label='Pareto front')
    axes.set(xlabel='measured INT8 latency (ms)', ylabel='INT8 top-1 on test images (%)',
             title='Deployed networks of the demo')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, demo.path('front.png'))


def _draw_breakdown(demo, networks):
    """Predicted latency of each network, stacked by stage."""
    configs = [subnet_config(network.supernet, network.subnet) for network in networks]
    stages = list(dict.fromkeys(block.stage for config in configs for block in config.blocks))
    shares = np.zeros((len(networks), len(stages)))
    for i, config in enumerate(configs):
        for block, ms in zip(config.blocks, demo.predictor.predict_blocks(config.blocks)):
            shares[i, stages.index(block.stage)] += ms
    figure, axes = new_figure(figsize=(8, 4.5), layout='constrained')
    left = np.zeros(len(networks))
    for j, stage in enumerate(stages):
        axes.barh(range(len(networks)), shares[:, j], left=left, label=stage)
        left += shares[:, j]
    axes.set_yticks(range(len(networks)), [network.what for network in networks])
    axes.invert_yaxis()
    axes.set(xlabel='predicted INT8 latency (ms)', title='Where the latency goes')
    axes.legend(fontsize=8)
    save_figure(figure, demo.path('breakdown.png'))


def _draw_cdfs(demo):
    """Distribution of the latencies of random subnets: of the found space and of the random ones."""
    figure, axes = new_figure(figsize=(7, 4.2), layout='constrained')
    for space in demo.spaces:
        rng, found = random.Random(demo.seed), space == demo.found_space
        drawn = [demo.predict(space, sample_subnet(space, rng, ALIGN)) for _ in range(500)]
        axes.ecdf(drawn, color=COLOURS['found' if found else 'best of random space'], linewidth=2 if found else 1,
                  label=f'{"found" if found else "random"}: {space}, median {percentiles(drawn, (50,))[0][1]:.3f} ms')
    c, d = demo.window
    axes.axvspan(c - d, c, color='#edae49', alpha=0.2, label='latency window')
    axes.set(xlabel='predicted INT8 latency (ms)', ylabel='share of subnets at most this slow', title='The spaces')
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right', fontsize=8)
    save_figure(figure, demo.path('cdf.png'))
