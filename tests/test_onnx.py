"""ONNX export: every block type in fp32 and int8 beside torch, grids and padding."""
import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modules.deploy import runtimes
from modules.deploy.evaluate import compare, layer_errors
from modules.deploy.export import Entry, random_source
from modules.deploy.onnx_models import OPSET, export_fp32, export_int8, metadata_of
from modules.deploy.quantisation import lsq_target, observe, signed_codes, tap_sums, weight_codes
from modules.deploy.runtimes import fits_16_bits, open_session, run_session
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import (
    quantised_ops,
    quantize_activation,
    quantize_weight,
    requantise,
    set_quant_mode,
)
from modules.modeling.ops.op import QConv
from modules.search_space.sampling import min_subnet

from .blocks import CASES, DEMO, SEARCHED, difference, some_block

pytest.importorskip('onnxruntime')


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


def test_the_slow_exact_mode_is_asked_for_only_where_sums_are_not_exact(monkeypatch):
    """With VNNI it takes twice as long, for the same numbers; without it, the other mode saturates."""
    network, images = some_block('ResNetBlock')
    set_quant_mode(network)
    model, answers = export_int8(network, observe(network, [images])), []
    for exact in (runtimes.sums_are_exact(), False):
        monkeypatch.setattr(runtimes, 'sums_are_exact', lambda exact=exact: exact)
        session = open_session(model)
        with contextlib.nullcontext() if not exact else pytest.raises(RuntimeError, match='does not have'):
            assert session.get_session_options().get_session_config_entry(runtimes.EXACT_SUMS[0]) == '1'
        answers.append(run_session(session, images.numpy()))
    np.testing.assert_array_equal(*answers)


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
            target = lsq_target(op, activation, can_shift=True, padded=False)
            codes = torch.round((x - target.shift) / target.params.scale) + target.params.zero_point
            codes = codes.clamp(0, 255).clamp(target.low, target.high)
            ours = target.params.scale * (codes - target.params.zero_point) + target.shift
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


def _with_a_dead_channel(beta_steps):
    """A block in int8, one of whose channels is 0 everywhere and has no variance, and images."""
    network, images = some_block('MobileNetV1Block', cin=16, kernel=3, stride=1, hw=8)
    set_quant_mode(network)
    images = images.abs()
    images[:, 3] = 0
    unit = network.stages['stage'][0].depth_conv
    observe(network, [images])
    unit.dwconv.beta.data[:] = beta_steps * unit.dwconv.sa.data
    unit.norm.running_mean[3], unit.norm.running_var[3], unit.norm.weight.data[3] = 0, 0, 1
    return network, images


def test_dead_channels_with_a_tiny_variance(tmp_path):
    """Of a channel that is 0 everywhere beta and the padding's zeros are all there is; batch norm enlarges that."""
    network, images = _with_a_dead_channel(-0.3)
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


def test_small_integers_grow_for_finer_steps_of_the_bias():
    codes = np.array([[3., -4.], [0., 0.], [100., 5.], [1., 0.], [-128., 1.]])[:, :, None, None]
    factor, bias = np.array([0.5, 1.0, 2.0, 0.0, -1.0]), np.array([1.0, 2.0, -3.0, 4.0, 0.0])
    (whole, scales), (grown, finer) = (signed_codes(codes, factor, bias, 0.1, most) for most in (1, 63))
    assert np.abs(grown).max((1, 2, 3)).tolist() == [60, 0, 100, 0, 127]
    np.testing.assert_array_equal(grown, np.round(grown))
    np.testing.assert_allclose(grown * finer[:, None, None, None], whole * scales[:, None, None, None])
    np.testing.assert_allclose(scales / finer, [15, 63, 1, 1, 1])
    assert (np.abs(bias) / (0.1 * finer) < 2 ** 31).all()


def test_weights_of_7_bits():
    """Channels that fit keep torch's integers; in the others each weight is off by half a step of at most 2.04 sw."""
    op = QConv(64, 8, 3)
    set_quant_mode(op)
    with torch.no_grad():
        op.weight[0] *= 0.1
    op.initialize_scales(torch.randn(4))
    (whole, scale), (codes, scales) = weight_codes(op), weight_codes(op, reduce_range=True)
    assert np.abs(codes).reshape(8, -1).max(1).tolist()[1:] == [63] * 7 and np.abs(whole[1:]).max() > 63
    np.testing.assert_array_equal(codes[0], whole[0])
    assert scales[0] == scale and (scales <= 128 / 63 * scale + 1e-9).all()
    weight = (op.weight / scale).clamp(-128, 127).detach().numpy() * scale
    assert (np.abs(codes * scales[:, None, None, None] - weight).reshape(8, -1).max(1) <= scales / 2 + 1e-7).all()


@pytest.mark.parametrize('name', SEARCHED)
def test_7_bits_need_no_exact_mode(name, monkeypatch):
    """With the integers' largest values in all of a block ONNX Runtime's quick sums are the exact ones."""
    network, images = some_block(name)
    set_quant_mode(network)
    ranges = observe(network, [images])
    eight, seven = export_int8(network, ranges), export_int8(network, ranges, reduce_range=True)
    assert fits_16_bits(seven) and not fits_16_bits(eight)
    quick = open_session(seven)
    monkeypatch.setattr(runtimes, 'fits_16_bits', lambda model: False)
    exact = open_session(seven)
    extreme = [images, images.sign() * 100]
    for x in extreme:
        np.testing.assert_array_equal(run_session(quick, x.numpy()), run_session(exact, x.numpy()))
    theirs, ours = outputs(network, seven, images)
    assert difference(ours, theirs) < 0.05


