"""The arithmetic of LSQ+: fake quantisation of tensors with its gradients, eager and by compiled kernels.

Sources: LSQ+ (Bhalgat et al., CVPR-W 2020), LSQ (Esser et al., ICLR 2020).
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...errors import UserError, one_line
from . import cpu_kernels
from .convolution import convolution, convolution_backward

OFF = 32                                    # bits of an op that does not quantise
_MIN_RANGE = 1e-7                           # a scale never falls below this / (2^b - 1)
_PIECE = 1 << 16                            # elements: four such tensors fit into a core's cache
_TRITON = ('cuda', 'meta')                  # devices of its kernels: meta to count what would be launched
_MOST = 1 << 31                             # elements of one of Triton's kernels, which count in int32
_use_kernels = False                        # compiled ones, see compile_quantisers()


class _Range(NamedTuple):
    """Levels low..high of a quantiser, the factor g of the gradients to its scale and offset, and its least scale."""
    low: int
    high: int
    gradient_factor: float
    least: float


def _flat(x):
    """1-d view of a dense tensor in the order of its memory; `x` must come from _dense()."""
    return x.permute(0, 2, 3, 1).reshape(-1) if x.ndim == 4 and not x.is_contiguous() else x.reshape(-1)


def _dense(x, like=None):
    """x without gaps in memory, in the memory order of `like` (default: its own)."""
    like = x if like is None else like
    channels_last = like.ndim == 4 and like.stride(1) == 1 and like.shape[2:] != (1, 1) and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _pieces(*tensors):
    """Corresponding pieces of dense tensors: on a CPU so small that several passes over them stay in its cache."""
    flat = [_flat(tensor) for tensor in tensors]
    return zip(*(tensor.split(_PIECE) for tensor in flat)) if flat[0].device.type == 'cpu' else [flat]


def _computed_in(dtype):
    """What quantisers of tensors of a type compute in: bf16 and fp16 have too few digits to tell levels apart."""
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def _gpu_kernels():
    """Imported where it is used: Triton comes with torch where torch runs on GPUs. UserError where it does not."""
    try:
        from . import gpu_kernels
    except ImportError as error:
        raise UserError(f'--compile: no Triton here: {one_line(error)[:200]}') from None
    return gpu_kernels


def _kernels(x, scale):
    """The compiled kernels for x: functions quantise and quantise_backward; None where there are none."""
    if not _use_kernels or scale.dtype != torch.float32 or _computed_in(x.dtype) != torch.float32:
        return None
    if x.device.type == 'cpu':
        return cpu_kernels if x.dtype == torch.float32 else None
    return _gpu_kernels() if x.device.type in _TRITON and x.numel() < _MOST else None


def compile_quantisers(enable=True):
    """From now on fake-quantise by compiled kernels: C++ on a CPU, Triton on a GPU; False: no more.

    The same numbers, but for the rounding of the sums in the gradients of scales and offsets.
    """
    global _use_kernels
    _use_kernels = enable


def check_quantisers(device):
    """Compile the kernels by a first use on `device`; UserError where that fails."""
    try:
        x, ones = torch.ones(1, device=device), torch.ones(1, device=device)
        for beta, levels in ((None, weight_range(x, 8)), (torch.zeros(1, device=device), activation_range(x, 8))):
            _quantise(x, ones, beta, levels)
            _quantise_backward(x, x, ones, beta, levels)
    except UserError:
        raise
    except Exception as error:                                  # of Triton and its compilers, of many kinds
        raise UserError(f'--compile: Triton does not work here: {one_line(error)[:200]}') from error


def _quantise(x, scale, beta, levels, dtype=None):
    """s * round(clamp((x - beta) / s, low, high)) + beta with s = positive(scale), cast once to dtype, by default x's.
    """
    x, dtype = _dense(x), dtype or x.dtype
    if kernels := _kernels(x, scale):
        return kernels.quantise(x, scale, beta, levels, dtype)
    scale, exact = positive(scale, levels.least), _computed_in(x.dtype)
    quantised = torch.empty_like(x, dtype=dtype)
    for v, y in _pieces(x, quantised):
        q = y if dtype == exact else torch.empty_like(v, dtype=exact)
        torch.div(v, scale, out=q) if beta is None else torch.sub(v, beta, out=q).div_(scale)
        q.clamp_(levels.low, levels.high).round_().mul_(scale)
        if beta is not None:
            q.add_(beta)                                        # not addcmul(), which rounds once less than published
        if q is not y:
            y.copy_(q)
    return quantised


def _quantise_backward(grad_y, x, scale, beta, levels):
    """(dx, dscale, dbeta) of _quantise() for dy. With s = positive(scale), v = (x - beta) / s and q = round(clamp(v)):

    dx     = dy where low <= v <= high, else 0                       (straight-through)
    dscale = sgn(scale) * g * (sum(dy * (q - v)) in the range, sum(dy * q) outside: q is low or high there)
    dbeta  = g * sum(dy) outside the range
    """
    x = _dense(x)
    grad_y = _dense(grad_y, like=x)
    if kernels := _kernels(x, scale):
        return kernels.quantise_backward(grad_y, x, scale, beta, levels)
    sign, scale = scale.sgn(), positive(scale, levels.least)
    exact, grad_x = _computed_in(x.dtype), torch.empty_like(x)
    grad_scale, grad_beta = [], []
    for v, dy, dx in _pieces(x, grad_y, grad_x):
        dy = dy.to(exact)
        v = torch.div(v, scale) if beta is None else torch.sub(v, beta).div_(scale)
        q = v.clamp(levels.low, levels.high)
        dv = torch.mul(dy, scale).mul_(q == v)                  # q == v exactly where v is in the range
        torch.div(dv, scale, out=dx) if dx.dtype == exact else dx.copy_(dv / scale)
        # two sums, in the order autograd would take them: they nearly cancel
        grad_scale.append(q.round_().mul_(dy).sum() - dv.mul_(v.div_(scale)).sum())
        if beta is not None:
            grad_beta.append(dy.sum() - dx.sum(dtype=exact))
    factor = levels.gradient_factor
    return (grad_x, factor * sign * torch.stack(grad_scale).sum(),
            None if beta is None else (factor * torch.stack(grad_beta).sum()).reshape(1))


class _FakeQuantize(torch.autograd.Function):
    """_quantise() of one tensor, keeping only the tensor for the backward pass."""

    @staticmethod
    def forward(ctx, x, scale, beta, levels):
        ctx.save_for_backward(x, scale, beta)
        ctx.levels = levels
        return _quantise(x, scale, beta, levels)

    @staticmethod
    def backward(ctx, grad_y):
        x, scale, beta = ctx.saved_tensors
        return *_quantise_backward(grad_y, x, scale, beta, ctx.levels), None


class QuantisedOp(torch.autograd.Function):
    """A convolution or linear layer of a fake-quantised input and weight.

    Keeps the input as it came and quantises it again for the backward pass: so int8 training holds no more activations
    than fp32 training, only the quantised weight in addition. levels_x, levels_w: _Range, None for off; geometry:
    (stride, padding, dilation, groups) of a convolution, None for a linear layer.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale_x, beta, scale_w, levels_x, levels_w, geometry):
        ctx.levels, ctx.geometry, ctx.bias_sizes = (levels_x, levels_w), geometry, None if bias is None else [len(bias)]
        weight = _dense(weight)                                 # a slice: not copied again by the backward pass
        used_x = QuantisedOp.operand(x, scale_x, beta, levels_x, _op_dtype(x))
        used_weight = QuantisedOp.operand(weight, scale_w, None, levels_w, used_x.dtype)
        ctx.save_for_backward(x, weight, used_weight, scale_x, beta, scale_w)
        if geometry is None:
            return F.linear(used_x, used_weight, bias)
        return convolution(used_x, used_weight, bias, *geometry)

    @staticmethod
    def operand(x, scale, beta, levels, dtype):
        """The numbers that the op multiplies, in dtype: the same in both passes."""
        return x.to(dtype) if levels is None else _quantise(x, scale, beta, levels, dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, used_weight, scale_x, beta, scale_w = ctx.saved_tensors
        levels_x, levels_w = ctx.levels
        wanted = ctx.needs_input_grad
        used_x = QuantisedOp.operand(x, scale_x, beta, levels_x, grad.dtype)
        # the scales' gradients come from those of what they quantise
        mask = [wanted[0] or levels_x is not None and (wanted[3] or wanted[4]),
                wanted[1] or levels_w is not None and wanted[5], wanted[2]]
        if ctx.geometry is None:
            grad_x = grad @ used_weight if mask[0] else None
            rows = grad.reshape(-1, grad.shape[-1])
            grad_weight = rows.t() @ used_x.reshape(len(rows), -1) if mask[1] else None
            grad_bias = rows.sum(0) if mask[2] else None
        else:
            grad_x, grad_weight, grad_bias = convolution_backward(grad, used_x, used_weight, ctx.bias_sizes,
                                                                  *ctx.geometry, mask)
        grad_scale_x = grad_beta = grad_scale_w = None
        if mask[0] and levels_x is not None:
            grad_x, grad_scale_x, grad_beta = _quantise_backward(grad_x, x, scale_x, beta, levels_x)
        if mask[1] and levels_w is not None:
            grad_weight, grad_scale_w, _ = _quantise_backward(grad_weight, weight, scale_w, None, levels_w)
        return grad_x, grad_weight, grad_bias, grad_scale_x, grad_beta, grad_scale_w, None, None, None


def _op_dtype(x):
    """What convolutions of x compute in, here: autocast's type, or its own."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def activation_range(activation, num_bits):
    high = 2 ** num_bits - 1
    per_sample = activation.numel() / max(1, activation.shape[0])
    return _Range(0, high, 1 / math.sqrt(max(1, per_sample) * high), least_scale(num_bits))


def weight_range(weight, num_bits):
    high = 2 ** (num_bits - 1) - 1
    return _Range(-high - 1, high, 1 / math.sqrt(weight.numel() * high), least_scale(num_bits))


def least_scale(num_bits):
    return _MIN_RANGE / (2 ** num_bits - 1)


def positive(scale, least):
    """|scale|, kept away from 0."""
    return scale.abs().clamp_min(least)


def positive_scale(scale, num_bits):
    """|scale|, kept away from 0: the step between two levels that training and export use."""
    return positive(scale, least_scale(num_bits))


def quantize_activation(activation, scale, num_bits, beta, is_training=True, training=None):
    """Fake-quantised activation, range 0..2^b-1 with offset beta; shapes: any (N, …), [1], [1].

    Gradients to scale and beta are multiplied by 1/sqrt(N_sample * (2^b - 1)), N_sample the elements of one
    sample. num_bits 32 returns the activation itself. Without `is_training` (or `training`, its other name) scale
    and beta are constants.
    """
    if num_bits == OFF:
        return activation
    if not (is_training if training is None else training):
        scale, beta = scale.detach(), beta.detach()
    levels = activation_range(activation, num_bits)
    return _FakeQuantize.apply(activation, scale, beta, levels)


def quantize_weight(weight, scale, num_bits, is_training=True, training=None):
    """Fake-quantised weight, range -2^(b-1)..2^(b-1)-1, no offset; shapes: any, [1].

    The gradient to scale is multiplied by 1/sqrt(numel * (2^(b-1) - 1)). num_bits 32 returns the weight itself.
    """
    if num_bits == OFF:
        return weight
    if not (is_training if training is None else training):
        scale = scale.detach()
    return _FakeQuantize.apply(weight, scale, None, weight_range(weight, num_bits))
