"""Supernet training: losses by their definitions, exact evaluation, the script killed and resumed on 1 and 2 ranks."""
import dataclasses
import importlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from modules.cli import INTERRUPTED
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import QBase, quantised_ops, set_quant_mode
from modules.modeling.ops.op import is_norm
from modules.modeling.supernet import Supernet
from modules.search_space.sampling import min_subnet
from modules.settings import load_config, save_config
from modules.training import supernet_trainer
from modules.training.calibrate import norm_statistics
from modules.training.checkpoint import load_checkpoint, save_checkpoint
from modules.training.data import calibration_batches, eval_loader, open_data
from modules.training.distributed import Job
from modules.training.evaluate import DecodedImages, accuracy, evaluate_subnet
from modules.training.losses import adaptive_alpha_loss, alpha_divergence
from modules.training.optim import parameter_groups, warmup_cosine
from modules.training.resumable import checkpoint_to_resume
from modules.training.supernet_trainer import SupernetRecipe, sandwich, train_supernet

from .checkpoints import fails
from .conftest import ROOT
from .launching import launch, run_script

DEMO = os.path.join(ROOT, 'supernet_training_configs', 'demo.yaml')


def _logits(seed=0, images=5, classes=7):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(2, images, classes, generator=rng, dtype=torch.float64) * 2).float()


def _defined(student, teacher, alpha):
    """D_alpha(p || q) as it is defined, differentiable; its limits from their neighbourhood."""
    if alpha in (0, 1):
        return (_defined(student, teacher, alpha + 1e-5) + _defined(student, teacher, alpha - 1e-5)) / 2
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    return ((q * (p / q) ** alpha).sum(-1) - 1) / (alpha * (alpha - 1))


@pytest.mark.parametrize('alpha', [-1.0, 0.5, 2.0, 1.0, 0.0])
def test_alpha_divergence_is_its_definition_with_its_gradient(alpha):
    student, teacher = _logits()
    ours, reference = (student.clone().requires_grad_() for _ in range(2))
    value = alpha_divergence(ours, teacher, alpha)
    torch.testing.assert_close(value.double(), _defined(reference, teacher, alpha), rtol=1e-3, atol=1e-5)
    value.sum().backward()
    _defined(reference, teacher, alpha).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-5)


def test_importance_weights_are_clipped_in_the_gradient():
    student, teacher = _logits(1)
    student = student.requires_grad_()
    alpha_divergence(student, teacher, -1.0, clip=1.5).sum().backward()
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    weights = q * (q / p).clamp_max(1.5)                            # of d log q_i, times -1/alpha = 1
    expected = weights - q * weights.sum(-1, keepdim=True)
    assert (q / p > 1.5).any()
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)


def test_adaptive_loss_is_the_larger_divergence_of_each_image():
    student, teacher = _logits(2, images=40)
    values = torch.stack([alpha_divergence(student, teacher, alpha, 5.0) for alpha in (-1.0, 1.0)])
    assert 0 < values.argmax(0).sum() < 40
    torch.testing.assert_close(adaptive_alpha_loss(student, teacher), values.max(0).values.mean())
    assert adaptive_alpha_loss(teacher, teacher).abs() < 1e-6


def test_no_decay_of_norms_biases_and_scales():
    supernet = Supernet.build_from_str('demo-012', 10)
    decayed, others = parameter_groups(supernet, 0.1)
    assert decayed['weight_decay'] == 0.1 and others['weight_decay'] == 0
    plain = {id(p) for m in supernet.modules() if is_norm(m) for p in m.parameters()}
    plain |= {id(p) for m in supernet.modules() if isinstance(m, QBase) for p in (m.sw, m.sa, m.beta)}
    plain |= {id(p) for name, p in supernet.named_parameters() if name.endswith('.bias')}
    assert {id(p) for p in others['params']} == plain
    assert all(p.ndim > 1 for p in decayed['params'])


def test_learning_rate_warms_up_and_goes_to_zero():
    rates = [warmup_cosine(0.4, step, 100, 10) for step in range(100)]
    assert rates[:3] == pytest.approx([0.04, 0.08, 0.12]) and max(rates) == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2, rel=0.02) and rates[-1] < 1e-3
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_the_last_gamma_of_blocks_with_a_shortcut_starts_at_zero():
    supernet = Supernet.build_from_str('demo-012', 10)
    supernet.initialize_weights()
    for name, last in (('stage1', 'point_conv2'), ('stage2', 'point_conv2'), ('stage3', 'point_conv')):
        for block in supernet.stages[name].blocks:
            assert not getattr(block, last).norm.weight.any() and block.downsample.norm.weight.all()
    assert supernet.stages['first_conv'].blocks[0].conv.norm.weight.all()


