"""Static ops: quantised convolution and linear layer, the conv-norm-act units and squeeze-excitation.

Sub-module names (conv, dwconv, norm, act, fc.reduce, fc.expand) are state-dict keys of published checkpoints.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from .lsq_plus import QBase

ACTIVATIONS = {None: nn.Identity, 'relu': nn.ReLU, 'relu6': nn.ReLU6, 'hswish': nn.Hardswish, 'swish': nn.SiLU}
ACTIVATION_FUNCTIONS = {None: lambda x: x, 'relu': F.relu, 'relu6': F.relu6, 'hswish': F.hardswish,
                        'swish': F.silu}


class QConv(QBase, nn.Conv2d):
    """nn.Conv2d with LSQ+ weights and inputs; (N, C, H, W) to (N, C', H', W')."""

    def forward(self, x):
        return self.run(x, self.weight, self.bias, (self.stride, self.padding, self.dilation, self.groups))


QConv2d = QConv                             # the original's name


class QLinear(QBase, nn.Linear):
    """nn.Linear with LSQ+ weights and inputs; (N, C) to (N, C')."""

    def forward(self, x):
        return self.run(x, self.weight, self.bias)


def conv(cin, cout, kernel=1, stride=1, groups=1, bias=False, op=QConv):
    return op(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm, activation."""

    def __init__(self, layer):
        super().__init__(OrderedDict(conv=conv(layer.cin, layer.cout, layer.kernel, layer.stride),
                                     norm=nn.BatchNorm2d(layer.cout), act=ACTIVATIONS[layer.activation]()))


class DepthConvNormAct(nn.Sequential):
    """Depth-wise convolution without bias, batch norm, activation."""

    def __init__(self, layer):
        super().__init__(OrderedDict(
            dwconv=conv(layer.cin, layer.cout, layer.kernel, layer.stride, layer.cout),
            norm=nn.BatchNorm2d(layer.cout), act=ACTIVATIONS[layer.activation]()))


class DepthStackNormAct(nn.Sequential):
    """`repeat` depth-wise convolutions, the first with the stride; then one batch norm and activation."""

    def __init__(self, layer):
        convs = [conv(layer.cin, layer.cout, layer.kernel, layer.stride if i == 0 else 1, layer.cout)
                 for i in range(layer.repeat)]
        super().__init__(OrderedDict(dwconv=nn.Sequential(*convs), norm=nn.BatchNorm2d(layer.cout),
                                     act=ACTIVATIONS[layer.activation]()))


class SE(nn.Module):
    """Squeeze-excitation: x * hard sigmoid(1x1 conv(relu(1x1 conv(global mean of x))))."""

    def __init__(self, layer, op=QConv):
        super().__init__()
        self.fc = nn.Sequential(OrderedDict(
            reduce=conv(layer.cin, layer.mid, bias=True, op=op), relu=nn.ReLU(),
            expand=conv(layer.mid, layer.cout, bias=True, op=op), hsigmoid=nn.Hardsigmoid()))

    def forward(self, x):
        return x * self.fc(global_mean(x))


class GlobalMean(nn.Module):
    """Mean over height and width, kept as 1x1."""

    def forward(self, x):
        return global_mean(x)


def global_mean(x):
    """(N, C, H, W) to (N, C, 1, 1)."""
    return F.adaptive_avg_pool2d(x, 1)


def resize(x, size):
    """Images (N, C, H, W) resized to size x size pixels, bicubic; unchanged where they fit."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, size=(size, size), mode='bicubic', align_corners=False)


def take(tensor, shape):
    """The slice of `tensor` a smaller op uses: channels (dims 0, 1) from the front, kernels from the centre."""
    index = []
    for dim, (have, want) in enumerate(zip(tensor.shape, shape)):
        start = (have - want) // 2 if dim >= 2 else 0
        index.append(slice(start, start + want))
    return tensor[tuple(index)]


def is_norm(module):
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
