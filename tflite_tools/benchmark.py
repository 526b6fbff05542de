"""Latency of exported subnets in TFLite on one thread, fp32 and INT8: on a phone through adb, or on this machine.

    python tflite_tools/benchmark.py
    python tflite_tools/benchmark.py --adb --serial 9A201FFAZ000AB --push_binary ./benchmark_model
    python tflite_tools/benchmark.py --input my_subnets.csv --warmup 20 --runs 50

Exports what is missing below --model_path (with random weights: latency does not depend on them), takes --warmup
untimed and --runs timed runs of one image of each model, and appends
`<superspace>-<choice>-<subnet>,<fp32 ms>,<int8 ms>,<speed-up>,<device>,<runtime>` (medians; of a phone means) to
latency.csv beside the models. With --adb or --serial each model is pushed to the phone and timed there by
`taskset <mask> <benchmark_binary>`. Without, the models run on this machine, in turns, by ai-edge-litert, on one
core (--core): keep it idle.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import note, parser, run
from modules.deploy.benchmark import BenchmarkSettings, add_benchmark_arguments, benchmark
from modules.deploy.phone import add_phone_arguments, phone_of
from modules.deploy.runtimes import TFLITE
from modules.settings import settings_of


def get_args():
    p = parser(__doc__)
    add_benchmark_arguments(p, TFLITE)
    add_phone_arguments(p)
    return p.parse_args()


def main(args):
    phone = phone_of(args)
    if phone is None:
        note('without --adb: latencies of this host, not of a phone')
    benchmark(settings_of(BenchmarkSettings, args), TFLITE, phone)


if __name__ == '__main__':
    run(main, get_args)
