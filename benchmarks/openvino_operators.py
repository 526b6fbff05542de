"""Which operators of INT8 blocks OpenVINO runs on bytes, which in float, and what its own graph of a swish is worth.

    taskset -c 1 python benchmarks/openvino_operators.py --output checkpoints/benchmarks/openvino_operators.md

Of each block type of the spaces: three equal blocks in a row, --width channels on --hw x --hw maps, stride 1, random
weights, one thread, codes in and out, as build_predictor.py measures them. Operators are those that OpenVINO compiled
the middle block to, of both graphs: the one for ONNX Runtime (a swish is operators on bytes) and the one for OpenVINO
(a swish of the convolution's float result, `float_swish`). Milliseconds are of one block, both graphs in turns, of the
thread's own time.
"""
import collections
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

from benchmarks.onnx_blocks import BLOCKS, COUNT
from modules.cli import parser, positive, run
from modules.deploy.benchmark import processor
from modules.deploy.devices import onnx_chain, timed
from modules.deploy.runtimes import OpenVinoSession
from modules.files import write_text
from modules.latency.profiling import Timing, time_in_turns
from modules.optional import need, version_of
from modules.search_space.block import Block

COLUMNS = ('block', 'activation', 'graph', 'on bytes', 'float in memory', 'time in convolutions', 'ms', 'speed-up')


def of_block(operators, number):
    """Those of [Operator] that belong to the block of this number in a chain."""
    return [op for op in operators if any(name.startswith(f'stages.block{number}.') for name in op.nodes)]


def counted(operators):
    """`3 Convolution, 1 Reduce` of [Operator]."""
    return ', '.join(f'{n} {kind}' for kind, n in collections.Counter(op.kind for op in operators).items()) or '–'


def row(operators):
    """Cells of [Operator] of one block: on bytes, with floats in memory, share of the time in convolutions."""
    real = [op for op in operators if 'f32' in (op.reads, *op.writes)]
    time = sum(op.ms for op in operators)
    return [counted([op for op in operators if op not in real]), counted(real),
            f'{sum(op.ms for op in operators if op.kind == "Convolution") / time:.0%}'.replace('%', ' %')]


def get_args():
    p = parser(__doc__)
    p.add_argument('--width', type=positive(int), default=64, help='channels')
    p.add_argument('--hw', type=positive(int), default=28, help='height and width, pixels')
    p.add_argument('--kernel', type=positive(int), default=5, help='kernel size')
    p.add_argument('--rounds', type=positive(int), default=16, help='turns of each model')
    p.add_argument('--output', default=os.path.join('checkpoints', 'benchmarks', 'openvino_operators.md'), help='file')
    return p.parse_args()


def main(args):
    need('openvino')
    torch.set_num_threads(1)
    codes = np.random.default_rng(0).integers(0, 256, (1, args.hw, args.hw, args.width), np.uint8)
    lines = [f'{processor()}, OpenVINO {version_of("openvino")}', '', f'| {" | ".join(COLUMNS)} |',
             '|---' * len(COLUMNS) + '|']
    for name, expand, activation in BLOCKS:
        blocks = [Block(name, args.hw, args.width, args.width, args.kernel, expand, 1, activation)] * COUNT
        runs, cells = [], []
        for float_swish in [False, True] if activation.endswith('swish') else [False]:
            model = onnx_chain(blocks, float_swish=float_swish)
            profiled, session = OpenVinoSession(model, profile=True), OpenVinoSession(model)
            for _ in range(args.rounds):
                profiled.run(None, {'codes': codes})
            runs.append(timed(lambda session=session: session.run(None, {'codes': codes}), 1))
            cells.append(row(of_block(profiled.operators(), COUNT // 2)))
        times, _ = time_in_turns(runs, Timing(rounds=args.rounds, turn_ms=20))
        for graph, cell, ms in zip(('bytes', 'float swish'), cells, times):
            lines.append(f'| {" | ".join([name, activation, graph, *cell])} | {ms / COUNT:.3f} | {times[0] / ms:.2f} |')
            print(lines[-1], flush=True)
    write_text(args.output, '\n'.join(lines) + '\n')
    print(args.output)


if __name__ == '__main__':
    run(main, get_args)
