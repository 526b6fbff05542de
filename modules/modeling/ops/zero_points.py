"""Zero points of LSQ+ activations: the paper's real ones, or whole codes that integer runtimes take as they are.

LSQ+ codes q = 0..2^b-1 stand for s·q + beta, so that 0 has the real-valued code -beta/s. With a whole number z in its
place the codes stand for s·(q - z): 0, and with it the zeros of padding, is exactly one of them.

integer    z = round(clamp(-beta/s, 0, 2^b-1)), and s·q - s·z is trained in the place of s·q + beta. With the rounding
           straight-through as everywhere in LSQ+, d(-s·z) = d beta + (-beta/s - z)·d s: beta has LSQ+'s gradient, and s
           that of LSQ+ and, of values outside the range, the rounding's rest of at most half a step. Where -beta/s is
           itself outside, z stays at that end: no gradient to beta, and -z·d s.
symmetric  z = 2^(b-1), the 0 of signed codes -2^(b-1)..2^(b-1)-1; beta is not used.
"""
ZERO_POINTS = ('real', 'integer', 'symmetric')


def zero_point(kind, step, beta, num_bits):
    """The code of 0, a whole number, shape [1], with the gradient of the real one; step: the scale s > 0, [1]."""
    if kind == 'symmetric':
        return step.new_full((1,), 2 ** (num_bits - 1))
    real = (-beta / step).clamp(0, 2 ** num_bits - 1)
    return real + (real.round() - real).detach()


def symmetric_step(step, beta, num_bits):
    """The step with which signed codes cover what codes of `step` and `beta` do, shape [1]."""
    half, high = 2 ** (num_bits - 1), beta + step * (2 ** num_bits - 1)
    return (-beta / half).maximum(high / (half - 1))
