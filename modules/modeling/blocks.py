"""Static blocks, built from layouts."""
from torch import nn

from .layout import block_layout
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


class StaticBlock(nn.Module):
    """The torch module of a Block (search_space.block); (N, cin, H, W) to (N, cout, H/stride, W/stride)."""

    def __init__(self, block):
        super().__init__()
        self.name, self.layers = block.name, block_layout(block)
        for layer in self.layers:
            if layer.op != 'add':
                self.add_module(layer.name, UNITS[layer.op](layer))

    def forward(self, x):
        return run_layers(self.layers, lambda layer, v: getattr(self, layer.name)(v), x)
