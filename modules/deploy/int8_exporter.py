"""An LSQ+ Network on integers: 8-bit activations and weights on the trained scales, for any runtime.

Int8Exporter decides scales, zero points, biases and which tensors are quantised; a graph (onnx_models.OnnxGraph,
tflite_models.TfliteGraph) writes the operators. docs/onnx.md explains the numbers.

The shift of a tensor (quantisation.py) is taken off in the bias of the convolution that writes it and put back in that
of its reader.
"""
import numpy as np

from .float_exporter import Exporter, unit_of
from .quantisation import (
    IMAGE,
    REDUCED,
    SATURATING,
    FloatTensor,
    QuantisedTensor,
    QuantParams,
    Range,
    Target,
    activation_scale,
    affine,
    check_bits,
    lsq_target,
    params_for_range,
    signed_codes,
    tap_sums,
    weight_codes,
)

SWISH_ZERO = -7.0               # swish is within 0.007 of 0 below this
SWISH_GAP = 0.5                 # x - hswish(x) and x - swish(x) are less than this
SIGMOID = QuantParams(1 / 256)
HARD_SIGMOID = QuantParams(1 / 255)
MOST_CLIPPED = 0.1              # share of a scale's span that a shortcut may lose to it
MAP_FROM = 1.0                  # steps of the output: what a bias leaves is added as a map where it is more


class PendingTensor:
    """A tensor that is written when its reader is known: write(Target) adds the nodes and gives a QuantisedTensor.

    activation: that the reader may rely on; can_shift: whether the writer can take off a shift. write_float(shift):
    gives the FloatTensor without quantising it, None where the writer's result is codes.
    """

    def __init__(self, name, write, activation=None, can_shift=True, write_float=None):
        self.name, self.write, self.activation, self.can_shift = name, write, activation, can_shift
        self.write_float = write_float


