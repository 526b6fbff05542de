"""Malformed checkpoints: one error line that names the culprit, code 2, nothing written."""

import os
import pickle
import re
import shutil
import struct

import pytest
import torch

from modules.training.checkpoint import load_checkpoint

from .conftest import ROOT
from .hardening import RUNS, every, refused, short, world

SUPERNET = 'supernets/demo-222-111-align0'
CHECKPOINTS = {  # {what reads it: (run, flag, a good file)}
    'accuracy': ('accuracy', '--resume', f'{SUPERNET}/checkpoint.pth'),
    'int8 accuracy': ('accuracy', '--quant_mode --resume', f'{SUPERNET}/lsq.pth'),
    'subnets': ('subnets', '--checkpoint_path', f'{SUPERNET}/lsq.pth'),
    'downstream': ('downstream', '--checkpoint_path', f'{SUPERNET}/lsq.pth'),
    'published': ('published', '--checkpoint_path', 'published/spaceevo@vnni/checkpoint.pth'),
    'export': ('export', '--checkpoint_path', f'{SUPERNET}/lsq.pth'),
    'network': ('export', '--network', 'network.pth'),
    'teacher': ('teacher', '--weights', 'teachers/efficientnet_lite0/checkpoint.pth'),
    'teacher of block KD': ('block_kd', '--teacher_weights', 'teachers/efficientnet_lite0/checkpoint.pth'),
    'teacher of LSQ': ('lsq_block_kd', '--teacher_checkpoint_path', 'teachers/efficientnet_lite0/checkpoint.pth'),
    'teacher of LUTs': ('lut', '--teacher_checkpoint_path', 'teachers/efficientnet_lite0/checkpoint.pth'),
}
RESUMED = {  # {what continues from it: (run, file below the output folder)}
    'supernet': ('supernet', 'demo-222-111-align0/checkpoint.pth', 'supernets'),
    'lsq_supernet': ('lsq_supernet', 'demo-222-111-align0/lsq.pth', 'supernets'),
    'block_kd': ('block_kd', 'stage1_0/checkpoint.pth', 'block_kd/demo'),
    'lsq_block_kd': ('lsq_block_kd', 'stage1_0/lsq.pth', 'block_kd/demo'),
    'downstream': ('downstream', 'demo-222-111_min/digits/lsq.pth', 'runs/downstream'),
}


