"""LSQ+ fake quantisation with learned scales and offsets.

Sources: LSQ+ (Bhalgat et al., CVPR-W 2020), LSQ (Esser et al., ICLR 2020).

Per tensor, 8 bits by default; 32 bits means "off". Activations are unsigned with an offset (beta), weights
signed and symmetric.
"""
import contextlib
import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ...errors import UserError, one_line
from .convolution import conv2d, convolution_backward
from .zero_points import symmetric_step, zero_point

OFF = 32                                    # bits of an op that does not quantise
WEIGHT_BITS = (8, 7)                        # of weights that INT8 models take
_MIN_RANGE = 1e-7                           # a scale never falls below this / (2^b - 1)
_PIECE = 1 << 16                            # elements: four such tensors fit into a core's cache
_WARM_UP = 1 << 22                          # elements of the first use of compiled kernels
_local_initialisation = False
_use_kernels = False                        # of torch.compile, see compile_quantisers()


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
    """_quantise() of a 1-d tensor as one expression, for devices and torch.compile."""
    x, scale = x.to(_computed_in(x.dtype)), positive(scale, least)
    q = (x / scale if beta is None else (x - beta) / scale).clamp(low, high).round()
    return (q * scale if beta is None else q * scale + beta).to(dtype)


def _quantise_backward_flat(dy, x, scale, beta, low, high, least):
    """_quantise_backward() of 1-d tensors as one expression, for devices and torch.compile; without the factor g."""
    dtype, exact = x.dtype, _computed_in(x.dtype)
    dy, x, sign, scale = dy.to(exact), x.to(exact), scale.sgn(), positive(scale, least)
    v = x / scale if beta is None else (x - beta) / scale
    q = v.clamp(low, high)
    inside = q == v
    dx = dy * inside
    grad_scale = torch.dot(dy, q.round() - v * inside) * sign
    return dx.to(dtype), grad_scale, None if beta is None else (dy - dx).sum().reshape(1)


@functools.cache
def _compiled(function):
    """The function compiled for tensors of any size, always called in one state: each other one would compile anew."""
    compiled = torch.compile(function, dynamic=True)

    def run(x, *args):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return compiled(x, *args)
    return run


def _kernel(function, x):
    """The function of flat tensors as it runs where x is; None on a CPU without compiled kernels: see _pieces()."""
    if _use_kernels:
        return _compiled(function)
    return None if x.device.type == 'cpu' else function


def compile_quantisers(enable=True):
    """From now on fake-quantise by kernels of torch.compile, which needs a C++ compiler on a CPU; False: no more.

    The same numbers, but for the rounding of the sums in the gradients of scales and offsets.
    """
    global _use_kernels
    _use_kernels = enable


def prove_quantisers(device):
    """Compile the kernels by a first use on `device`; UserError where that fails.

    With the levels of int8 and as many numbers as large activations have: their reductions are sized for the first use.
    """
    try:
        x, ones = torch.ones(_WARM_UP, device=device), torch.ones(1, device=device)
        for beta, levels in ((None, _weight_range(x, 8)), (torch.zeros(1, device=device), _activation_range(x, 8))):
            _quantise(x, ones, beta, levels)
            _quantise_backward(x, x, ones, beta, levels)
    except Exception as error:                                  # of torch's compilers, of many kinds
        raise UserError(f'--compile: torch.compile does not work here: {one_line(error)[:200]}') from error


def _bare(x):
    """_flat() of a dense tensor that is no view to torch.compile, which would compile anew for each shape viewed."""
    return _flat(x).data


def _like(flat, x):
    """A 1-d tensor in the shape of x, in whose memory order it is."""
    return flat.as_strided(x.shape, x.stride())


def _quantise(x, scale, beta, levels, dtype=None):
    """s * round(clamp((x - beta) / s, low, high)) + beta with s = positive(scale), cast once to dtype, by default x's.
    """
    x, dtype = _dense(x), dtype or x.dtype
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