class Int8Exporter(Exporter):
    """Writes a Network in int8 mode into a graph; values are PendingTensors, QuantisedTensors or FloatTensors.

    ranges: of quantisation.observe() on real images; reduce_range: weights of 7 bits.
    tensors: {op name: [tensor, scale, zero point, shift] of its input}.
    """

    def __init__(self, graph, ranges, reduce_range=False):
        super().__init__(graph)
        self.ranges, self.reduce_range, self.tensors = ranges, reduce_range, {}

    def write(self, network):
        """As of Exporter; UserError where an op has other than 8 bits, or weights of 7."""
        check_bits(network)
        return super().write(network)

    # -- values -----------------------------------------------------------------------------------------------

    def image(self):
        image = FloatTensor(self.graph.image)
        if self.graph.has_floats:
            return image
        return PendingTensor(IMAGE, lambda target: self.quantised(image, target, IMAGE + '.codes'))

    def op_input(self, value, name, op):
        """QuantisedTensor of `value` as the input of a quantised op called `name`."""
        padded = getattr(op, 'padding', (0, 0)) != (0, 0)
        if isinstance(value, FloatTensor):
            x, exact = value, value.tensor is self.graph.image
            value = PendingTensor(name, lambda target: self.quantised(x, target, name + '.input', exact))
        if isinstance(value, PendingTensor):
            value = self.written(value, lsq_target(op, value.activation, value.can_shift, padded))
        elif name not in self.tensors:              # the scale is another op's, or a calibrated one
            value = self.clipped(value, name, op)
        self.tensors[name] = [value.tensor, *value.params, value.shift]
        return value

    def written(self, pending, target):
        """QuantisedTensor of a PendingTensor by a Target."""
        x = pending.write(target)
        return x._replace(tensor=self.graph.clip(x.tensor, x.params, target.low, target.high))

    def clipped(self, x, name, op):
        """x, on another scale than a quantised op's, kept within the range of that one where it leaves it."""
        (scale, beta), seen = activation_scale(op), self.ranges[name + '.input']
        low, high = (min(255, max(0, round((end - x.shift) / x.params.scale + x.params.zero_point)))
                     for end in (beta, beta + 255 * scale))
        low = low if seen.low < beta - scale / 2 else 0
        high = high if seen.high > beta + 255.5 * scale else 255
        return x._replace(tensor=self.graph.clip(x.tensor, x.params, low, high, shared=True))

    def calibrated(self, value, shift=0.0):
        """QuantisedTensor of a value, of a PendingTensor on its range in the calibration images.

        shift: of that, if it can have one.
        """
        if not isinstance(value, PendingTensor):
            return value
        seen = self.ranges[value.name]
        if value.activation in SATURATING:
            return self.written(value, Target(QuantParams(max(seen.high, 1e-6) / 255)))
        shift = shift if value.can_shift else 0.0
        return self.written(value, Target(params_for_range(seen.low - shift, seen.high - shift), shift))

    def quantised(self, x, target, name, exact=False):
        """QuantisedTensor of a FloatTensor. A shift other than the target's stays, for the reader to put right: the
        codes then lie between torch's. exact: a subtraction before the quantiser instead, where the graph has floats.
        """
        tensor, shift = x
        if exact and self.graph.has_floats:
            tensor, shift = self.graph.minus(tensor, target.shift - shift), target.shift
        return QuantisedTensor(self.graph.quantise(tensor, target.params, name), target.params, shift)

    def as_float(self, value, shift=0.0):
        """FloatTensor of a value that several readers share; `shift`: the one they would like."""
        if isinstance(value, PendingTensor):
            if value.write_float and self.graph.has_floats:
                return value.write_float(shift)
            value = self.calibrated(value, shift)
        if isinstance(value, QuantisedTensor):
            return FloatTensor(self.graph.dequantise(value.tensor, value.params), value.shift)
        return value

    # -- layers -----------------------------------------------------------------------------------------------

    def conv(self, x, op, norm, activation, name):
        """PendingTensor of activation(norm(op(x)))."""
        x, unit = self.op_input(x, name, op), unit_of(name)
        if norm is None:                            # of SE, or before the last of a stack: the op's own output
            return PendingTensor(name, lambda target: self.write_conv(x, op, None, name, target), activation)
        return self.activated(lambda target, swish=None: self.write_conv(x, op, norm, name, target, swish=swish),
                              activation, self.ranges[unit + '.norm'], unit)

    def write_conv(self, x, op, norm, name, target, gain=1.0, offset=0.0, swish=None):
        """QuantisedTensor of gain * norm(op(x)) + offset by a Target; swish: of this activation of it, in float."""
        graph, (codes, scale) = self.graph, weight_codes(op, self.reduce_range)
        factor, bias = affine(op, norm)
        factor, bias = factor * scale * gain, bias * gain + offset - (0.0 if swish else target.shift)
        hw = self.ranges[name + '.input'].hw
        border = tap_sums(op, codes.sum(1) * (x.shift * factor)[:, None, None], hw)  # what the shift adds to each pixel
        bias = bias + border.mean((1, 2))
        codes, scales = signed_codes(codes, factor, bias, x.params.scale,
                                     REDUCED if self.reduce_range or op.nbits_w < 8 else 127)
        steps = x.params.scale * scales
        # what a bias by channel and in whole steps leaves
        left = border + (bias - np.round(bias / steps) * steps - border.mean((1, 2)))[:, None, None]
        y, most = graph.int8_convolution(x, codes, scales, bias, op, name), np.abs(left).max()
        if most > MAP_FROM * target.params.scale:
            if swish is None:
                params = self._before_sum(name, norm, target, most, gain, offset)
                y = graph.dequantise(graph.quantise(y, params, name + '.part'), params)
            left = graph.constant_map(left, params_for_range(left.min(), left.max()), name + '.left')
            y = graph.sum(y, left, name + '.sum')
        if swish is not None:
            y = graph.minus(graph.activated(y, swish, name + '.swish'), target.shift)
        return QuantisedTensor(graph.quantise(y, target.params, name), target.params, target.shift)

    def _before_sum(self, name, norm, target, most, gain, offset):
        """QuantParams of a convolution's result to which up to `most` is added before `target` quantises it."""
        seen, params = self.ranges[name if norm is None else unit_of(name) + '.norm'], target.params
        # what saturates by the target needs no codes here
        low = max(gain * seen.low + offset - target.shift, -params.scale * params.zero_point) - most
        high = min(gain * seen.high + offset - target.shift, params.scale * (255 - params.zero_point)) + most
        return params_for_range(low, high)

    def activated(self, write, activation, before, name, write_float=None):
        """PendingTensor of an activation of what write(Target, swish=None) writes; before: Range of that.

        swish: the activation, taken in float. A swish is operators on codes where the graph does not take it in the
        operator before.
        """
        if activation is None or activation in SATURATING:
            return PendingTensor(name, write, activation, write_float=write_float)
        if self.graph.float_swish:
            def write_codes(target):
                return write(target, swish=activation)
        else:
            write_swish = self.hswish if activation == 'hswish' else self.swish

            def write_codes(target):
                y = write_swish(write, before, target.params, name)
                return QuantisedTensor(self.graph.quantise(y, target.params, name + '.codes'), target.params)
        return PendingTensor(name, write_codes, can_shift=self.graph.float_swish, write_float=write_float)

    def hswish(self, write, before, wanted, name):
        """Float hswish of codes that have their first one at -3, below which it is 0; wanted: QuantParams of it."""
        zero_point = max(1, int(3 * 255 / (_swish_end(before, wanted) + 3)))
        params = QuantParams(3 / zero_point, zero_point)
        return self.graph.hswish(write(Target(params)).tensor, params, name)

    def swish(self, write, before, wanted, name):
        """Float swish of codes and of its sigmoid's; wanted: QuantParams of it."""
        graph, params = self.graph, params_for_range(max(before.low, SWISH_ZERO), _swish_end(before, wanted))
        x = write(Target(params)).tensor
        gate = graph.quantise(graph.sigmoid(graph.dequantise(x, params), name + '.sigmoid'), SIGMOID, name + '.gate')
        return graph.product(graph.dequantise(x, params), graph.dequantise(gate, SIGMOID), name)

    def mean(self, x, name):
        """PendingTensor of the global mean of x."""
        x = self.calibrated(x)

        def write(target):
            mean = self.graph.mean(self.graph.dequantise(x.tensor, x.params), name)
            return QuantisedTensor(self.graph.quantise(mean, target.params, name + '.codes'), target.params)
        return PendingTensor(name, write, can_shift=False)

    def squeeze_excite(self, x, reduce, expand, name):
        """x times its gate; the hard sigmoid is the saturation of the second convolution's codes."""
        graph, x = self.graph, self.calibrated(x)
        inner = self.conv(self.mean(x, name + '.mean'), reduce, None, 'relu', name + '.fc.reduce')
        inner = self.op_input(inner, name + '.fc.expand', expand)
        gate = self.write_conv(inner, expand, None, name + '.fc.expand', Target(HARD_SIGMOID), 1 / 6, 0.5).tensor

        def write(target):
            y = graph.product(graph.dequantise(x.tensor, x.params), graph.dequantise(gate, HARD_SIGMOID), name)
            return QuantisedTensor(graph.quantise(y, target.params, name + '.codes'), target.params)
        return PendingTensor(name, write, can_shift=False)

    def flatten(self, x, name):
        return x                                    # linear() does it

    def linear(self, x, op, name):
        """Logits of a value."""
        x, (codes, scale) = self.op_input(x, name, op), weight_codes(op, self.reduce_range)
        bias = op.bias.detach().double().numpy() + x.shift * scale * codes.sum(1)
        return self.output(self.graph.int8_matmul(x, codes, scale, bias, name), name)

    def features(self, x, name):
        """Features of the value of the last block, called `name`."""
        x = self.as_float(x)
        y = self.output(self.graph.plus(x.tensor, x.shift), name) if x.shift else x.tensor
        return self.graph.features(y)

    def output(self, x, name):
        """What leaves the network: the float tensor x, quantised on its own range where the graph has no floats."""
        seen = self.ranges[name]
        if self.graph.has_floats:
            return x
        return self.graph.quantise(x, params_for_range(seen.low, seen.high), name + '.output')

    # -- blocks -----------------------------------------------------------------------------------------------

    def block(self, x, block, name):
        if isinstance(x, PendingTensor) and any(layer.op == 'add' for layer in block.layers):
            x = self.shared(x, block, name)
        y = super().block(x, block, name)
        if isinstance(y, PendingTensor):
            y.name = name                               # ranges of the block's output
        return y

    def shared(self, x, block, name):
        """QuantisedTensor or FloatTensor of a PendingTensor that both branches of a block read.

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
        margin = MOST_CLIPPED * 255 * scale
        if beta - margin <= low and high <= beta + 255 * scale + margin:
            return self.op_input(x, op_name, op)
        shift = lsq_target(op, None, can_shift=True, padded=False).shift
        return self.as_float(x, shift) if self.graph.has_floats else self.calibrated(x, shift)

    def add(self, y, shortcut, activation, name):
        """PendingTensor of activation(y + shortcut)."""
        graph = self.graph

        def total(shift):
            # which side can take off the shift
            main_can = isinstance(y, PendingTensor) and y.activation not in SATURATING
            other = self.as_float(shortcut, 0.0 if main_can else shift)
            main = self.as_float(y, shift - other.shift)
            return FloatTensor(graph.sum(main.tensor, other.tensor, name + '.add'), main.shift + other.shift)

        def write_float(shift):
            if activation is None:
                return total(shift)
            x = total(0.0)
            return FloatTensor(graph.activated(graph.plus(x.tensor, x.shift), activation, name))

        def write(target, swish=None):
            return self.quantised(write_float(0.0) if swish else total(target.shift), target, name, exact=bool(swish))
        before = Range(SWISH_ZERO, self.ranges[name].high + SWISH_GAP)
        return self.activated(write, activation, before, name, write_float)


def _swish_end(before, wanted):
    """Largest value of a swish's input that is needed; before: its Range, wanted: QuantParams of the output."""
    return max(1e-3, min(before.high, (255 - wanted.zero_point) * wanted.scale + SWISH_GAP))


def first_op(name, unit):
    """(name, op) of the first convolution of a unit."""
    if hasattr(unit, 'conv'):
        return name + '.conv', unit.conv
    return (name + '.dwconv', unit.dwconv) if hasattr(unit.dwconv, 'weight') else (name + '.dwconv.0', unit.dwconv[0])
