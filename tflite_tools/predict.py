"""What an exported network sees in pictures, prepared as its metadata says.

    python tflite_tools/predict.py --model checkpoints/models/tflite_model/net_quant_int8.tflite picture.jpg other.png
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.feeding import add_predict_arguments, predict
from modules.deploy.runtimes import TFLITE
from modules.deploy.tflite_run import open_interpreter


def get_args():
    p = parser(__doc__)
    add_predict_arguments(p, TFLITE)
    return p.parse_args()


def main(args):
    predict(args, TFLITE, lambda model: open_interpreter(model).run)


if __name__ == '__main__':
    run(main, get_args)
