"""INT8 latency of the SEQnets beside ready-made networks on this host: is a searched network better than what you have?

    python onnx_tools/compare_baselines.py --reduce_range                 # x86 without VNNI
    python onnx_tools/compare_baselines.py --runtimes onnxruntime openvino --platform epyc_zen3_ort1.32_1t

Ready-made networks of timm become INT8 by ONNX Runtime's static quantiser (of convolutions and matrix products, or of
every operator it knows, whichever takes less time here), SEQnets by our exporter; all with random weights, on which
latency does not depend. One thread, one image, medians, all models of a row in turns. The last column is our exporter
against that quantiser on the same SEQnet, each with the runtime that is better for it. Accuracies are published float
ones, where there is one (PUBLISHED below has the sources); those of SEQnets stay empty until someone has checkpoints.
--platform: what that platform predicts for the SEQnets, beside. Writes baselines.csv, table.md and picture.png.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from modules.cli import parser, positive, run
from modules.deploy.baselines import CONVOLUTIONS, export_ready_made, quantize_static, ready_made
from modules.deploy.benchmark import in_turns, processor
from modules.deploy.export import Entry, add_reduce_range, random_source
from modules.deploy.onnx_models import export_fp32, export_int8
from modules.deploy.quantisation import observe
from modules.deploy.runtimes import ONNX, ONNX_RUNTIMES
from modules.errors import UserError
from modules.figures import new_figure, save_figure
from modules.files import write_csv, write_text
from modules.latency import LatencyPredictor
from modules.optional import need
from modules.search_space.encoding import subnet_config
from modules.search_space.named import find_subnet, named_subnets
from modules.training.data import seed_of

# {timm's name: (pixels, published ImageNet top-1 in %)}: of torchvision's first weights (its Weights.meta) for ResNets,
# MobileNetV2 and V3; of the authors' tables for EfficientNet-lite0 (TensorFlow's repository) and MobileNetV4 (paper)
PUBLISHED = {'mobilenetv2_100': (224, 71.88), 'mobilenetv3_small_100': (224, 67.67),
             'mobilenetv3_large_100': (224, 74.04), 'mobilenetv4_conv_small': (224, 73.8),
             'tf_efficientnet_lite0': (224, 75.1), 'resnet18': (224, 69.76), 'resnet50': (224, 76.13)}
IMAGES = 8                              # of noise, for the ranges of the static quantiser
QUANTISED = CONVOLUTIONS, None          # which operators that quantiser is given


def get_args():
    p = parser(__doc__)
    p.add_argument('--models', nargs='*', default=list(PUBLISHED), help='ready-made networks: names of timm')
    p.add_argument('--networks', nargs='*', default=list(named_subnets()), help='published SEQnets')
    p.add_argument('--runtimes', nargs='+', choices=list(ONNX_RUNTIMES), default=['onnxruntime'], help='what runs them')
    p.add_argument('--platform', help='latency platform whose predictions are shown beside')
    p.add_argument('--warmup', type=positive(int), default=20, help='untimed runs of each model')
    p.add_argument('--runs', type=positive(int), default=60, help='timed runs of each model')
    p.add_argument('--output', default=os.path.join('checkpoints', 'compare_baselines'), help='folder of the table')
    add_reduce_range(p)
    return p.parse_args()


def main(args):
    for package in ONNX.packages:
        need(package)
    for name in args.networks:
        if name not in named_subnets():
            raise UserError(f'--networks {name}: published are {" ".join(named_subnets())}')
    predictor = LatencyPredictor(args.platform) if args.platform else None
    header = ['network', 'pixels', 'published top-1 %', *(f'{kind} ms, {runtime}' for runtime in args.runtimes
                                                          for kind in ('fp32', 'INT8'))]
    if predictor:
        header.append(f'{args.platform} ms')
    header.append("ours / quantiser's")
    versions = ', '.join(f'{ONNX_RUNTIMES[name].name} {ONNX_RUNTIMES[name].version}' for name in args.runtimes)
    print(f'{processor()}; {versions}; one thread\n' + _line(header) + '\n' + '|' + '---|' * len(header), flush=True)
    rows = []
    for name in [*args.models, *args.networks]:
        searched = name in named_subnets()
        models, pixels = _searched(name, args) if searched else _ready_made(name, args)
        calls = {(kind, runtime): ONNX_RUNTIMES[runtime].open(model).invoke for runtime in args.runtimes
                 for kind, model in models.items() if kind == runtime or kind not in ONNX_RUNTIMES}
        times = {call: latency.median for call, latency in in_turns(calls, args.warmup, args.runs).items()}
        quantiser = {runtime: min(times[str(ops), runtime] for ops in QUANTISED) for runtime in args.runtimes}
        ours = {runtime: times[runtime, runtime] for runtime in args.runtimes} if searched else quantiser
        row = [name, pixels, PUBLISHED.get(name, (pixels, ''))[1]]
        for runtime in args.runtimes:
            row += [f'{times["fp32", runtime]:.3f}', f'{ours[runtime]:.3f}']
        if predictor:
            row.append(f'{predictor.predict_subnet(subnet_config(*find_subnet(name))):.3f}'
                       if searched else '')
        row.append(f'{min(ours.values()) / min(quantiser.values()):.3f}' if searched else '')
        rows.append(row)
        print(_line(row), flush=True)
    write_csv(os.path.join(args.output, 'baselines.csv'), header, rows)
    write_text(os.path.join(args.output, 'table.md'), '\n'.join(
        [_line(header), '|' + '---|' * len(header), *map(_line, rows)]) + '\n')
    _draw(rows, header, os.path.join(args.output, 'picture.png'))


def _line(cells):
    return f'| {" | ".join(map(str, cells))} |'


def _ready_made(name, args):
    """({kind: ModelProto}, pixels) of a network of timm with random weights."""
    pixels, _ = PUBLISHED.get(name, (224, ''))
    torch.manual_seed(seed_of(0, name))
    fp32 = export_ready_made(ready_made(name, 1000, pixels))
    return _quantised(fp32, [torch.randn(IMAGES, 3, pixels, pixels)], args), pixels


def _quantised(fp32, batches, args):
    """{kind: ModelProto} of an fp32 model and of what ONNX Runtime's quantiser makes of it."""
    return {'fp32': fp32, **{str(ops): quantize_static(fp32, batches, ops, args.reduce_range) for ops in QUANTISED}}


