"""Accuracy of exported subnets in TFLite on this machine, and their agreement with torch.

    python tflite_tools/eval_tflite.py --quant_mode --dataset_path ./dataset
    python tflite_tools/eval_tflite.py --quant_mode --network checkpoints/downstream/net.pth --dataset FashionMNIST

Takes the subnets, weights and options of export_tflite.py, exports what is missing or of other weights, and runs each
network in torch and its TFLite model on the test images. Agreement: images for which both name the same class.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.evaluate import EvaluationSettings, evaluate
from modules.deploy.export import add_export_arguments
from modules.deploy.runtimes import TFLITE
from modules.settings import settings_of


def get_args():
    p = parser(__doc__)
    add_export_arguments(p, TFLITE, EvaluationSettings)
    return p.parse_args()


def main(args):
    evaluate(settings_of(EvaluationSettings, args), TFLITE)


if __name__ == '__main__':
    run(main, get_args)
