"""From block KD to a supernet: what the students with their projections compute, the supernet computes without them."""
import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.block_kd.checkpoints import load_student, without_untrained_ends
from modules.block_kd.into_supernet import learn_rest, start_from_blocks
from modules.block_kd.student import new_student
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import quantised_ops, set_quant_mode
from modules.modeling.supernet import Supernet
from modules.modeling.transfer import assemble, copy_stage
from modules.search_space.encoding import Supernet as Encoding
from modules.search_space.macro_arch import HEAD_STAGES
from modules.search_space.sampling import max_subnet
from modules.search_space.superspace import SUPERSPACES
from modules.training.calibrate import kept_statistics, norms
from modules.training.checkpoint import load_checkpoint
from modules.training.data import eval_loader, open_data
from modules.training.distributed import Job
from modules.training.losses import nsr_loss
from modules.training.supernet_trainer import SupernetRecipe, train_supernet

from .launching import run_script

# {block type: (superspace, digit)}, each once
TYPES = {block_type.name: (space.name, digit) for space in reversed(SUPERSPACES.values())
         for digit, block_type in enumerate(space.block_types)}
PLAIN = sorted(name for name in TYPES if not name.startswith(('Fused', 'MobileNetV1')))
FUSED = sorted(name for name in TYPES if name.startswith('Fused'))


def _students(space, block_types, channels=range(10, 24, 2), classes=10):
    """Students with random weights and statistics, in eval mode: stem, stages, head."""
    torch.manual_seed(0)
    stages = [f'{stage}_{digit}' for stage, digit in zip(space.searchable_stages, block_types)]
    sizes = [3, *list(channels)[:len(stages) + 1], classes]
    blocks = ['stem', *stages, 'head']
    students = [new_student(space, block, *pair) for block, pair in zip(blocks, zip(sizes, sizes[1:]))]
    for student in students:
        for norm in norms(student):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        student.eval()
    return students


def _widest(space, block_types):
    """The supernet with the widest window of every stage."""
    return Encoding(space, block_types, tuple(space.stage(name).num_windows - 1 for name in space.searchable_stages))


@torch.no_grad()
def _joined(name, pairs=None, pixels=64, bias=True, narrow=False):
    """[(output of the students with projections, of the stitched supernet)] of the first `pairs` of stages, or all.

    bias: whether the projections have one; narrow: the narrowest width windows instead of the widest ones.
    """
    space, digit = SUPERSPACES[TYPES[name][0]], TYPES[name][1]
    block_types = (digit,) * len(space.searchable_stages)
    students = _students(space, block_types)
    for projection in (p for student in students for p in (student.in_proj, student.out_proj) if p is not None):
        projection.bias *= bias
    encoding = Encoding(space, block_types, (0,) * len(block_types)) if narrow else _widest(space, block_types)
    supernet = Supernet(encoding, 10).eval()
    assemble(supernet, students)
    x, found, largest = torch.randn(2, 3, pixels, pixels), [], max_subnet(encoding).stages()
    for stage in students[0].named_stages().values():
        x = stage(x)
    for before, student in list(zip(students, students[1:-1]))[:pairs]:
        student.set_active_sub_stage(x.shape[1], largest[student.block_id.stage])
        expected = student.in_proj(before.out_proj(x))
        for stage_name, stage in student.named_stages().items():
            expected, x = stage(expected), supernet.stages[stage_name](x)
        found.append((expected, x))
    return found


