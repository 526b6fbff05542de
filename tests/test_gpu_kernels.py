"""Triton's kernels without a GPU: their numbers by Triton's interpreter, and that they compile for GPUs."""
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip('triton')

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# in a process of its own: the interpreter is chosen when the kernels are imported
INTERPRETED = '''
import itertools, math, torch
from modules.modeling.ops import fake_quantise as f
torch.manual_seed(0)
kernels = f._gpu_kernels()
kernels._PROGRAMS = 4                       # fewer than blocks: each program has several
shapes, offsets, signs = [(0, 3), (1, 1), (2, 5, 20, 21), (3, 1200)], [-0.7, None], [1, -1]
for shape, offset, sign, dtype in itertools.product(shapes, offsets, signs, [torch.float32, torch.bfloat16]):
    x, dy = (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    dy = f._dense(dy, like=x)
    scale, beta = torch.tensor([0.011 * sign]), None if offset is None else torch.tensor([offset])
    levels = f.activation_range(x, 8)
    eager = f._quantise(x, scale, beta, levels), *f._quantise_backward(dy, x, scale, beta, levels)
    exact = kernels.quantise(x, scale, beta, levels, torch.float32)       # the interpreter cuts bf16 off, GPUs round
    got = exact.to(dtype), *kernels.quantise_backward(dy, x, scale, beta, levels)
    assert torch.equal(eager[0], got[0]) and got[0].stride() == eager[0].stride(), (shape, offset, sign, dtype)
    torch.testing.assert_close(got[1:], eager[1:], rtol=1e-4, atol=1e-5)
    again = kernels.quantise_backward(dy, x, scale, beta, levels)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got[1:], again))
unknown = torch.tensor([[math.nan, 0.5]])
assert kernels.quantise(unknown, scale, beta, levels, torch.float32).isnan().tolist() == [[True, False]]
'''


def test_the_numbers_are_those_of_eager_operations():
    subprocess.run([sys.executable, '-c', INTERPRETED], check=True, cwd=ROOT,
                   env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'})


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('beta', ['*fp32', None])
@pytest.mark.parametrize('dtype', ['*fp32', '*bf16'])
def test_they_compile_for_gpus(capability, beta, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from modules.modeling.ops import gpu_kernels
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    numbers = {'n': 'i32', 'low': 'fp32', 'high': 'fp32', 'least': 'fp32'}
    once = {'programs': 'i32', 'factor': 'fp32', 'sums': '*fp32', 'scale': '*fp32', 'grads': '*fp32'}
    for kernel, types, constants in (
            (gpu_kernels._quantise, {'x': dtype, 'scale': '*fp32', 'beta': beta, 'y': dtype, **numbers},
             {'BLOCK': 1024}),
            (gpu_kernels._backward, {'dy': dtype, 'x': dtype, 'scale': '*fp32', 'beta': beta, 'dx': dtype,
                                     'sums': '*fp32', **numbers}, {'BLOCK': 1024}),
            (gpu_kernels._finish, once, {'PROGRAMS': 1024})):
        constants |= {name: None for name, kind in types.items() if kind is None}
        signature = {name: types.get(name) or 'constexpr' for name in kernel.arg_names}
        built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget('cuda', capability, 32),
                               options={'enable_fp_fusion': False})
        assert len(built.asm['cubin']) > 1000
        assert kernel is not gpu_kernels._quantise or ('cvt.rn.bf16' in built.asm['ptx']) == (dtype == '*bf16')
        assert 'fma.rn' not in built.asm['ptx'] and 'div.full' not in built.asm['ptx']      # would round otherwise


def test_without_triton_one_line_says_so(monkeypatch):
    """Triton does not come with every torch; for --compile auto choose_quantisers() continues in eager mode then."""
    from modules.errors import UserError
    from modules.modeling import ops
    from modules.modeling.ops import fake_quantise
    fake_quantise._gpu_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, 'triton', None)
    monkeypatch.delitem(sys.modules, 'modules.modeling.ops.gpu_kernels', raising=False)
    monkeypatch.delattr(ops, 'gpu_kernels', raising=False)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='--compile: no Triton here'):
        patch.setattr(fake_quantise, '_use_kernels', True)
        fake_quantise.check_quantisers(torch.device('meta'))
    fake_quantise._gpu_kernels.cache_clear()
