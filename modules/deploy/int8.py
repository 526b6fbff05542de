"""An LSQ+ Network on integers: 8-bit activations and weights on the trained scales, for any runtime.

Int8Exporter decides scales, zero points, biases and which tensors are quantised; a graph (graph.Graph for ONNX,
tf_graph.TfGraph for TFLite) writes the operators. docs/onnx.md explains the numbers.

A tensor's real value is scale * (code - zero) + shift. The shift is what LSQ+'s real-valued beta leaves of an integer
zero point: it is taken off in the bias of the convolution that writes the tensor and put back in that of the reader.
"""
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..modeling.blocks import run_layers
from ..modeling.network import named_blocks
from ..modeling.ops.lsq_plus import WEIGHT_BITS, quantised_ops
from .folding import activation_scale, affine, signed_codes, tap_sums, weight_codes
from .trace import Range

TOPS = {'relu': np.inf, 'relu6': 6.0}           # activations that saturation computes, and their upper ends
SWISH_ZERO = -7.0                               # swish is within 0.007 of 0 below this
CLIPPED = 0.1                                   # share of a scale's span that a shortcut may lose to it
HSWISH_SLACK = 0.5                              # x - hswish(x) and x - swish(x) are less than this
LEFT = 1.0                                      # steps of the output: what a bias leaves is added where it is more
GATE = 1 / 256                                  # scale of a sigmoid's codes


class Grid(NamedTuple):
    """scale and integer zero point of uint8 codes."""
    scale: float
    zero: int = 0


class Codes(NamedTuple):
    """A uint8 tensor of the graph, `tensor` what the graph calls it."""
    tensor: object
    grid: Grid
    shift: float = 0.0


class Real(NamedTuple):
    """A float tensor of the graph; the value is tensor + shift."""
    tensor: object
    shift: float = 0.0


class Target(NamedTuple):
    """How a reader wants a tensor: on `grid` with `shift`, codes within low..high."""
    grid: Grid
    shift: float = 0.0
    low: int = 0
    high: int = 255


