"""LSQ+ ops: the published figures, the definition, initialisation and its state."""
import contextlib
import copy
import math
import pickle
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.errors import UserError
from modules.modeling.ops import cpu_kernels, fake_quantise, lsq_plus
from modules.modeling.ops.convolution import conv2d, convolution_backward
from modules.modeling.ops.fake_quantise import QuantisedOp, compile_quantisers
from modules.modeling.ops.lsq_plus import (
    QBase,
    quantise_weights_once,
    quantize_activation,
    quantize_weight,
    set_fp32_mode,
    set_quant_mode,
)
from modules.modeling.ops.op import QConv, QConv2d, QLinear
from modules.modeling.supernet import Supernet

from .conftest import GOLDEN

OPS = {'conv': lambda: QConv(8, 12, 3, 2, 1), 'dwconv': lambda: QConv(8, 8, 5, padding=2, groups=8, bias=False),
       'linear': lambda: QLinear(16, 10)}


NEEDS_COMPILER = pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')


@pytest.fixture(params=['eager', pytest.param('compiled', marks=NEEDS_COMPILER)])
def kernels(request):
    """Fake-quantisers of a CPU, eager and compiled; a GPU's: test_gpu_kernels.py."""
    compile_quantisers(request.param == 'compiled')
    yield request.param
    compile_quantisers(False)


@pytest.mark.parametrize('name', sorted(OPS))
def test_output_and_gradients_are_the_published_ones(name, kernels):
    golden = np.load(f'{GOLDEN}/lsq_ops.npz')

    def figure(key):
        return torch.as_tensor(golden[f'{name}.loaded.{key}'])

    op = OPS[name]()
    op.load_state_dict({key: figure(key) for key in op.state_dict()})
    set_quant_mode(op).train()
    x = figure('x').requires_grad_()
    y = op(x)
    (y * figure('gout')).sum().backward()
    torch.testing.assert_close(y, figure('y'), rtol=1e-5, atol=1e-6)
    for grad, key in ((x.grad, 'x'), (op.weight.grad, 'w'), (op.sw.grad, 'sw'), (op.sa.grad, 'sa'),
                      (op.beta.grad, 'beta')):
        want = figure(f'grad_{key}')
        # the published sums of scales and offsets cancel, with errors of their own that only their order repeats
        tolerance = 1e-3 if kernels != 'eager' and key in ('sa', 'sw', 'beta') else 1e-4
        assert (grad - want).norm() <= tolerance * want.norm() + 1e-7, key


def _composed(x, scale, beta, low, high, g):
    """LSQ+ from its definition, straight-through by detach, in float64."""
    def scale_grad(p):
        return (p - p * g).detach() + p * g
    s, b = scale_grad(scale), scale_grad(beta)
    v = ((x - b) / s).clamp(low, high)
    return (v + (v.round() - v).detach()) * s + b


@NEEDS_COMPILER
@pytest.mark.parametrize('offset', [-0.7, None])
@pytest.mark.parametrize('shape', [(0, 3), (1, 1), (4, 9, 70, 71)])
def test_compiled_kernels_give_the_numbers_of_eager_ones(shape, offset):
    """The very output, the gradients to rounding; on one thread and on two the same."""
    torch.manual_seed(0)
    x = torch.randn(shape) * 2
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    dy, scale, beta = torch.randn(shape), torch.tensor([-0.011]), None if offset is None else torch.tensor([offset])
    levels, results = fake_quantise.activation_range(x, 8), []
    try:
        for compiled, threads in ((False, 1), (True, 1), (True, 2)):
            torch.set_num_threads(threads)
            compile_quantisers(compiled)
            results.append((fake_quantise._quantise(x, scale, beta, levels),
                            *fake_quantise._quantise_backward(dy, x, scale, beta, levels)))
        unknown = torch.tensor([[math.nan, 0.5]])
        assert fake_quantise._quantise(unknown, scale, beta, levels).isnan().tolist() == [[True, False]]
    finally:
        torch.set_num_threads(1)
        compile_quantisers(False)
    eager, one, two = results
    assert torch.equal(eager[0], one[0]) and one[0].stride() == eager[0].stride()
    torch.testing.assert_close(one[1:], eager[1:], rtol=1e-4, atol=1e-5)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, two))


