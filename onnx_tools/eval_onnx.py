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
from modules.deploy.jobs import add_evaluation_arguments, add_runtime, evaluate
from modules.deploy.onnx_run import open_runtime, run_session
from modules.deploy.runtimes import ONNX, ONNX_RUNTIMES


def get_args():
    p = parser(__doc__)
    add_evaluation_arguments(p, ONNX)
    add_runtime(p)
    return p.parse_args()


def main(args):
    def open_model(model):
        session = open_runtime(args.runtime)(model, args.threads)
        return lambda images: run_session(session, images)
    evaluate(args, ONNX_RUNTIMES[args.runtime], open_model)


if __name__ == '__main__':
    run(main, get_args)
