"""What a pipeline found: summary.md and summary.html with the table of deployed networks, and pictures."""
import base64
import csv
import itertools
import os
import re
import shlex
from typing import NamedTuple

import numpy as np

from ..deploy.benchmark import processor
from ..errors import UserError
from ..figures import new_figure, pareto_front, save_figure
from ..files import write_text
from ..search_space.encoding import subnet_config
from .steps import BY_HAND, FLOPS, FOUND, LARGEST, SMALLEST, baseline_step

COLOURS = {FOUND: '#d1495b', FLOPS: '#1f6f8b', BY_HAND: '#7b4fa3', LARGEST: '#edae49', SMALLEST: '#66a182'}
READY_MADE = 's^vDP*X'                     # markers of the ready-made networks
STYLE = ('body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}'
         'table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em}code{overflow-wrap:anywhere}')


class Row(NamedTuple):
    """A network that was measured: medians in ms, top-1 in % of `images` test images; network: Deployed or None."""
    what: str
    int8_ms: float
    fp32_ms: float
    top1: float
    images: int
    network: object = None

    @property
    def error(self):
        """Standard error of top1 in points."""
        share = self.top1 / 100
        return 100 * (share * (1 - share) / self.images) ** 0.5


def write_summary(pipeline, steps):
    """Write summary.md, summary.html and the pictures; returns the text. steps: [(Step, seconds)]."""
    rows = read_rows(pipeline)
    _draw_front(pipeline, rows)
    _draw_breakdown(pipeline, [row for row in rows if row.network])
    text = _text(pipeline, steps, rows)
    write_text(pipeline.path('summary.md'), text)
    write_text(pipeline.path('summary.html'), as_html(text, pipeline.folder))
    return text


def read_rows(pipeline):
    """[Row] of what was deployed, what was found first, then the ready-made networks."""
    rows, networks = [], pipeline.deployed()
    with open(pipeline.path('latency.csv'), encoding='utf-8', newline='') as f:
        latencies = {row[0]: row for row in csv.reader(f)}          # of a network measured twice the last one counts
    for network in networks:
        name = '-'.join(network.entry.split(','))
        if name not in latencies:
            raise UserError(f'{pipeline.path("latency.csv")}: lacks {name}')
        with open(pipeline.accuracy_file(network), encoding='utf-8', newline='') as f:
            int8 = next(row for row in csv.DictReader(f) if row['kind'] == 'int8')
        _, fp32_ms, int8_ms, *_ = latencies[name]
        rows.append(Row(network.what, float(int8_ms), float(fp32_ms), float(int8['onnx']), int(int8['images']),
                        network))
    for model in pipeline.settings.baselines:
        what = f'{model}, ready-made, {_weights(pipeline, model)}'
        with open(pipeline.path('baselines', model, 'result.csv'), encoding='utf-8', newline='') as f:
            result = next(csv.DictReader(f))
        rows.append(Row(what, float(result['int8_ms']), float(result['fp32_ms']), float(result['int8_top1']),
                        int(result['images'])))
    return rows


def _types(pipeline):
    types = [block_type.name for stage, (_, block_type, _) in pipeline.hand_space.choices.items()
             if stage in pipeline.hand_space.superspace.searchable_stages]
    return ', '.join(dict.fromkeys(types))


def _weights(pipeline, model):
    pretrained = '--pretrained' in pipeline.settings.flags(baseline_step(model))
    return 'pretrained' if pretrained else 'from random weights'