def test_a_compiler_that_does_not_work_is_one_line(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler -g')
    cpu_kernels.library.cache_clear()
    compile_quantisers()
    with pytest.raises(UserError, match="--compile: no C\\+\\+ compiler that works here: .*no-such-compiler"):
        fake_quantise.check_quantisers(torch.device('cpu'))
    compile_quantisers(False)
    cpu_kernels.library.cache_clear()


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_activation_gradients_follow_the_definition(bits, kernels):
    torch.manual_seed(bits)
    x = torch.randn(3, 5, 7, 7, dtype=torch.float64) * 2
    grad = torch.randn_like(x)
    results = []
    for function in (lambda x, s, b: quantize_activation(x, s, bits, b, True),
                     lambda x, s, b: _composed(x, s, b, 0, 2 ** bits - 1,
                                               1 / math.sqrt(x[0].numel() * (2 ** bits - 1)))):
        leaves = [x.clone().requires_grad_(), torch.tensor([0.011], dtype=torch.float64, requires_grad=True),
                  torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)]
        y = function(*leaves)
        y.backward(grad)
        results.append([y.detach()] + [leaf.grad for leaf in leaves])
    for ours, definition in zip(*results):
        torch.testing.assert_close(ours, definition, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_weight_gradients_follow_the_definition(bits, kernels):
    torch.manual_seed(bits)
    w = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    grad, low, high = torch.randn_like(w), -2 ** (bits - 1), 2 ** (bits - 1) - 1
    zero = torch.zeros(1, dtype=torch.float64)
    results = []
    for function in (lambda w, s: quantize_weight(w, s, bits, True),
                     lambda w, s: _composed(w, s, zero, low, high, 1 / math.sqrt(w.numel() * high))):
        leaves = [w.clone().requires_grad_(), torch.tensor([0.013], dtype=torch.float64, requires_grad=True)]
        y = function(*leaves)
        y.backward(grad)
        results.append([y.detach()] + [leaf.grad for leaf in leaves])
    for ours, definition in zip(*results):
        torch.testing.assert_close(ours, definition, rtol=1e-9, atol=1e-12)


def test_a_negative_scale_acts_by_its_size_and_a_zero_scale_is_finite():
    x = torch.linspace(-1, 1, 64).reshape(1, 64)
    beta = torch.zeros(1)
    assert torch.equal(quantize_activation(x, torch.tensor([-0.01]), 8, beta, True),
                       quantize_activation(x, torch.tensor([0.01]), 8, beta, True))
    assert torch.isfinite(quantize_activation(x, torch.zeros(1), 8, beta, True)).all()
    assert torch.isfinite(quantize_weight(x, torch.zeros(1), 8, True)).all()


@pytest.mark.parametrize('name', sorted(OPS))
def test_fp32_mode_is_the_plain_op(name):
    op = OPS[name]()
    x = torch.randn(2, 16) if name == 'linear' else torch.randn(2, 8, 9, 9)
    plain = nn.functional.linear(x, op.weight, op.bias) if name == 'linear' else nn.functional.conv2d(
        x, op.weight, op.bias, op.stride, op.padding, 1, op.groups)
    assert torch.equal(op(x), plain)
    set_quant_mode(op)
    assert not torch.equal(op(x), plain)
    set_fp32_mode(op)
    assert torch.equal(op(x), plain)
    assert quantize_weight(x, op.sw, 32, True) is x and quantize_activation(x, op.sa, 32, op.beta, True) is x


def test_first_int8_forward_initialises_the_scales_by_min_and_max():
    op = set_quant_mode(QConv(3, 4, 3))
    x = torch.rand(2, 3, 8, 8) * 5 - 1
    op(x)
    assert op.sa.item() == pytest.approx((x.max() - x.min()).item() / 255)
    assert op.beta.item() == pytest.approx(x.min().item())
    assert op.sw.item() == pytest.approx(2 * op.weight.abs().max().item() / 255)
    before = copy.deepcopy(op.state_dict())
    op(x * 3)
    assert all(torch.equal(before[key], op.state_dict()[key]) for key in ('sw', 'sa', 'beta'))


def test_constant_inputs_give_finite_scales():
    op = set_quant_mode(QConv(3, 4, 1))
    nn.init.zeros_(op.weight)
    assert torch.isfinite(op(torch.zeros(1, 3, 4, 4))).all()
    assert op.sa.item() == pytest.approx(1e-7 / 255) and op.sw.item() == pytest.approx(1e-7 / 255)


def _state(**values):
    return OrderedDict({'weight': torch.randn(4, 3, 1, 1), 'bias': torch.zeros(4)},
                       **{key: torch.tensor([float(values.get(key, default))])
                          for key, default in (('sw', 1), ('sa', 1), ('beta', 0))})


@pytest.mark.parametrize('values, initialised', [
    ({}, False),                                                 # published fp32 training: 1, 1, 0
    ({'sw': 0.01, 'sa': 0.02, 'beta': -1}, True),
    ({'sw': 1, 'sa': 0.02}, True),                               # a scale that happens to be exactly 1
    ({'sw': 0.3, 'sa': 1}, True),
    ({'beta': -0.5}, True),
])
def test_loading_tells_initialised_scales_from_untouched_ones(values, initialised):
    op = set_quant_mode(QConv(3, 4, 1))
    op.load_state_dict(_state(**values))
    assert op.scales_initialized is initialised
    op(torch.rand(2, 3, 4, 4))
    kept = [op.sw.item(), op.sa.item(), op.beta.item()]
    stored = [values.get('sw', 1), values.get('sa', 1), values.get('beta', 0)]
    assert (kept == pytest.approx(stored)) is initialised


def test_a_partial_state_dict_counts_too():
    op = set_quant_mode(QConv(3, 4, 1))
    op.load_state_dict({'sw': torch.tensor([0.5])}, strict=False)
    op(torch.rand(2, 3, 4, 4))
    assert op.scales_initialized and op.sw.item() == 0.5
    op = QConv(3, 4, 1)
    op.load_state_dict({'weight': torch.zeros(4, 3, 1, 1)}, strict=False)
    assert not op.scales_initialized


@pytest.mark.parametrize('bits', [0, 1, 17, 33, -8, 8.0, '8', None, True])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ValueError, match='bits: expected 2 to 16, or 32'):
        set_quant_mode(QConv(3, 4, 1), bits)


