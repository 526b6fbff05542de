"""A block's layout as nn-Meter kernels: what a kernel-level latency predictor sums.

Kernels: conv-bn-relu and dwconv-bn-relu (relu and relu6 are part of them), fc, hswish, swish, se,
global-avgpool, add, addrelu. Source: nn-Meter (MobiSys 2021) and its package, version 2.0, to which
tests/test_nn_meter.py compares them.
"""
from typing import NamedTuple

from ..modeling.layout import block_layout
from ..search_space.block import out_size

FUSED_ACTIVATIONS = (None, 'relu', 'relu6')


class Kernel(NamedTuple):
    """One kernel: hw of its input (pixels), channels, kernel size and stride (0 where it has none)."""
    name: str
    hw: int
    cin: int
    cout: int
    kernel_size: int = 0
    stride: int = 0

    def features(self):
        """Inputs of nn-Meter's predictor of this kernel, as nn-Meter 2.0 computes them in training and use.

        conv, dwconv: [hw, cin, cout, k, stride, MFLOPs, Mparams], with a bias per output channel and
        multiply-adds at hw / stride *not* rounded up. fc: [cin, cout, MFLOPs, Mparams]; its (2 cin + 1) cout
        "params" are nn-Meter's. add, addrelu: [hw, cin, cin]. Others: [hw, cin]. (When it predicts a graph
        nn-Meter gives hw 1 to every global-avgpool, whatever it was trained on: a slip not repeated here.)
        """
        if self.name in ('conv-bn-relu', 'dwconv-bn-relu'):
            inputs = self.cin if self.name == 'conv-bn-relu' else 1
            params = (self.kernel_size ** 2 * inputs + 1) * self.cout
            flops = self.hw / self.stride * self.hw / self.stride * params
            return [self.hw, self.cin, self.cout, self.kernel_size, self.stride, flops / 1e6, params / 1e6]
        if self.name == 'fc':
            params = (2 * self.cin + 1) * self.cout
            return [self.cin, self.cout, params / 2e6, params / 1e6]
        if self.name in ('add', 'addrelu'):
            return [self.hw, self.cin, self.cin]
        return [self.hw, self.cin]


def block_kernels(block):
    """Kernels of a Block, in execution order."""
    kernels, pixels = [], block.hw
    for layer in block_layout(block):
        layer_hw = block.hw if layer.shortcut else pixels
        activation = layer.activation
        if layer.op == 'conv':
            kernels.append(Kernel('conv-bn-relu', layer_hw, layer.cin, layer.cout, layer.kernel, layer.stride))
        elif layer.op in ('dwconv', 'dwstack'):
            for i in range(layer.repeat):
                stride = layer.stride if i == 0 else 1
                kernels.append(Kernel('dwconv-bn-relu', layer_hw, layer.cin, layer.cout, layer.kernel, stride))
                layer_hw = out_size(layer_hw, stride)
        elif layer.op == 'se':
            kernels.append(Kernel('se', layer_hw, layer.cin, layer.cin))
        elif layer.op == 'mean':
            kernels.append(Kernel('global-avgpool', layer_hw, layer.cin, layer.cin))
        elif layer.op == 'linear':
            kernels.append(Kernel('fc', 1, layer.cin, layer.cout))
        elif layer.op == 'add':
            add = 'addrelu' if activation in ('relu', 'relu6') else 'add'
            kernels.append(Kernel(add, layer_hw, layer.cin, layer.cout))
        if not layer.shortcut:
            pixels = 1 if layer.op == 'mean' else out_size(pixels, layer.stride)
        if activation not in FUSED_ACTIVATIONS:
            kernels.append(Kernel(activation, pixels, layer.cout, layer.cout))
    return kernels