class _QuantisedOp(torch.autograd.Function):
    """A convolution or linear layer of a fake-quantised input and weight.

    Keeps the input as it came and quantises it anew for the backward pass: so int8 training holds no more activations
    than fp32 training, only the quantised weight in addition. levels_x, levels_w: _Range, None for off; geometry:
    (stride, padding, dilation, groups) of a convolution, None for a linear layer.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale_x, beta, scale_w, levels_x, levels_w, geometry):
        ctx.levels, ctx.geometry, ctx.bias_sizes = (levels_x, levels_w), geometry, None if bias is None else [len(bias)]
        used_x = _QuantisedOp.operand(x, scale_x, beta, levels_x, _op_dtype(x))
        used_weight = _QuantisedOp.operand(weight, scale_w, None, levels_w, used_x.dtype)
        ctx.save_for_backward(x, weight, used_weight, scale_x, beta, scale_w)
        if geometry is None:
            return F.linear(used_x, used_weight, bias)
        return F.conv2d(used_x, used_weight, bias, *geometry)

    @staticmethod
    def operand(x, scale, beta, levels, dtype):
        """The numbers that the op multiplies, in dtype: the same in both passes."""
        return x.to(dtype) if levels is None else _quantise(x, scale, beta, levels, dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, used_weight, scale_x, beta, scale_w = ctx.saved_tensors
        levels_x, levels_w = ctx.levels
        wanted = ctx.needs_input_grad
        used_x = _QuantisedOp.operand(x, scale_x, beta, levels_x, grad.dtype)
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


def _activation_range(activation, num_bits):
    high = 2 ** num_bits - 1
    per_sample = activation.numel() / max(1, activation.shape[0])
    return _Range(0, high, 1 / math.sqrt(max(1, per_sample) * high), _least_scale(num_bits))


def _weight_range(weight, num_bits):
    high = 2 ** (num_bits - 1) - 1
    return _Range(-high - 1, high, 1 / math.sqrt(weight.numel() * high), _least_scale(num_bits))


def _least_scale(num_bits):
    return _MIN_RANGE / (2 ** num_bits - 1)


def positive(scale, least):
    """|scale|, kept away from 0."""
    return scale.abs().clamp_min(least)


def positive_scale(scale, num_bits):
    """|scale|, kept away from 0: the step between two levels that training and export use."""
    return positive(scale, _least_scale(num_bits))


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
    levels = _activation_range(activation, num_bits)
    return _FakeQuantize.apply(activation, scale, beta, levels)


def quantize_weight(weight, scale, num_bits, is_training=True, training=None):
    """Fake-quantised weight, range -2^(b-1)..2^(b-1)-1, no offset; shapes: any, [1].

    The gradient to scale is multiplied by 1/sqrt(numel * (2^(b-1) - 1)). num_bits 32 returns the weight itself.
    """
    if num_bits == OFF:
        return weight
    if not (is_training if training is None else training):
        scale = scale.detach()
    return _FakeQuantize.apply(weight, scale, None, _weight_range(weight, num_bits))


@contextlib.contextmanager
def local_initialisation():
    """Scales initialised inside are this rank's own: for ranks that run different networks."""
    global _local_initialisation
    previous, _local_initialisation = _local_initialisation, True
    try:
        yield
    finally:
        _local_initialisation = previous


def _reduce_over_ranks(sw, sa, beta):
    """Scales averaged, beta the minimum over ranks."""
    if _local_initialisation or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return sw, sa, beta
    scales, beta = torch.stack([sw, sa]), beta.clone()
    dist.all_reduce(scales)
    dist.all_reduce(beta, op=dist.ReduceOp.MIN)
    scales /= dist.get_world_size()
    return scales[0], scales[1], beta


def check_bits(nbits):
    """nbits; ValueError unless it is an int of 2..16, or 32 for off."""
    if isinstance(nbits, bool) or not isinstance(nbits, int) or not (2 <= nbits <= 16 or nbits == OFF):
        raise ValueError(f'{nbits!r} bits: expected 2 to 16, or {OFF} for no quantisation')
    return nbits


def min_max_initial(activation, weight, nbits_a, nbits_w):
    """(sw, sa, beta) that span the observed range: sw = 2 max|w|/(2^b-1), sa = (max-min)/(2^b-1), beta = min."""
    low, high = torch.aminmax(activation)
    return 2 * weight.abs().max() / (2 ** nbits_w - 1), (high - low) / (2 ** nbits_a - 1), low


