"""What an exported network sees in pictures, prepared as its metadata says.

    python tflite_tools/predict.py --model checkpoints/models/tflite_model/net_quant_int8.tflite picture.jpg other.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.predict import add_predict_arguments, predict
from modules.deploy.runtimes import TFLITE


def get_args():
    p = parser(__doc__)
    add_predict_arguments(p, TFLITE)
    return p.parse_args()


def main(args):
    predict(args.model, args.pictures, args.top, TFLITE)


if __name__ == '__main__':
    run(main, get_args)
