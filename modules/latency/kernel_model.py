"""A platform's latency model: small networks over the kernels of a block's layout, evaluated by numpy.

    block ms = block factor * (overhead + sum over its kernels of  work * exp(net of the kernel(sizes)))

work is what the kernel computes (multiply-adds or elements), so a net only has to learn a rate. The block
factor (present where blocks, not kernels, were measured) is exp of one more net over the block's sizes. On
top come corrections: log factors of single kernels or single blocks, where the published figures pin them.

Nothing here knows how a model is fitted: see regression.py. A model is one npz of plain arrays (no pickles).
"""
import json
import math

import numpy as np

from ..errors import UserError
from ..search_space.block import out_size
from .kernels import Kernel, block_kernels


class LatencyError(UserError):
    """A latency cannot be given; the message is one line that names the platform and the block."""


def kernels_of(block):
    """Kernels of a Block, in execution order. A convolution of 1x1 pixels is a fully connected kernel."""
    return [Kernel('fc', 1, k.cin, k.cout) if k.name == 'conv-bn-relu' and k.hw == 1 else k
            for k in block_kernels(block)]


def kernel_columns(kernels):
    """Columns cin, cout, k, stride (1 where there is none) and output hw of a list of Kernels.

    The input's hw is left out: it matters through the output, and published pairs of the two are few.
    """
    return np.array([[k.cin, k.cout, k.kernel_size, max(k.stride, 1), out_size(k.hw, max(k.stride, 1))]
                     for k in kernels], float).T


def kernel_work(kernels):
    """Multiply-adds of convolutions and fc, channels of a global-avgpool, else elements; shape [kernels]."""
    cin, cout, k, _, out = kernel_columns(kernels)
    name = np.array([kernel.name for kernel in kernels])
    pixels = np.where(name == 'global-avgpool', 1, out ** 2)
    reduced = np.isin(name, ('conv-bn-relu', 'fc'))
    return pixels * cout * np.maximum(k, 1) ** 2 * np.where(reduced, cin, 1)


def _vector_features(c):
    """Where channels fall in the vector widths, and the share of padding to them."""
    phases = [f(2 * np.pi * c / width) for width in (16, 32, 64, 128) for f in (np.sin, np.cos)]
    return phases + [2 * np.log2(np.ceil(c / width) * width / c) for width in (16, 32, 64)]


def kernel_features(kernels, tiled):
    """Inputs of the kernel nets, all of order 1; float array [kernels, features].

    tiled: also where channels and output pixels fall in the vector widths and tiles of a matrix product. It
    helps a lot on x86; without it the nets are smooth.
    """
    cin, cout, k, stride, out = kernel_columns(kernels)
    columns = [np.log2(out) - 4.5, stride - 1, *(k == size for size in (1, 3, 5, 7)),
               np.log2(kernel_work(kernels)) / 4 - 5, np.log2(cin) - 6, np.log2(cout) - 6]
    if tiled:
        columns += [np.log2(k + 1) - 2, out % 2, out ** 2 % 4 / 4, out ** 2 % 16 / 16]
        columns += _vector_features(cin) + _vector_features(cout)
    return np.stack(columns, 1).astype(np.float64)


def block_features(blocks, names):
    """Inputs of the block factor's net, block types one-hot by `names`; float array [blocks, features]."""
    out, cin, cout, k, e, stride = np.array(
        [[out_size(b.hw, b.stride or 1), b.cin, b.cout, b.kernel, b.expand or 1, b.stride or 1]
         for b in blocks], float).T
    phases = [f(2 * np.pi * c / width) for c in (cin, cout)
              for width in (32, 64, 128) for f in (np.sin, np.cos)]
    one_hot = [np.array([b.name == name for b in blocks]) for name in names]
    columns = [np.log2(out) - 4.5, stride - 1, (k - 5) / 2, np.log2(e), (cin == cout) & (stride == 1),
               np.log2(cin) - 7, np.log2(cout) - 7, *phases, *one_hot]
    return np.stack(columns, 1).astype(np.float64)


def run_net(layers, x):
    """Multi-layer perceptron with SiLU; layers [(weight [in, out], bias [out]), …]; x [n, in] -> [n]."""
    for i, (weight, bias) in enumerate(layers):
        if i:
            x = x / (1 + np.exp(-x))
        x = x @ weight + bias
    return x[:, 0]


def _check_net(what, layers):
    """ValueError unless the layers follow one another, end in one number and hold finite numbers."""
    ends = [len(layer[0]) for layer in layers[1:]] + [1]
    for (weight, bias), end in zip(layers, ends, strict=True):
        if weight.ndim != 2 or weight.shape[1] != end or bias.shape != (end,):
            raise ValueError(f'{what}: layers that do not fit together')
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError(f'{what}: weights that are no finite numbers')