def test_our_own_state_dict_remembers_scales_that_are_exactly_the_defaults(tmp_path):
    op = QConv(3, 4, 1)
    op.scales_initialized = True
    torch.save(op.state_dict(), tmp_path / 'op.pth')
    loaded = QConv(3, 4, 1)
    loaded.load_state_dict(torch.load(tmp_path / 'op.pth', weights_only=True))
    assert loaded.scales_initialized
    fresh = QConv(3, 4, 1)
    fresh.load_state_dict(QConv(3, 4, 1).state_dict())
    assert not fresh.scales_initialized


def test_set_quant_mode_reaches_the_op_itself_and_every_depth():
    op = QConv2d(3, 4, 1)
    assert set_quant_mode(op).nbits_w == 8
    nested = nn.Sequential(nn.ModuleList([nn.ModuleDict({'a': QLinear(2, 2)})]))
    set_quant_mode(nested, 4)
    assert [m.nbits_a for m in nested.modules() if isinstance(m, QBase)] == [4]
    supernet = set_quant_mode(Supernet.build_from_str('mobilew-601234-100000'))
    ops = lsq_plus.quantised_ops(supernet)
    assert len(ops) == sum(key.endswith('.sw') for key in supernet.state_dict())
    assert all(o.nbits_w == o.nbits_a == 8 for o in ops)
    assert not any(o.is_quantised for o in lsq_plus.quantised_ops(set_fp32_mode(supernet)))


