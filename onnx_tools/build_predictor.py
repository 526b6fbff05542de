"""A latency predictor of this host with ONNX Runtime, from nothing to `--platform my_host`.

    python onnx_tools/build_predictor.py --platform my_host
    python onnx_tools/build_predictor.py --platform my_host --superspace demo --minutes 5
    python onnx_tools/build_predictor.py --platform my_host --resume
    python onnx_tools/build_predictor.py --platform my_host_openvino --runtime openvino
    python onnx_tools/build_predictor.py --platform my_host_7bit --reduce_range        # x86 without VNNI
    python onnx_tools/build_predictor.py --platform my_host --from_platform epyc_zen3_ort1.32_1t --minutes 3

Measures INT8 models of single blocks and of whole random networks on one pinned core, blocks of a kind the more the
worse they are predicted, fits data/latency/my_host/, and writes its errors on blocks and networks that were held out
to report.md and validation.png there. Let nothing else run meanwhile: on a noisy machine nothing is written and the
exit code is 2. Measurements are in checkpoints/predictor/my_host/measurements.jsonl; --resume continues a run that was
stopped. See docs/your_device.md.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.devices import OnnxDevice
from modules.deploy.export import add_reduce_range, add_runtime
from modules.latency.build_predictor import BuildSettings, add_build_arguments, build
from modules.latency.profiling import add_host_arguments, run_on_one_core
from modules.settings import settings_of


def get_args():
    p = parser(__doc__)
    add_build_arguments(p)
    add_host_arguments(p, 'ONNX Runtime')
    add_reduce_range(p)
    add_runtime(p)
    return p.parse_args()


def main(args):
    run_on_one_core(args)
    build(settings_of(BuildSettings, args), lambda: OnnxDevice(args.threads, args.reduce_range, args.runtime))


if __name__ == '__main__':
    run(main, get_args)