def _searched(name, args):
    """The same of a published network, by our exporter; of INT8 a model for each runtime, under its name."""
    entry = Entry(*find_subnet(name))
    int8 = random_source(entry, quant_mode=True)
    batches = [images for images, _ in int8.batches]
    ranges = observe(int8.network, batches)
    return {**_quantised(export_fp32(random_source(entry, quant_mode=False).network), batches, args),
            **{runtime: export_int8(int8.network, ranges, **ONNX_RUNTIMES[runtime].int8_options(args.reduce_range))
               for runtime in args.runtimes}}, entry.subnet.resolution


def _draw(rows, header, path):
    """Bars of the INT8 latencies."""
    columns = [i for i, name in enumerate(header) if name.startswith('INT8')]
    figure, axes = new_figure(figsize=(1.5 + 0.6 * len(rows), 4.5), layout='constrained')
    for i, column in enumerate(columns):
        width = 0.8 / len(columns)
        axes.bar([j + width * i for j in range(len(rows))], [float(row[column]) for row in rows], width,
                 label=header[column])
    axes.set_xticks([j + 0.4 * (len(columns) - 1) / len(columns) for j in range(len(rows))],
                    [f'{row[0]}\n{row[2]} %' if row[2] else row[0] for row in rows], rotation=60, fontsize=8)
    axes.set_ylabel('INT8 latency (ms), one thread')
    axes.legend()
    save_figure(figure, path)
    print(path)


if __name__ == '__main__':
    run(main, get_args)