def _text(pipeline, steps, rows):
    c, d = pipeline.window
    found = rows[0]
    settings = pipeline.settings
    lines = ['# What SpaceEvo found here', '']
    if settings.finds_nothing:
        lines += ['**So few steps that nothing was found: this shows that everything runs, no more.**', '']
    lines += [f'`{found.network.supernet}`, searched for {c - d:.3g} to {c:.3g} ms of INT8 (predicted by '
              f'`{pipeline.platform}`), and in it the network `{found.network.subnet}`:', '', *_stages(found.network),
              '', f'| network | INT8 ms | fp32 ms | fp32 / INT8 | INT8 top-1 of {found.images:,} test images |',
              '|---|---|---|---|---|']
    lines += [f'| {row.what} | {row.int8_ms:.3f} | {row.fp32_ms:.3f} | {row.fp32_ms / row.int8_ms:.2f} | '
              f'{row.top1:.2f} ± {row.error:.2f} % |' for row in rows]
    lines += ['', *(f'- {line}' for line in claims(pipeline, rows)), '',
              '![accuracy over latency](front.png)', '', '![where the latency goes](breakdown.png)', '',
              '## How it was measured', '',
              f'- Device: {processor()}; ONNX Runtime, one thread, one image, medians.'
              + (' INT8 weights have 7 bits (`--reduce_range`): no VNNI here.' if pipeline.narrow else ''),
              f'- Pictures: {pipeline.data.dataset} ({pipeline.data.why}), {pipeline.data.images:,} to train on, '
              f'{pipeline.image_size} pixels and less. ± is the standard error that the number of test images gives; '
              'another seed moves an accuracy by more.',
              f'- Seed {settings.seed}. All subnets were fine-tuned alike.']
    if settings.compare_flops:
        lines.append(f'- FLOPs searched for {pipeline.budget:g} MFLOPs: as many random subnets have less as are '
                     "quicker than the end of the latency window. The first space with subnets on both sides of the "
                     "window's middle was taken.")
    if settings.compare_types:
        lines.append(f'- The space by hand: block types {settings.compare_types} ({_types(pipeline)}), with the width '
                     'windows that the search scores best, trained and searched as the one found.')
    if settings.baselines:
        lines.append("- Ready-made networks: timm, INT8 by ONNX Runtime's own quantiser.")
    lines += ['', '| step | minutes |', '|---|---|',
              *(f'| {step.title} | {seconds / 60:.1f} |' for step, seconds in steps),
              f'| all | {sum(seconds for _, seconds in steps) / 60:.1f} |', '', '## To continue', '', '```',
              *_commands(pipeline, found.network), '```', '', 'Encodings:', '',
              *(f'- {row.what}: `{row.network.supernet}` `{row.network.subnet}`' for row in rows if row.network), '']
    return '\n'.join(lines)


def _stages(network):
    """A table of the space, stage by stage, with what the network takes of it."""
    lines = ['| stage | block type | widths of the space | blocks: width, kernel, expand ratio |', '|---|---|---|---|']
    blocks = subnet_config(network.supernet, network.subnet).stages
    for name, (_, block_type, widths) in network.supernet.choices.items():
        chosen = '; '.join(f'{block.cout}, {block.kernel}' + (f', {block.expand:g}' if block.expand else '')
                           for block in blocks[name])
        lines.append(f'| {name} | {block_type.name} | {" ".join(map(str, widths))} | {chosen} |')
    return lines


def claims(pipeline, rows):
    """Lines that say what the numbers show, whatever it is."""
    found, lines, better, ties = rows[0], [], [], 0
    for row in rows[1:]:
        gain, error = found.top1 - row.top1, (found.error ** 2 + row.error ** 2) ** 0.5
        tie = abs(gain) <= 2 * error
        sure = 'within two standard errors' if tie else 'more than two standard errors'
        lines.append(f'What was found against the {row.what}: {gain:+.2f} ± {error:.2f} points '
                     f'({sure}), at {found.int8_ms / row.int8_ms:.2f} times its INT8 latency.')
        if row.int8_ms < found.int8_ms and gain < 0:
            better.append(f'{row.what} ({sure})' if tie else row.what)
        ties += tie
    if pipeline.settings.compare_flops and pipeline.flops_space == pipeline.found_space:
        lines.append('FLOPs choose the same space here.')
    lines.append(f'Quicker and more accurate than what was found: {", ".join(better) or "none"}.')
    if 0 < ties == len(rows) - 1:
        lines.append(f'{found.images:,} test images are too few to tell what was found from any of the others.')
    return lines


