"""Dynamic ops: the largest weights, of which each forward uses the slice that a layer (layout.Layer) asks for.

Channels are taken from the front, kernels from the centre; batch norm slices its statistics the same way. The
LSQ+ scales belong to the op and are shared by all slices.
"""
from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from .op import ACTIVATION_FUNCTIONS, QConv, QLinear, conv, global_mean, take


class DynamicConv(QConv):
    """QConv whose forward takes the active channels and kernel; depth-wise where it was built with groups.

    cout None: the channels set as `active_out_channels`, at first all.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.active_out_channels = self.out_channels

    def forward(self, x, cout=None, kernel=1, stride=1):
        depthwise, cout = self.groups > 1, cout or self.active_out_channels
        weight = take(self.weight, (cout, 1 if depthwise else x.shape[1], kernel, kernel))
        bias = None if self.bias is None else self.bias[:cout]
        pad = kernel // 2
        return self.run(x, weight, bias, ((stride, stride), (pad, pad), (1, 1), cout if depthwise else 1))


class DynamicLinear(QLinear):
    """QLinear that uses the first input features of its weight."""

    def forward(self, x, cout):
        return self.run(x, take(self.weight, (cout, x.shape[1])), self.bias[:cout])


class DynamicBatchNorm(nn.BatchNorm2d):
    """Batch norm over the first channels; momentum None is the cumulative average, as in torch."""

    def forward(self, x):
        channels = x.shape[1]
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        return F.batch_norm(x, self.running_mean[:channels], self.running_var[:channels], self.weight[:channels],
                            self.bias[:channels], self.training, factor, self.eps)


class DynamicConvNormAct(nn.Module):
    """Convolution, batch norm, activation at the layer's active sizes."""

    def __init__(self, layer):
        super().__init__()
        self.conv = conv(layer.cin, layer.cout, layer.kernel, op=DynamicConv)
        self.norm = DynamicBatchNorm(layer.cout)

    def forward(self, x, layer):
        x = self.norm(self.conv(x, layer.cout, layer.kernel, layer.stride))
        return ACTIVATION_FUNCTIONS[layer.activation](x)


class DynamicDepthConvNormAct(nn.Module):
    """Depth-wise convolution, batch norm, activation at the layer's active sizes."""

    def __init__(self, layer):
        super().__init__()
        self.dwconv = conv(layer.cin, layer.cout, layer.kernel, groups=layer.cout, op=DynamicConv)
        self.norm = DynamicBatchNorm(layer.cout)

    def forward(self, x, layer):
        x = self.norm(self.dwconv(x, layer.cout, layer.kernel, layer.stride))
        return ACTIVATION_FUNCTIONS[layer.activation](x)


class DynamicDepthStackNormAct(nn.Module):
    """The first `layer.repeat` of a stack of depth-wise convolutions, then batch norm and activation."""

    def __init__(self, layer):
        super().__init__()
        self.dwconv = nn.ModuleDict({f'dwconv{i}': conv(layer.cin, layer.cout, layer.kernel, groups=layer.cout,
                                                        op=DynamicConv) for i in range(layer.repeat)})
        self.norm = DynamicBatchNorm(layer.cout)

    def forward(self, x, layer):
        for i in range(layer.repeat):
            x = self.dwconv[f'dwconv{i}'](x, layer.cout, layer.kernel, layer.stride if i == 0 else 1)
        return ACTIVATION_FUNCTIONS[layer.activation](self.norm(x))


class DynamicSE(nn.Module):
    """Squeeze-excitation at the layer's active sizes."""

    def __init__(self, layer):
        super().__init__()
        self.fc = nn.ModuleDict(OrderedDict(
            reduce=conv(layer.cin, layer.mid, bias=True, op=DynamicConv),
            expand=conv(layer.mid, layer.cout, bias=True, op=DynamicConv)))

    def forward(self, x, layer):
        gate = F.relu(self.fc['reduce'](global_mean(x), layer.mid))
        return x * F.hardsigmoid(self.fc['expand'](gate, layer.cout))
