"""ONNX export: every block type in fp32 and int8 beside torch, grids and padding, the commands, refusals, reuse."""
import os
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modules.deploy.folding import tap_sums, weight_codes
from modules.deploy.graph import metadata, need
from modules.deploy.int8 import lsq_target
from modules.deploy.jobs import random_subject
from modules.deploy.onnx_fp32 import export_fp32
from modules.deploy.onnx_int8 import export_int8
from modules.deploy.onnx_run import layer_errors, open_session, run_session
from modules.deploy.runtimes import ONNX
from modules.deploy.store import Entry, read_entries, read_model
from modules.deploy.trace import observe
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import quantised_ops, quantize_activation, quantize_weight, set_quant_mode
from modules.modeling.ops.op import QConv
from modules.search_space.encoding import parse_subnet
from modules.search_space.sampling import max_subnet, min_subnet

from .blocks import CASES, DEMO, SEARCHED, difference, some_block, write_trained
from .checkpoints import call, fails, write_supernet
from .conftest import ROOT

pytest.importorskip('onnxruntime')
sys.path.insert(0, os.path.join(ROOT, 'onnx_tools'))
import benchmark
import eval_onnx
import export_onnx


def outputs(network, model, images):
    """(torch's, ONNX Runtime's) outputs."""
    with torch.no_grad():
        return network(images).numpy(), run_session(open_session(model), images.numpy())


def operators(model, folder):
    """The operators that ONNX Runtime runs after its fusions."""
    import onnx
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / 'optimised.onnx'), 3
    ort.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return [node.op_type for node in onnx.load(folder / 'optimised.onnx').graph.node]


@pytest.mark.parametrize('name', SEARCHED)
@pytest.mark.parametrize('activation', CASES)
def test_every_block_type_as_torch(name, activation):
    kernel, stride = CASES[activation]              # two blocks: a shortcut of each kind
    network, images = some_block(name, kernel=kernel, stride=stride, activation=activation, count=2)
    ours, theirs = outputs(network, export_fp32(network), images)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * abs(ours).max())
    set_quant_mode(network)
    ranges = observe(network, [images])
    model = export_int8(network, ranges)
    ours, theirs = outputs(network, model, images)
    assert difference(ours, theirs) < 0.05
    errors = layer_errors(network, model, images)
    assert {error.name for error in errors} == {
        name for name, op in network.named_modules() if op in set(quantised_ops(network))} | {'logits'}
    assert errors[0].rms < 1e-6 and max(error.rms for error in errors) < 0.08


@pytest.mark.parametrize('name, activation', [('MobileNetV3K3ResBlock', 'swish'), ('MobileNetV3ResBlock', 'hswish'),
                                              ('MobileNetV2ResBlock', 'relu6'), ('ResNetSEBlock', 'relu')])
def test_onnx_runtime_fuses_the_whole_block(name, activation, tmp_path):
    network, images = some_block(name, activation=activation, count=3, hw=12, kernel=5)
    set_quant_mode(network)
    found = operators(export_int8(network, observe(network, [images])), tmp_path)
    assert found.count('QLinearConv') == sum(isinstance(op, QConv) for op in quantised_ops(network))
    # the input is quantised (twice: main branch and shortcut), and the last block's sum is real
    most = {'QuantizeLinear': 2, 'Sub': 2, 'Transpose': 3, 'DequantizeLinear': 2, 'Add': 1, 'Relu': 1, 'Flatten': 1}
    rest = Counter(op for op in found if not op.startswith('QLinear') and op != 'Clip')
    assert not rest - Counter(most), rest


def test_targets_are_torchs_codes():
    """Codes and shift of a target give LSQ+'s value of what a convolution wrote, for every scale and beta."""
    rng = np.random.default_rng(0)
    op = QConv(4, 4, 1)
    set_quant_mode(op)
    for activation, top in (('relu', np.inf), ('relu6', 6.0), (None, None)):
        for beta_steps in (0, 0.3, -0.3, 1.7, -1.7, -60.4, -254.6):
            scale = float(rng.uniform(0.01, 0.04))
            op.sa.data[:], op.beta.data[:] = scale, beta_steps * scale
            x = torch.from_numpy(rng.normal(0.5, 4, 4000).astype(np.float32))
            target = lsq_target(op, activation, movable=True, padded=False)
            codes = torch.round((x - target.shift) / target.grid.scale) + target.grid.zero
            codes = codes.clamp(0, 255).clamp(target.low, target.high)
            ours = target.grid.scale * (codes - target.grid.zero) + target.shift
            x = x if top is None else x.clamp(0, top)
            theirs = quantize_activation(x, op.sa, 8, op.beta, False)
            wrong = (ours - theirs).abs() > 1e-4
            assert wrong.float().mean() < 0.002, (activation, beta_steps)          # ties
            assert (ours - theirs).abs().max() <= 1.01 * scale


