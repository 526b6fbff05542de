"""Latency of exported subnets in ONNX Runtime, or OpenVINO, on one thread, fp32 and INT8.

    python onnx_tools/benchmark.py
    python onnx_tools/benchmark.py --input my_subnets.csv --warmup 20 --runs 50
    python onnx_tools/benchmark.py --runtime openvino

Exports what is missing below --model_path (with random weights: latency does not depend on them), takes --warmup
untimed and --runs timed runs of one image of each model, the two in turns, and appends
`<superspace>-<choice>-<subnet>,<fp32 ms>,<int8 ms>,<speed-up>,<device>,<runtime>` (medians) to latency.csv beside the
models. It stays on one core (--core); keep the machine idle. OpenVINO has INT8 models of its own,
…_quant_int8_openvino.onnx.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.benchmark import BenchmarkSettings, add_benchmark_arguments, benchmark
from modules.deploy.export import add_runtime
from modules.deploy.runtimes import ONNX, ONNX_RUNTIMES
from modules.settings import settings_of


def get_args():
    p = parser(__doc__)
    add_benchmark_arguments(p, ONNX)
    add_runtime(p)
    return p.parse_args()


def main(args):
    benchmark(settings_of(BenchmarkSettings, args), ONNX_RUNTIMES[args.runtime])


if __name__ == '__main__':
    run(main, get_args)
