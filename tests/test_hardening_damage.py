"""Valid files with one thing in them damaged, and odd surroundings: errors of one line that name the culprit."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from modules import zoo
from modules.block_kd.teacher import build_teacher
from modules.cli import load_plugin
from modules.errors import UserError
from modules.files import check_file
from modules.latency.kernel_model import LatencyError
from modules.latency.tables import DATA, load_platform, read_table
from modules.modeling.network import Network
from modules.pipeline.runner import _read
from modules.training.checkpoint import load_weights, model_state, restore
from modules.training.data import open_data
from modules.training.tars import tar_index

from .conftest import ROOT
from .hardening import refused, world

DEMO, SUBNET = 'demo-222-111', 'd1#1#1#1#1_k3#3#3#3#3_w24#24#48#80#160_e0#0.5#4.0#4.0#4.0_r32'


def one_line(error, *culprits):
    text = str(error.value)
    assert '\n' not in text and len(text) < 1000, text
    for culprit in culprits:
        assert culprit in text, text


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize('metadata', [[1], 5, 'x', {1: 2}, {'': 5}, {'': {'version': 'x'}}, {'0': {'version': [1]}}],
                         ids=repr)
def test_metadata_of_weights(metadata):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    state = OrderedDict(model.state_dict())
    state._metadata = metadata
    load_weights(model, {'state_dict': state})


TENSORS = {
    'sparse': lambda t: t.to_sparse(),
    'meta': lambda t: t.to('meta'),
    'float8': lambda t: t.to(torch.float8_e4m3fn),
    'complex': lambda t: t.to(torch.complex64),
    'nested': lambda t: torch.nested.nested_tensor(list(t)),
    'quantised': lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8),
}


@pytest.mark.parametrize('kind', TENSORS)
def test_tensors_of_odd_kinds(kind):
    with pytest.raises(UserError) as error:
        model_state({'state_dict': {'weight': TENSORS[kind](torch.ones(2, 2)), 'bias': torch.ones(2)}})
    one_line(error, 'weight')


@pytest.mark.parametrize('key, value', [('running_var', -1.0), ('weight', 1e300), ('weight', float('nan'))])
def test_values_that_no_training_gives(key, value):
    model = torch.nn.BatchNorm1d(2)
    state = {name: tensor.double() if tensor.is_floating_point() else tensor
             for name, tensor in model.state_dict().items()}
    state[key][0] = value
    with pytest.raises(UserError) as error:
        load_weights(model, state)
    one_line(error, key)


@pytest.mark.parametrize('classifier', [torch.tensor(1.0), torch.ones(3), torch.ones(10 ** 6, 1), torch.ones(0, 320)],
                         ids=lambda tensor: str(tuple(tensor.shape)))
def test_classifiers_of_another_shape(tmp_path, classifier):
    path = tmp_path / 'checkpoint.pth'
    torch.save({'state_dict': {zoo.CLASSIFIER: classifier}}, path)
    with pytest.raises(UserError) as error:
        zoo.load_supernet(DEMO, path)
    one_line(error, str(path), zoo.CLASSIFIER)


FACTS = [('num_classes', value) for value in ('10', -1, 10 ** 13, True, 2.0, float('nan'), None, torch.tensor(10))] + [
    ('quant_mode', value) for value in ('x', 5, torch.ones(2), None)] + [
    ('subnet', value) for value in (5, None, [], 'd1')] + [('supernet', value) for value in (5, 'demo-999-111', {})] + [
    ('state_dict', value) for value in (5, [])] + [('weight_bits', value) for value in (6, '7', True, None)] + [
    ('zero_points', value) for value in ('whole', 5, [])]


@pytest.mark.parametrize('key, value', FACTS, ids=lambda value: str(value)[:20])
def test_facts_of_a_network(tmp_path, key, value):
    path = tmp_path / 'network.pth'
    network = Network.build(DEMO, SUBNET, 3)
    torch.save(zoo.network_checkpoint(network, DEMO, SUBNET, False) | {key: value}, path)
    for read in (zoo.load_network, zoo.subnet_of):
        with pytest.raises(UserError) as error:
            read(path)
        one_line(error, str(path))


@pytest.mark.parametrize('change', [{'arch': None}, {'arch': 5}, {'arch': 'efficientnet-b0'}, {'normalize': 'x'},
                                    {'normalize': [1]}, {'normalize': {}}], ids=str)
def test_facts_of_a_teacher(tmp_path, change):
    path = tmp_path / 'checkpoint.pth'
    teacher = build_teacher('efficientnet-lite0', weights='random')
    torch.save(teacher.checkpoint() | change, path)
    with pytest.raises(UserError) as error:
        build_teacher('efficientnet-lite0', checkpoint=path)
    one_line(error, str(path), str(next(iter(change.values()))))


# ---------------------------------------------------------------- training runs

def _stopped():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer, {'settings': {'seed': 0}, 'step': 1, 'best': 1.0, 'optimizer': optimizer.state_dict()}


RUNS = [('step', True), ('step', 2.0), ('step', -1), ('step', 99), ('best', float('nan')), ('best', 1), ('best', None)]


@pytest.mark.parametrize('key, value', RUNS, ids=str)
def test_progress_of_a_run(key, value):
    optimizer, state = _stopped()
    with pytest.raises(UserError) as error:
        restore('run.pth', state | {key: value}, {'seed': 0}, optimizer, {'step': int, 'best': float}, 10)
    one_line(error, 'run.pth', key)


def test_the_state_of_other_parameters():
    optimizer, state = _stopped()
    state['optimizer']['state'][0]['momentum_buffer'] = torch.ones(3)
    with pytest.raises(UserError) as error:
        restore('run.pth', state, {'seed': 0}, optimizer, {'step': int}, 10)
    one_line(error, 'run.pth', 'momentum_buffer')


def test_settings_of_an_optimizer_are_the_scripts():
    optimizer, state = _stopped()
    state['optimizer']['param_groups'][0].update(lr='x', momentum=None, nesterov='x', maximize=True)
    restore('run.pth', state, {'seed': 0}, optimizer, {'step': int}, 10)
    group, = optimizer.param_groups
    assert (group['lr'], group['momentum'], group['nesterov'], group['maximize']) == (0.1, 0.9, False, False)


# ---------------------------------------------------------------- latency platforms

def _arrays(path):
    with np.load(path, allow_pickle=False) as data:
        return dict(data)


def _change_array(file, name, change):
    def damage(folder):
        arrays = _arrays(folder / file)
        arrays[name] = change(arrays[name])
        np.savez(folder / file, **arrays)
    return damage


def _change_header(**values):
    return _change_array('model.npz', 'header', lambda array: np.array(json.dumps(json.loads(str(array)) | values)))


def _poke(array, value):
    array = array.copy()
    array.flat[0] = value
    return array


PLATFORMS = {
    'blocks cut off': lambda folder: os.truncate(folder / 'blocks.npz', 1000),
    'model cut off': lambda folder: os.truncate(folder / 'model.npz', 1000),
    'empty blocks': lambda folder: (folder / 'blocks.npz').write_bytes(b''),
    'one array': lambda folder: np.save(open(folder / 'blocks.npz', 'wb'), np.ones(3)),
    'unknown type': _change_array('blocks.npz', 'type', lambda array: _poke(array, 99)),
    'no rows': _change_array('blocks.npz', 'ms', lambda array: array[:0]),
    'a short column': _change_array('blocks.npz', 'hw', lambda array: array[:-1]),
    'flat types': _change_array('blocks.npz', 'types', lambda array: array.ravel()),
    'text for ms': _change_array('blocks.npz', 'ms', lambda array: array.astype(str)),
    'negative ms': _change_array('blocks.npz', 'ms', lambda array: _poke(array.astype(float), -1)),
    'nan ms': _change_array('blocks.npz', 'ms', lambda array: _poke(array.astype(float), np.nan)),
    'list for header': _change_array('model.npz', 'header', lambda array: np.array('[1]')),
    'layers': _change_header(layers=[1]),
    'no layers': _change_header(layers={'conv': 0}),
    'overhead': _change_header(overhead_ms='x'),
    'block types': _change_header(block_types=5),
    'nan weights': _change_array('model.npz', 'block.0.weight', lambda array: _poke(array, np.nan)),
    'short bias': _change_array('model.npz', 'block.0.bias', lambda array: array[:-1]),
}


@pytest.mark.parametrize('damage', PLATFORMS)
def test_damaged_platforms(tmp_path, damage):
    folder = tmp_path / 'host'
    shutil.copytree(os.path.join(DATA, 'onnx_lut'), folder)
    PLATFORMS[damage](folder)
    with pytest.raises(LatencyError) as error:
        load_platform(str(folder))
    one_line(error, str(folder))


KEY = 'MobileNetV2ResBlock_{}_{}_16_3_{}_1_relu6'
TABLES = [(KEY.format(10 ** 25, 16, 4), 1.0), (KEY.format(70000, 16, 4), 1.0), (KEY.format(56, -16, 4), 1.0),
          (KEY.format(56, 16, 'inf'), 1.0), (KEY.format(56, 16, 'nan'), 1.0), (KEY.format(0, 16, 4), 1.0),
          (KEY.format(56, 16, 4), 1e308), (KEY.format(56, 16, 4), 1e-320)]


@pytest.mark.parametrize('key, ms', TABLES, ids=str)
def test_extremes_in_block_tables(tmp_path, key, ms):
    path = tmp_path / 'table.json'
    path.write_text(json.dumps({key: ms}))
    with pytest.raises(LatencyError) as error:
        read_table(path)
    one_line(error, str(path), key)


# ---------------------------------------------------------------- data

IDX = {
    'labels': lambda raw: (raw / 't10k-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01\0\0\0\x02\xc8\xc8'),
    'empty images': lambda raw: (raw / 'train-images-idx3-ubyte').write_bytes(
        b'\0\0\x08\x03\0\0\0\x02' + b'\0\0\0\0' * 2),
    'floats': lambda raw: (raw / 't10k-images-idx3-ubyte').write_bytes(
        b'\0\0\x0d\x03\0\0\0\x02' + b'\0\0\0\x04' * 2 + bytes(32)),
}


@pytest.mark.parametrize('damage', IDX)
def test_damaged_idx_files(tmp_path, damage):
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for part in ('train', 't10k'):
        (raw / f'{part}-images-idx3-ubyte').write_bytes(b'\0\0\x08\x03\0\0\0\x02' + b'\0\0\0\x04' * 2 + bytes(32))
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(b'\0\0\x08\x01\0\0\0\x02\x01\x02')
    assert len(open_data(str(tmp_path), 'mnist', 0, image_size=32).train) == 2
    IDX[damage](raw)
    with pytest.raises(UserError) as error:
        open_data(str(tmp_path), 'mnist', 0, image_size=32)
    one_line(error, str(raw))


@pytest.mark.parametrize('change', [{'offsets': ['x']}, {'offsets': [2 ** 70]}, {'sizes': [2 ** 40]}, {'sizes': [-1]},
                                    {'names': [5]}, {'names': [None]}, {'names': ['\ud800']}, {'offsets': [True]}],
                         ids=str)
def test_damaged_index_of_a_tar_is_made_anew(tmp_path, change):
    path = tmp_path / 'x.tar'
    (tmp_path / 'a.png').write_bytes(b'picture')
    with tarfile.open(path, 'w') as tar:
        tar.add(tmp_path / 'a.png', 'n00/a.png')
    members, keep = tar_index(str(path))
    keep()
    index = tmp_path / 'x.tar.index.json'
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    assert tar_index(str(path))[0] == members


# ---------------------------------------------------------------- surroundings

@pytest.mark.parametrize('text', ['', '{', '[]', '5', '{"commands": []}', '{"commands": [], "seconds": "x"}', '\xff'])
def test_records_of_the_demo(tmp_path, text):
    path = tmp_path / 'step.json'
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(UserError) as error:
        _read(path)
    one_line(error, str(path))


@pytest.mark.parametrize('code, said', [('def f(:\n', 'SyntaxError'), ('import nosuchthing', 'nosuchthing'),
                                        ('x = 1\n1/0', ':2: ZeroDivisionError'), ('x = "\xff"', 'Error')], ids=str)
def test_plugins_that_fail(tmp_path, code, said):
    path = tmp_path / 'plugin.py'
    path.write_bytes(code.encode('latin-1'))
    with pytest.raises(UserError) as error:
        load_plugin(str(path))
    one_line(error, str(path), said)


@pytest.mark.parametrize('name, value', [('LOCAL_RANK', 'x'), ('RANK', 'x'), ('RANK', '-1'), ('MASTER_PORT', 'x'),
                                         ('WORLD_SIZE', '0'), ('RANK', '5')])
def test_a_launchers_environment(monkeypatch, name, value):
    made = world()
    for key, text in ({'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}).items():
        monkeypatch.setenv(key, text)
    monkeypatch.setenv(name, value)
    refused(made.base('accuracy'), value)


@pytest.mark.parametrize('run, flag', [('latency', '--output_path'), ('spaces', '--output_dir'),
                                       ('export', '--model_path'), ('subnets', '--checkpoint_path')])
def test_empty_values(run, flag):
    refused(world().base(run, [f'{flag}=']), flag)


def test_what_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    check_file(tmp_path / 'new' / 'folder' / 'x')
    for path, said in ((tmp_path, 'is a folder'), (tmp_path / 'file' / 'x' / 'y', 'is a file')):
        with pytest.raises(UserError, match=said):
            check_file(path)
    folder = tmp_path / 'out'
    folder.mkdir()
    refused(world().base('supernet', ['--output_path', str(tmp_path / 'file')]), str(tmp_path / 'file'))
    refused(world().base('published', ['--save_network', str(folder)]), str(folder))


@pytest.mark.parametrize('run, words, culprit', [
    ('spaces', ['--latency_constraint', '2', '2.00000001'], '2 2'),
    ('supernet', ['--valid_size=0'], '--valid_size 0'),
    ('teacher', ['--image_size=100000'], '100000'),
    ('block_kd', ['--hw_list', '800000'], '800000'),
    ('lut', ['--num_threads=100000'], '100000')])
def test_numbers_that_make_no_sense(run, words, culprit):
    refused(world().base(run, words), culprit)


def test_scores_that_overflow():
    """A penalty too large for a float counts as infinite, and the run ends well."""
    assert world().base('choices', ['--latency_loss_a=400', '--latency_loss_t=1e10']).code == 0


def test_a_csv_of_excel(tmp_path):
    text = world().inputs.joinpath('input.csv').read_text()
    path = tmp_path / 'input.csv'
    path.write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r').encode())
    assert world().base('export', ['--input', str(path)]).code == 0


@pytest.mark.parametrize('text', ['', 'x,y\n'])
def test_a_damaged_lut_is_not_a_finished_one(tmp_path, text):
    made = world()
    file = made.inputs / PLACE / 'stage1_0_0.csv'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    refused(made.base('lut', out=file.parents[1]), str(file))


PLACE = 'damaged_luts/demo'


def test_names_that_no_encoding_has(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'eval_supernet.py'), '--supernet_choice', 'demo-222-111',
                           '--subnet_choice', 'min', '--platform', b'/tmp/\xff.json'], cwd=tmp_path, check=False,
                          env={**os.environ, 'PYTHONIOENCODING': 'utf-8:strict'}, capture_output=True)
    assert done.returncode == 2 and b'Traceback' not in done.stderr and rb'\udcff' in done.stderr