def lsq_initial(activation, weight, nbits_a, nbits_w):
    """(sw, sa, beta) by LSQ's rule, scale = 2 mean|v|/sqrt(largest level); beta = min of the activation."""
    low = activation.min()
    return (2 * weight.abs().mean() / math.sqrt(2 ** (nbits_w - 1) - 1),
            2 * (activation - low).mean() / math.sqrt(2 ** nbits_a - 1), low)


def _next(cls, op, name):
    """super().name of a mix-in, or the torch module's where that stands before the mix-in."""
    return getattr(super(cls, op), name, None) or functools.partial(getattr(nn.Module, name), op)


class QBase:
    """Mix-in of every quantised op: owns sw, sa, beta (shape [1]), initialises them and fake-quantises.

    An op of your own is a class of QBase and a torch module with a `weight`, in either order, whose __init__ ends with
    QBase.__init__(self) and whose forward begins with get_quant_x_w() (docs/python.md has one). As
    class X(QBase, nn.Conv2d) it needs no __init__.

    `initial` is how: QBase.min_max_initial (default) or QBase.lsq_initial, functions of (activation, weight,
    nbits_a, nbits_w) that give (sw, sa, beta). Scales belong to the bits they were initialised for; after a
    change of bits by set_quant_mode() they are kept, and training has to adapt them; requantise() fits them.

    `zero_points`, one of zero_points.ZERO_POINTS, is how beta is used.

    Whether the scales are initialised is the state `scales_initialized`. It is set by the first forward in
    quantised mode, which initialises them from what it sees, and by loading a checkpoint: our own state dicts
    carry the flag in their metadata; where that is missing (published files, prefixes renamed) an op counts as
    initialised unless all three stored values are the untouched 1, 1, 0. That is right for published fp32
    checkpoints (1, 1, 0 everywhere) and for trained scales of which one happens to be exactly 1. Of a partial
    state dict (strict=False) the values it lacks are those the op has.
    """
    min_max_initial = staticmethod(min_max_initial)
    lsq_initial = staticmethod(lsq_initial)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ('_save_to_state_dict', '_load_from_state_dict'):       # also where the module's come first
            if getattr(cls, name) is getattr(nn.Module, name):
                setattr(cls, name, getattr(QBase, name))

    def __init__(self, *args, **kwargs):
        if '_parameters' not in self.__dict__:              # the torch module's own is yet to run
            super().__init__(*args, **kwargs)
        self.sw = nn.Parameter(torch.ones(1))
        self.sa = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))
        self.nbits_w = self.nbits_a = OFF
        self.initial = QBase.min_max_initial
        self.zero_points = 'real'
        self.scales_initialized = False

    def set_quant_mode(self, nbits=8):
        """Quantise weights and activations to `nbits` bits."""
        self.nbits_w = self.nbits_a = check_bits(nbits)

    def set_fp32_mode(self):
        """Be exactly the plain torch op."""
        self.nbits_w = self.nbits_a = OFF

    @property
    def is_quantised(self):
        return self.nbits_w != OFF or self.nbits_a != OFF

    def zero_point(self):
        """The input's code of 0, a whole number, [1], with gradients; None where zero points are real."""
        if self.zero_points == 'real':
            return None
        return zero_point(self.zero_points, positive_scale(self.sa, self.nbits_a), self.beta, self.nbits_a)

    def offset(self):
        """The offset that the input is quantised with, [1]: beta, or with whole zero points -sa times that."""
        zero = self.zero_point()
        return self.beta if zero is None else -positive_scale(self.sa, self.nbits_a) * zero

    @torch.no_grad()
    def requantise(self, weight_bits, zero_points):
        """Other bits of the weights and zero points; scales that are initialised go on covering what they cover."""
        if self.scales_initialized:
            self.sw.mul_((2 ** self.nbits_w - 1) / (2 ** check_bits(weight_bits) - 1))
        if zero_points == 'symmetric' != self.zero_points and self.scales_initialized:
            self.sa.copy_(symmetric_step(positive_scale(self.sa, self.nbits_a), self.offset(), self.nbits_a))
        self.nbits_w, self.zero_points = weight_bits, zero_points

    @torch.no_grad()
    def initialize_scales(self, activation):
        """Set sw, sa, beta from one activation and the op's whole weight, the same on every rank."""
        bits_a, bits_w = (8 if bits == OFF else bits for bits in (self.nbits_a, self.nbits_w))
        values = self.initial(activation.float(), self.weight.float(), bits_a, bits_w)
        for parameter, value in zip((self.sw, self.sa, self.beta), _reduce_over_ranks(*values)):
            parameter.copy_(value)
        if self.zero_points == 'symmetric':
            self.sa.copy_(symmetric_step(self.sa, self.beta, bits_a))
        for scale, bits in ((self.sw, bits_w), (self.sa, bits_a)):
            scale.clamp_(min=_least_scale(bits))
        self.scales_initialized = True

    def get_quant_x_w(self, x, w):
        """(x, w) fake-quantised, the very same in fp32 mode; initialises scales that are not yet."""
        if self.is_quantised and not self.scales_initialized:
            self.initialize_scales(x)
        return (quantize_activation(x, self.sa, self.nbits_a, self.offset(), self.training),
                quantize_weight(w, self.sw, self.nbits_w, self.training))

    def run(self, x, weight, bias, geometry=None):
        """The op with this weight and bias, as the int8 device computes it; the plain op in fp32 mode.

        geometry: (stride, padding, dilation, groups) of a convolution, None for a linear layer.
        """
        if not self.is_quantised:
            return F.linear(x, weight, bias) if geometry is None else conv2d(x, weight, bias, *geometry)
        if not self.scales_initialized:
            self.initialize_scales(x)
        sa, beta, sw = self.sa, self.offset(), self.sw
        if not self.training:
            sa, beta, sw = sa.detach(), beta.detach(), sw.detach()
        levels_x = None if self.nbits_a == OFF else _activation_range(x, self.nbits_a)
        levels_w = None if self.nbits_w == OFF else _weight_range(weight, self.nbits_w)
        return _QuantisedOp.apply(x, weight, bias, sa, beta, sw, levels_x, levels_w, geometry)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        _next(QBase, self, '_save_to_state_dict')(destination, prefix, keep_vars)
        if hasattr(destination, '_metadata'):
            destination._metadata[prefix[:-1]]['lsq_initialized'] = self.scales_initialized

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        _next(QBase, self, '_load_from_state_dict')(state_dict, prefix, local_metadata, *args)
        names = [name for name in ('sw', 'sa', 'beta') if prefix + name in state_dict]
        if names:
            untouched = [self.sw.item(), self.sa.item(), self.beta.item()] == [1, 1, 0]
            self.scales_initialized = local_metadata.get('lsq_initialized', not untouched)


