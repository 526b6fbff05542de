"""An LSQ+ Network as INT8 ONNX: uint8 activations and int8 weights on the trained scales. docs/onnx.md explains it.

A tensor's real value is scale * (code - zero) + shift. The shift is what LSQ+'s real-valued beta leaves of an integer
zero point: it is taken off in the bias of the convolution that writes the tensor and put back in that of the reader.
"""
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..modeling.blocks import run_layers
from ..modeling.ops.lsq_plus import quantised_ops
from .folding import activation_scale, affine, tap_sums, weight_codes
from .graph import IMAGE, Graph
from .onnx_fp32 import conv_attributes, io_sizes, named_blocks, write_activation

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
    """A uint8 tensor of the graph."""
    name: str
    grid: Grid
    shift: float = 0.0


class Real(NamedTuple):
    """A float tensor of the graph; the value is tensor + shift."""
    name: str
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
    if activation in TOPS:              # codes below the one of 0 do not occur: begin with that one
        first = max(0, zero)
        last = 255 if top == np.inf else min(255, max(0, round((top - beta) / scale)))
        return Target(Grid(scale, 0), beta + scale * first, 0, max(0, last - first))
    zero = max(0, zero)
    return Target(Grid(scale, zero), beta + scale * zero)


class Pending:
    """A tensor whose maker waits for its reader: write(Target) adds the nodes and gives the Codes.

    activation: that the reader may rely on; movable: whether the maker can take off a shift. write_real(shift):
    gives the tensor as a Real without quantising it, None where the maker's result is codes.
    """

    def __init__(self, name, write, activation=None, movable=True, write_real=None):
        self.name, self.write, self.activation, self.movable = name, write, activation, movable
        self.write_real = write_real