def _commands(pipeline, network):
    """Shell lines that take what was found further."""
    data = shlex.join(map(str, pipeline.data.flags))
    file = shlex.quote(pipeline.finished(network))
    data += ''.join(f' {shlex.quote(word)}' for word in pipeline.plugins)
    return [f'python onnx_tools/eval_onnx.py --network {file} --quant_mode {data}'
            + (' --reduce_range' if pipeline.narrow else ''),
            f'python downstream_cls.py --superspace {pipeline.space} --supernet_choice {network.supernet.choice} '
            f"--subnet_name '{network.subnet}' {' '.join(pipeline.align)} --distill --num_epochs 5 "
            f'--batch_size {pipeline.settings.batch_size} '
            f'--checkpoint_path {shlex.quote(pipeline.path("supernet_training"))} {data}']


def _draw_front(pipeline, rows):
    """Measured accuracy over measured latency, and the searches' Pareto fronts before fine-tuning."""
    figure, axes = new_figure(figsize=(8, 6), layout='constrained')
    fronts = {pipeline.hand_space: BY_HAND, pipeline.flops_space: FLOPS, pipeline.found_space: FOUND}
    for space, what in fronts.items():
        with open(os.path.join(pipeline.results(space), 'scored.csv'), encoding='utf-8', newline='') as f:
            points = [(float(row['ms']), float(row['top1'])) for row in csv.DictReader(f)]
        axes.plot(*zip(*pareto_front(points, tuple)), color=COLOURS[what], linewidth=1, drawstyle='steps-post',
                  alpha=0.6, label=f'{what}: front of the search (predicted ms, held out, before fine-tuning)')
    looks = itertools.cycle(READY_MADE)
    for row in rows:
        colour, marker = (COLOURS[row.what], 'o') if row.network else ('#444444', next(looks))
        axes.errorbar(row.int8_ms, row.top1, yerr=row.error, fmt=marker, markersize=8, capsize=3, color=colour,
                      label=row.what)
    axes.set(xlabel=f'INT8 latency (ms), {processor()}', ylabel='INT8 top-1 on test images (%)', xscale='log')
    axes.grid(alpha=0.3, which='both')
    figure.legend(fontsize=8, loc='outside lower center', ncols=2)
    save_figure(figure, pipeline.path('front.png'))


def _draw_breakdown(pipeline, rows):
    """Predicted latency of each subnet, stacked by stage."""
    configs = [subnet_config(row.network.supernet, row.network.subnet) for row in rows]
    stages = list(dict.fromkeys(stage for config in configs for stage in config.stages))
    shares = np.array([[sum(pipeline.predictor.predict_blocks(config.stages.get(stage, ()))) for stage in stages]
                       for config in configs])
    figure, axes = new_figure(figsize=(8, 3), layout='constrained')
    left = np.zeros(len(rows))
    for j, stage in enumerate(stages):
        axes.barh(range(len(rows)), shares[:, j], left=left, label=stage)
        left += shares[:, j]
    axes.set_yticks(range(len(rows)), [row.what for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel=f'predicted INT8 latency (ms), {pipeline.platform}', title='Where the latency goes')
    axes.legend(fontsize=8)
    save_figure(figure, pipeline.path('breakdown.png'))


def as_html(text, folder):
    """One HTML file that opens anywhere: markdown text with the pictures of `folder` inside it."""
    import markdown

    def inside(match):
        with open(os.path.join(folder, match.group(1)), 'rb') as f:
            return f'src="data:image/png;base64,{base64.b64encode(f.read()).decode()}"'
    body = re.sub(r'src="([^":]+\.png)"', inside, markdown.markdown(text, extensions=['tables', 'fenced_code']))
    return f'<!DOCTYPE html><meta charset="utf-8"><title>SpaceEvo</title><style>{STYLE}</style>\n{body}\n'
