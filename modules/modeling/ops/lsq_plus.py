"""LSQ+ fake quantisation with learned scales and offsets: the operators, and models of them.

Sources: LSQ+ (Bhalgat et al., CVPR-W 2020), LSQ (Esser et al., ICLR 2020).

Per tensor, 8 bits by default; 32 bits means "off". Activations are unsigned with an offset (beta), weights
signed and symmetric.
"""
import contextlib
import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .convolution import conv2d
from .fake_quantise import (
    OFF,
    QuantisedOp,
    activation_range,
    least_scale,
    positive_scale,
    quantize_activation,
    quantize_weight,
    weight_range,
)
from .zero_points import symmetric_step, zero_point

WEIGHT_BITS = (8, 7)                        # of weights that INT8 models take
_local_initialisation = False


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
        """Other bits of the weights and zero points; scales that are initialised keep covering what they cover."""
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
            scale.clamp_(min=least_scale(bits))
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
        levels_x = None if self.nbits_a == OFF else activation_range(x, self.nbits_a)
        levels_w = None if self.nbits_w == OFF else weight_range(weight, self.nbits_w)
        return QuantisedOp.apply(x, weight, bias, sa, beta, sw, levels_x, levels_w, geometry)

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

    Scales that are initialised are fitted, so that what they cover stays: training continues from there.
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
