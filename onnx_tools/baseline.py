"""A ready-made network on your data, to compare with: trained, quantised by ONNX Runtime itself, evaluated and timed.

    python onnx_tools/baseline.py --model mobilenetv3_small_050 --dataset_path ./dataset --image_size 48 --num_epochs 2
    python onnx_tools/baseline.py --model efficientnet-lite0 --pretrained --dataset_path ./dataset --image_size 48

Trains a network of timm as downstream_cls.py --fp32 trains ours, from random weights or from ImageNet's (--pretrained:
EfficientNets, by the names of --teacher_arch); exports it, makes it INT8 by ONNX Runtime's static quantiser (of
convolutions and matrix products, or of every operator it knows, whichever takes less time here), and prints accuracy
of both on the test images and latency of one image on one thread. Writes checkpoint.pth, fp32.onnx, int8.onnx and
result.csv (`model,image_size,fp32_top1,int8_top1,images,fp32_ms,int8_ms`, medians) to <output>/<model>/.
"""
import csv
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from modules.cli import parser, positive, run
from modules.deploy.baselines import CONVOLUTIONS, export_ready_made, quantize_static, ready_made
from modules.deploy.benchmark import in_turns, processor
from modules.deploy.evaluate import compare
from modules.deploy.export import add_reduce_range
from modules.deploy.runtimes import ONNX
from modules.files import write_csv
from modules.optional import need
from modules.settings import add_settings, settings_of
from modules.training.data import add_data_arguments, calibration_batches, eval_loader, open_data, seed_of
from modules.training.distributed import Job
from modules.training.downstream import DownstreamRecipe, finetune
from modules.training.evaluate import images_of
from modules.training.sources import plain_name

HEADER = ('model', 'image_size', 'fp32_top1', 'int8_top1', 'images', 'fp32_ms', 'int8_ms')


def get_args():
    p = parser(__doc__)
    p.add_argument('--model', required=True, help='name of a timm network; with --pretrained of --teacher_arch')
    p.add_argument('--pretrained', action='store_true', help="start from ImageNet's weights")
    p.add_argument('--image_size', type=positive(int), default=224, help='side of the images in pixels')
    p.add_argument('--output', default=os.path.join('checkpoints', 'baselines'), help='folder of what is written')
    p.add_argument('--runs', type=positive(int), default=300, help='timed runs of each model')
    p.add_argument('--only_latency', action='store_true', help='time the models that are there; the rest of result.csv '
                   'stays')
    add_settings(p, DownstreamRecipe, skip=('distill', 'only_train_head'))
    add_reduce_range(p)
    add_data_arguments(p)
    p.set_defaults(learning_rate=0.05, num_epochs=10)
    return p.parse_args()


def main(args):
    for package in ONNX.packages:
        need(package)
    if args.only_latency:
        return measure_again(os.path.join(args.output, args.model), args.runs)
    data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, args.image_size, seed=args.seed)
    torch.manual_seed(seed_of(args.seed, 'weights'))
    network = ready_made(args.model, data.num_classes, args.image_size, args.pretrained)
    folder = os.path.join(args.output, args.model)
    identity = {'subnet_name': args.model, 'pretrained': args.pretrained, 'num_classes': data.num_classes,
                'image_size': args.image_size, 'dataset': plain_name(args.dataset), 'augment': args.augment}
    recipe = settings_of(DownstreamRecipe, args)
    finetune(network, data, recipe, os.path.join(folder, 'checkpoint.pth'), Job(), identity)
    models = quantised(network, data, args)
    opened = {kind: ONNX.open(model) for kind, model in models.items()}
    times = medians(opened, args.runs)
    int8 = min((kind for kind in models if kind != 'fp32'), key=times.get)
    test = eval_loader(data.test, args.batch_size, workers=args.num_workers, limit_images=args.num_eval_images)
    found = compare(network, opened[int8].run, test)
    ONNX.write(os.path.join(folder, 'fp32.onnx'), models['fp32'])
    ONNX.write(os.path.join(folder, 'int8.onnx'), models[int8])
    row = [args.model, args.image_size, f'{found.torch:.2f}', f'{found.exported:.2f}', found.images,
           f'{times["fp32"]:.4f}', f'{times[int8]:.4f}']
    path = os.path.join(folder, 'result.csv')
    write_csv(path, HEADER, [row])
    print(f'{args.model} at {args.image_size} px: fp32 {found.torch:.2f} %, {times["fp32"]:.3f} ms; INT8 '
          f'{found.exported:.2f} %, {times[int8]:.3f} ms ({int8}); {found.images} images; {processor()}, {ONNX.name} '
          f'{ONNX.version}\n{path}')
    return None


def medians(opened, runs):
    """{kind: median ms of one image} of {kind: OpenModel}."""
    latencies = in_turns({kind: model.invoke for kind, model in opened.items()}, runs=runs)
    return {kind: latency.median for kind, latency in latencies.items()}


def measure_again(folder, runs):
    """Write new latencies of fp32.onnx and int8.onnx into result.csv."""
    path = os.path.join(folder, 'result.csv')
    with open(path, encoding='utf-8', newline='') as f:
        row, = csv.DictReader(f)
    opened = {kind: ONNX.open(os.path.join(folder, f'{kind}.onnx')) for kind in ('fp32', 'int8')}
    for kind, ms in medians(opened, runs).items():
        row[f'{kind}_ms'] = f'{ms:.4f}'
    write_csv(path, HEADER, [[row[name] for name in HEADER]])
    print(f'{row["model"]}: fp32 {row["fp32_ms"]} ms, INT8 {row["int8_ms"]} ms\n{path}')


def quantised(network, data, args):
    """{kind: ModelProto}: fp32, and what ONNX Runtime's quantiser makes of it."""
    batches = list(images_of(calibration_batches(data.train, args.batch_size, args.num_calib_batches, args.seed,
                                                 args.num_workers)))
    fp32 = export_ready_made(network)
    return {'fp32': fp32, **{kind: quantize_static(fp32, batches, ops, args.reduce_range) for kind, ops in (
        ('convolutions in INT8', CONVOLUTIONS), ('all operators in INT8', None))}}


if __name__ == '__main__':
    run(main, get_args)