class Int8Exporter:
    """Writes a Network in int8 mode into self.graph; ranges: of trace.observe()."""

    def __init__(self, ranges):
        self.graph, self.ranges, self.tensors = Graph(), ranges, {}

    # -- values -----------------------------------------------------------------------------------------------

    def codes(self, value, name, op):
        """Codes of `value` as the input of a quantised op called `name`."""
        padded = bool(getattr(op, 'padding', (0, 0)) != (0, 0))
        if isinstance(value, Real):
            real, exact = value, value.name == IMAGE
            value = Pending(name, lambda target: self.quantised(real, target, name + '.input', exact))
        if isinstance(value, Pending):
            value = self.written(value, lsq_target(op, value.activation, value.movable, padded))
        self.tensors[name] = [value.name, value.grid.scale, value.grid.zero, value.shift]
        return value

    def written(self, pending, target):
        """Codes of a Pending on a Target."""
        codes = pending.write(target)
        return codes._replace(name=self.graph.clip_codes(codes.name, target.low, target.high))

    def calibrated(self, pending, shift=0.0):
        """Codes of a Pending on the grid of its range in the calibration images."""
        seen = self.ranges[pending.name]
        if pending.activation in TOPS:
            return self.written(pending, Target(Grid(max(seen.high, 1e-6) / 255)))
        return self.written(pending, Target(span_grid(seen.low - shift, seen.high - shift), shift))

    def quantised(self, real, target, name, exact=False):
        """Codes of a Real. A shift other than the target's stays, for the reader to put right: the codes then lie
        between torch's. exact: a subtraction before the quantiser instead."""
        x, shift = real
        if exact and target.shift != shift:
            x = self.graph.add('Sub', [x, self.graph.constant('shift', target.shift - shift)], name + '.shifted')
            shift = target.shift
        return Codes(self.graph.quantise(x, target.grid, name), target.grid, shift)

    def real(self, value, shift=0.0):
        """Real of a value that several readers share; `shift`: the one they would like."""
        if isinstance(value, Pending):
            if value.write_real:
                return value.write_real(shift)
            value = self.calibrated(value, shift if value.movable and value.activation not in TOPS else 0.0)
        if isinstance(value, Codes):
            return Real(self.graph.real(value.name, value.grid), value.shift)
        return value

    # -- layers -----------------------------------------------------------------------------------------------

    def conv_node(self, x, op, norm, name, target, gain=1.0, offset=0.0):
        """Codes of gain * norm(op(x)) + offset on a Target; x: Codes."""
        graph, (codes, scale) = self.graph, weight_codes(op)
        factor, bias = affine(op, norm)
        factor, bias = factor * scale * gain, bias * gain + offset - target.shift
        hw = self.ranges[name + '.input'].hw
        border = tap_sums(op, codes.sum(1) * (x.shift * factor)[:, None, None], hw)  # what the shift adds to each pixel
        bias = bias + border.mean((1, 2))
        codes = codes * np.where(factor < 0, -1, 1)[:, None, None, None]
        # a vanishing factor (gamma 0) would take the bias out of int32
        least = np.maximum(np.abs(bias) / (x.grid.scale * 2.0 ** 30), 1e-20)
        scales = np.maximum(np.abs(factor), least)
        codes = np.round(codes * (np.abs(factor) / scales)[:, None, None, None]).clip(-128, 127)
        steps = x.grid.scale * scales
        # what a bias by channel and in whole steps leaves
        left = border + (bias - np.round(bias / steps) * steps - border.mean((1, 2)))[:, None, None]
        most, final = np.abs(left).max(), target
        if most > LEFT * target.grid.scale:
            target = self._before_sum(name, norm, target, most, gain, offset)
        weight = self._constant(name + '.weight', codes, scales, np.int8)
        bias = self._constant(name + '.bias', np.round(bias / steps), steps, np.int32)
        y = graph.add('Conv', [graph.real(x.name, x.grid), weight, bias], name + '.float', **conv_attributes(op))
        y = graph.quantise(y, target.grid, name)
        if target is not final:
            grid = span_grid(left.min(), left.max())
            left = graph.constant(name + '.left', np.round(left[None] / grid.scale).clip(-grid.zero, 255 - grid.zero)
                                  + grid.zero, np.uint8)
            y = graph.add('Add', [graph.real(y, target.grid), graph.real(left, grid)], name + '.sum')
            y = graph.quantise(y, final.grid, name + '.codes')
        return Codes(y, final.grid, final.shift)

    def _before_sum(self, name, norm, target, most, gain, offset):
        """Target of a convolution to which up to `most` is added before the codes that `target` wants."""
        unit = name.rsplit('.', 1)[0].removesuffix('.dwconv')           # of unit.conv, unit.dwconv or unit.dwconv.2
        seen = self.ranges[name if norm is None else unit + '.norm']
        grid = target.grid                          # what saturates there needs no codes here
        low = max(gain * seen.low + offset - target.shift, -grid.scale * grid.zero) - most
        high = min(gain * seen.high + offset - target.shift, grid.scale * (255 - grid.zero)) + most
        return Target(span_grid(low, high), target.shift)

    def _constant(self, name, codes, scales, dtype):
        graph = self.graph
        zeros = graph.constant('zeros', np.zeros(len(scales)), dtype)
        return graph.add('DequantizeLinear', [graph.constant(name + '.codes', codes, dtype),
                                              graph.constant(name + '.scale', scales), zeros], name, axis=0)

    def conv(self, x, op, norm, name, activation):
        """Pending of activation(norm(op(x))); a swish is a node of its own."""
        x = self.codes(x, name, op)
        unit = name.rsplit('.', 1)[0]
        if activation is None or activation in TOPS:
            return Pending(unit, lambda target: self.conv_node(x, op, norm, name, target), activation)
        return self.swished(lambda target: self.conv_node(x, op, norm, name, target), unit, activation)

    def swished(self, write, name, activation):
        """Pending of hswish or swish of what write() writes, two passes over bytes; name: the unit's."""
        graph, before = self.graph, self.ranges[name + '.norm']

        def write_codes(target):
            high = max(1e-3, min(before.high, (255 - target.grid.zero) * target.grid.scale + HSWISH_SLACK))
            if activation == 'hswish':          # x * clip(x + 3, 0, 6) / 6, with code 0 at -3
                zero = max(1, int(3 * 255 / (high + 3)))
                grid, gate_grid = Grid(3 / zero, zero), Grid(0.5 / zero)
                x = write(Target(grid)).name
                gate = graph.clip_codes(x, 0, min(255, 2 * zero))
            else:
                grid, gate_grid = span_grid(max(before.low, SWISH_ZERO), high), Grid(GATE)
                x = write(Target(grid)).name
                gate = graph.quantise(graph.add('Sigmoid', [graph.real(x, grid)], name + '.sigmoid'), gate_grid,
                                      name + '.gate')
            product = graph.add('Mul', [graph.real(x, grid), graph.real(gate, gate_grid)], name)
            return Codes(graph.quantise(product, target.grid, name + '.codes'), target.grid)
        return Pending(name, write_codes, movable=False)

    def stack(self, x, unit, name, activation):
        for i, op in enumerate(unit.dwconv):
            last = i == len(unit.dwconv) - 1
            op_name = f'{name}.dwconv.{i}'
            codes = self.codes(x, op_name, op)
            norm = unit.norm if last else None

            def write(target, codes=codes, op=op, norm=norm, op_name=op_name):
                return self.conv_node(codes, op, norm, op_name, target)
            if not last:
                x = Pending(op_name, write)
            elif activation is None or activation in TOPS:
                return Pending(name, write, activation)
            else:
                return self.swished(write, name, activation)

    def mean(self, x, name):
        """Pending of the global mean of Codes x."""
        def write(target):
            mean = self.graph.add('GlobalAveragePool', [self.graph.real(x.name, x.grid)], name)
            return Codes(self.graph.quantise(mean, target.grid, name + '.codes'), target.grid)
        return Pending(name, write, movable=False)

    def se(self, x, unit, name):
        """x times its gate; the hard sigmoid is the saturation of the second convolution's codes."""
        graph, x = self.graph, self.calibrated(x)
        reduce, expand = unit.fc.reduce, unit.fc.expand
        inner = self.conv(self.mean(x, name + '.mean'), reduce, None, name + '.fc.reduce', 'relu')
        inner = self.codes(inner, name + '.fc.expand', expand)
        grid = Grid(1 / 255)
        gate = self.conv_node(inner, expand, None, name + '.fc.expand', Target(grid), 1 / 6, 0.5).name

        def write(target):
            product = graph.add('Mul', [graph.real(x.name, x.grid), graph.real(gate, grid)], name)
            return Codes(graph.quantise(product, target.grid, name + '.codes'), target.grid)
        return Pending(name, write, movable=False)

    def linear(self, x, op, name):
        """Float logits of Codes x."""
        graph, (codes, scale) = self.graph, weight_codes(op)
        bias = op.bias.detach().double().numpy() + x.shift * scale * codes.sum(1)
        scales = np.full(len(codes), scale)
        weight = self._constant(name + '.weight', codes, scales, np.int8)
        bias = self._constant(name + '.bias', np.round(bias / (x.grid.scale * scales)), x.grid.scale * scales, np.int32)
        return graph.add('Gemm', [graph.real(x.name, x.grid), weight, bias], name, transB=1)

    def features(self, x):
        """Float tensor (N, features) of the value of the last block."""
        x = self.real(x)
        y = self.graph.add('Add', [x.name, self.graph.constant('shift', x.shift)], 'shifted') if x.shift else x.name
        return self.graph.add('Flatten', [y], 'features')

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
            x = self.codes(x, name, unit)
            flat = self.graph.add('Flatten', [x.name], name + '.flat')
            return self.linear(x._replace(name=flat), unit, name)
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
        what the shortcut needs; otherwise both read a float tensor.
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
        return self.real(x, lsq_target(op, None, True, False).shift)

    def add(self, y, shortcut, name, activation):
        """Pending of activation(y + shortcut)."""
        graph = self.graph

        def total(shift):
            free = isinstance(y, Pending) and y.activation not in TOPS          # which side can take off the shift
            other = self.real(shortcut, 0.0 if free else shift)
            main = self.real(y, shift - other.shift)
            return graph.add('Add', [main.name, other.name], name + '.add'), main.shift + other.shift

        def write_real(shift):
            x, left = total(0.0 if activation else shift)
            if activation and left:
                x, left = graph.add('Add', [x, graph.constant('shift', left)], name + '.shifted'), 0.0
            return Real(write_activation(graph, x, activation, name), left)

        def write(target):
            real = Real(*total(target.shift)) if activation in (None, *TOPS) else write_real(0.0)
            return self.quantised(real, target, name)
        return Pending(name, write, activation if activation in TOPS else None, write_real=write_real)


def first_op(name, unit):
    """(name, op) of the first convolution of a unit."""
    if hasattr(unit, 'conv'):
        return name + '.conv', unit.conv
    return (name + '.dwconv', unit.dwconv) if hasattr(unit.dwconv, 'weight') else (name + '.dwconv.0', unit.dwconv[0])


def export_int8(network, ranges, metadata=None):
    """ModelProto of a Network in int8 and eval mode on the CPU; ranges: of trace.observe() on real images."""
    bits = {(op.nbits_a, op.nbits_w) for op in quantised_ops(network)}
    if bits != {(8, 8)}:
        raise UserError(f'an INT8 model needs 8 bits in every op; the network has {sorted(bits)}')
    exporter, x = Int8Exporter(ranges), Real(IMAGE)
    for name, block in named_blocks(network):
        x = exporter.block(x, block, name)
    if not network.num_classes:
        x = exporter.features(x)
    shape, outputs = io_sizes(network)
    return exporter.graph.model(shape, x, outputs, {**(metadata or {}), 'tensors': exporter.tensors})
