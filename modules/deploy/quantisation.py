"""The numbers of an INT8 model: weights as integers, scales and zero points, and ranges of tensors seen on images.

A tensor's real value is scale * (code - zero_point) + shift. The shift is what LSQ+'s real-valued beta leaves of an
integer zero point; docs/onnx.md explains it.
"""
import contextlib
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..modeling.ops.fake_quantise import positive_scale
from ..modeling.ops.lsq_plus import WEIGHT_BITS, QBase, quantised_ops, quantize_activation

IMAGE = 'input'                 # what models and ranges call the image
REDUCED = 63                    # largest weight of 7 bits: two products with uint8 fit into int16
# activations that the saturation of the codes computes, and their largest values
SATURATING = {'relu': np.inf, 'relu6': 6.0}


class QuantParams(NamedTuple):
    """Scale and integer zero point of 8-bit codes."""
    scale: float
    zero_point: int = 0


class QuantisedTensor(NamedTuple):
    """A tensor of codes in a graph; `tensor` is what the graph calls it."""
    tensor: object
    params: QuantParams
    shift: float = 0.0


class FloatTensor(NamedTuple):
    """A float tensor of a graph; its value is tensor + shift."""
    tensor: object
    shift: float = 0.0


class Target(NamedTuple):
    """How a reader wants a tensor: quantised by `params` with `shift`, codes within low..high."""
    params: QuantParams
    shift: float = 0.0
    low: int = 0
    high: int = 255


def params_for_range(low, high):
    """QuantParams of codes that cover low..high and hold 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-6) / 255
    return QuantParams(scale, round(-low / scale))


def lsq_target(op, activation, can_shift, padded):
    """Target of a quantised op's input on its LSQ+ scale.

    activation: what made the tensor, None: anything; can_shift: whether its writer can take off a shift; padded: zeros
    are added around it, so that 0 has to be a code.
    """
    scale, beta = activation_scale(op)
    zero_point = round(-beta / scale)
    top = SATURATING.get(activation, np.inf)
    if not can_shift or (padded and zero_point < 0) or zero_point > 255:
        return _unshifted_target(scale, beta, top)
    zero_point = max(0, zero_point)
    low = zero_point if activation in SATURATING else 0         # codes below that of 0 do not occur
    high = 255 if top == np.inf else min(255, max(low, round((top - beta) / scale)))
    return Target(QuantParams(scale, zero_point), beta + scale * zero_point, low, high)


def _unshifted_target(scale, beta, top):
    """Target without a shift of an LSQ+ scale whose values end at `top`."""
    low, high, zero_point = min(beta, 0.0), max(beta + 255 * scale, 0.0), round(-beta / scale)
    params = QuantParams(scale, zero_point)
    if beta > 0 or low == high or zero_point > 255:
        params = params_for_range(low, high)

    def code(value):
        return round(value / params.scale) + params.zero_point
    return Target(params, 0.0, max(0, code(beta)) if beta > 0 else 0, 255 if top == np.inf else min(255, code(top)))


# -- weights ----------------------------------------------------------------------------------------------------

def _array(tensor):
    return tensor.detach().cpu().double().numpy()


def affine(op, norm):
    """(factor, bias) by output channel of what follows an op's sum: its bias, then batch norm (or None)."""
    channels = len(op.weight)
    bias = np.zeros(channels) if op.bias is None else _array(op.bias)
    if norm is None:
        return np.ones(channels), bias
    factor = _array(norm.weight) / np.sqrt(_array(norm.running_var) + norm.eps)
    return factor, _array(norm.bias) + factor * (bias - _array(norm.running_mean))


def fold_norm(op, norm):
    """(weight, bias) of the op that does what op and batch norm (or None) do."""
    factor, bias = affine(op, norm)
    return _array(op.weight) * _by_channel(factor, op.weight), bias


def _by_channel(values, weight):
    """Values by output channel, to be multiplied with a weight."""
    return values.reshape(-1, *[1] * (weight.ndim - 1))


def weight_codes(op, reduce_range=False):
    """(integers of -128..127 as float64, scale) of an op's LSQ+ weights, exactly as torch rounds them in float32.

    reduce_range: integers of -REDUCED..REDUCED, and a scale for each output channel: LSQ+'s where the integers of
    that fit, up to twice as large where they do not. Weights that were trained with 7 bits, -64..63, stay as they are.
    """
    scale, high = positive_scale(op.sw.detach(), op.nbits_w), 2 ** (op.nbits_w - 1) - 1
    steps = _array((op.weight.detach() / scale).clamp(-high - 1, high))
    if not reduce_range or high <= REDUCED:
        return steps.round(), float(scale)
    widen = np.maximum(1, np.abs(steps.round()).reshape(len(steps), -1).max(1) / REDUCED)
    return (steps / _by_channel(widen, steps)).round(), float(scale) * widen


