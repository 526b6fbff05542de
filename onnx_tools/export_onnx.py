"""Export subnets to ONNX: fp32, and with --quant_mode INT8 on their trained LSQ+ scales.

    python onnx_tools/export_onnx.py --skip_weights
    python onnx_tools/export_onnx.py --quant_mode --checkpoint_path checkpoints/supernet_training \\
        --dataset_path ./dataset --report
    python onnx_tools/export_onnx.py --quant_mode --network checkpoints/downstream/net.pth --dataset CIFAR10
    python onnx_tools/export_onnx.py --skip_weights --runtime openvino

onnx_tools/input.csv holds one `<superspace>,<supernet_choice>,<subnet_choice>` a line. Writes
<model_path>/<superspace>_<choice>_<6 hex of sha256(subnet)>{,_quant_int8}.onnx; a model of the same subnet and weights
that is there already is used again. fp32 weights are those of checkpoint.pth, INT8 ones those of lsq.pth, both with
batch-norm statistics of --num_calib_batches training batches. Images go in as the network's resolution asks,
normalised; logits come out. --skip_weights: random weights, for latencies; both models. --report: per layer, how far
the INT8 model's tensors are from torch's. --runtime openvino: INT8 models that OpenVINO runs faster, in
…_quant_int8_openvino.onnx. docs/onnx.md explains the INT8 graph.
"""
import os
import sys
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, positive, run
from modules.deploy.evaluate import layer_errors
from modules.deploy.export import ExportSettings, add_export_arguments, add_runtime, export_all
from modules.deploy.quantisation import observe
from modules.deploy.runtimes import ONNX, ONNX_RUNTIMES
from modules.modeling.ops.op import resize
from modules.optional import need
from modules.settings import settings_of
from modules.training.evaluate import images_of


def get_args():
    p = parser(__doc__)
    add_export_arguments(p, ONNX)
    add_runtime(p)
    p.add_argument('--report', action='store_true', help='print the error of each layer of the INT8 models')
    p.add_argument('--report_images', type=positive(int), default=32, help='images of the report')
    return p.parse_args()


def main(args):
    report = None
    if args.report:
        for package in ONNX.packages:
            need(package)
        report = partial(print_report, count=args.report_images)
    export_all(settings_of(ExportSettings, args), ONNX_RUNTIMES[args.runtime], report)


def print_report(source, model, count):
    """The layers' errors, the worst ones marked."""
    images = resize(next(images_of(source.batches))[:count], source.network.resolution)
    observe(source.network, [images])               # initialises scales that random weights do not have yet
    errors = layer_errors(source.network, model, images)
    worst = sorted(errors[:-1], key=lambda error: -error.added)[:5]
    print(f'{"input of":<43} rms / std    added  mean / step')
    for error in errors:
        print(f'{error}{"  <- worst" if error in worst else ""}')


if __name__ == '__main__':
    run(main, get_args)
