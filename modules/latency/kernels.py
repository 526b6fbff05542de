"""A block's layout as nn-Meter kernels: what a kernel-level latency predictor sums.

Kernels: conv-bn-relu and dwconv-bn-relu (relu and relu6 are part of them), fc, hswish, swish, se,
global-avgpool, add, addrelu. Source: nn-Meter (MobiSys 2021), as described in its kernel predictors' inputs.
"""
from typing import NamedTuple

from ..modeling.layout import block_layout, out_size

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
        """Inputs of nn-Meter's predictor of this kernel (MFLOPs and Mparams without batch norm and biases)."""
        if self.name in ('conv-bn-relu', 'dwconv-bn-relu'):
            weights = self.kernel_size ** 2 * (self.cin if self.name == 'conv-bn-relu' else 1) * self.cout
            flops = weights * out_size(self.hw, self.stride) ** 2
            return [self.hw, self.cin, self.cout, self.kernel_size, self.stride, flops / 1e6, weights / 1e6]
        if self.name == 'fc':
            weights = (self.cin + 1) * self.cout
            return [self.cin, self.cout, 2 * weights / 1e6, weights / 1e6]
        if self.name in ('add', 'addrelu'):
            return [self.hw, self.cin, self.cin]
        return [self.hw, self.cin]


def block_kernels(name, sizes, hw):
    """Kernels of block type `name` at `sizes` (layout.Sizes), its input hw x hw pixels, in execution order."""
    kernels, pixels = [], hw
    for layer in block_layout(name, sizes):
        layer_hw = hw if layer.shortcut else pixels
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
            kernels.append(Kernel('add' if activation is None else 'addrelu', layer_hw, layer.cin, layer.cout))
            activation = None
        if not layer.shortcut:
            pixels = 1 if layer.op == 'mean' else out_size(pixels, layer.stride)
        if activation not in FUSED_ACTIVATIONS:
            kernels.append(Kernel(activation, pixels, layer.cout, layer.cout))
    return kernels