@pytest.mark.parametrize('beta_steps', [0.4, -0.4, 3.3, -20.4])
def test_the_zero_of_padding_is_a_code(beta_steps):
    """A k x k convolution whose input's beta is no multiple of its scale, on a map that is mostly border."""
    network, images = some_block('FusedMBConvResBlock', kernel=7, stride=1, hw=6, activation='relu')
    set_quant_mode(network)
    observe(network, [images])
    op = network.stages['stage'][0].fused_conv.conv
    op.sa.data[:] = 0.05
    op.beta.data[:] = beta_steps * 0.05
    ours, theirs = outputs(network, export_int8(network, observe(network, [images])), images)
    assert difference(ours, theirs) < 0.03


def test_dead_channels_with_a_tiny_variance(tmp_path):
    """Of a channel that is 0 everywhere beta and the padding's zeros are all there is; batch norm enlarges that."""
    network, images = some_block('MobileNetV1Block', cin=16, kernel=3, stride=1, hw=8)
    set_quant_mode(network)
    images = images.abs()
    images[:, 3] = 0
    unit = network.stages['stage'][0].depth_conv
    observe(network, [images])
    unit.dwconv.beta.data[:] = -0.3 * unit.dwconv.sa.data
    unit.norm.running_mean[3], unit.norm.running_var[3], unit.norm.weight.data[3] = 0, 0, 1
    model = export_int8(network, observe(network, [images]))
    assert difference(*outputs(network, model, images)) < 0.03
    found = operators(model, tmp_path)
    assert found.count('QLinearAdd') == 1 and 'Add' not in found


def test_tap_sums():
    op, taps = QConv(1, 4, 3, 2, 1), np.random.default_rng(0).normal(size=(4, 3, 3))
    ours = tap_sums(op, taps, (5, 6))
    theirs = F.conv2d(torch.ones(1, 1, 5, 6).double(), torch.from_numpy(taps)[:, None], stride=2, padding=1)[0]
    np.testing.assert_allclose(ours, theirs)


def test_weight_codes_are_torchs():
    op = QConv(3, 5, 3)
    set_quant_mode(op)
    op.initialize_scales(torch.randn(4))
    codes, scale = weight_codes(op)
    weight = quantize_weight(op.weight, op.sw, 8, False)
    np.testing.assert_allclose(codes * scale, weight.detach(), atol=1e-7)
    assert codes.min() >= -128 and codes.max() <= 127


def test_a_shortcut_that_the_first_scale_would_clip_stays_float(tmp_path):
    network, images = some_block('MobileNetV2ResBlock', stride=1, cin=24, activation='relu6', count=2)
    set_quant_mode(network)
    observe(network, [images])
    op = network.stages['stage'][1].point_conv1.conv
    op.sa.data /= 3
    op.beta.data /= 3
    model = export_int8(network, observe(network, [images]))
    assert difference(*outputs(network, model, images)) < 0.05
    assert 'Add' in operators(model, tmp_path)


def test_other_bits_are_refused():
    network, images = some_block('ResNetBlock')
    set_quant_mode(network, 4)
    with pytest.raises(UserError, match='8 bits'):
        export_int8(network, observe(network, [images]))


def _csv(path, *subnets, text=None):
    path.write_text(text or ''.join(f'demo,{DEMO.choice},{subnet}\n' for subnet in subnets))
    return path


@pytest.mark.parametrize('line, said', [
    ('onnxw,151122_023231', 'line 3: 2 values, expected <superspace>,<supernet_choice>,<subnet_choice>'),
    ('onnxy,151122_023231,d1', "line 3: no superspace 'onnxy'"),
    ('demo,019_000,d1', 'line 3: '),
    ('demo,012_000,d1#1', "line 3: 'd1#1'"),
    (f'demo,012_000,{max_subnet(DEMO)}'.replace('r48', 'r47'), 'resolution 47'),
    (f'demo,012_000,{min_subnet(DEMO)}', 'line 3: the same subnet as in line 2')])
def test_wrong_lines_are_refused_with_their_number(line, said, tmp_path, monkeypatch, capsys):
    path = _csv(tmp_path / 'in.csv', text=f'# comment\ndemo,{DEMO.choice},{min_subnet(DEMO)}\n{line}\n')
    for script in (export_onnx, benchmark):
        fails(script, monkeypatch, capsys, said, '--input', path, '--model_path', tmp_path / 'models')
    assert not (tmp_path / 'models').exists()


def test_other_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    path = _csv(tmp_path / 'in.csv', min_subnet(DEMO))
    fails(export_onnx, monkeypatch, capsys, 'no such file', '--input', tmp_path / 'none.csv')
    fails(export_onnx, monkeypatch, capsys, 'no subnet in it', '--input', _csv(tmp_path / 'e.csv', text='\n'))
    fails(export_onnx, monkeypatch, capsys, 'no checkpoint of demo-012-000', '--input', path, '--dataset', 'digits',
          '--checkpoint_path', tmp_path)
    fails(eval_onnx, monkeypatch, capsys, 'random weights have no accuracy', '--input', path, '--skip_weights')
    monkeypatch.setitem(sys.modules, 'onnx', None)
    for script in (export_onnx, benchmark, eval_onnx):
        fails(script, monkeypatch, capsys, 'onnx is not installed: pip install -r requirements-onnx.txt')