def test_configuration(tmp_path):
    path = tmp_path / 'c.yaml'
    path.write_text('epochs: 7\nweight_decay: 1e-4\nnum_arch_training: 3\nquant:\n  epochs: 2\n')
    recipe = load_config(SupernetRecipe, path)
    assert (recipe.epochs, recipe.weight_decay, recipe.num_arch_training, recipe.base_lr) == (7, 1e-4, 3, 0.1)
    assert load_config(SupernetRecipe, path, {'base_lr': 0.3, 'seed': None}, 'quant').epochs == 2
    assert load_config(SupernetRecipe, path, {'epochs': 1}, 'quant').epochs == 1
    save_config(recipe, tmp_path, 'effective.yaml')
    assert load_config(SupernetRecipe, tmp_path / 'effective.yaml') == recipe
    for name in ('train.yaml', 'demo.yaml', 'demo_short.yaml', 'block_kd.yaml', 'block_kd_short.yaml'):
        shipped = load_config(SupernetRecipe, os.path.join(ROOT, 'supernet_training_configs', name), None, 'quant')
        assert shipped.base_lr == 0.01
    published = load_config(SupernetRecipe, os.path.join(ROOT, 'supernet_training_configs', 'train.yaml'))
    assert published == SupernetRecipe()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return open_data(str(tmp_path_factory.mktemp('none')), 'digits', valid_size=100, image_size=48)


def test_decoded_images_are_the_loaders(digits):
    loader = eval_loader(digits.valid, 32)
    decoded = DecodedImages(loader)
    assert len(decoded) == 100
    for _ in range(2):
        for (images, labels), (kept, kept_labels) in zip(loader, decoded, strict=True):
            assert torch.equal(images, kept) and torch.equal(labels, kept_labels)
    assert all(pixels.dtype == torch.uint8 for pixels, _ in decoded.batches)


def test_accuracy_counts_every_image():
    logits = torch.randn(103, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(103) % 10
    batches = [(logits[i:i + 8], labels[i:i + 8]) for i in range(0, 103, 8)]
    result = accuracy(torch.nn.Identity(), batches, Job())
    assert result.images == 103
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item(), abs=1e-12)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    with pytest.raises(UserError, match='no images'):
        accuracy(torch.nn.Identity(), [], Job())


def test_evaluating_a_subnet_leaves_the_supernet_as_it_was(digits):
    torch.manual_seed(0)
    supernet = Supernet.build_from_str('demo-012', 10).train()
    before = norm_statistics(supernet), supernet.active_subnet
    calibration = DecodedImages(calibration_batches(digits.train, 32, 2))
    test = DecodedImages(eval_loader(digits.valid, 50))
    first = evaluate_subnet(supernet, min_subnet(supernet.encoding), calibration, test, Job())
    assert evaluate_subnet(supernet, str(min_subnet(supernet.encoding)), calibration, test, Job()) == first
    assert supernet.active_subnet == before[1] and supernet.training
    assert all(torch.equal(a, b) for old, new in zip(before[0], norm_statistics(supernet)) for a, b in zip(old, new))
    # the same numbers as a static network that was calibrated on its own
    supernet.set_min_subnet()
    static = supernet.get_active_subnet()
    from modules.training.calibrate import calibrate
    calibrate(static, (images for images, _ in calibration))
    assert accuracy(static, test, Job()).loss == pytest.approx(first.loss, rel=1e-4)


