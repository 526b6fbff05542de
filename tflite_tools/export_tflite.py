"""Export subnets to TFLite: fp32, and with --quant_mode INT8 on their trained LSQ+ scales.

    python tflite_tools/export_tflite.py --skip_weights
    python tflite_tools/export_tflite.py --quant_mode --checkpoint_path checkpoints/supernet_training \\
        --dataset_path ./dataset
    python tflite_tools/export_tflite.py --quant_mode --network checkpoints/downstream/net.pth --dataset CIFAR10

tflite_tools/input.csv holds one `<superspace>,<supernet_choice>,<subnet_choice>` a line. Writes
<model_path>/<superspace>_<choice>_<6 hex of sha256(subnet)>{,_quant_int8}.tflite; a model of the same subnet and
weights that is there already is used again. fp32 weights are those of checkpoint.pth, INT8 ones those of lsq.pth, both
with batch-norm statistics of --num_calib_batches training batches. One image (1, r, r, 3) goes in, as the network's
resolution asks, normalised, float32; logits (1, classes) come out as float32. --skip_weights: random weights, for
latencies; both models. docs/tflite.md explains the INT8 model.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.export import ExportSettings, add_export_arguments, export_all
from modules.deploy.runtimes import TFLITE
from modules.settings import settings_of


def get_args():
    p = parser(__doc__)
    add_export_arguments(p, TFLITE)
    return p.parse_args()


def main(args):
    export_all(settings_of(ExportSettings, args), TFLITE)


if __name__ == '__main__':
    run(main, get_args)
