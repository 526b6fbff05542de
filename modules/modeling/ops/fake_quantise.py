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
_WARM_UP = 1 << 22                          # elements of the first use of compiled kernels
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
    """Corresponding pieces of dense tensors on a CPU, so small that several passes over them stay in its cache."""
    return zip(*(_flat(tensor).split(_PIECE) for tensor in tensors))


def _computed_in(dtype):
    """What quantisers of tensors of a type compute in: bf16 and fp16 have too few digits to tell levels apart."""
    return torch.promote_types(dtype, torch.float32)


def _quantise_flat(x, scale, beta, low, high, least, dtype):
    """_quantise() of a 1-d tensor as one expression, for GPUs."""
    x, scale = x.to(_computed_in(x.dtype)), positive(scale, least)
    q = (x / scale if beta is None else (x - beta) / scale).clamp(low, high).round()
    return (q * scale if beta is None else q * scale + beta).to(dtype)


def _quantise_backward_flat(dy, x, scale, beta, low, high, least):
    """_quantise_backward() of 1-d tensors as one expression, for GPUs; without the factor g."""
    dtype, exact = x.dtype, _computed_in(x.dtype)
    dy, x, sign, scale = dy.to(exact), x.to(exact), scale.sgn(), positive(scale, least)
    v = x / scale if beta is None else (x - beta) / scale
    q = v.clamp(low, high)
    inside = q == v
    dx = dy * inside
    grad_scale = torch.dot(dy, torch.addcmul(q.round(), v, inside, value=-1)) * sign
    return dx.to(dtype), grad_scale, None if beta is None else (dy - dx).sum().reshape(1)


@functools.cache
def _compiled(function):
    """The function compiled for tensors of any size, always called in one state: each other one would compile again."""
    compiled = torch.compile(function, dynamic=True)

    def run(x, *args):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return compiled(x, *args)
    return run


def _kernel(function, x):
    """The function of flat tensors as it runs on a device; None on a CPU: see _pieces()."""
    if x.device.type == 'cpu':
        return None
    return _compiled(function) if _use_kernels else function


def _has_cpu_kernel(x, scale):
    return _use_kernels and x.device.type == 'cpu' and x.dtype == scale.dtype == torch.float32


def compile_quantisers(enable=True):
    """From now on fake-quantise by compiled kernels: C++ on a CPU, torch.compile's elsewhere; False: no more.

    The same numbers, but for the rounding of the sums in the gradients of scales and offsets.
    """
    global _use_kernels
    _use_kernels = enable


def check_quantisers(device):
    """Compile the kernels by a first use on `device`; UserError where that fails.

    With the levels of int8 and as many numbers as large activations have: torch.compile sizes reductions for the first
    use.
    """
    try:
        x, ones = torch.ones(_WARM_UP, device=device), torch.ones(1, device=device)
        for beta, levels in ((None, weight_range(x, 8)), (torch.zeros(1, device=device), activation_range(x, 8))):
            _quantise(x, ones, beta, levels)
            _quantise_backward(x, x, ones, beta, levels)
    except UserError:
        raise
    except Exception as error:                                  # of torch's compilers, of many kinds
        raise UserError(f'--compile: torch.compile does not work here: {one_line(error)[:200]}') from error


def _bare(x):
    """_flat() of a dense tensor that is no view to torch.compile, which would compile again for each shape viewed."""
    return _flat(x).data


def _like(flat, x):
    """A 1-d tensor in the shape of x, in whose memory order it is."""
    return flat.as_strided(x.shape, x.stride())


def _quantise(x, scale, beta, levels, dtype=None):
    """s * round(clamp((x - beta) / s, low, high)) + beta with s = positive(scale), cast once to dtype, by default x's.
    """
    x, dtype = _dense(x), dtype or x.dtype
    if _has_cpu_kernel(x, scale):
        return cpu_kernels.quantise(x, scale, beta, levels).to(dtype)
    if kernel := _kernel(_quantise_flat, x):
        return _like(kernel(_bare(x), scale.detach(), None if beta is None else beta.detach(), levels.low,
                            levels.high, levels.least, dtype), x)
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
    if _has_cpu_kernel(x, scale):
        return cpu_kernels.quantise_backward(grad_y.float(), x, scale, beta, levels)
    if kernel := _kernel(_quantise_backward_flat, x):
        grad_x, grad_scale, grad_beta = kernel(_bare(grad_y), _bare(x), scale.detach(),
                                               None if beta is None else beta.detach(), levels.low, levels.high,
                                               levels.least)
        factor = levels.gradient_factor                         # a number in a kernel would be one kernel a number
        return _like(grad_x, x), factor * grad_scale, None if beta is None else factor * grad_beta
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