def test_a_sandwich_trains_max_random_and_min(digits, monkeypatch):
    torch.manual_seed(0)
    supernet = Supernet.build_from_str('demo-012', 10)
    images, labels = next(iter(eval_loader(digits.valid, 16)))
    seen = []
    monkeypatch.setattr(Supernet, 'forward', lambda self, x, forward=Supernet.forward: (
        seen.append((self.active_subnet, [m.p for m in self.modules() if isinstance(m, torch.nn.Dropout)])),
        forward(self, x))[1])
    recipe = SupernetRecipe(dropout=0.3)
    losses = sandwich(supernet, images, labels, recipe, random.Random(0))
    assert len(losses) == 4 and all(map(torch.isfinite, losses))
    assert [p for _, p in seen] == [[0.3], [0.0], [0.0], [0.0]]
    supernet.set_max_subnet()
    assert seen[0][0] == supernet.active_subnet and seen[3][0] == min_subnet(supernet.encoding)
    assert len({subnet for subnet, _ in seen}) == 4
    grads = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    seen.clear()
    sandwich(supernet, images, labels, recipe, random.Random(0), smallest=False)
    assert len(seen) == 4 and min_subnet(supernet.encoding) not in [subnet for subnet, _ in seen]
    assert any(name.startswith('stages.stage3.blocks.1.') for name in grads)      # only max is that deep for sure


RECIPE = SupernetRecipe(epochs=2, warmup_epochs=0.5, batch_size_per_gpu=16, augment='default', valid_freq=1,
                        num_calib_batches=2, max_steps=3, num_valid_images=40, checkpoint_freq=1)


def _build(quant=False):
    torch.manual_seed(0)
    supernet = Supernet.build_from_str('demo-012', 10)
    supernet.initialize_weights()
    return set_quant_mode(supernet) if quant else supernet


def test_divergence_stops_and_names_the_last_good_checkpoint(digits, tmp_path, monkeypatch):
    results = train_supernet(_build(), digits, dataclasses.replace(RECIPE, epochs=1), str(tmp_path), Job())
    assert set(results) == {'max', 'min', 'random'} and results['max']['images'] == 40
    assert load_checkpoint(tmp_path / 'checkpoint.pth')['done'] and (tmp_path / 'checkpoint_best.pth').exists()
    with pytest.raises(UserError, match='no checkpoint yet'):
        train_supernet(_build(), digits, dataclasses.replace(RECIPE, base_lr=1e38, warmup_epochs=0.0),
                       str(tmp_path / 'new'), Job())
    calls = []

    def poisoned(*args, **how):
        calls.append(1)
        losses = sandwich(*args, **how)
        return [loss * (math.nan if len(calls) > 3 else 1) for loss in losses]
    monkeypatch.setattr(supernet_trainer, 'sandwich', poisoned)
    with pytest.raises(UserError, match=r'step 3 .*last good checkpoint is .*checkpoint.pth'):
        train_supernet(_build(), digits, RECIPE, str(tmp_path / 'nan'), Job())
    kept = load_checkpoint(tmp_path / 'nan' / 'checkpoint.pth')
    assert kept['step'] == 2                                        # step 3's loss did not prove its weights good


def test_a_published_checkpoint_goes_on_from_its_epoch_or_is_refused(digits, tmp_path):
    """It has epochs, no steps; it is never written over. The batches come in two parts here."""
    short, path = dataclasses.replace(RECIPE, epochs=2, max_steps=1, accumulate=2), tmp_path / 'checkpoint.pth'
    train_supernet(_build(), digits, dataclasses.replace(short, epochs=1), str(tmp_path), Job())
    state = load_checkpoint(path)
    published = {'epoch': 1, 'state_dict': state['state_dict'], 'optimizer': state['optimizer']}
    save_checkpoint(path, published)
    before = path.read_bytes()
    train_supernet(_build(), digits, dataclasses.replace(short, resume=True), str(tmp_path), Job())
    assert load_checkpoint(path)['step'] == 2 and (tmp_path / 'checkpoint_old.pth').read_bytes() == before
    for change, said in (({'optimizer': None}, 'cannot continue from'), ({}, 'checkpoint_old.pth is there'),
                         ({'epoch': 2}, 'epoch 2 of 2')):
        save_checkpoint(path, published | change)
        before = path.read_bytes()
        with pytest.raises(UserError, match=said):
            train_supernet(_build(), digits, dataclasses.replace(short, resume=True), str(tmp_path), Job())
        assert path.read_bytes() == before
    with pytest.raises(UserError, match='less than two images'):
        train_supernet(_build(), digits, dataclasses.replace(short, accumulate=100), str(tmp_path), Job())