class Code:
    """Its pickle makes the file `path` when it is opened as such."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def weights_of(state):
    return state['state_dict'] if 'state_dict' in state else state['model']


def changed(change):
    """Maker of a bad file: a good checkpoint with `change` made to its weights."""

    def make(path, good):
        state = load_checkpoint(good)
        if 'published' in good.parts:
            state = {'state_dict': state['state_dict']}
        weights = weights_of(state)
        keys = [key for key in weights if weights[key].dim() > 1]
        change(weights, keys[len(keys) // 2])
        torch.save(state, path)

    return make


def _nan(weights, key):
    weights[key] = weights[key].clone()
    weights[key][(0,) * weights[key].dim()] = float('nan')


def _shape(weights, key):
    weights[key] = weights[key][:-1] if len(weights[key]) > 1 else torch.cat([weights[key]] * 2)


def _bytes(data):
    return lambda path, good: path.write_bytes(data)


def _object(value):
    return lambda path, good: torch.save(value, path)


BAD = {
    'missing': lambda path, good: None,
    'empty': _bytes(b''),
    'text': _bytes(b'weights\n'),
    'nul': _bytes(bytes(1000)),
    'truncated': lambda path, good: path.write_bytes(good.read_bytes()[:-2000]),
    'half': lambda path, good: path.write_bytes(good.read_bytes()[: good.stat().st_size // 2]),
    'start': lambda path, good: path.write_bytes(good.read_bytes()[:100]),
    'zip': _bytes(b'PK\5\6' + bytes(18)),
    'bare_code': lambda path, good: path.write_bytes(pickle.dumps(Code(path.parent / 'ran'), protocol=2)),
    'code': lambda path, good: torch.save({'state_dict': Code(path.parent / 'ran')}, path),
    'code_beside': lambda path, good: torch.save(
        {'model': {'a': torch.ones(1)}, 'args': Code(path.parent / 'ran')}, path
    ),
    'script': lambda path, good: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    'list': _object([1, 2]),
    'none': _object(None),
    'tensor': _object(torch.ones(3)),
    'number': _object({'state_dict': 5}),
    'no_tensors': _object({'state_dict': {'a': 1}}),
    'no_weights': _object({'epoch': 1}),
    'nothing': _object({'state_dict': {}}),
    'nan': changed(_nan),
    'shape': changed(_shape),
    'lacks': changed(lambda weights, key: weights.pop(key)),
    'more': changed(lambda weights, key: weights.update(other=torch.ones(1))),
    'whole_numbers': changed(lambda weights, key: weights.update({key: weights[key].long()})),
    'number_keys': _object({'state_dict': {1: torch.ones(1)}}),
    'deep': _bytes(b'\x80\x02' + b'(' * 100000 + b't.'),
}


def bad_file(name, folder, good):
    """The path of a bad file, made where the test of its name says so."""
    network = world().inputs / 'network.pth'
    if not network.exists():
        shutil.copy(world().inputs / 'runs/downstream/demo-222-111_min/digits/lsq.pth', network)
    path = folder / 'bad.pth'
    BAD[name](path, world().inputs / good)
    return path


@pytest.mark.filterwarnings('ignore')                       # torch's, about TorchScript
@pytest.mark.parametrize('reader, name', every('accuracy', CHECKPOINTS, BAD, 'shape', 'code'))
def test_checkpoints(reader, name, tmp_path):
    run, flags, good = CHECKPOINTS[reader]
    path = bad_file(name, tmp_path, good)
    *others, flag = flags.split()
    refused(
        world().base(run, [*others, f'{flag}={path}']),
        'bad.pth'
        if name != 'missing'
        or reader not in ('accuracy', 'int8 accuracy', 'subnets', 'downstream', 'published', 'export')
        else str(path),
    )
    assert not (tmp_path / 'ran').exists()


def test_safetensors(tmp_path):
    run, flag, _ = CHECKPOINTS['accuracy']
    for i, data in enumerate((b'', b'text', struct.pack('<Q', 1 << 40) + b'{}', struct.pack('<Q', 2) + b'{}')):
        (tmp_path / f'{i}.safetensors').write_bytes(data)
        refused(world().base(run, [f'{flag}={tmp_path}/{i}.safetensors']), f'{i}.safetensors')


def test_checkpoints_of_another_space(tmp_path):
    world()
    for run, flag in (('accuracy', '--resume'), ('subnets', '--checkpoint_path'), ('downstream', '--checkpoint_path')):
        for file in (
            'published/spaceevo@vnni/checkpoint.pth',
            'teachers/efficientnet_lite0/checkpoint.pth',
            'block_kd/demo/stage1_0/checkpoint.pth',
        ):
            refused(world().base(run, [f'{flag}={world().inputs / file}']), file)
    shutil.copytree(world().inputs / 'block_kd/demo', tmp_path / 'blocks/onnxw')
    refused(
        world().base('lut', ['--superspace=onnxw', '--hw_list=64', f'--checkpoint_path={tmp_path}/blocks']),
        'onnxw/stage1_0/lsq.pth',
        'superspace demo',
    )


def test_fp32_weights_are_no_int8_ones():
    fp32 = world().inputs / SUPERNET / 'checkpoint.pth'
    for run, flags in (('accuracy', ['--quant_mode', f'--resume={fp32}']), ('subnets', [f'--checkpoint_path={fp32}'])):
        refused(world().base(run, flags), str(fp32), 'lsq.pth')


@pytest.mark.parametrize('name', ['half', 'code', 'shape'])
def test_blocks(name, tmp_path):
    """lsq.pth for the LUT, checkpoint.pth for LSQ+."""
    for file, run, flags in (
        ('lsq.pth', 'lut', ['--checkpoint_path', tmp_path]),
        ('checkpoint.pth', 'lsq_block_kd', ['--output_path', tmp_path / 'demo']),
    ):
        path = tmp_path / 'demo/stage1_0' / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bad_file(name, tmp_path, f'block_kd/demo/stage1_0/{file}'), path)
        words = [word for word in world().arguments(RUNS[run][1]) if word != '--from_scratch']
        refused(world().attempt(RUNS[run][0], words + list(map(str, flags))), str(path))
        assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('run, name', every('downstream', RESUMED, ['half', 'list', 'no_weights', 'nan'])
                         + every('', RESUMED, [], 'code', 'shape'))
def test_resumed_checkpoints(run, name, tmp_path):
    run, file, place = RESUMED[run]
    out = tmp_path / 'out'
    path = out / file
    path.parent.mkdir(parents=True)
    shutil.move(bad_file(name, tmp_path, f'{place}/{file}'), path)
    refused(world().base(run, ['--resume'], out=out), str(path))
    assert not (tmp_path / 'ran').exists()


DAMAGES = [
    ('settings', None),
    ('settings', {}),
    ('settings', [1]),
    ('optimizer', {}),
    ('optimizer', None),
    ('optimizer', 'x'),
    ('optimizer', {'state': {}, 'param_groups': []}),
    ('step', 'ten'),
    ('step', -1),
    ('step', 10**9),
    ('step', 1.5),
    ('step', None),
    ('done', 'no'),
    ('done', None),
]


@pytest.mark.parametrize('run, damage', every('downstream', RESUMED, DAMAGES, ('step', 'ten')), ids=short)
def test_resumed_states(run, damage, tmp_path):
    key, value = damage
    run, file, place = RESUMED[run]
    path = tmp_path / 'out' / file
    path.parent.mkdir(parents=True)
    state = torch.load(world().inputs / place / file, weights_only=True)
    torch.save(state | {'done': False, 'step': 0} | {key: value}, path)
    refused(
        world().base(run, ['--resume'], out=tmp_path / 'out'), str(path), key if key != 'settings' else 'begun with'
    )


def test_an_unfinished_teacher(tmp_path):
    good = world().inputs / 'teachers/efficientnet_lite0/checkpoint.pth'
    path = tmp_path / 'out/efficientnet_lite0/unfinished.pth'
    path.parent.mkdir(parents=True)
    for name in ('truncated', 'bare_code', 'shape'):
        shutil.copy(bad_file(name, tmp_path, good), path)
        refused(world().base('teacher', ['--resume'], out=tmp_path / 'out'), str(path))
        assert not (tmp_path / 'ran').exists()
    shutil.copy(good, path)  # a finished one
    refused(world().base('teacher', ['--resume'], out=tmp_path / 'out'), str(path), 'no run to continue')


# ---- no foreign objects


def test_pickles_are_opened_behind_a_flag_only():
    """Outside the nn-Meter adapter, which asks for --trust_pickles; load_checkpoint's pickle module opens data only."""
    found = {}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith('.') and name != 'tests']
        for name in (name for name in files if name.endswith('.py')):
            path = os.path.join(folder, name)
            with open(path, encoding='utf-8') as f:
                for line in f:
                    if re.search(
                        r'weights_only=False|pickle\.loads?\(|Unpickler\(|allow_pickle=True|joblib\.load|'
                        r'torch\.load\((?!.*weights_only=)|marshal\.load|shelve\.open|yaml\.(unsafe_|full_)?load\(',
                        line,
                    ):
                        found.setdefault(os.path.relpath(path, ROOT), []).append(line.strip())
    assert found.pop('modules/latency/nn_meter_adapter.py') == [
        'model = pickle.load(file)       # only behind trust_pickles, see load'
    ]
    assert all(
        '_inert_pickle' in line or 'class _Unpickler' in line or 'return _Unpickler' in line
        for line in found.pop('modules/training/checkpoint.py')
    )
    assert found.pop('modules/settings.py') == ['content = yaml.load(file, _Loader)']  # a SafeLoader
    assert not found