class KernelModel:
    """Latency model of one platform.

    nets: {kernel name: layers}; tiled: see kernel_features; overhead: ms per block; block_net: (block types,
    layers) or None; corrections: {Kernel or Block: log factor}. Kernels and block types that were not fitted
    are a LatencyError.
    """

    def __init__(self, platform, nets, tiled, overhead=0.0, block_net=None):
        self.platform, self.nets, self.tiled, self.overhead = platform, nets, tiled, overhead
        self.block_net, self.corrections = block_net, {}

    def scaled(self, factor):
        """A KernelModel whose latencies are these times a factor; without corrections."""
        nets = {name: [*layers[:-1], (layers[-1][0], layers[-1][1] + math.log(factor))]
                for name, layers in self.nets.items()}
        return KernelModel(self.platform, nets, self.tiled, self.overhead * factor, self.block_net)

    def kernel_ms(self, kernels):
        """ms of each of a list of Kernels; float array [kernels]."""
        names = np.array([k.name for k in kernels])
        rate = np.empty(len(kernels))
        features = kernel_features(kernels, self.tiled)
        for name in np.unique(names):
            chosen = names == name
            rate[chosen] = run_net(self.nets[name], features[chosen])
        return kernel_work(kernels) * np.exp(rate + self._correction(kernels))

    def block_factor(self, blocks):
        """The factor of whole blocks; float array [blocks]."""
        log_factor = self._correction(blocks)
        if self.block_net:
            names, layers = self.block_net
            log_factor = log_factor + run_net(layers, block_features(blocks, names))
        return np.exp(log_factor)

    def predict_blocks(self, blocks):
        """ms of each of a list of Blocks; float array [blocks]. Raises LatencyError for an unknown block."""
        if not blocks:
            return np.zeros(0)
        index, owner, which = {}, [], []
        for i, block in enumerate(blocks):
            for kernel in self._kernels(block):
                owner.append(i)
                which.append(index.setdefault(kernel, len(index)))
        sums = np.bincount(owner, weights=self.kernel_ms(list(index))[which], minlength=len(blocks))
        return (self.overhead + sums) * self.block_factor(blocks)

    def _kernels(self, block):
        try:
            if min(block.hw, block.cin, block.cout) < 1 or block.kernel < 0 or block.stride < 0:
                raise ValueError('hw and channels must be at least 1, kernel and stride not negative')
            kernels = kernels_of(block)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise LatencyError(f'{self.platform}: {" ".join(map(str, block))}: {error}') from None
        if self.block_net and block.name not in self.block_net[0]:
            raise LatencyError(f'{self.platform}: block type {block.name} was not fitted for this platform; '
                               f'known: {" ".join(self.block_net[0])}')
        missing = [k.name for k in kernels if k.name not in self.nets]
        if missing:
            raise LatencyError(f'{self.platform}: {block.name} {block.activation}: no figures of kernel '
                               f'{missing[0]} on this platform; known: {" ".join(self.nets)}')
        return kernels

    def _correction(self, items):
        return np.array([self.corrections.get(item, 0.0) for item in items])

    def save(self, file):
        """Write the nets (float32) to a file or path as npz. Corrections go into the table of blocks."""
        named = dict(self.nets, **({'block': self.block_net[1]} if self.block_net else {}))
        arrays = {f'{name}.{i}.{part}': np.asarray(array, np.float32) for name, layers in named.items()
                  for i, layer in enumerate(layers) for part, array in zip(('weight', 'bias'), layer)}
        header = {'tiled': self.tiled, 'overhead_ms': self.overhead,
                  'layers': {name: len(layers) for name, layers in named.items()},
                  'block_types': self.block_net[0] if self.block_net else None}
        np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, platform, path):
        """KernelModel from a file written by save()."""
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(str(data['header']))
            nets = {name: [(data[f'{name}.{i}.weight'].astype(float), data[f'{name}.{i}.bias'].astype(float))
                           for i in range(count)] for name, count in header['layers'].items()}
        for name, layers in nets.items():
            _check_net(f'{path}: {name}', layers)
        if not math.isfinite(header['overhead_ms']) or not isinstance(header['block_types'], (list, type(None))):
            raise ValueError(f'{path}: damaged header')
        block_layers = nets.pop('block', None)
        inputs = kernel_features([Kernel('add', 8, 8, 8)], header['tiled']).shape[1]
        if any(len(layers[0][0]) != inputs for layers in nets.values()):
            raise ValueError(f'{path}: its nets do not take the {inputs} inputs of this version')
        block_net = (header['block_types'], block_layers) if block_layers else None
        return cls(platform, nets, header['tiled'], header['overhead_ms'], block_net)