def test_ops_can_be_copied_and_pickled():
    op = set_quant_mode(QConv(3, 4, 1))
    x = torch.randn(1, 3, 2, 2)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(op)))
    assert torch.equal(twin(x), op(x)) and twin.initial is QBase.min_max_initial


def test_lsq_initial_is_finite_and_used_where_asked():
    op = set_quant_mode(QConv(3, 4, 3))
    op.initial = QBase.lsq_initial
    x = torch.randn(2, 3, 8, 8)
    op(x)
    assert op.sw.item() == pytest.approx(2 * op.weight.abs().mean().item() / math.sqrt(127))
    assert op.beta.item() == pytest.approx(x.min().item())


def test_without_training_scales_are_constants():
    op = set_quant_mode(QConv(3, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    op(x).sum().backward()
    assert op.sa.grad is None and op.sw.grad is None and x.grad is not None


def _initialise_on_rank(rank, world, file, results):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=world)
    torch.manual_seed(0)
    op = set_quant_mode(QConv(3, 4, 1))
    op(torch.full((1, 3, 2, 2), float(rank)) + torch.arange(4.).reshape(2, 2))
    results[rank] = [op.sw.item(), op.sa.item(), op.beta.item()]
    with lsq_plus.local_initialisation():                        # no collective: only one rank comes here
        if rank == 1:
            other = set_quant_mode(QConv(3, 4, 1))
            other(torch.rand(1, 3, 2, 2))
    dist.destroy_process_group()


def test_scales_are_averaged_and_beta_min_reduced_over_ranks(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_initialise_on_rank, (2, tmp_path / 'store', results), nprocs=2)
        assert results[0] == results[1]
        assert results[0][1] == pytest.approx(3 / 255) and results[0][2] == 0.0


@pytest.mark.parametrize('size, kernel, stride', [(7, 5, 1), (9, 7, 1), (10, 7, 2), (11, 7, 2), (4, 5, 2), (1, 5, 1),
                                                 (2, 7, 2), (9, 3, 1)])
@pytest.mark.parametrize('bits', [32, 8])
def test_depthwise_gradients_are_torchs(size, kernel, stride, bits):
    """In int8 with an exact input: then both modes see the same numbers."""
    torch.manual_seed(0)
    op = QConv(6, 6, kernel, stride, kernel // 2, groups=6)
    x = torch.randint(0, 9, (3, 6, size, size)).float().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        op.weight.copy_(torch.randint(-3, 4, op.weight.shape))
        for parameter, value in ((op.sa, 1), (op.sw, 1), (op.beta, 0)):
            parameter.fill_(value)
    op.scales_initialized = True
    if bits == 8:
        set_quant_mode(op)
    leaves = [x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in (op.weight, op.bias))]
    want = nn.functional.conv2d(*leaves, op.stride, op.padding, 1, 6)
    grad = torch.randn_like(want)
    want.backward(grad)
    x.requires_grad_()
    y = op(x)
    y.backward(grad)
    torch.testing.assert_close(y, want)
    for ours, theirs in zip((x, op.weight, op.bias), leaves):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('geometry', [((1, 1), (0, 0), 1, 1, 1), ((1, 1), (2, 2), 5, 9, 16),
                                      ((2, 2), (3, 3), 7, 8, 16)],
                         ids=['one pixel', '5x5 depth-wise', '7x7 depth-wise, stride 2'])
def test_fast_convolutions_have_torchs_gradients(geometry):
    """Output and gradients of x, weight and bias, of the plain op's backward pass and of the quantised op's."""
    stride, padding, kernel, hw, groups = geometry
    x = torch.randn(3, 16, hw, hw, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(24 if groups == 1 else 16, 16 // groups, kernel, kernel, requires_grad=True)
    bias = torch.randn(len(weight), requires_grad=True)
    want = F.conv2d(x, weight, bias, stride, padding, 1, groups)
    grad = torch.randn_like(want)
    expected = torch.autograd.grad(want, (x, weight, bias), grad)
    ours = conv2d(x, weight, bias, stride, padding, (1, 1), groups)
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)
    assert type(ours.grad_fn).__name__ != type(want.grad_fn).__name__, 'the fast path was taken'
    for got, value in zip(torch.autograd.grad(ours, (x, weight, bias), grad), expected):
        torch.testing.assert_close(got, value, atol=1e-4, rtol=1e-4)
    direct = convolution_backward(grad, x.detach(), weight.detach(), [len(bias)], stride, padding, (1, 1), groups,
                                  [True] * 3)
    for got, value in zip(direct, expected):
        torch.testing.assert_close(got, value, atol=1e-4, rtol=1e-4)


def test_a_padded_single_pixel_is_no_linear_layer():
    op, x = QConv(4, 5, 1, padding=1), torch.randn(2, 4, 1, 1, requires_grad=True)
    torch.testing.assert_close(op(x), F.conv2d(x, op.weight, op.bias, padding=1))
    set_quant_mode(op)
    op(x).sum().backward()
    assert x.grad.shape == x.shape and op.weight.grad.shape == op.weight.shape


@pytest.mark.parametrize('name', sorted(OPS))
def test_autocast_leaves_levels_alone(name, kernels):
    """Of bf16 activations under autocast: the fp32 quantiser's numbers, cast once, in both passes.

    bf16 itself moves what is cast by up to 2^-9 of its size; quantising in bf16 puts 6 to 24 % on other levels.
    """
    op = set_quant_mode(OPS[name]()).train()
    x = torch.randn((2, 16) if name == 'linear' else (2, 8, 9, 9)).bfloat16()
    op(x.float())                                                # initialises the scales
    of_x = quantize_activation(x.float(), op.sa, 8, op.beta, True)
    used, exact = [], [of_x, quantize_weight(op.weight, op.sw, 8, True), of_x]      # forward, then backward
    with torch.autocast('cpu', torch.bfloat16), _operands(used):
        y = op(x.requires_grad_())
    with _operands(used):
        y.float().sum().backward()
    assert all(tensor.dtype == torch.bfloat16 for tensor in used)
    for ours, want in zip(used, exact, strict=True):
        assert (ours != want.bfloat16()).sum() == 0, 'values off the grid'
    assert op.sa.grad.isfinite().all() and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize('name', sorted(OPS))
def test_weights_quantised_once_give_the_same_numbers(name, kernels):
    op = set_quant_mode(OPS[name]()).eval()
    assert quantise_weights_once(op).nbits_w == 8                # its scales are not there yet
    x = torch.randn((2, 16) if name == 'linear' else (2, 8, 9, 9))
    with torch.no_grad():
        before, weight = op(x), quantize_weight(op.weight, op.sw, 8)
        assert not torch.equal(op.weight, weight)
        quantise_weights_once(op)
        assert torch.equal(op.weight, weight) and torch.equal(op(x), before) and op.is_quantised
        assert quantise_weights_once(op).nbits_w == 32


@contextlib.contextmanager
def _operands(seen):
    """Inside, the tensors that the quantised ops multiply are appended to `seen`."""
    operand = QuantisedOp.operand

    def record(*args):
        seen.append(operand(*args))
        return seen[-1]
    QuantisedOp.operand = staticmethod(record)
    try:
        yield
    finally:
        QuantisedOp.operand = staticmethod(operand)