@pytest.mark.parametrize('name', PLAIN)
@pytest.mark.parametrize('narrow', [False, True])
def test_a_stitched_pair_computes_what_the_students_with_their_projections_do(name, narrow):
    for expected, stitched in _joined(name, narrow=narrow):
        torch.testing.assert_close(stitched, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize('name', FUSED)
def test_a_fused_convolution_differs_at_the_border_alone(name):
    """There its padding is 0 where the students have the projections' bias."""
    def difference(**how):
        (expected, stitched), = _joined(name, pairs=1, **how)
        return (stitched - expected).abs() / expected.abs().max()
    assert difference(bias=False).max() < 1e-5
    with_bias = difference(pixels=128)
    assert with_bias.max() > 1e-3
    if 'SE' not in name:                            # squeeze-excitation spreads the border over the whole map
        assert with_bias[..., 14:-14, 14:-14].max() < 1e-5


def test_ends_that_were_never_trained_are_left_out_with_a_line(tmp_path, capsys):
    (tmp_path / 'head').mkdir()
    (tmp_path / 'head' / 'checkpoint.pth').touch()
    assert without_untrained_ends(['stem', 'stage1_0', 'head'], str(tmp_path), False) == ['stage1_0', 'head']
    assert 'not there; stem is left out' in capsys.readouterr().err
    assert without_untrained_ends(['stem', 'stage1_0', 'head'], str(tmp_path), True) == ['stage1_0']


def test_the_head_is_joined_too():
    space = SUPERSPACES['demo']
    students = _students(space, (0, 1, 2))
    supernet = Supernet(_widest(space, (0, 1, 2)), 10).eval()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    assemble(supernet, students[:-1])
    unchanged = [name for name, tensor in supernet.state_dict().items() if torch.equal(before[name], tensor)
                 and name.endswith('weight')]
    assert unchanged and all(name.startswith(('stages.final_expand', 'stages.feature_mix', 'stages.logits'))
                             for name in unchanged)
    assemble(supernet, students)
    x = torch.randn(2, students[-1].in_proj.out_channels, 4, 4)
    with torch.no_grad():
        expected = students[-1].in_proj(students[-2].out_proj(x))
        for name, stage in students[-1].named_stages().items():
            expected, x = stage(expected), supernet.stages[name](x)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_narrow_windows_take_the_front_channels_and_the_kernels_centre():
    space = SUPERSPACES['onnxw']
    student = _students(space, (1,) * 6)[3]
    stage = Supernet(Encoding(space, (1,) * 6, (0,) * 6)).stages['stage3']
    copy_stage(student.stage, stage)
    larger, block = student.stage.blocks[1], stage.blocks[1]
    for name in ('point_conv1.conv', 'depth_conv.dwconv', 'point_conv2.conv'):
        whole, part = larger.get_submodule(name).weight, block.get_submodule(name).weight
        assert torch.equal(part, whole[:part.shape[0], :part.shape[1]]) and part.shape != whole.shape
    assert torch.equal(block.point_conv2.norm.running_mean, larger.point_conv2.norm.running_mean[:96])


def test_scales_of_what_reads_or_holds_something_else_are_left_to_be_initialised():
    space = SUPERSPACES['onnxw']
    students = _students(space, (0, 1, 2, 3, 4, 5))
    for student in students:
        for i, op in enumerate(quantised_ops(set_quant_mode(student))):
            op.scales_initialized = True
            nn.init.constant_(op.sw, 0.01 + i)
    supernet = set_quant_mode(Supernet(_widest(space, (0, 1, 2, 3, 4, 5)), 10))
    assemble(supernet, students)
    ops = {name: op for name, op in supernet.named_modules() if op in set(quantised_ops(supernet))}
    left = {name for name, op in ops.items() if not op.scales_initialized}
    assert left == {f'stages.{name}' for name in (
        'stage1.blocks.0.depth_conv1.dwconv', 'stage1.blocks.0.downsample.conv',
        'stage2.blocks.0.point_conv1.conv', 'stage2.blocks.0.downsample.conv',
        'stage3.blocks.0.point_conv1.conv', 'stage3.blocks.0.downsample.conv',
        'stage4.blocks.0.conv1.conv', 'stage4.blocks.0.downsample.conv',
        'stage5.blocks.0.conv1.conv', 'stage5.blocks.0.downsample.conv',
        'stage6.blocks.0.fused_conv.conv', 'stage6.blocks.0.downsample.conv', 'final_expand.blocks.0.conv.conv')}
    assert all(op.sw == 1 and op.beta == 0 for name, op in ops.items() if name in left)
    assert all(op.sw != 1 for name, op in ops.items() if name not in left)


def test_what_assembling_cannot_carry_over_is_learned(digits, monkeypatch):
    """A depth-wise first block copies the students, a new head learns the labels; nothing else changes,
    and it is reproducible."""
    def distance(supernet, students):
        stage, student = supernet.stages['stage1'].blocks[0].train(), students['stage1']
        student.set_active_sub_stage(stage.active.cin, [(stage.active.kernel, stage.active.cout, None)])
        x, _ = next(iter(eval_loader(digits.valid, 32)))
        with torch.no_grad(), kept_statistics(supernet):
            for name in ('first_conv', 'stage0'):
                x = supernet.stages[name].train()(x)
            projected = student.in_proj(students['stem'].out_proj(x))
            return nsr_loss(stage(x), student.stage.blocks[0].train()(projected)).item()


    def loss(supernet):
        images, labels = next(iter(eval_loader(digits.valid, 64)))
        with torch.no_grad(), kept_statistics(supernet):
            supernet.set_max_subnet()
            return F.cross_entropy(supernet.train()(images), labels).item()
    weights, space = [], dataclasses.replace(SUPERSPACES['demo'], name='small', resolutions=(32,),
                                             block_types=SUPERSPACES['onnxw'].block_types)
    monkeypatch.setitem(SUPERSPACES, 'small', space)
    for steps in (0, 25, 25):
        students = dict(zip(('stem', *space.searchable_stages), _students(space, (0, 1, 1))[:-1]))
        supernet = Supernet(_widest(space, (0, 1, 1)), 10)
        assemble(supernet, students.values())
        before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
        learn_rest(supernet, students, digits, 16, steps)
        assert not any(op.is_quantised for op in quantised_ops(supernet))
        changed = {name for name, tensor in supernet.state_dict().items() if not torch.equal(before[name], tensor)}
        assert bool(changed) == bool(steps) and {name.split('.')[1] for name in changed} <= {'stage1', *HEAD_STAGES}
        assert all(name.startswith('stages.stage1.blocks.0.') for name in changed if 'stage1' in name)
        weights.append((distance(supernet, students), supernet.state_dict(), loss(supernet)))
    assert weights[1][0] < 0.8 * weights[0][0]
    assert weights[1][2] < weights[0][2] - 0.05
    assert all(torch.equal(weights[1][1][name], weights[2][1][name]) for name in weights[1][1])
    set_quant_mode(supernet)
    for op in quantised_ops(supernet):
        op.scales_initialized = True
    learn_rest(supernet, students, digits, 16, 1)
    assert all(op.is_quantised for op in quantised_ops(supernet))
    assert not any(op.scales_initialized for op in quantised_ops(supernet.stages['stage1'].blocks[0]))
    assert all(op.scales_initialized for op in quantised_ops(supernet.stages['stage2']))


@pytest.fixture(scope='module')
def digits():
    return open_data('', 'digits', valid_size=40, image_size=32)


@pytest.fixture(scope='module')
def blocks(tmp_path_factory):
    """Folder of finished block checkpoints of demo-012, fp32 and int8, with random weights; no head."""
    folder, space = tmp_path_factory.mktemp('block_kd') / 'demo', SUPERSPACES['demo']
    for quant, name in ((False, 'checkpoint.pth'), (True, 'lsq.pth')):
        for student in _students(space, (0, 1, 2))[:-1]:
            for op in quantised_ops(student):
                op.scales_initialized = quant
                nn.init.constant_(op.sw, 0.02 if quant else 1)
                nn.init.constant_(op.sa, 0.05 if quant else 1)
            path = folder / str(student.block_id).rstrip('_') / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({'model': student.state_dict(), 'superspace': 'demo', 'block': str(student.block_id), 'step': 5,
                        'done': True, 'settings': {'teacher': 'efficientnet-lite0', 'teacher weights': 'abc'}}, path)
    return folder


def _supernet(quant=False):
    torch.manual_seed(1)
    model = Supernet.build_from_str('demo-012', 10)
    model.initialize_weights()
    return set_quant_mode(model) if quant else model


def test_a_supernet_starts_from_a_folder_of_blocks(blocks, capsys):
    supernet = _supernet()
    _, digests = start_from_blocks(supernet, str(blocks.parent))           # the superspace's name is added
    assert list(digests) == ['stem', 'stage1_0', 'stage2_1', 'stage3_2']
    assert 'no checkpoint.pth of head: the head learns the labels first' in capsys.readouterr().err
    student, _ = load_student('demo', 'stage2_1', str(blocks))
    block = supernet.stages['stage2'].blocks[1]
    assert torch.equal(block.se.fc['reduce'].weight, student.stage.blocks[1].se.fc['reduce'].weight[
        :block.se.fc['reduce'].out_channels, :block.se.fc['reduce'].in_channels])
    assert not any(op.scales_initialized for op in quantised_ops(supernet))
    assert start_from_blocks(_supernet(True), str(blocks), quant=True)[1] != digests


@pytest.mark.parametrize('change, said', [
    ({'done': False}, r'stage2_1.checkpoint.pth: training is not finished \(step 5\); finish it with '
                      r'train_block_kd.py --superspace demo --output_path .* --stage_list stage2_1 --resume'),
    ({'superspace': 'onnxw'}, 'stage2_1.checkpoint.pth: a block of superspace onnxw, not of demo'),
    ({'block': 'stage2_2'}, 'stage2_1.checkpoint.pth: the checkpoint of block stage2_2, not of stage2_1'),
    ({'model': {'in_proj.weight': torch.zeros(1, 1, 1, 1)}}, 'stage2_1.checkpoint.pth: not the checkpoint of block '
                                                            'stage2_1: no out_proj.weight'),
    ({'settings': {'teacher': 'efficientnet-b0', 'teacher weights': 'def'}},
     r'stage2_1.checkpoint.pth: copied another teacher \(efficientnet-b0, weights def\) than stage1_0'),
    ({'model': None}, r'stage2_1.checkpoint.pth: copied 11 channels of its teacher, where the teacher of stage1_0 has'),
    (None, r': no checkpoint.pth of stage2_1; train it first with train_block_kd.py --superspace demo '
           r'--output_path .* --stage_list stage2_1 --teacher_arch efficientnet-lite0$')])
def test_blocks_that_do_not_fit_are_told_in_one_line(blocks, tmp_path, change, said):
    for path in blocks.glob('*/checkpoint.pth'):
        (tmp_path / path.parent.name).mkdir()
        state = load_checkpoint(path)
        if path.parent.name == 'stage2_1':
            if change is None:
                continue
            state |= change
            state['model'] = state['model'] or new_student('demo', 'stage2_1', 11, 16).state_dict()
        torch.save(state, tmp_path / path.parent.name / 'checkpoint.pth')
    with pytest.raises(UserError, match=said) as error:
        start_from_blocks(_supernet(), str(tmp_path))
    assert '\n' not in str(error.value)


def test_a_head_of_other_classes_is_left_out(blocks, tmp_path, capsys):
    for path in blocks.glob('*/checkpoint.pth'):
        (tmp_path / path.parent.name).mkdir()
        (tmp_path / path.parent.name / 'checkpoint.pth').write_bytes(path.read_bytes())
    (tmp_path / 'head').mkdir()
    for classes in (1000, 10):
        head = _students(SUPERSPACES['demo'], (0, 1, 2), classes=classes)[-1]
        torch.save({'model': head.state_dict()}, tmp_path / 'head' / 'checkpoint.pth')
        supernet = _supernet()
        assert ('head' in start_from_blocks(supernet, str(tmp_path))[1]) == (classes == 10)
        assert ('tells 1000 classes apart, the supernet 10' in capsys.readouterr().err) == (classes == 1000)
        assert torch.equal(supernet.stages['logits'].blocks[0].linear.bias, head.stages['logits'].blocks[0].linear.bias
                           ) == (classes == 10)


def test_training_goes_on_from_the_same_blocks_only(blocks, digits, tmp_path):
    """And with --quant_mode it needs no fp32 checkpoint."""
    recipe = SupernetRecipe(epochs=1, warmup_epochs=0.0, batch_size_per_gpu=16, augment='none', num_calib_batches=2,
                            max_steps=2, num_valid_images=40, base_lr=0.01)
    for quant in (False, True):
        supernet = _supernet(quant)
        digests = start_from_blocks(supernet, str(blocks), quant)[1]
        train_supernet(supernet, digits, dataclasses.replace(recipe, quant_mode=quant), str(tmp_path), Job(), digests)
        ops = {name: op for name, op in supernet.named_modules() if op in quantised_ops(supernet)}
        assert all(op.scales_initialized == quant for name, op in ops.items() if 'downsample' not in name)
    name = os.path.join(tmp_path, 'lsq.pth')
    assert load_checkpoint(name)['settings']['init_block_kd'] == digests
    for other in (None, {**digests, 'stem': '0' * 16}):
        with pytest.raises(UserError, match='begun with init_block_kd'):
            train_supernet(_supernet(), digits, dataclasses.replace(recipe, resume=True), str(tmp_path), Job(), other)


@pytest.mark.slow                       # one loop for all: test_train_supernet.py, on two ranks test_block_kd.py
def test_a_killed_start_from_blocks_is_resumed_by_the_same_command(blocks, tmp_path):
    """On two ranks: they start with equal weights, and end with the unbroken run's."""
    def train(folder, *more, **how):
        return run_script(
            'train_supernet.py', '--config-file', 'supernet_training_configs/demo.yaml', '--superspace', 'demo',
            '--supernet_choice', '012', '--init_block_kd', blocks, '--dataset', 'digits', '--valid_size', 40,
            '--augment', 'none', '--batch_size_per_gpu', 16, '--max_steps', 3, '--init_steps', 2, '--epochs', 2,
            '--checkpoint_freq', 1, '--num_valid_images', 40, '--num_calib_batches', 2, '--output_path',
            tmp_path / folder, '--device', 'cpu', '--num_workers', 0, *more, ranks=2, **how)
    path = 'demo-012-000-align0/checkpoint.pth'
    train('whole')
    train('broken', kill_when=str(tmp_path / 'broken' / path))
    train('broken', '--resume')
    whole, broken = (load_checkpoint(tmp_path / folder / path)['state_dict'] for folder in ('whole', 'broken'))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
