"""Which operators keep INT8 slow: fp32 and int8 latency by block type in ONNX Runtime, and where int8 time goes.

    taskset -c 1 python benchmarks/onnx_blocks.py --output checkpoints/benchmarks/onnx_blocks.md

Of each block type of the spaces: three equal blocks of --width channels on --hw x --hw maps, stride 1, random weights,
one thread. Milliseconds are of one block (medians); shares of int8 time are of ONNX Runtime's own profile.
"""
import collections
import json
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from modules.cli import parser, positive, run
from modules.deploy.benchmark import in_turns
from modules.deploy.onnx_models import export_fp32, export_int8
from modules.deploy.quantisation import observe
from modules.deploy.runtimes import ONNX, open_session
from modules.files import write_text
from modules.modeling.complexity import config_complexity
from modules.modeling.network import Network
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.search_space.block import Block
from modules.search_space.encoding import SubnetConfig
from modules.training.calibrate import calibrate

COUNT = 3
BLOCKS = (('ResNetBlock', 1.0, 'relu'), ('ResNetSEBlock', 1.0, 'relu'), ('FusedMBConvResBlock', 2, 'swish'),
          ('FusedMBConvSEResBlock', 2, 'swish'), ('MobileNetV1DualBlock', None, 'relu'),
          ('MobileNetV2ResBlock', 6, 'relu6'), ('MobileNetV2K3ResBlock', 6, 'relu6'),
          ('MobileNetV3ResBlock', 6, 'hswish'), ('MobileNetV3ResBlock', 6, 'swish'),
          ('MobileNetV3K3ResBlock', 6, 'swish'))
PARTS = ('conv', 'depth-wise', 'swish', 'SE', 'add', 'rest')


def part(event):
    """Which of PARTS a node of ONNX Runtime's profile belongs to."""
    name, op = event['name'], event['args']['op_name']
    if '.se' in name or op == 'QLinearGlobalAveragePool':
        return 'SE'
    if op == 'QLinearConv':
        return 'depth-wise' if 'dwconv' in name else 'conv'
    return {'QLinearMul': 'swish', 'QLinearSigmoid': 'swish', 'Clip': 'swish', 'QLinearAdd': 'add'}.get(op, 'rest')


def shares(model, image, runs):
    """{part: share of the time} of a ModelProto by ONNX Runtime's profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(model, profile=os.path.join(folder, 'profile'))
        for _ in range(runs):
            session.run(None, {'image': image})
        with open(session.end_profiling(), encoding='utf-8') as f:
            events = json.load(f)
    times = collections.Counter()
    for event in events:
        if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time'):
            times[part(event)] += event['dur']
    return {name: times[name] / sum(times.values()) for name in PARTS}


def get_args():
    p = parser(__doc__)
    p.add_argument('--width', type=positive(int), default=64, help='channels')
    p.add_argument('--hw', type=positive(int), default=28, help='height and width, pixels')
    p.add_argument('--kernel', type=positive(int), default=5, help='kernel size')
    p.add_argument('--runs', type=positive(int), default=100, help='timed runs')
    p.add_argument('--output', default=os.path.join('checkpoints', 'benchmarks', 'onnx_blocks.md'), help='file')
    return p.parse_args()


def main(args):
    lines = ['| block | activation | MFLOPs | fp32 (ms) | int8 (ms) | speed-up | ' + ' | '.join(PARTS) + ' |',
             '|---' * (6 + len(PARTS)) + '|']
    for name, expand, activation in BLOCKS:
        block = Block(name, args.hw, args.width, args.width, args.kernel, expand, 1, activation)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Network(SubnetConfig(args.hw, {'stage': [block] * COUNT}))
            images = torch.randn(4, args.width, args.hw, args.hw)
        calibrate(network, [images])
        fp32 = export_fp32(network)
        set_quant_mode(network)
        int8 = export_int8(network, observe(network, [images]))
        times = in_turns({'fp32': ONNX.open(fp32).invoke, 'int8': ONNX.open(int8).invoke}, 10, args.runs)
        part_of = shares(int8, images[:1].numpy(), args.runs)
        a, b = times['fp32'].median / COUNT, times['int8'].median / COUNT
        flops = config_complexity([block])[0]
        lines.append(f'| {name} | {activation} | {flops:.1f} | {a:.3f} | {b:.3f} | {a / b:.2f} | '
                     + ' | '.join(f'{share:.0%}' for share in part_of.values()) + ' |')
        print(lines[-1], flush=True)
    write_text(args.output, '\n'.join(lines) + '\n')
    print(args.output)


if __name__ == '__main__':
    run(main, get_args)
