"""TFLite export: every block type in fp32 and int8 beside torch, no floats left, a phone."""
import os
import sys

import numpy as np
import pytest
import torch

from modules.deploy.export import Entry, random_source
from modules.deploy.phone import Phone, parse_benchmark
from modules.deploy.quantisation import observe
from modules.deploy.runtimes import TFLITE, Interpreter
from modules.deploy.tflite_models import export_fp32, export_int8, metadata_of
from modules.errors import UserError
from modules.modeling.network import Network
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.optional import need
from modules.search_space.sampling import min_subnet
from tflite_tools import benchmark

from .blocks import CASES, DEMO, difference, each_once, some_block, subnet_list
from .checkpoints import call, fails

pytest.importorskip('ai_edge_litert')


def operators(model):
    """[(operator, its tensors' types)] of a model's bytes, in order."""
    schema = need('ai_edge_litert.schema_py_generated')
    tree = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model))
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    types = {code: name for name, code in vars(schema.TensorType).items() if isinstance(code, int)}
    graph = tree.subgraphs[0]
    return [(names[tree.operatorCodes[op.opcodeIndex].builtinCode],
             [types[graph.tensors[i].type] for i in (*op.inputs, *op.outputs) if i >= 0]) for op in graph.operators]


def floats(model):
    """The operators that touch a float tensor."""
    return [name for name, types in operators(model) if set(types) & {'FLOAT32', 'FLOAT16', 'FLOAT64'}]


def outputs(network, model, images):
    with torch.no_grad():
        return network(images).numpy(), Interpreter(model).run(images)


@pytest.mark.parametrize('name, activation', each_once())
def test_every_block_type_as_torch(name, activation):
    kernel, stride = CASES[activation]              # two blocks: a shortcut of each kind
    network, images = some_block(name, kernel=kernel, stride=stride, activation=activation, count=2)
    if activation in ('relu', 'swish'):
        ours, theirs = outputs(network, export_fp32(network), images)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * abs(ours).max())
    set_quant_mode(network)
    model = export_int8(network, observe(network, [images]))
    ours, theirs = outputs(network, model, images)
    assert difference(ours, theirs) < 0.05
    assert floats(model) == ['QUANTIZE', 'DEQUANTIZE']


@pytest.mark.parametrize('hw', [8, 9])
@pytest.mark.parametrize('beta_steps', [0.4, -0.4, 3.3, -20.4])
def test_padding_and_its_zero(beta_steps, hw):
    """A strided 7x7 convolution on a map that is mostly border, its input's beta no multiple of its scale."""
    network, images = some_block('FusedMBConvResBlock', kernel=7, stride=2, hw=hw, activation='relu')
    set_quant_mode(network)
    observe(network, [images])
    op = network.stages['stage'][0].fused_conv.conv
    op.sa.data[:], op.beta.data[:] = 0.05, beta_steps * 0.05
    ours, theirs = outputs(network, export_int8(network, observe(network, [images])), images)
    assert difference(ours, theirs) < 0.03


def test_weights_of_minus_128_and_a_trained_relu6():
    """-128 is no TFLite weight; a scale that holds more than relu6 gives is cut at 6, by the kernel where it can."""
    network, images = some_block('MobileNetV2ResBlock', stride=1, kernel=5, activation='relu6', hw=8, count=2)
    set_quant_mode(network)
    observe(network, [images])
    for block in network.stages['stage']:
        for unit in (block.point_conv1.conv, block.depth_conv.dwconv):
            unit.sw.data *= 0.8
        block.depth_conv.dwconv.sa.data *= 1.3
        block.depth_conv.dwconv.beta.data -= 2.4 * block.depth_conv.dwconv.sa.data
        block.point_conv2.conv.sa.data[:] = 0.04
    model = export_int8(network, observe(network, [images]))
    assert difference(*outputs(network, model, images)) < 0.05
    assert floats(model) == ['QUANTIZE', 'DEQUANTIZE']


