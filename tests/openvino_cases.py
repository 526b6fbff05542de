"""OpenVINO runs ONNX files: same answers, latencies, blocks for a predictor, swishes within convolutions."""
import csv

import numpy as np
import pytest
import torch

from modules.deploy import runtimes
from modules.deploy.devices import OnnxDevice
from modules.deploy.export import Entry, random_source
from modules.deploy.onnx_models import export_fp32, export_int8
from modules.deploy.quantisation import observe
from modules.deploy.runtimes import ONNX, OPENVINO, OpenVinoSession, open_session, run_session
from modules.errors import UserError
from modules.latency.candidates import smallest_network
from modules.latency.profiling import Timing, time_in_turns
from modules.modeling.ops.lsq_plus import quantised_ops, set_quant_mode
from modules.modeling.ops.op import QConv
from modules.search_space.sampling import min_subnet
from onnx_tools import benchmark, eval_onnx, export_onnx

from .blocks import CASES, DEMO, difference, each_once, some_block, subnet_list, write_trained
from .checkpoints import call

pytest.importorskip('openvino')
pytest.importorskip('onnxruntime')


def test_float_models_answer_alike_whatever_the_batch():
    model = export_fp32(random_source(Entry(DEMO, min_subnet(DEMO)), False).network)
    ours, theirs = OPENVINO.open_session(model), open_session(model)
    assert ours.get_inputs()[0].shape == (None, 3, 32, 32)
    for batch in (1, 5, 1):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), np.float32)
        assert np.allclose(run_session(ours, images), run_session(theirs, images), atol=1e-4)


def test_a_trained_int8_network_answers_as_torch(tmp_path, monkeypatch, capsys):
    write_trained(tmp_path / 'net.pth')
    assert call(eval_onnx, monkeypatch, '--network', tmp_path / 'net.pth', '--quant_mode', '--dataset', 'digits',
                '--num_workers', 0, '--model_path', tmp_path / 'models', '--num_calib_batches', 4, '--runtime',
                'openvino', '--output', tmp_path / 'eval.csv') == 0
    assert 'OpenVINO' in capsys.readouterr().out
    with open(tmp_path / 'eval.csv', newline='') as f:
        fp32, int8 = csv.DictReader(f)
    assert float(fp32['agree']) == 100 and float(int8['agree']) >= 98
    assert abs(float(int8['torch']) - float(int8['onnx'])) <= 1


def test_latencies_name_the_runtime(tmp_path, monkeypatch):
    assert call(benchmark, monkeypatch, '--runtime', 'openvino', '--input', subnet_list(
        tmp_path / 'in.csv', min_subnet(DEMO)), '--model_path', tmp_path, '--warmup', 2, '--runs', 5) == 0
    *_, fp32, int8, ratio, device, runtime = (tmp_path / 'latency.csv').read_text().strip().split(',')
    assert runtime.startswith('OpenVINO 20') and float(fp32) > 0 and float(int8) > 0 and device


def test_blocks_are_measured():
    device, network = OnnxDevice(runtime='openvino'), smallest_network('demo')
    assert 'OpenVINO' in str(device)
    for blocks in ((), network[:1], network[1:2], network):
        run = device.prepare(blocks)
        assert 0 < time_in_turns([run], Timing(rounds=2))[0][0] < 100


def test_what_is_no_model_is_one_line(tmp_path):
    (tmp_path / 'x.onnx').write_text('no model')
    with pytest.raises(UserError, match='x.onnx: OpenVINO cannot open it'):
        OPENVINO.open_session(tmp_path / 'x.onnx')


# Its own graph of a swish

def runs(network, images, options):
    """(torch's outputs, OpenVINO's, [Operator]) of an INT8 model of a network, with weights of 7 bits: those of 8
    saturate without VNNI."""
    model = export_int8(network, observe(network, [images]), **options)
    session = OpenVinoSession(model, profile=True)
    with torch.no_grad():
        return network(images).numpy(), run_session(session, images.numpy()), session.operators()


@pytest.mark.parametrize('name, activation', each_once())
def test_every_block_type_as_torch(name, activation):
    kernel, stride = CASES[activation]
    network, images = some_block(name, kernel=kernel, stride=stride, activation=activation, count=2)
    set_quant_mode(network)
    ours, theirs, _ = runs(network, images, OPENVINO.int8_options(reduce_range=True))
    assert difference(ours, theirs) < 0.05


@pytest.mark.parametrize('name, activation', [('MobileNetV3ResBlock', 'hswish'), ('MobileNetV3ResBlock', 'swish')])
def test_swishes_are_part_of_the_convolution_before(name, activation):
    network, images = some_block(name, activation=activation, count=3, hw=12, kernel=5)
    set_quant_mode(network)
    ours, bytes_, before = runs(network, images, ONNX.int8_options(reduce_range=True))
    _, float_, after = runs(network, images, OPENVINO.int8_options(reduce_range=True))
    assert difference(ours, float_) < difference(ours, bytes_)
    convolutions = sum(isinstance(op, QConv) for op in quantised_ops(network))
    for operators in (before, after):
        assert sum(op.kind == 'Convolution' and op.reads == 'u8' for op in operators) == convolutions
    # beside those that add a constant map, which a shift at the border may need
    passes = [sum(op.kind == 'Subgraph' and not any(node.endswith('.sum') for node in op.nodes) for op in operators)
              for operators in (before, after)]
    assert passes[0] - passes[1] == 2 * 3               # two swishes in each of three blocks


def test_its_int8_models_are_files_of_their_own(tmp_path, monkeypatch):
    for runtime in ('onnxruntime', 'openvino'):
        assert call(export_onnx, monkeypatch, '--skip_weights', '--runtime', runtime, '--input', subnet_list(
            tmp_path / 'in.csv', min_subnet(DEMO)), '--model_path', tmp_path) == 0
    name = Entry(DEMO, min_subnet(DEMO)).name
    assert sorted(path.name for path in tmp_path.glob('*.onnx')) == [
        f'{name}{kind}.onnx' for kind in ('', '_quant_int8', '_quant_int8_openvino')]


def test_8_bit_weights_without_vnni_are_said_to_saturate(monkeypatch, capsys):
    network = random_source(Entry(DEMO, min_subnet(DEMO)), True).network
    ranges = observe(network, [torch.randn(2, 3, 32, 32)])
    models = {bits: export_int8(network, ranges, **OPENVINO.int8_options(bits == 7)) for bits in (7, 8)}
    runtimes._say_saturating.cache_clear()
    for exact, bits, said in ((True, 8, 0), (False, 7, 0), (False, 8, 1), (False, 8, 0)):      # once in a process
        monkeypatch.setattr(runtimes, 'sums_are_exact', lambda exact=exact: exact)
        OPENVINO.open_session(models[bits])
        assert capsys.readouterr().err.count('--reduce_range') == said