def signed_codes(codes, factor, bias, step, most=1):
    """(integers, positive scales) by output channel of the weights codes * factor.

    A negative factor turns the signs of its channel's integers (-128 becomes 127). A vanishing one (gamma 0) is kept so
    large that the bias, in steps of the input's `step` times it, fits into int32: ONNX Runtime rounds float ones too.
    A channel of small integers has them multiplied by a whole number, up to `most`, and its scale divided by it: the
    same products, and finer steps for the bias.
    """
    least = np.maximum(np.abs(bias) / (step * 2.0 ** 30), 1e-20)
    scales = np.maximum(np.abs(factor), least)
    codes = np.round(codes * _by_channel(np.sign(factor) * (np.abs(factor) / scales), codes)).clip(-128, 127)
    largest = np.abs(codes).reshape(len(codes), -1).max(1)
    times = np.maximum(1, np.floor(np.minimum(most / np.maximum(largest, 1), scales / least)))
    return codes * _by_channel(times, codes), scales / times


def activation_scale(op):
    """(sa, beta) of an op's input as LSQ+ uses them; with a whole zero point beta is exactly a multiple of sa."""
    scale, zero_point = float(positive_scale(op.sa.detach(), op.nbits_a)), op.zero_point()
    return scale, float(op.beta.detach()) if zero_point is None else -scale * float(zero_point.detach())


def tap_sums(op, taps, hw):
    """(C', H', W'): the sum of `taps` (C', kh, kw) that lie inside the map at each output pixel.

    hw: input (height, width). It is what a constant 1 in every pixel of the input, padded with zeros, adds up to.
    """
    inside = []
    for size, kernel, stride, padding in zip(hw, op.kernel_size, op.stride, op.padding):
        positions = np.arange((size + 2 * padding - kernel) // stride + 1)[:, None] * stride - padding
        positions = positions + np.arange(kernel)
        inside.append(((positions >= 0) & (positions < size)).astype(float))
    return np.einsum('ckl,hk,wl->chw', taps, *inside)


def check_bits(network):
    """UserError unless all ops of a Network have the bits of INT8 models."""
    bits = {(op.nbits_a, op.nbits_w) for op in quantised_ops(network)}
    if not bits <= {(8, weight_bits) for weight_bits in WEIGHT_BITS}:
        raise UserError(f'an INT8 model needs 8 bits in every op, or 7 of weights; the network has {sorted(bits)}')


# -- ranges -----------------------------------------------------------------------------------------------------

class Range:
    """Least and largest value of a tensor and its (height, width)."""

    def __init__(self, low=float('inf'), high=float('-inf')):
        self.low, self.high, self.hw = low, high, None

    def see(self, x):
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        self.hw = tuple(x.shape[2:])


@contextlib.contextmanager
def _hooks(network, see):
    """see(name, module, input, output) after every module of the network."""
    handles = [module.register_forward_hook(lambda m, args, out, name=name: see(name, m, args[0], out))
               for name, module in network.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(network, batches):
    """{module name: Range of its output} over batches of images, network in eval mode as it is, fp32 or int8.

    `<name>.input` is that of a quantised op's input, IMAGE that of the images. LSQ+ scales that are not initialised yet
    are by the first batch.
    """
    ranges = {IMAGE: Range()}

    def see(name, module, x, y):
        ranges.setdefault(name, Range()).see(y)
        if isinstance(module, QBase):
            ranges.setdefault(name + '.input', Range()).see(x)

    seen = 0
    with _hooks(network.eval(), see):
        for images in batches:
            seen += len(images)
            ranges[IMAGE].see(images)
            network(images)
    if not seen:
        raise UserError('no images to calibrate with')
    return ranges


@torch.no_grad()
def op_inputs(network, images):
    """({op name: its fake-quantised input}, logits) of an int8 Network."""
    inputs = {}

    def see(name, module, x, y):
        if isinstance(module, QBase):
            inputs[name] = quantize_activation(x, module.sa, module.nbits_a, module.offset(), False)

    with _hooks(network.eval(), see):
        logits = network(images)
    return inputs, logits
