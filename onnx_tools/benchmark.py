"""Latency of exported subnets in ONNX Runtime on one thread, fp32 and INT8.

    python onnx_tools/benchmark.py
    python onnx_tools/benchmark.py --input my_subnets.csv --warmup 20 --runs 50

Exports what is missing below --model_path (with random weights: latency does not depend on them), takes --warmup
untimed and --runs timed runs of one image of each model, the two in turns, and appends
`<encoding>,<fp32 ms>,<int8 ms>,<speed-up>` (means) to latency.csv beside the models. Keep the machine idle, and pin
the process where others run: taskset -c 1 python onnx_tools/benchmark.py.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, positive, run
from modules.deploy.graph import need
from modules.deploy.onnx_jobs import INPUT, MODELS, export, random_subject
from modules.deploy.onnx_run import latencies, open_session
from modules.deploy.store import model_path, read_entries, read_model


def get_args():
    p = parser(__doc__)
    p.add_argument('--input', default=INPUT, help='csv of <superspace>,<supernet_choice>,<subnet_choice> lines')
    p.add_argument('--model_path', default=MODELS, help='folder of the models')
    p.add_argument('--output', metavar='FILE', help='csv to append to; default: <model_path>/latency.csv')
    p.add_argument('--threads', type=positive(int), default=1, help='of ONNX Runtime')
    p.add_argument('--warmup', type=positive(int), default=100, help='untimed runs of each model')
    p.add_argument('--runs', type=positive(int), default=100, help='timed runs of each model')
    return p.parse_args()


def main(args):
    need('onnx'), need('onnxruntime')
    output = args.output or os.path.join(args.model_path, 'latency.csv')
    for entry in read_entries(args.input):
        sessions = {}
        for kind, quant_mode in (('fp32', False), ('int8', True)):
            path = model_path(args.model_path, entry, quant_mode)
            if read_model(path) is None:
                path, *_ = export(random_subject(entry, quant_mode), args.model_path, quant_mode)
                print(f'exported {path} with random weights', flush=True)
            sessions[kind] = open_session(path, args.threads)
        times = latencies(sessions, args.warmup, args.runs)
        speed_up = times['fp32'].mean / times['int8'].mean
        print(f'{entry.supernet} {entry.subnet}')
        for kind, latency in times.items():
            print(f'  {kind}: {latency}')
        medians = times['fp32'].median / times['int8'].median
        print(f'  speed-up {speed_up:.2f}, of the medians {medians:.2f}', flush=True)
        append(output, f'{entry.subnet},{times["fp32"].mean:.4f},{times["int8"].mean:.4f},{speed_up:.4f}\n')
    print(output)


def append(path, line):
    """Add a line to a file in one write, so that lines of two runs do not mix."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, 'ab', buffering=0) as f:
        f.write(line.encode())


if __name__ == '__main__':
    run(main, get_args)