@pytest.mark.parametrize('name', SEARCHED)
@pytest.mark.parametrize('activation', CASES)
def test_7_bits_and_whole_zero_points_that_were_trained_are_kept(name, activation):
    """The very integers of torch, also with reduce_range; no shift and no map, and codes nearer to torch's."""
    kernel, stride = CASES[activation]
    network, images = some_block(name, kernel=kernel, stride=stride, activation=activation, count=2)
    requantise(set_quant_mode(network), 7, 'integer')
    ranges = observe(network, [images])
    model, again = export_int8(network, ranges), export_int8(network, ranges, reduce_range=True)
    shifts = {tensor[3] for tensor in metadata_of(model)['tensors'].values()}
    assert model == again and fits_16_bits(model) and shifts == {0}
    for op in quantised_ops(network):
        codes, scale = weight_codes(op, reduce_range=True)
        np.testing.assert_allclose(codes * scale, quantize_weight(op.weight, op.sw, 7).detach(), atol=1e-7)
    assert not any('left' in node.output[0] for node in model.graph.node)
    errors = layer_errors(network, model, images)
    assert errors[0].rms < 1e-3 and max(error.rms for error in errors) < 0.08               # 1e-3: a tie
    assert difference(*outputs(network, model, images)) < 0.05


@pytest.mark.parametrize('beta_steps', [0.4, -20.4])
def test_padding_and_dead_channels_need_no_map_where_zero_is_a_code(beta_steps):
    """What is left of a shift, and enlarged by a tiny variance, is not there."""
    network, images = _with_a_dead_channel(beta_steps)
    maps = {}
    for kind in ('real', 'integer'):
        model = export_int8(requantise(network, 8, kind), observe(network, [images]))
        maps[kind] = sum('left' in node.output[0] for node in model.graph.node)
        assert difference(*outputs(network, model, images)) < 0.03
    assert maps['real'] and not maps['integer']


@pytest.mark.parametrize('name', SEARCHED)
@pytest.mark.parametrize('activation', CASES)
def test_symmetric_networks_are_int8_with_zero_points_of_0(name, activation):
    """As TensorRT reads them; checked by onnx's checker, run by its reference evaluator and by ONNX Runtime."""
    import onnx
    from onnx.reference import ReferenceEvaluator
    kernel, stride = CASES[activation]
    bits = 7 if kernel == 3 else 8
    network, images = some_block(name, kernel=kernel, stride=stride, activation=activation, count=2)
    requantise(set_quant_mode(network), bits, 'symmetric')
    model = export_int8(network, observe(network, [images]))
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type.endswith('Linear')]
    assert sum(node.op_type == 'QuantizeLinear' for node in nodes) == len(quantised_ops(network))
    for node in nodes:
        _, scale, zero = node.input
        assert constants[zero].dtype == np.int8 and not constants[zero].any() and (constants[scale] > 0).all()
    assert fits_16_bits(model) == (bits == 7)
    ours, theirs = outputs(network, model, images)
    model.opset_import[0].version = 19              # the reference has the two operators since then, the same for int8
    onnx.checker.check_model(model, full_check=True)
    reference, = ReferenceEvaluator(model).run(None, {'input': images.numpy()})
    model.opset_import[0].version = OPSET
    assert difference(ours, theirs) < 0.02 and difference(ours, reference) < 0.02
    errors = layer_errors(network, model, images)
    assert len(errors) == len(quantised_ops(network)) + 1 and max(error.rms for error in errors) < 0.02


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


def test_dynamic_batch_and_sessions():
    source = random_source(Entry(DEMO, min_subnet(DEMO)), True)
    images = source.batches[0][0]
    model = export_int8(source.network, observe(source.network, [images]))
    session = open_session(model)
    whole = run_session(session, images.numpy())
    single = np.concatenate([run_session(session, image[None].numpy()) for image in images])
    np.testing.assert_allclose(whole, single, atol=1e-5)


def test_torch_runs_the_first_images_alone_where_that_is_asked():
    """Every image has a class of its own, so that answers compared with those to other images would differ."""
    images, labels = torch.eye(10).view(10, 1, 1, 10).expand(10, 3, 10, 10), torch.arange(10)
    seen = []

    class Network(torch.nn.Module):
        resolution = 10

        def forward(self, images):
            seen.append(len(images))
            return images[:, 0, 0]
    batches = [(images[:4], labels[:4]), (images[4:8], labels[4:8]), (images[8:], labels[8:])]
    found = compare(Network(), lambda images: images[:, 0, 0], batches, torch_images=5)
    assert seen == [4, 1] and found[:4] == (100, 100, 100, 0) and (found.images, found.torch_images) == (10, 5)
    assert found.describe('it').endswith('(10 images, torch on 5)')
    assert compare(Network(), lambda images: images[:, 0, 0], batches).describe('it').endswith('(10 images)')
