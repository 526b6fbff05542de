"""Time and memory of a supernet training step: ours in fp32 and int8, a plain eager one, and plainly composed LSQ+.

    python benchmarks/supernet_step.py --supernets spaceevo@vnni spaceevo@pixel4 --batch_size 4 --image_size 224

A step is a sandwich (max, two random subnets, min; forward and backward each) and an SGD step, always of the same
subnets. "plain" is torch's convolutions in NCHW memory, with glibc's allocator as it comes; all others keep freed
memory as train_supernet.py does, "plain kept" too, which tells the two gains apart. "compiled" is --compile;
"composed" fake-quantises by one autograd operation after another. Variants take turns in one process; shown is the
median of the ratios of neighbouring steps. Memory: what autograd keeps for the backward pass of the largest subnet,
every storage counted once, weights left out.
"""
import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn.functional as F

from modules.cli import parser, positive, run
from modules.modeling.ops.fake_quantise import compile_quantisers
from modules.modeling.ops.lsq_plus import QBase, set_quant_mode
from modules.modeling.supernet import Supernet
from modules.search_space.named import find_supernet
from modules.training.memory import keep_freed_memory
from modules.training.optim import parameter_groups
from modules.training.supernet_trainer import SupernetRecipe, sandwich

VARIANTS = ('plain fp32', 'plain kept fp32', 'fp32', 'int8', 'compiled int8', 'composed int8')
RATIOS = (('plain fp32', 'fp32'), ('plain kept fp32', 'fp32'), ('int8', 'fp32'), ('compiled int8', 'fp32'),
          ('composed int8', 'fp32'))


def get_args():
    p = parser(__doc__)
    p.add_argument('--supernets', nargs='+', default=['spaceevo@vnni', 'spaceevo@pixel4'], help='names or encodings')
    p.add_argument('--batch_size', type=positive(int), default=4, help='images')
    p.add_argument('--image_size', type=positive(int), default=224, help='pixels')
    p.add_argument('--repeats', type=positive(int), default=3, help='steps of each variant')
    p.add_argument('--threads', type=positive(int), help="torch's threads; default: all cores")
    return p.parse_args()


def _round(x):
    return x + (x.round() - x).detach()


def _scaled(x, factor):
    return x * factor + (x - x * factor).detach()


def composed(op, x, weight, bias, geometry=None):
    """QBase.run() of LSQ+ composed of autograd's own operations."""
    if not op.scales_initialized:
        op.initialize_scales(x)
    per_sample = x.numel() / len(x)
    sa, beta = (_scaled(p, (per_sample * 255) ** -0.5) for p in (op.sa, op.beta))
    sw = _scaled(op.sw, (weight.numel() * 127) ** -0.5)
    x = _round(((x - beta) / sa).clamp(0, 255)) * sa + beta
    weight = _round((weight / sw).clamp(-128, 127)) * sw
    return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, *geometry)


def plain(op, x, weight, bias, geometry=None):
    """QBase.run() in fp32, of torch's own operations."""
    return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, *geometry)


class Variant:
    """A supernet that takes the same steps as the others."""

    def __init__(self, kind, encoding, batch_size, image_size):
        torch.manual_seed(0)
        self.kind = kind
        self.model = Supernet(encoding)
        self.model.initialize_weights()
        memory = torch.contiguous_format if 'plain' in kind else torch.channels_last
        self.model.to(memory_format=memory)
        if 'int8' in kind:
            set_quant_mode(self.model)
        if 'plain' in kind or kind == 'composed int8':
            for module in self.model.modules():
                if isinstance(module, QBase):
                    module.run = (plain if 'plain' in kind else composed).__get__(module)
        self.images = torch.randn(batch_size, 3, image_size, image_size).contiguous(memory_format=memory)
        self.labels = torch.randint(1000, (batch_size,))
        self.optimizer = torch.optim.SGD(parameter_groups(self.model, 1e-5), lr=1e-3, momentum=0.9, nesterov=True)

    def step(self):
        """Seconds of one training step."""
        compile_quantisers(self.kind == 'compiled int8')
        keep_freed_memory(self.kind != 'plain fp32')
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        sandwich(self.model, self.images, self.labels, SupernetRecipe(), random.Random(0))
        self.optimizer.step()
        return time.perf_counter() - start

    def kept(self):
        """MiB that autograd keeps for the backward pass of the largest subnet."""
        storages, own = {}, {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.model.train().set_max_subnet()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(self.images).square().mean()
        del loss
        return sum(storages.values()) / 2 ** 20


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f'batch {args.batch_size}, {args.image_size} px, {torch.get_num_threads()} threads\n')
    print('| supernet | ' + ' | '.join(f'{kind} s' for kind in VARIANTS) + ' '
          '| plain / ours | plain kept / ours | int8 / fp32 | compiled int8 / fp32 | composed / fp32 | '
          + ' | '.join(f'{kind} MiB' for kind in VARIANTS[2:]) + ' | int8 / fp32 memory |')
    print('|---' * (1 + len(VARIANTS) + len(RATIOS) + len(VARIANTS[2:]) + 1) + '|')
    for name in args.supernets:
        variants = {kind: Variant(kind, find_supernet(name), args.batch_size, args.image_size) for kind in VARIANTS}
        seconds = {kind: [] for kind in VARIANTS}
        for _repeat in range(args.repeats + 1):
            for kind, variant in variants.items():
                seconds[kind].append(variant.step())
        seconds = {kind: np.array(values[1:]) for kind, values in seconds.items()}      # without the warm-up
        ratios = [np.median(seconds[over] / seconds[under]) for over, under in RATIOS]
        kept = {kind: variants[kind].kept() for kind in VARIANTS[2:]}
        print(f'| {name} | ' + ' | '.join(f'{np.median(values):.2f}' for values in seconds.values()) + ' | '
              + ' | '.join(f'**{ratio:.2f}**' for ratio in ratios) + ' | '
              + ' | '.join(f'{mib:.0f}' for mib in kept.values()) + f' | **{kept["int8"] / kept["fp32"]:.2f}** |',
              flush=True)


if __name__ == '__main__':
    run(main, get_args)
