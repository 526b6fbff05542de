"""What an exported network sees in pictures, prepared as its metadata says.

    python onnx_tools/predict.py --model checkpoints/models/onnx_model/net_quant_int8.onnx picture.jpg other.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.predict import add_predict_arguments, predict
from modules.deploy.runtimes import ONNX


def get_args():
    p = parser(__doc__)
    add_predict_arguments(p, ONNX)
    return p.parse_args()


def main(args):
    predict(args.model, args.pictures, args.top, ONNX)


if __name__ == '__main__':
    run(main, get_args)
