"""Whole zero points of activations, and weights of 7 bits: gradients, what they keep, files, INT8 models."""
import math

import pytest
import torch

import train_supernet
from modules.modeling.ops.lsq_plus import (
    quantisation_of,
    quantised_ops,
    quantize_activation,
    quantize_weight,
    requantise,
    set_fp32_mode,
    set_quant_mode,
)
from modules.modeling.ops.op import QLinear
from modules.modeling.supernet import Supernet
from modules.search_space.sampling import min_subnet
from modules.training.checkpoint import load_checkpoint
from modules.zoo import build_network, load_network, load_supernet, save_network, take_out

from .checkpoints import call, fails
from .conftest import ROOT

DEMO = 'demo-012-111'
# -beta / sa inside the range, rounded up and down, and beyond both ends
POINTS = [(0.011, -0.7), (0.013, -0.5), (-0.011, -0.7), (0.011, 0.3), (0.0011, -0.7)]


def _op(kind, sa=0.02, beta=-1.0):
    op = requantise(set_quant_mode(QLinear(4, 4)), 8, kind).double()
    with torch.no_grad():
        op.sa.fill_(sa), op.beta.fill_(beta)
    op.scales_initialized = True
    return op


def _composed(x, sa, beta, kind, bits, g):
    """s * (clamp(x / s + z) - z) with z as kind says, all roundings straight-through by detach, in float64."""
    def through(v, rounded):
        return v + (rounded - v).detach()
    high = 2 ** bits - 1
    s, b = (through(p * g, p) for p in (sa, beta))
    s = s.abs()
    z = through(real := (-b / s).clamp(0, high), real.round()) if kind == 'integer' else 2 ** (bits - 1)
    v = (x / s + z).clamp(0, high)
    return s * (through(v, v.round()) - z)


