"""Batch norm folded into convolutions, and LSQ+ weights as integers."""
import numpy as np

from ..modeling.ops.fake_quantise import positive_scale

REDUCED = 63                    # largest weight of 7 bits: two products with uint8 fit into int16


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


def folded(op, norm):
    """(weight, bias) of the op that does what op and batch norm do."""
    factor, bias = affine(op, norm)
    return _array(op.weight) * _along(factor, op.weight), bias


def _along(values, weight):
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
    return (steps / _along(widen, steps)).round(), float(scale) * widen


def signed_codes(codes, factor, bias, step):
    """(integers, positive scales) by output channel of the weights codes * factor.

    A negative factor turns the signs of its channel's integers (-128 becomes 127). A vanishing one (gamma 0) is kept so
    large that the bias, in steps of the input's `step` times it, fits into int32: ONNX Runtime rounds float ones too.
    """
    scales = np.maximum(np.abs(factor), np.maximum(np.abs(bias) / (step * 2.0 ** 30), 1e-20))
    return np.round(codes * _along(np.sign(factor) * (np.abs(factor) / scales), codes)).clip(-128, 127), scales


def activation_scale(op):
    """(sa, beta) of an op's input as LSQ+ uses them; with a whole zero point beta is exactly a multiple of sa."""
    scale, zero = float(positive_scale(op.sa.detach(), op.nbits_a)), op.zero_point()
    return scale, float(op.beta.detach()) if zero is None else -scale * float(zero.detach())


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