def quantised_ops(model):
    """Every quantised op of a model, the model itself included, at every nesting depth."""
    return [module for module in model.modules() if isinstance(module, QBase)]


def set_quant_mode(model, nbits=8):
    """Put every quantised op of the model into int8 mode; returns the model."""
    for op in quantised_ops(model):
        op.set_quant_mode(nbits)
    return model


def requantise(model, weight_bits=8, zero_points='real'):
    """Give the model's ops in quantised mode other bits of weights and zero points; returns the model.

    Scales that are initialised are fitted, so that what they cover stays: training goes on from there.
    """
    for op in quantised_ops(model):
        if op.is_quantised:
            op.requantise(weight_bits, zero_points)
    return model


def quantisation_of(model):
    """{'weight_bits': …, 'zero_points': …} of the model's quantised ops, as requantise() takes them; {} in fp32."""
    op = next((op for op in quantised_ops(model) if op.is_quantised), None)
    return {} if op is None else {'weight_bits': op.nbits_w, 'zero_points': op.zero_points}


@torch.no_grad()
def quantise_weights_once(model):
    """Put quantised weights in the place of weights, so that no pass quantises them again; returns the model.

    For evaluation, with the very same results: the weights that could be trained, or exported, are gone.
    """
    for op in quantised_ops(model):
        if op.scales_initialized and op.nbits_w != OFF:
            op.weight.copy_(quantize_weight(op.weight, op.sw, op.nbits_w))
            op.nbits_w = OFF
    return model


def set_fp32_mode(model):
    """Put every quantised op of the model into fp32 mode; returns the model."""
    for op in quantised_ops(model):
        op.set_fp32_mode()
    return model
