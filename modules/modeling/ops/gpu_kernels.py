"""LSQ+ fake quantisation on a GPU by Triton kernels, in one pass each way; the formulas stand in fake_quantise.py.

Imported where they are used: Triton comes with torch where torch runs on GPUs. Each result is what torch's operations
give one after another, in float32; sums are those of at most _PROGRAMS programs, added up in turn, and so the same in
each run. They are torch operations (torch.ops.spaceevo), so that tests/meta.py can count them.
"""
import torch
import triton
import triton.language as tl

_BLOCK = 1024
_PROGRAMS = 1024                            # partial sums, at most


@triton.jit
def _step(scale, least):
    size = tl.abs(tl.load(scale))
    return tl.where(size < least, least, size)                  # NaN stays NaN, as in torch


@triton.jit
def _offset(beta):
    return tl.load(beta) if beta is not None else 0.0


@triton.jit
def _clamped(v, low, high):
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _rounded(q):
    """Half to even, of numbers far below 2^22: what 1.5 * 2^23 leaves of a fraction."""
    return (q + 12582912.0) - 12582912.0


@triton.jit
def _quantise(x, scale, beta, y, n, low, high, least, BLOCK: tl.constexpr):
    step, offset = _step(scale, least), _offset(beta)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.div_rn(tl.load(x + i, mask=i < n).to(tl.float32) - offset, step)
    tl.store(y + i, _rounded(_clamped(v, low, high)) * step + offset, mask=i < n)


@triton.jit
def _backward(dy, x, scale, beta, dx, sums, n, low, high, least, BLOCK: tl.constexpr):
    """dx, and of each program a sum for the scale and one for beta."""
    step, offset = _step(scale, least), _offset(beta)
    program, programs = tl.program_id(0), tl.num_programs(0)
    of_step, of_beta = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, n, programs * BLOCK):
        i = start + tl.arange(0, BLOCK)
        dy_i = tl.load(dy + i, mask=i < n, other=0.0).to(tl.float32)
        v = tl.div_rn(tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) - offset, step)
        q = _clamped(v, low, high)
        inside = tl.where(q == v, dy_i, 0.0)
        tl.store(dx + i, inside, mask=i < n)
        of_step += tl.where(i < n, dy_i * _rounded(q) - inside * v, 0.0)
        of_beta += dy_i - inside
    tl.store(sums + program, tl.sum(of_step))
    tl.store(sums + programs + program, tl.sum(of_beta))


@triton.jit
def _finish(sums, scale, grads, programs, factor, PROGRAMS: tl.constexpr):
    """(dscale, dbeta) from the sums."""
    i = tl.arange(0, PROGRAMS)
    sign = tl.load(scale)
    sign = tl.where(sign > 0, 1.0, tl.where(sign < 0, -1.0, sign))
    tl.store(grads, tl.sum(tl.load(sums + i, mask=i < programs, other=0.0)) * factor * sign)
    tl.store(grads + 1, tl.sum(tl.load(sums + programs + i, mask=i < programs, other=0.0)) * factor)


def _launch_quantise(x, scale, beta, low, high, least, dtype):
    y, n = torch.empty_like(x, dtype=dtype), x.numel()
    if n:
        _quantise[(triton.cdiv(n, _BLOCK),)](x, scale, beta, y, n, low, high, least, BLOCK=_BLOCK,
                                             enable_fp_fusion=False)
    return y


def _launch_backward(dy, x, scale, beta, low, high, least, factor):
    n = x.numel()
    programs = max(1, min(triton.cdiv(n, _BLOCK), _PROGRAMS))
    dx, sums, grads = torch.empty_like(x), scale.new_empty(2 * programs), scale.new_empty(2)
    _backward[(programs,)](dy, x, scale, beta, dx, sums, n, low, high, least, BLOCK=_BLOCK, enable_fp_fusion=False)
    _finish[(1,)](sums, scale, grads, programs, factor, PROGRAMS=_PROGRAMS)
    return dx, grads


_library = torch.library.Library('spaceevo', 'DEF')
_library.define('fake_quantise(Tensor x, Tensor scale, Tensor? beta, float low, float high, float least, '
                'ScalarType dtype) -> Tensor')
_library.define('fake_quantise_backward(Tensor dy, Tensor x, Tensor scale, Tensor? beta, float low, float high, '
                'float least, float factor) -> (Tensor, Tensor)')
for _key in ('CUDA', 'CPU'):                # on a CPU by Triton's interpreter alone: tests
    _library.impl('fake_quantise', _launch_quantise, _key)
    _library.impl('fake_quantise_backward', _launch_backward, _key)
_library.impl('fake_quantise', lambda x, scale, beta, low, high, least, dtype: torch.empty_like(x, dtype=dtype), 'Meta')
_library.impl('fake_quantise_backward', lambda dy, x, scale, *_: (torch.empty_like(x), scale.new_empty(2)), 'Meta')


def quantise(x, scale, beta, levels, dtype):
    """x, fake-quantised, in dtype; x dense, in whatever order, of any floating-point type up to float32."""
    return torch.ops.spaceevo.fake_quantise(x, scale, beta, levels.low, levels.high, levels.least, dtype)


def quantise_backward(dy, x, scale, beta, levels):
    """(dx, dscale, dbeta) of quantise(); dy and x in one order."""
    dx, grads = torch.ops.spaceevo.fake_quantise_backward(dy, x, scale, beta, levels.low, levels.high, levels.least,
                                                          levels.gradient_factor)
    return dx, grads[:1], None if beta is None else grads[1:]
