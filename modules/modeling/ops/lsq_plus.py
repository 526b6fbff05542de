"""LSQ+ fake quantisation with learned scales and offsets.

Sources: LSQ+ (Bhalgat et al., CVPR-W 2020), LSQ (Esser et al., ICLR 2020).

Per tensor, 8 bits by default; 32 bits means "off". Activations are unsigned with an offset (beta), weights
signed and symmetric.
"""
import contextlib
import math

import torch
import torch.distributed as dist
from torch import nn

OFF = 32                                    # bits of an op that does not quantise
_MIN_RANGE = 1e-7                           # a scale never falls below this / (2^b - 1)
_local_initialisation = False


class _FakeQuantize(torch.autograd.Function):
    """y = s * round(clamp((x - beta) / s, low, high)) + beta, keeping only x for the backward pass.

    With v = (x - beta) / s and q = round(clamp(v)):
      dx    = dy where low <= v <= high, else 0                       (straight-through)
      ds    = g * sum(dy * (q - v)) in the range, g * sum(dy * q) outside (q is low or high there)
      dbeta = g * sum(dy) outside the range
    """

    @staticmethod
    def forward(ctx, x, scale, beta, low, high, gradient_factor):
        ctx.save_for_backward(x, scale, beta)
        ctx.low, ctx.high, ctx.gradient_factor = low, high, gradient_factor
        shifted = x / scale if beta is None else (x - beta).div_(scale)
        y = shifted.clamp_(low, high).round_().mul_(scale)
        return y if beta is None else y.add_(beta)

    @staticmethod
    def backward(ctx, grad_y):
        x, scale, beta = ctx.saved_tensors
        v = x / scale if beta is None else (x - beta).div_(scale)
        q = v.clamp(ctx.low, ctx.high)
        grad_v = (grad_y * scale).mul_(q == v)                   # q == v exactly where v is in the range
        grad_x = grad_v / scale
        grad_scale = grad_beta = None
        if ctx.needs_input_grad[1]:                              # two sums, in the order autograd would take them
            grad_scale = (grad_y * q.round_()).sum() - grad_v.mul_(v.div_(scale)).sum()
            grad_scale = (ctx.gradient_factor * grad_scale).reshape(scale.shape).to(scale.dtype)
        if beta is not None and ctx.needs_input_grad[2]:
            grad_beta = ctx.gradient_factor * (grad_y.sum() - grad_x.sum())
            grad_beta = grad_beta.reshape(beta.shape).to(beta.dtype)
        return grad_x.to(x.dtype), grad_scale, grad_beta, None, None, None


def _positive(scale, num_bits):
    return scale.abs().clamp_min(_MIN_RANGE / (2 ** num_bits - 1))


def quantize_activation(activation, scale, num_bits, beta, is_training):
    """Fake-quantised activation, range 0..2^b-1 with offset beta; shapes: any (N, …), [1], [1].

    Gradients to scale and beta are multiplied by 1/sqrt(N_sample * (2^b - 1)), N_sample the elements of one
    sample. num_bits 32 returns the activation itself. Without `is_training` scale and beta are constants.
    """
    if num_bits == OFF:
        return activation
    if not is_training:
        scale, beta = scale.detach(), beta.detach()
    high = 2 ** num_bits - 1
    per_sample = activation.numel() / max(1, activation.shape[0])
    factor = 1 / math.sqrt(max(1, per_sample) * high)
    return _FakeQuantize.apply(activation, _positive(scale, num_bits), beta, 0, high, factor)


def quantize_weight(weight, scale, num_bits, is_training):
    """Fake-quantised weight, range -2^(b-1)..2^(b-1)-1, no offset; shapes: any, [1].

    The gradient to scale is multiplied by 1/sqrt(numel * (2^(b-1) - 1)). num_bits 32 returns the weight itself.
    """
    if num_bits == OFF:
        return weight
    if not is_training:
        scale = scale.detach()
    high = 2 ** (num_bits - 1) - 1
    factor = 1 / math.sqrt(weight.numel() * high)
    return _FakeQuantize.apply(weight, _positive(scale, num_bits), None, -high - 1, high, factor)


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


class QBase:
    """Mix-in of every quantised op: owns sw, sa, beta (shape [1]), initialises them and fake-quantises.

    `initial` is how: QBase.min_max_initial (default) or QBase.lsq_initial, functions of (activation, weight,
    nbits_a, nbits_w) that give (sw, sa, beta). Scales belong to the bits they were initialised for; after a
    change of bits they are kept, and training has to adapt them.

    Whether the scales are initialised is the state `scales_initialized`. It is set by the first forward in
    quantised mode, which initialises them from what it sees, and by loading a checkpoint: our own state dicts
    carry the flag in their metadata; where that is missing (published files, prefixes renamed) an op counts as
    initialised unless all three stored values are the untouched 1, 1, 0. That is right for published fp32
    checkpoints (1, 1, 0 everywhere) and for trained scales of which one happens to be exactly 1. Of a partial
    state dict (strict=False) the values it lacks are those the op has.
    """
    min_max_initial = staticmethod(min_max_initial)
    lsq_initial = staticmethod(lsq_initial)

    def _init_quantisation(self):
        self.sw = nn.Parameter(torch.ones(1))
        self.sa = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))
        self.nbits_w = self.nbits_a = OFF
        self.initial = QBase.min_max_initial
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

    @torch.no_grad()
    def initialize_scales(self, activation):
        """Set sw, sa, beta from one activation and the op's whole weight, the same on every rank."""
        bits_a, bits_w = (8 if bits == OFF else bits for bits in (self.nbits_a, self.nbits_w))
        values = self.initial(activation.float(), self.weight.float(), bits_a, bits_w)
        for parameter, value in zip((self.sw, self.sa, self.beta), _reduce_over_ranks(*values)):
            parameter.copy_(value)
        for scale, bits in ((self.sw, bits_w), (self.sa, bits_a)):
            scale.clamp_(min=_MIN_RANGE / (2 ** bits - 1))
        self.scales_initialized = True

    def fake_quantise(self, activation, weight):
        """(activation, weight) as the int8 op sees them; unchanged in fp32 mode."""
        if not self.is_quantised:
            return activation, weight
        if not self.scales_initialized:
            self.initialize_scales(activation)
        return (quantize_activation(activation, self.sa, self.nbits_a, self.beta, self.training),
                quantize_weight(weight, self.sw, self.nbits_w, self.training))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, '_metadata'):
            destination._metadata[prefix[:-1]]['lsq_initialized'] = self.scales_initialized

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
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


def set_fp32_mode(model):
    """Put every quantised op of the model into fp32 mode; returns the model."""
    for op in quantised_ops(model):
        op.set_fp32_mode()
    return model