def test_shipped_list():
    entries = read_entries(os.path.join(ROOT, 'onnx_tools', 'input.csv'))
    assert {entry.supernet.superspace.name for entry in entries} == {'onnxw', 'mobilew'}
    assert entries[0].name.startswith('onnxw_151122_023231_') and len(entries[0].name.split('_')[-1]) == 6


def test_commands_run_and_models_are_used_again(tmp_path, monkeypatch, capsys):
    path, models = _csv(tmp_path / 'in.csv', min_subnet(DEMO)), tmp_path / 'models'
    options = ['--input', path, '--model_path', models]
    assert call(export_onnx, monkeypatch, '--skip_weights', *options, '--report') == 0
    out = capsys.readouterr().out
    assert 'as it was' not in out and out.count('<- worst') == 5
    name = Entry(DEMO, min_subnet(DEMO)).name
    files = {entry: os.stat(models / entry).st_mtime_ns for entry in os.listdir(models)}
    assert sorted(files) == [f'{name}.onnx', f'{name}_quant_int8.onnx']
    assert call(export_onnx, monkeypatch, '--skip_weights', *options) == 0
    assert capsys.readouterr().out.count('as it was') == 2
    assert files == {entry: os.stat(models / entry).st_mtime_ns for entry in os.listdir(models)}
    (models / f'{name}.onnx').write_bytes(b'half a model')
    assert call(export_onnx, monkeypatch, '--skip_weights', *options) == 0
    assert capsys.readouterr().out.count('as it was') == 1
    assert call(export_onnx, monkeypatch, '--skip_weights', *options, '--seed', 1) == 0       # other weights
    assert capsys.readouterr().out.count('as it was') == 0
    facts = metadata(read_model(models / f'{name}.onnx', ONNX))
    assert facts['subnet'] == str(min_subnet(DEMO)) and facts['supernet'] == str(DEMO)
    os.remove(models / f'{name}_quant_int8.onnx')
    for _ in range(2):
        assert call(benchmark, monkeypatch, *options, '--warmup', 1, '--runs', 5) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ('mean', 'median', 'p5', 'p95', 'with random weights'))
    lines = (models / 'latency.csv').read_text().split('\n')
    assert len(lines) == 3 and lines[2] == ''
    encoding, fp32, int8, speed_up = lines[0].split(',')
    assert parse_subnet(encoding) and float(speed_up) == pytest.approx(float(fp32) / float(int8), rel=0.01)
    assert sorted(os.listdir(models)) == sorted([*files, 'latency.csv'])


def test_a_checkpoint_of_a_supernet(tmp_path, monkeypatch, capsys):
    for file, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(tmp_path / 'demo-012-000-align0' / file, str(DEMO), 10, quant)
    options = ['--input', _csv(tmp_path / 'in.csv', min_subnet(DEMO)), '--model_path', tmp_path / 'models', '--dataset',
               'digits', '--checkpoint_path', tmp_path, '--num_calib_batches', 2, '--num_workers', 0, '--quant_mode']
    assert call(export_onnx, monkeypatch, *options) == 0
    assert 'lsq.pth)' in capsys.readouterr().out
    assert call(export_onnx, monkeypatch, *options) == 0
    assert capsys.readouterr().out.count('as it was') == 2


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """File of a demo subnet trained on digits, then LSQ+."""
    path = tmp_path_factory.mktemp('trained') / 'net.pth'
    write_trained(path)
    return path


def test_a_trained_network_keeps_its_accuracy(trained, tmp_path, monkeypatch, capsys):
    assert call(eval_onnx, monkeypatch, '--network', trained, '--quant_mode', '--dataset', 'digits', '--num_workers', 0,
                '--model_path', tmp_path, '--num_calib_batches', 4) == 0
    fp32, int8 = (line.split() for line in capsys.readouterr().out.split('\n') if 'agreement' in line)
    ours, theirs, agree = (float(int8[i].rstrip('%')) for i in (2, 5, 7))
    assert float(fp32[7].rstrip('%')) == 100 and ours > 90 and abs(ours - theirs) <= 1 and agree >= 98.5


def test_dynamic_batch_and_sessions():
    source = random_subject(Entry(DEMO, min_subnet(DEMO)), True)
    images = source.batches[0][0]
    model = export_int8(source.network, observe(source.network, [images]))
    session = open_session(model)
    whole = run_session(session, images.numpy())
    single = np.concatenate([run_session(session, image[None].numpy()) for image in images])
    np.testing.assert_allclose(whole, single, atol=1e-5)
    assert need('onnx').__name__ == 'onnx'