@pytest.mark.parametrize('channels_last', [True, False])
def test_memory_order_is_a_setting(digits, tmp_path, channels_last):
    supernet, short = _build(), dataclasses.replace(RECIPE, epochs=1, max_steps=1, channels_last=channels_last)
    train_supernet(supernet, digits, short, str(tmp_path), Job())
    kernels = [p for p in supernet.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
    assert kernels and all(p.is_contiguous() != channels_last for p in kernels)


def test_collapse_to_guessing_stops(digits, tmp_path, monkeypatch):
    calls = []

    def collapsing(*args, **how):
        calls.append(1)
        value = 1.0 if len(calls) <= 3 else math.log(10)            # an epoch of learning, then guessing
        return [loss * 0 + value for loss in sandwich(*args, **how)]
    monkeypatch.setattr(supernet_trainer, 'sandwich', collapsing)
    with pytest.raises(UserError, match='epoch 1: collapsed, the loss is back at guessing'):
        train_supernet(_build(), digits, RECIPE, str(tmp_path), Job())
    assert load_checkpoint(tmp_path / 'checkpoint.pth')['step'] <= 3


def test_quantisation_starts_from_fp32_and_initialises_every_used_scale(digits, tmp_path):
    with pytest.raises(UserError, match='no fp32 checkpoint to start from'):
        train_supernet(_build(quant=True), digits, dataclasses.replace(RECIPE, quant_mode=True), str(tmp_path), Job())
    short = dataclasses.replace(RECIPE, epochs=1, max_steps=1)
    train_supernet(_build(), digits, short, str(tmp_path), Job())
    supernet = _build(quant=True)
    train_supernet(supernet, digits, dataclasses.replace(short, quant_mode=True), str(tmp_path), Job())
    missing = [name for name, op in supernet.named_modules() if isinstance(op, QBase) and not op.scales_initialized]
    # only a shortcut convolution between equal widths is never used
    assert all('downsample' in name for name in missing), missing
    assert len(missing) < len(list(quantised_ops(supernet))) / 10
    with pytest.raises(UserError, match='begun with seed 0, not 1'):
        train_supernet(_build(), digits, dataclasses.replace(short, seed=1, resume=True), str(tmp_path), Job())


def _words(folder, data, *more):
    return ['train_supernet.py', '--config-file', DEMO, '--superspace', 'demo', '--supernet_choice', '012-111',
            '--dataset', 'digits', '--dataset_path', data, '--output_path', folder, '--epochs', 2,
            '--batch_size_per_gpu', 8, '--max_steps', 2, '--checkpoint_freq', 1, '--num_calib_batches', 2,
            '--num_valid_images', 20, '--num_workers', 0, '--valid_size', 100, '--base_lr', 0.02, '--device', 'cpu',
            *more]


def _train(*words, **options):
    return run_script(*_words(*words), **options)


def _killed_and_resumed(tmp_path, *more, ranks=1):
    """What the unbroken run said; the broken one ended with its weights. Both are in the folders of these names."""
    output = _train(tmp_path / 'whole', tmp_path, '--resume', *more, ranks=ranks)
    assert 'max: top-1' in output
    name = 'lsq.pth' if '--quant_mode' in more else 'checkpoint.pth'
    whole, broken = (tmp_path / run / 'demo-012-111-align0' / name for run in ('whole', 'broken'))
    _train(tmp_path / 'broken', tmp_path, '--resume', *more, kill_when=str(broken), ranks=ranks)
    assert not load_checkpoint(broken)['done']
    _train(tmp_path / 'broken', tmp_path, '--resume', *more, ranks=ranks)
    states = [load_checkpoint(path) for path in (whole, broken)]
    assert states[0]['done'] and states[1]['done'] and states[0]['results'] == states[1]['results']
    assert all(torch.equal(states[0]['state_dict'][key], states[1]['state_dict'][key])
               for key in states[0]['state_dict'])
    return output


def test_a_killed_and_resumed_training_ends_with_the_unbroken_runs_weights(tmp_path):
    """fp32, then INT8 from it. On two ranks: block KD's, and slow tests here and in test_transfer.py."""
    _killed_and_resumed(tmp_path)
    output = _killed_and_resumed(tmp_path, '--quant_mode')
    assert (tmp_path / 'whole' / 'demo-012-111-align0' / 'lsq.yaml').exists()
    assert 'already trained' in _train(tmp_path / 'whole', tmp_path, '--resume', '--quant_mode')
    again = _train(tmp_path / 'whole', tmp_path, '--test_only', '--quant_mode')
    wanted, found = ([line for line in text.split('\n') if ': top-1' in line] for text in (output, again))
    assert found == wanted and len(found) == 3


@pytest.mark.slow
def test_the_same_in_int8_on_two_ranks(tmp_path):
    _killed_and_resumed(tmp_path, '--quant_mode', '--from_scratch', ranks=2)


@pytest.mark.parametrize('ranks, number', [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_ctrl_c_and_sigterm_let_a_training_write_its_state(tmp_path, ranks, number):
    folder = tmp_path / 'demo-012-111-align0'
    output = _train(tmp_path, tmp_path, '--checkpoint_freq', 1000, '--max_steps', 10, ranks=ranks, code=INTERRUPTED,
                    kill_when=str(folder / 'tensorboard'), kill_by=number)
    assert output.count('stopped; with --resume') == 1 and 'Traceback' not in output
    state = load_checkpoint(folder / 'checkpoint.pth')
    assert 0 < state['step'] < 20 and not state['done']


@pytest.mark.slow                       # the other launcher: test_original.py
def test_torchrun_and_aligned_samples(tmp_path):
    launch('torch.distributed.run', *_words(tmp_path, tmp_path, '--align_sample', '--epochs', 1, '--max_steps', 1))
    assert (tmp_path / 'demo-012-111-align1' / 'checkpoint.pth').exists()


@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')
def test_compiled_quantisers_train(tmp_path):
    short = ('--quant_mode', '--from_scratch', '--epochs', 1, '--max_steps', 2)
    for name, more in (('eager', ('--compile', 'off')), ('compiled', ('--compile',))):
        assert 'max: top-1' in _train(tmp_path / name, tmp_path, *short, *more)
    eager, compiled = (load_checkpoint(tmp_path / name / 'demo-012-111-align0' / 'lsq.pth')['state_dict']
                       for name in ('eager', 'compiled'))
    # the same scales, but for rounding; that the kernels are others shows in some bits
    assert all((eager[key] - compiled[key]).abs() <= 0.02 * eager[key].abs() for key in eager if key.endswith('.sa'))
    assert any(not torch.equal(eager[key], compiled[key]) for key in eager)


@pytest.mark.parametrize('more, said', [
    (['--quant_mode', '--output_path', '{tmp}'], 'no fp32 checkpoint to start from'),
    (['--config-file', 'nowhere.yaml'], 'nowhere.yaml: No such file'),
    (['--supernet_choice', '012-119'], 'width window 9'), (['--base_lr', '-1'], 'base_lr'),
    (['--batch_size_per_gpu', '100000'], 'fewer than one step')])
def test_wrong_commands_are_one_line(tmp_path, monkeypatch, capsys, more, said):
    fails(importlib.import_module('train_supernet'), monkeypatch, capsys, said, *_words(
        tmp_path, tmp_path, *(text.replace('{tmp}', str(tmp_path)) for text in more))[1:])


def test_a_dead_rank_ends_the_job_with_a_message(tmp_path):
    output = _train(tmp_path, tmp_path, '--epochs', 1000, ranks=2, victims=slice(-1, None),
                    kill_when=tmp_path / 'demo-012-111-align0' / 'checkpoint.pth')
    assert 'another rank is gone' in output, output


FREED = """
import resource
import torch
from modules.training.memory import keep_freed_memory
for enable in (True, False):
    if not keep_freed_memory(enable):
        break
    for _ in range(4):
        torch.ones(2 ** 24 + 2 ** 10)     # glibc < 2.38 asks for a little more than an aligned tensor needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept():
    """After a large tensor was freed, the next, smaller one needs no new pages; turned off, it does.

    In a process of its own: what other tests have freed would serve the tensor either way.
    """
    pytest.importorskip('resource')
    done = subprocess.run([sys.executable, '-c', FREED], capture_output=True, text=True, cwd=ROOT, check=True)
    if not done.stdout:
        pytest.skip('not glibc')
    kept, given_back = map(int, done.stdout.split())
    assert 10 * kept < given_back


def test_a_checkpoint_of_an_earlier_run_is_kept(tmp_path, capsys):
    path = tmp_path / 'checkpoint.pth'
    path.write_bytes(b'weeks of training')
    assert checkpoint_to_resume(str(path), False, Job()) is None
    assert (tmp_path / 'checkpoint_old.pth').read_bytes() == b'weeks of training' and not path.exists()
    assert 'kept as' in capsys.readouterr().err
