"""Accuracy of exported subnets in ONNX Runtime, or OpenVINO, and their agreement with torch.

    python onnx_tools/eval_onnx.py --quant_mode --dataset_path ./dataset
    python onnx_tools/eval_onnx.py --quant_mode --network checkpoints/downstream/net.pth --dataset FashionMNIST

Takes the subnets, weights and options of export_onnx.py, exports what is missing or of other weights, and runs each
network in torch and its ONNX model on the test images. Agreement: images for which both name the same class.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.evaluate import EvaluationSettings, evaluate
from modules.deploy.export import add_export_arguments, add_runtime
from modules.deploy.runtimes import ONNX, ONNX_RUNTIMES
from modules.settings import settings_of


def get_args():
    p = parser(__doc__)
    add_export_arguments(p, ONNX, EvaluationSettings)
    add_runtime(p)
    return p.parse_args()


def main(args):
    evaluate(settings_of(EvaluationSettings, args), ONNX_RUNTIMES[args.runtime])


if __name__ == '__main__':
    run(main, get_args)