def span_grid(low, high):
    """Grid that covers low..high and holds 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-6) / 255
    return Grid(scale, round(-low / scale))


def lsq_target(op, activation, movable, padded):
    """Target of a quantised op's input on its LSQ+ scale.

    activation: what made the tensor, None: anything; movable: its maker can take off a shift; padded: zeros are
    added around it, so that 0 has to be a code.
    """
    scale, beta = activation_scale(op)
    zero = round(-beta / scale)
    top = TOPS.get(activation, np.inf)
    if not movable or (padded and zero < 0) or zero > 255:
        low, high = min(beta, 0.0), max(beta + 255 * scale, 0.0)
        grid = span_grid(low, high) if beta > 0 or low == high or zero > 255 else Grid(scale, zero)
        return Target(grid, 0.0, max(0, round(beta / grid.scale) + grid.zero) if beta > 0 else 0,
                      255 if top == np.inf else min(255, round(top / grid.scale) + grid.zero))
    zero = max(0, zero)
    low = zero if activation in TOPS else 0         # codes below that of 0 do not occur
    high = 255 if top == np.inf else min(255, max(low, round((top - beta) / scale)))
    return Target(Grid(scale, zero), beta + scale * zero, low, high)


class Pending:
    """A tensor whose maker waits for its reader: write(Target) adds the nodes and gives the Codes.

    activation: that the reader may rely on; movable: whether the maker can take off a shift. write_real(shift):
    gives the tensor as a Real without quantising it, None where the maker's result is codes.
    """

    def __init__(self, name, write, activation=None, movable=True, write_real=None):
        self.name, self.write, self.activation, self.movable = name, write, activation, movable
        self.write_real = write_real


class Int8Exporter:
    """Writes a Network in int8 mode into a graph; ranges: of trace.observe(); reduce_range: weights of 7 bits.

    tensors: {op name: [tensor, scale, zero, shift] of its input}.
    """

    def __init__(self, graph, ranges, reduce_range=False):
        self.graph, self.ranges, self.reduce_range, self.tensors = graph, ranges, reduce_range, {}

    # -- values -----------------------------------------------------------------------------------------------

    def codes(self, value, name, op):
        """Codes of `value` as the input of a quantised op called `name`."""
        padded = bool(getattr(op, 'padding', (0, 0)) != (0, 0))
        if isinstance(value, Real):
            real, exact = value, value.tensor is self.graph.image
            value = Pending(name, lambda target: self.quantised(real, target, name + '.input', exact))
        if isinstance(value, Pending):
            value = self.written(value, lsq_target(op, value.activation, value.movable, padded))
        elif name not in self.tensors:              # the scale is another op's, or a calibrated one
            value = self.clipped(value, name, op)
        self.tensors[name] = [value.tensor, value.grid.scale, value.grid.zero, value.shift]
        return value

    def written(self, pending, target):
        """Codes of a Pending on a Target."""
        codes = pending.write(target)
        return codes._replace(tensor=self.graph.clip_codes(codes.tensor, codes.grid, target.low, target.high))

    def clipped(self, codes, name, op):
        """Codes on another scale than a quantised op's, kept within the range of that one where they leave it."""
        grid, (scale, beta), seen = codes.grid, activation_scale(op), self.ranges[name + '.input']
        low, high = (min(255, max(0, round((end - codes.shift) / grid.scale + grid.zero)))
                     for end in (beta, beta + 255 * scale))
        low = low if seen.low < beta - scale / 2 else 0
        high = high if seen.high > beta + 255.5 * scale else 255
        return codes._replace(tensor=self.graph.clip_codes(codes.tensor, grid, low, high))

    def calibrated(self, pending, shift=0.0):
        """Codes of a Pending on the grid of its range in the calibration images; `shift`: if it can have one."""
        seen = self.ranges[pending.name]
        if pending.activation in TOPS:
            return self.written(pending, Target(Grid(max(seen.high, 1e-6) / 255)))
        shift = shift if pending.movable else 0.0
        return self.written(pending, Target(span_grid(seen.low - shift, seen.high - shift), shift))

    def quantised(self, real, target, name, exact=False):
        """Codes of a Real. A shift other than the target's stays, for the reader to put right: the codes then lie
        between torch's. exact: a subtraction before the quantiser instead, where the graph has floats."""
        x, shift = real
        if exact and self.graph.floats:
            x, shift = self.graph.minus(x, target.shift - shift), target.shift
        return Codes(self.graph.quantise(x, target.grid, name), target.grid, shift)

    def real(self, value, shift=0.0):
        """Real of a value that several readers share; `shift`: the one they would like."""
        if isinstance(value, Pending):
            if value.write_real and self.graph.floats:
                return value.write_real(shift)
            value = self.calibrated(value, shift)
        if isinstance(value, Codes):
            return Real(self.graph.real(value.tensor, value.grid), value.shift)
        return value

    # -- layers -----------------------------------------------------------------------------------------------

    def conv_node(self, x, op, norm, name, target, gain=1.0, offset=0.0, swish=None):
        """Codes of gain * norm(op(x)) + offset on a Target; x: Codes. swish: of this activation of it, in float."""
        graph, (codes, scale) = self.graph, weight_codes(op, self.reduce_range)
        factor, bias = affine(op, norm)
        factor, bias = factor * scale * gain, bias * gain + offset - target.shift
        hw = self.ranges[name + '.input'].hw
        border = tap_sums(op, codes.sum(1) * (x.shift * factor)[:, None, None], hw)  # what the shift adds to each pixel
        bias = bias + border.mean((1, 2))
        codes, scales = signed_codes(codes, factor, bias, x.grid.scale)
        steps = x.grid.scale * scales
        # what a bias by channel and in whole steps leaves
        left = border + (bias - np.round(bias / steps) * steps - border.mean((1, 2)))[:, None, None]
        y, most = graph.conv((x.tensor, x.grid), op, codes, scales, bias, name), np.abs(left).max()
        if most > LEFT * target.grid.scale:
            if swish is None:
                grid = self._before_sum(name, norm, target, most, gain, offset)
                y = graph.real(graph.quantise(y, grid, name + '.part'), grid)
            y = graph.sum(y, graph.real_map(left, span_grid(left.min(), left.max()), name + '.left'), name + '.sum')
        if swish is not None:
            y = graph.activated(y, swish, name + '.swish')
        return Codes(graph.quantise(y, target.grid, name), target.grid, target.shift)

    def _before_sum(self, name, norm, target, most, gain, offset):
        """Grid of a convolution's result to which up to `most` is added before the codes that `target` wants."""
        unit = name.rsplit('.', 1)[0].removesuffix('.dwconv')           # of unit.conv, unit.dwconv or unit.dwconv.2
        seen = self.ranges[name if norm is None else unit + '.norm']
        grid = target.grid                          # what saturates there needs no codes here
        low = max(gain * seen.low + offset - target.shift, -grid.scale * grid.zero) - most
        high = min(gain * seen.high + offset - target.shift, grid.scale * (255 - grid.zero)) + most
        return span_grid(low, high)

    def conv(self, x, op, norm, name, activation):
        """Pending of activation(norm(op(x))); a swish is a node of its own."""
        x = self.codes(x, name, op)
        unit = name.rsplit('.', 1)[0]
        if activation is None or activation in TOPS:
            return Pending(unit, lambda target: self.conv_node(x, op, norm, name, target), activation)
        return self.swished(lambda target, swish=None: self.conv_node(x, op, norm, name, target, swish=swish), unit,
                            activation, self.ranges[unit + '.norm'])

    def swished(self, write, name, activation, before):
        """Pending of hswish or swish of what write(Target, activation taken in float or None) writes, without floats
        where the graph does not take it in the operator before; before: Range of that."""
        graph = self.graph
        if graph.float_swish:
            return Pending(name, lambda target: write(target, activation), movable=False)

        def write_codes(target):
            high = max(1e-3, min(before.high, (255 - target.grid.zero) * target.grid.scale + HSWISH_SLACK))
            if activation == 'hswish':          # below -3 it is 0
                zero = max(1, int(3 * 255 / (high + 3)))
                grid = Grid(3 / zero, zero)
                product = graph.hswish(write(Target(grid)).tensor, grid, name)
            else:
                grid = span_grid(max(before.low, SWISH_ZERO), high)
                x = write(Target(grid)).tensor
                gate = graph.quantise(graph.sigmoid(graph.real(x, grid), name + '.sigmoid'), Grid(GATE), name + '.gate')
                product = graph.product(graph.real(x, grid), graph.real(gate, Grid(GATE)), name)
            return Codes(graph.quantise(product, target.grid, name + '.codes'), target.grid)
        return Pending(name, write_codes, movable=False)

    def stack(self, x, unit, name, activation):
        for i, op in enumerate(unit.dwconv):
            last = i == len(unit.dwconv) - 1
            op_name = f'{name}.dwconv.{i}'
            codes = self.codes(x, op_name, op)
            norm = unit.norm if last else None

            def write(target, swish=None, codes=codes, op=op, norm=norm, op_name=op_name):
                return self.conv_node(codes, op, norm, op_name, target, swish=swish)
            if not last:
                x = Pending(op_name, write)
            elif activation is None or activation in TOPS:
                return Pending(name, write, activation)
            else:
                return self.swished(write, name, activation, self.ranges[name + '.norm'])

    def mean(self, x, name):
        """Pending of the global mean of Codes x."""
        def write(target):
            mean = self.graph.mean(self.graph.real(x.tensor, x.grid), name)
            return Codes(self.graph.quantise(mean, target.grid, name + '.codes'), target.grid)
        return Pending(name, write, movable=False)

    def se(self, x, unit, name):
        """x times its gate; the hard sigmoid is the saturation of the second convolution's codes."""
        graph, x = self.graph, self.calibrated(x)
        reduce, expand = unit.fc.reduce, unit.fc.expand
        inner = self.conv(self.mean(x, name + '.mean'), reduce, None, name + '.fc.reduce', 'relu')
        inner = self.codes(inner, name + '.fc.expand', expand)
        grid = Grid(1 / 255)
        gate = self.conv_node(inner, expand, None, name + '.fc.expand', Target(grid), 1 / 6, 0.5).tensor

        def write(target):
            product = graph.product(graph.real(x.tensor, x.grid), graph.real(gate, grid), name)
            return Codes(graph.quantise(product, target.grid, name + '.codes'), target.grid)
        return Pending(name, write, movable=False)

    def linear(self, x, op, name):
        """Logits of a value."""
        x, (codes, scale) = self.codes(x, name, op), weight_codes(op, self.reduce_range)
        bias = op.bias.detach().double().numpy() + x.shift * scale * codes.sum(1)
        return self.output(self.graph.linear((x.tensor, x.grid), codes, scale, bias, name), name)

    def features(self, x, name):
        """Features of the value of the last block, called `name`."""
        x = self.real(x)
        y = self.output(self.graph.plus(x.tensor, x.shift), name) if x.shift else x.tensor
        return self.graph.flatten(y, 'features')

    def output(self, x, name):
        """What leaves the network: the float tensor x, quantised on its own range where the graph has no floats."""
        seen = self.ranges[name]
        return x if self.graph.floats else self.graph.quantise(x, span_grid(seen.low, seen.high), name + '.output')

    # -- blocks -----------------------------------------------------------------------------------------------

    def unit(self, x, layer, unit, name):
        if layer.op == 'conv':
            return self.conv(x, unit.conv, unit.norm, name + '.conv', layer.activation)
        if layer.op == 'dwconv':
            return self.conv(x, unit.dwconv, unit.norm, name + '.dwconv', layer.activation)
        if layer.op == 'dwstack':
            return self.stack(x, unit, name, layer.activation)
        if layer.op == 'se':
            return self.se(x, unit, name)
        if layer.op == 'mean':
            return self.mean(self.calibrated(x) if isinstance(x, Pending) else x, name)
        if layer.op == 'linear':
            return self.linear(x, unit, name)
        return x                                    # flatten, dropout

    def block(self, x, block, name):
        """Value of a block's output; x: a Pending, or the images (Real)."""
        shared = any(layer.op == 'add' for layer in block.layers)
        if shared and isinstance(x, Pending):
            x = self.shared(x, block, name)
        y = run_layers(block.layers, lambda layer, v: self.unit(v, layer, getattr(block, layer.name),
                                                                f'{name}.{layer.name}'), x,
                       lambda y, shortcut, activation: self.add(y, shortcut, name, activation))
        if isinstance(y, Pending) and not shared:
            y.name = name                               # ranges of the block's output
        return y

    def shared(self, x, block, name):
        """Codes or Real of a Pending that both branches of a block read.

        The codes on the scale of the main branch's first convolution do for the shortcut too where that scale covers
        what the shortcut needs; otherwise both read a float tensor, or codes on a calibrated scale where there is none.
        """
        first = block.layers[0]
        op_name, op = first_op(f'{name}.{first.name}', getattr(block, first.name))
        scale, beta = activation_scale(op)
        seen = self.ranges[op_name + '.input']
        low, high = seen.low, seen.high
        if any(layer.shortcut for layer in block.layers):
            other_scale, other_beta = activation_scale(block.downsample.conv)
            low, high = max(low, other_beta), min(high, other_beta + 255 * other_scale)
        margin = CLIPPED * 255 * scale
        if beta - margin <= low and high <= beta + 255 * scale + margin:
            return self.codes(x, op_name, op)
        shift = lsq_target(op, None, True, False).shift
        return self.real(x, shift) if self.graph.floats else self.calibrated(x, shift)

    def add(self, y, shortcut, name, activation):
        """Pending of activation(y + shortcut)."""
        graph = self.graph

        def total(shift):
            free = isinstance(y, Pending) and y.activation not in TOPS          # which side can take off the shift
            other = self.real(shortcut, 0.0 if free else shift)
            main = self.real(y, shift - other.shift)
            return Real(graph.sum(main.tensor, other.tensor, name + '.add'), main.shift + other.shift)

        def write_real(shift):
            x, left = total(0.0 if activation else shift)
            return Real(graph.activated(graph.plus(x, left), activation, name)) if activation else Real(x, left)

        def write(target, swish=None):
            return self.quantised(write_real(0.0) if swish else total(target.shift), target, name)
        if activation is None or activation in TOPS:
            return Pending(name, write, activation, write_real=write_real)
        before = Range()
        before.low, before.high = SWISH_ZERO, self.ranges[name].high + HSWISH_SLACK
        pending = self.swished(write, name, activation, before)
        pending.write_real = write_real
        return pending


def first_op(name, unit):
    """(name, op) of the first convolution of a unit."""
    if hasattr(unit, 'conv'):
        return name + '.conv', unit.conv
    return (name + '.dwconv', unit.dwconv) if hasattr(unit.dwconv, 'weight') else (name + '.dwconv.0', unit.dwconv[0])


def check_bits(network):
    """UserError unless all ops of a Network have the bits of INT8 models."""
    bits = {(op.nbits_a, op.nbits_w) for op in quantised_ops(network)}
    if not bits <= {(8, weight_bits) for weight_bits in WEIGHT_BITS}:
        raise UserError(f'an INT8 model needs 8 bits in every op, or 7 of weights; the network has {sorted(bits)}')


def write_int8(graph, network, ranges, reduce_range=False):
    """(output, Int8Exporter) of a Network in int8 and eval mode on the CPU, written into a graph.

    ranges: of trace.observe() on real images; reduce_range: weights of 7 bits. UserError where an op
    has other than 8 bits, or weights of 7.
    """
    check_bits(network)
    exporter, x = Int8Exporter(graph, ranges, reduce_range), Real(graph.image)
    for name, block in named_blocks(network):
        x = exporter.block(x, block, name)
    return (x if network.num_classes else exporter.features(x, name)), exporter
