"""A latency predictor of TFLite on this machine or on a phone, from nothing to `--platform my_phone`.

    python tflite_tools/build_predictor.py --platform my_host_tflite
    python tflite_tools/build_predictor.py --platform my_phone --adb --phone "Pixel 4" --mask 40 --minutes 240 \\
      --push_binary ./benchmark_model --superspace mobilew

As onnx_tools/build_predictor.py, which explains it, with INT8 TFLite models: here by ai-edge-litert on one pinned core,
or with --adb or --serial on a phone by TFLite's benchmark_model. --mask 40 is one big core of a Pixel 4. On a phone
each model takes seconds, so give it hours; --resume continues with a run that was stopped. See docs/your_device.md.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.deploy.devices import LiteRtDevice, PhoneDevice
from modules.deploy.phone import add_phone_arguments, phone_of
from modules.latency.build_predictor import BuildSettings, add_build_arguments, build
from modules.latency.profiling import Timing, add_host_arguments, run_on_one_core
from modules.settings import settings_of

PHONE_TIMING = Timing(rounds=3, warmup=0, runs=20)


def get_args():
    p = parser(__doc__)
    add_build_arguments(p)
    add_host_arguments(p, 'TFLite')
    add_phone_arguments(p)
    p.add_argument('--phone', default='a phone', metavar='NAME', help='what the report calls it')
    return p.parse_args()


def main(args):
    phone = phone_of(args)
    if phone is not None:
        build(settings_of(BuildSettings, args), lambda: PhoneDevice(phone, args.phone), PHONE_TIMING)
        return
    run_on_one_core(args)
    build(settings_of(BuildSettings, args), lambda: LiteRtDevice(args.threads))


if __name__ == '__main__':
    run(main, get_args)
