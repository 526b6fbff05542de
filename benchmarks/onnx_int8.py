"""INT8 against fp32 in ONNX Runtime, ours against ONNX Runtime's own static quantiser: a table and a picture.

    taskset -c 1 python benchmarks/onnx_int8.py --output checkpoints/benchmarks/onnx_int8
    taskset -c 1 python benchmarks/onnx_int8.py --networks SEQnet@vnni-A0 SEQnet@pixel4-A0 --runs 30

Of each network, with random weights (latency does not depend on them): fp32; ours, the LSQ+ graph of
modules/deploy/int8_exporter.py, and with weights of 7 bits (--reduce_range); and
onnxruntime.quantization.quantize_static, QDQ, uint8 activations, int8 weights per channel, of convolutions and matrix
products ("ORT conv") and of all operators it knows ("ORT all"). One thread, one image, in turns; medians in ms.
Writes <output>/table.md and <output>/picture.png.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from modules.cli import parser, positive, run
from modules.deploy.baselines import CONVOLUTIONS, quantize_static
from modules.deploy.benchmark import in_turns
from modules.deploy.export import Entry, random_source
from modules.deploy.onnx_models import export_fp32, export_int8
from modules.deploy.quantisation import observe
from modules.deploy.runtimes import ONNX
from modules.errors import UserError
from modules.figures import new_figure, save_figure
from modules.files import write_text
from modules.search_space.named import find_subnet, named_subnets

KINDS = ('fp32', 'ours', '7 bits', 'ORT conv', 'ORT all')


def network_models(name):
    """{kind: ModelProto} of a published network with random weights."""
    entry = Entry(*find_subnet(name))
    fp32 = export_fp32(random_source(entry, quant_mode=False).network)
    int8 = random_source(entry, quant_mode=True)
    batches = [images for images, _ in int8.batches]
    ranges = observe(int8.network, batches)
    return dict(zip(KINDS, (fp32, export_int8(int8.network, ranges),
                            export_int8(int8.network, ranges, reduce_range=True),
                            quantize_static(fp32, batches, CONVOLUTIONS), quantize_static(fp32, batches, None))))


def get_args():
    p = parser(__doc__)
    p.add_argument('--networks', nargs='+', default=list(named_subnets()), help='published networks')
    p.add_argument('--warmup', type=positive(int), default=20, help='untimed runs of each model')
    p.add_argument('--runs', type=positive(int), default=100, help='timed runs of each model')
    p.add_argument('--output', default=os.path.join('checkpoints', 'benchmarks', 'onnx_int8'), help='folder')
    return p.parse_args()


def main(args):
    lines = ['| network | fp32 (ms) | ours int8 (ms) | ORT conv (ms) | ORT all (ms) | ours / ORT conv '
             '| ours / best ORT | speed-up | ours, 7 bits (ms) | speed-up |', '|' + '---|' * 10]
    speed_ups = {}
    for name in args.networks:
        if name not in named_subnets():
            raise UserError(f'--networks {name}: published are {" ".join(named_subnets())}')
    print('\n'.join(lines), flush=True)
    for name in args.networks:
        calls = {kind: ONNX.open(model).invoke for kind, model in network_models(name).items()}
        times = {kind: latency.median for kind, latency in in_turns(calls, args.warmup, args.runs).items()}
        fp32, ours, seven, conv, every = (times[kind] for kind in KINDS)
        speed_ups[name] = {kind: fp32 / times[kind] for kind in KINDS[1:]}
        lines.append(f'| {name} | {fp32:.2f} | {ours:.2f} | {conv:.2f} | {every:.2f} | {ours / conv:.3f} '
                     f'| {ours / min(conv, every):.3f} | {fp32 / ours:.2f} | {seven:.2f} | {fp32 / seven:.2f} |')
        print(lines[-1], flush=True)
    write_text(os.path.join(args.output, 'table.md'), '\n'.join(lines) + '\n')
    draw(speed_ups, os.path.join(args.output, 'picture.png'))


def draw(speed_ups, path):
    """Bars of the speed-up over fp32 by network and kind."""
    figure, axes = new_figure(figsize=(1.5 + 1.1 * len(speed_ups), 4), layout='constrained')
    for i, kind in enumerate(KINDS[1:]):
        axes.bar(np.arange(len(speed_ups)) + 0.21 * (i - 1.5), [row[kind] for row in speed_ups.values()], 0.19,
                 label=kind)
    axes.set_xticks(range(len(speed_ups)), [name.removeprefix('SEQnet@') for name in speed_ups], rotation=30)
    axes.set_ylabel('speed-up over fp32')
    axes.axhline(1, color='grey', linewidth=0.8)
    axes.legend(ncols=4, loc='lower center', bbox_to_anchor=(0.5, 1))
    save_figure(figure, path)
    print(path)


if __name__ == '__main__':
    run(main, get_args)