def test_a_shortcut_that_the_first_scale_would_clip():
    network, images = some_block('MobileNetV2ResBlock', stride=1, activation='relu6', count=2)
    set_quant_mode(network)
    observe(network, [images])
    op = network.stages['stage'][1].point_conv1.conv
    op.sa.data /= 3
    op.beta.data /= 3
    model = export_int8(network, observe(network, [images]))
    assert difference(*outputs(network, model, images)) < 0.05
    assert floats(model) == ['QUANTIZE', 'DEQUANTIZE'] and 'MINIMUM' in [name for name, _ in operators(model)]


def test_dead_channels_with_a_tiny_variance():
    """A channel that is 0 everywhere: beta is all that its batch norm sees, and enlarges 316 times."""
    network, images = some_block('MobileNetV1Block', kernel=3, stride=1, hw=8, count=2)
    set_quant_mode(network)
    first, second = network.stages['stage']
    first.point_conv.norm.weight.data[3], first.point_conv.norm.bias.data[3] = 0, -1
    unit = second.depth_conv
    observe(network, [images])
    unit.dwconv.beta.data[:] = -0.3 * unit.dwconv.sa.data
    unit.norm.running_mean[3], unit.norm.running_var[3], unit.norm.weight.data[3] = 0, 0, 1
    model = export_int8(network, observe(network, [images]))
    assert difference(*outputs(network, model, images)) < 0.03
    assert [name for name, _ in operators(model)].count('ADD') == 1


def test_swishes_and_gates_are_single_operators():
    network, images = some_block('MobileNetV3ResBlock', activation='hswish', kernel=5, count=2)
    assert [name for name, _ in operators(export_fp32(network))].count('HARD_SWISH') == 4
    set_quant_mode(network)
    names = [name for name, _ in operators(export_int8(network, observe(network, [images])))]
    assert names.count('HARD_SWISH') == 4 and names.count('MEAN') == names.count('MUL') == 2
    assert 'LOGISTIC' not in names and names.count('DEPTHWISE_CONV_2D') == 2


def test_a_whole_network():
    source = random_source(Entry(DEMO, min_subnet(DEMO)), True)
    images, network = source.batches[0][0], source.network
    model = export_int8(network, observe(network, [images]), {'subnet': 'x'})
    ours, theirs = outputs(network, model, images)
    assert ours.shape == theirs.shape == (len(images), 10) and difference(ours, theirs) < 0.25
    assert floats(model) == ['QUANTIZE', 'DEQUANTIZE'] and metadata_of(model) == {'subnet': 'x'}
    interpreter = Interpreter(model)
    once = interpreter.run(images[:1])
    interpreter.invoke()
    np.testing.assert_array_equal(interpreter.run(images[:1]), once)


def test_a_whole_network_in_fp32():
    network = Network.build(DEMO, min_subnet(DEMO), 10).eval()
    images = torch.randn(3, 3, network.resolution, network.resolution)
    ours, theirs = outputs(network, export_fp32(network), images)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


def test_other_bits_and_damaged_models_are_refused(tmp_path):
    network, images = some_block('ResNetBlock')
    set_quant_mode(network, 4)
    with pytest.raises(UserError, match='8 bits'):
        export_int8(network, observe(network, [images]))
    (tmp_path / 'half.tflite').write_bytes(b'half a model')
    with pytest.raises(UserError, match='half.tflite: TFLite cannot open it'):
        Interpreter(tmp_path / 'half.tflite')


FAKE_ADB = '''#!{python}
"""adb of a phone whose /data/local/tmp is {folder}; {folder}/fault says what goes wrong."""
import os, re, shutil, sys
args, folder = sys.argv[1:], {folder!r}
fault = open(folder + '/fault').read() if os.path.exists(folder + '/fault') else ''
open(folder + '/log', 'a').write(' '.join(args) + chr(10))
if args[:1] == ['-s']:
    if args[1] != 'PHONE':
        sys.exit(f'error: device {{args[1]!r}} not found')
    args = args[2:]
here = lambda path: path.replace('/data/local/tmp', folder)
if args[0] == 'push':
    if fault == 'push':
        sys.exit('adb: error: failed to copy: No space left on device')
    shutil.copy(args[1], here(args[2]))
elif 'benchmark_model' in args[1] and 'chmod' not in args[1]:
    graph = re.search(r'--graph=(\\S+)', args[1])[1]
    milliseconds = 1 + ('fp32' in fault) + os.path.getsize(here(graph)) / 1e6
    if fault == 'run':
        print('sh: benchmark_model: not found\\nspaceevo exit status 127')
    elif fault == 'garbage':
        print('INFO: STARTING!\\nspaceevo exit status 0')
    else:
        runs = 7 if fault == 'short' else re.search(r'--num_runs=(\\d+)', args[1])[1]
        print('INFO: count=100 first=9 curr=9 min=9 max=9 avg=99999 std=1')
        print(f'INFO: count={{runs}} first=9 curr=8 min=7 max=9 avg={{1000 * milliseconds:.1f}} std=25.5 p5=7 median=8')
        print('INFO: Inference timings in us: Init: 1, First inference: 2, Warmup (avg): 99999, Inference (avg): 1')
        print('INFO: Memory footprint delta from the start of the tool (MB): init=1.5 overall=4.25')
        print('spaceevo exit status 0')
else:
    if 'rm -f' in args[1]:
        os.remove(here(args[1].split()[-1]))
    print('spaceevo exit status 0')
'''