@pytest.mark.parametrize('sa, beta', POINTS)
@pytest.mark.parametrize('kind', ['integer', 'symmetric'])
def test_gradients_follow_the_definition(kind, sa, beta):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7, 7, dtype=torch.float64) * 2
    grad, results = torch.randn_like(x), []
    op = _op(kind, sa, beta)
    for function in (lambda x, s, b: quantize_activation(x, s, 8, op.offset(), True),
                     lambda x, s, b: _composed(x, s, b, kind, 8, 1 / math.sqrt(x[0].numel() * 255))):
        leaf = x.clone().requires_grad_()
        op.zero_grad()
        y = function(leaf, op.sa, op.beta)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, op.sa.grad, torch.zeros(1) if op.beta.grad is None else op.beta.grad])
    for ours, definition in zip(*results):
        torch.testing.assert_close(ours, definition.to(ours.dtype), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('sa, beta', POINTS)
def test_gradients_are_the_differences_of_what_is_rounded_as_it_is(sa, beta):
    """With what each rounding adds held fixed the output can be differentiated: central differences in sa and beta."""
    torch.manual_seed(0)
    x, op = torch.randn(2, 400, dtype=torch.float64) * 2, _op('integer', sa, beta)
    grad = torch.randn_like(x)

    def value(s, b, held=None):
        s = abs(s)
        real = min(max(-b / s, 0), 255)
        z_rest = held[0] if held else round(real) - real
        z = real + z_rest
        v = (x / s + z).clamp(0, 255)
        rest = held[1] if held else v.round() - v
        return (grad * s * (v + rest - z)).sum().item(), (z_rest, rest)

    quantize_activation(x, op.sa, 8, op.offset(), True).backward(grad)
    held, h = value(sa, beta)[1], 1e-9
    factor = 1 / math.sqrt(400 * 255)
    for gradient, high, low in ((op.sa.grad, (sa + h, beta), (sa - h, beta)),
                                (op.beta.grad, (sa, beta + h), (sa, beta - h))):
        numeric = (value(*high, held)[0] - value(*low, held)[0]) / (2 * h) * factor
        assert gradient.item() == pytest.approx(numeric, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize('kind', ['integer', 'symmetric'])
def test_zero_is_a_code(kind):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sa, beta = torch.rand(2, generator=generator).tolist()
        op = _op(kind, sa / 10 + 1e-4, beta * 8 - 7).float()
        zero = op.zero_point()
        assert zero == zero.round() and 0 <= zero <= 255
        assert quantize_activation(torch.zeros(1, 3), op.sa, 8, op.offset(), False).tolist() == [[0, 0, 0]]


def test_fitted_scales_cover_what_they_covered():
    op = _op('real')
    with torch.no_grad():
        op.weight.copy_(torch.linspace(-1, 1, 16).reshape(4, 4))
    op.initialize_scales(torch.linspace(-1, 2, 50).double())
    covered = 127.5 * op.sw.item()
    assert (op.weight - quantize_weight(op.weight, op.sw, 8)).abs().max() < 0.005
    requantise(op, 7, 'symmetric')
    assert (op.nbits_w, op.nbits_a) == (7, 8) and 63.5 * op.sw.item() == pytest.approx(covered)
    weight = quantize_weight(op.weight, op.sw, 7)
    assert (op.weight - weight).abs().max() < 0.01 and len((weight / op.sw).round().unique()) <= 128
    assert op.sa.item() == pytest.approx(2 / 127) and op.offset().item() == pytest.approx(-128 * 2 / 127)
    anew = _op('symmetric')
    anew.initialize_scales(torch.linspace(-1, 2, 50).double())
    torch.testing.assert_close(anew.sa, op.sa)
    requantise(op, 8, 'symmetric')
    assert 127.5 * op.sw.item() == pytest.approx(covered) and op.sa.item() == anew.sa.item()


@pytest.mark.parametrize('quantisation', [{'weight_bits': 7, 'zero_points': 'integer'}, {'zero_points': 'symmetric'}])
def test_a_file_says_how_its_network_is_quantised(tmp_path, quantisation):
    network = requantise(build_network(DEMO, min_subnet(DEMO), 10, None, True), **quantisation)
    images = torch.randn(4, 3, 40, 40)
    with torch.no_grad():
        network.train()(images)
        save_network(tmp_path / 'network.pth', network, DEMO, min_subnet(DEMO), True)
        again = load_network(tmp_path / 'network.pth')
        assert quantisation_of(again) == {'weight_bits': 8, **quantisation}
        assert torch.equal(again(images), network.eval()(images))
        network.reset_classifier(3)
    head = network.get_classifier()
    assert quantisation_of(head) == quantisation_of(again) and head.nbits_a == 8
    assert quantisation_of(set_fp32_mode(network)) == {}


def test_a_supernets_file_says_its_bits(tmp_path):
    supernet = requantise(set_quant_mode(Supernet.build_from_str(DEMO, 10)), 7)
    supernet.set_max_subnet()
    with torch.no_grad():
        supernet(torch.randn(2, 3, 40, 40))
    torch.save({'state_dict': supernet.state_dict(), **quantisation_of(supernet)}, tmp_path / 'lsq.pth')
    scales = [op.sw.item() for op in quantised_ops(supernet)]
    again = load_supernet(DEMO, tmp_path / 'lsq.pth', True)
    assert quantisation_of(again)['weight_bits'] == 7 and scales == [op.sw.item() for op in quantised_ops(again)]
    network, = take_out(DEMO, (min_subnet(DEMO),), tmp_path / 'lsq.pth', True)
    assert {op.nbits_w for op in quantised_ops(network)} == {7}
    network, = take_out(DEMO, (min_subnet(DEMO),), tmp_path / 'lsq.pth', False)
    assert quantisation_of(network) == quantisation_of(load_supernet(DEMO, tmp_path / 'lsq.pth')) == {}


def test_a_supernet_is_trained_and_validated_with_7_bits(tmp_path, monkeypatch, capsys):
    words = ('--config-file', 'supernet_training_configs/demo.yaml', '--supernet_choice', DEMO, '--dataset', 'digits',
             '--output_path', tmp_path, '--epochs', 1, '--max_steps', 1, '--batch_size_per_gpu', 8, '--valid_size', 100,
             '--num_calib_batches', 1, '--num_valid_images', 20, '--num_workers', 0, '--device', 'cpu', '--quant_mode')
    monkeypatch.chdir(ROOT)
    assert call(train_supernet, monkeypatch, *words, '--from_scratch', '--weight_bits', 7) == 0
    path, said = tmp_path / f'{DEMO}-align0' / 'lsq.pth', capsys.readouterr().out
    assert load_checkpoint(path)['weight_bits'] == 7
    assert quantisation_of(load_supernet(DEMO, path, True))['weight_bits'] == 7
    assert call(train_supernet, monkeypatch, *words, '--test_only') == 0
    assert capsys.readouterr().out == said                          # the file says its bits
    fails(train_supernet, monkeypatch, capsys, 'begun with weight_bits 7, not 8', *words, '--resume')
