"""Static blocks, built from layouts."""
import torch
from torch import nn

from .layout import always_shortcut, block_layout
from .ops.op import ACTIVATION_FUNCTIONS, SE, ConvNormAct, DepthConvNormAct, DepthStackNormAct, GlobalMean, QLinear

UNITS = {'conv': ConvNormAct, 'dwconv': DepthConvNormAct, 'dwstack': DepthStackNormAct, 'se': SE,
         'mean': lambda layer: GlobalMean(), 'flatten': lambda layer: nn.Flatten(),
         'dropout': lambda layer: nn.Dropout(0.0), 'linear': lambda layer: QLinear(layer.cin, layer.cout)}
NORMALISED = ('conv', 'dwconv', 'dwstack')              # layers with a batch norm


def _add(y, shortcut, activation):
    return ACTIVATION_FUNCTIONS[activation](y + shortcut)


def run_layers(layers, apply, x, add=_add):
    """Output of a layout for input x; apply(layer, x) runs one layer, add(y, shortcut, activation) the sum."""
    y = shortcut = x
    for layer in layers:
        if layer.op == 'add':
            y = add(y, shortcut, layer.activation)
        elif layer.shortcut:
            shortcut = apply(layer, x)
        else:
            y = apply(layer, y)
    return y


class Block(nn.Module):
    """A block of type `name` at fixed sizes (layout.Sizes); (N, cin, H, W) to (N, cout, H/stride, W/stride)."""

    def __init__(self, name, sizes):
        super().__init__()
        self.name, self.sizes = name, sizes
        self.layers = block_layout(name, sizes)
        for layer in self.layers:
            if layer.op != 'add':
                self.add_module(layer.name, UNITS[layer.op](layer))

    def forward(self, x):
        return run_layers(self.layers, lambda layer, v: getattr(self, layer.name)(v), x)


def zero_last_gamma(model):
    """Start the last batch norm of every block that always has a shortcut at 0 (Goyal et al., 2017)."""
    for block in model.modules():
        if always_shortcut(getattr(block, 'name', None)):
            last = [layer for layer in block.layers if layer.op in NORMALISED and not layer.shortcut][-1]
            torch.nn.init.zeros_(getattr(block, last.name).norm.weight)