@pytest.fixture
def phone(tmp_path, monkeypatch):
    """Folder of a phone behind a fake adb on PATH."""
    folder, programs = tmp_path / 'phone', tmp_path / 'bin'
    folder.mkdir(), programs.mkdir()
    (programs / 'adb').write_text(FAKE_ADB.format(python=sys.executable, folder=str(folder)))
    (programs / 'adb').chmod(0o755)
    monkeypatch.setenv('PATH', f'{programs}{os.pathsep}{os.environ["PATH"]}')
    return folder


def test_a_phone_measures_models(phone, tmp_path):
    (tmp_path / 'binary').write_bytes(b'binary')
    latency = Phone(serial='PHONE', mask='f0', push_binary=str(tmp_path / 'binary')).latency(b'x' * 500_000, 20, 50)
    assert latency.mean == pytest.approx(1.5) and latency.std == 0.0255 and latency.memory == 4.25
    log = (phone / 'log').read_text()
    assert 'taskset f0 /data/local/tmp/benchmark_model --graph=/data/local/tmp/spaceevo-' in log
    assert '--num_threads=1 --warmup_runs=20 --num_runs=50' in log and log.startswith('-s PHONE push')
    assert sorted(os.listdir(phone)) == ['benchmark_model', 'log']          # the model is removed


@pytest.mark.parametrize('fault, said', [
    ('push', 'No space left on device'), ('run', 'benchmark_model: not found'),
    ('garbage', 'no latency in its output (it ends: INFO: STARTING!)'), ('short', 'stopped after 7 of 100 runs')])
def test_what_goes_wrong_on_a_phone_is_one_line(fault, said, phone, tmp_path, monkeypatch, capsys):
    models = tmp_path / 'models'
    entry = Entry(DEMO, min_subnet(DEMO))
    for ending in ('', '_quant_int8'):
        TFLITE.write(models / f'{entry.name}{ending}.tflite', b'a model, for the fake')
    options = ['--input', subnet_list(tmp_path / 'in.csv', entry.subnet), '--model_path', models, '--adb']
    assert call(benchmark, monkeypatch, *options) == 0
    before = (models / 'latency.csv').read_text()
    assert before == f'demo-{entry.choice}-{entry.subnet},1.0000,1.0000,1.0000,phone,TFLite benchmark_model\n'
    (phone / 'fault').write_text(fault)
    fails(benchmark, monkeypatch, capsys, said, *options)
    assert (models / 'latency.csv').read_text() == before
    fails(benchmark, monkeypatch, capsys, "device 'OTHER' not found", *options, '--serial', 'OTHER')
    fails(benchmark, monkeypatch, capsys, '--adb says where it is', *options[:-1], '--adb', tmp_path / 'no_adb')
    fails(benchmark, monkeypatch, capsys, 'with --adb or --serial', *options[:-1], '--push_binary', 'x')


def test_output_of_old_benchmark_models():
    line = 'count={} first=5 curr=5 min=5 max=5 avg={} std=2\n'
    assert parse_benchmark(line.format(1, 9000) + line.format(100, 4000), 100) == (4.0, 0.002, None)
    with pytest.raises(UserError, match='no latency'):
        parse_benchmark(line.format(100, 4000), 100)            # the warm-up only
