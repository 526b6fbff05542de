"""downstream_cls.py: exact resumption after SIGKILL, the recipe by its numbers, and that it learns (digits)."""
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

import downstream_cls
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import quantised_ops
from modules.search_space.sampling import min_subnet
from modules.training import downstream
from modules.training.checkpoint import load_checkpoint
from modules.training.data import eval_loader, open_data
from modules.training.distributed import Job
from modules.training.downstream import DownstreamRecipe, find_recipe, finetune
from modules.training.evaluate import accuracy
from modules.zoo import build_network, load_network

from .checkpoints import call, fails, published_root, write_supernet
from .launching import run_script

pytestmark = pytest.mark.usefixtures('one_thread')
DEMO = 'demo-012-111'
IDENTITY = {'subnet_name': 'min', 'supernet': DEMO, 'subnet': str(min_subnet(DEMO)), 'num_classes': 10,
            'quant_mode': True}
RECIPE = DownstreamRecipe(0.1, 4e-5, epochs=1, batch_size=8, warmup_epochs=0, max_steps=1, num_calib_batches=2,
                          num_eval_images=32)
FOLDER = f'{DEMO}_min/digits'


@pytest.fixture(scope='module')
def lsq(tmp_path_factory):
    path = tmp_path_factory.mktemp('demo') / 'lsq.pth'
    write_supernet(path, DEMO, 6, quant=True)
    return path


@pytest.fixture(scope='module')
def digits():
    return open_data('.', 'digits', 100, image_size=32)


@pytest.fixture
def network(lsq):
    torch.manual_seed(0)
    return build_network(DEMO, min_subnet(DEMO), 10, lsq, True)


def _args(lsq, output, *more):
    return ['--subnet_name', 'min', '--supernet_choice', DEMO, '--checkpoint_path', lsq, '--dataset', 'digits',
            '--learning_rate', 0.05, '--weight_decay', 4e-5, '--num_epochs', 2, '--max_steps', 3, '--eval_freq', 1,
            '--batch_size', 8, '--num_calib_batches', 2, '--num_eval_images', 40, '--checkpoint_freq', 1,
            '--drop_rate', 0.2, '--num_workers', 0, '--device', 'cpu', '--output_path', output, *more]


@pytest.mark.parametrize('ranks', [1, 2])
def test_a_killed_and_resumed_run_ends_with_the_unbroken_runs_weights(tmp_path, lsq, monkeypatch, capsys, ranks):
    def run(output, *more):
        if ranks > 1:
            return run_script('downstream_cls.py', *_args(lsq, output, *more), ranks=ranks)
        assert call(downstream_cls, monkeypatch, *_args(lsq, output, *more)) == 0
        return capsys.readouterr().out

    said = run(tmp_path / 'whole')
    broken = tmp_path / 'broken' / FOLDER / 'lsq.pth'
    run_script('downstream_cls.py', *_args(lsq, tmp_path / 'broken'), ranks=ranks, kill_when=broken)
    assert not load_checkpoint(broken)['done']
    again = run(tmp_path / 'broken', '--resume')
    accuracy_line = next(line for line in said.split('\n') if line.startswith('min on digits: top-1'))
    assert accuracy_line in again and '(40 images)' in accuracy_line
    for name in ('lsq.pth', 'lsq_best.pth'):
        one, two = (load_checkpoint(tmp_path / run / FOLDER / name) for run in ('whole', 'broken'))
        assert one['step'] == two['step'] and one['results'] == two['results'] and one['best'] == two['best']
        assert all(torch.equal(tensor, two['state_dict'][key]) for key, tensor in one['state_dict'].items())
    assert os.listdir(tmp_path / 'whole' / FOLDER / 'tensorboard' / 'lsq')
    if ranks == 1:
        fails(downstream_cls, monkeypatch, capsys, 'begun with batch_size 8, not 4; resume with the same',
              *_args(lsq, tmp_path / 'broken', '--resume', '--batch_size', 4))
        assert call(downstream_cls, monkeypatch, *_args('gone.pth', tmp_path / 'broken', '--resume')) == 0
        assert 'already fine-tuned' in capsys.readouterr().err


def test_it_learns_and_its_file_is_the_network(tmp_path, lsq, digits, monkeypatch, capsys):
    assert call(downstream_cls, monkeypatch, *_args(
        lsq, tmp_path, '--num_epochs', 5, '--max_steps', 20, '--batch_size', 32, '--num_eval_images', 300,
        '--eval_freq', 5, '--checkpoint_freq', 100)) == 0
    capsys.readouterr()
    path = tmp_path / FOLDER / 'lsq.pth'
    result = load_checkpoint(path)['results']['test']
    assert result['top1'] > 70 and result['images'] == 300
    network = load_network(path)
    again = accuracy(network, eval_loader(digits.test, 100, limit_images=300), Job())
    assert again.top1 == result['top1']
    assert all(op.is_quantised and op.scales_initialized for op in quantised_ops(network))
    assert network.get_classifier().weight.shape == (10, 320)


def _after_one_step(network, digits, path, **changes):
    recipe = replace(RECIPE, **changes)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    finetune(network, digits, recipe, str(path), Job(), IDENTITY)
    return before, network.state_dict()


def test_weight_decay_is_applied_to_weights_and_to_nothing_else(tmp_path, lsq, digits):
    networks = []
    for weight_decay in (0.0, 0.5):
        torch.manual_seed(0)
        networks.append(build_network(DEMO, min_subnet(DEMO), 10, lsq, True))
        before, _ = _after_one_step(networks[-1], digits, tmp_path / f'{weight_decay}.pth', weight_decay=weight_decay)
    plain, decayed = (network.state_dict() for network in networks)
    weights = [key for key in plain if key.endswith('weight') and '.norm.' not in key]
    assert len(weights) > 10 and 'stages.logits.0.linear.weight' in weights
    for key in plain:
        if key in weights:              # Nesterov's first step: 1.9 times the gradient
            torch.testing.assert_close(plain[key] - decayed[key], 0.1 * 1.9 * 0.5 * before[key], rtol=1e-3, atol=1e-5)
        else:
            assert torch.equal(plain[key], decayed[key]), key


def test_the_gradient_norm_is_clipped(tmp_path, network, digits):
    before, after = _after_one_step(network, digits, tmp_path / 'x.pth', weight_decay=0.0, grad_clip_norm=1e-3,
                                    momentum=0.0)
    names = [name for name, _ in network.named_parameters()]
    prepared = {op for op in names if op.startswith('stages.logits') and op.endswith(('sw', 'sa', 'beta'))}
    change = torch.cat([(after[key] - before[key]).flatten() for key in names if key not in prepared]).norm()
    assert 0.5e-4 < change <= 1.001e-4


def test_only_the_head_is_trained(tmp_path, network, digits):
    body = {}

    def remember(tuning, *args):
        body.update({key: tensor.clone() for key, tensor in tuning.network.state_dict().items()})
        return take_step(tuning, *args)

    take_step, downstream._take_step = downstream._take_step, remember
    try:
        _, after = _after_one_step(network, digits, tmp_path / 'x.pth', only_train_head=True)
    finally:
        downstream._take_step = take_step
    changed = {key for key in after if not torch.equal(body[key], after[key])}
    assert changed >= {f'stages.logits.0.linear.{name}' for name in ('weight', 'bias', 'sw', 'sa')}
    assert all(key.startswith('stages.logits.') for key in changed)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path, network, digits):
    recipe = replace(RECIPE, max_steps=6, checkpoint_freq=1)
    path, steps = tmp_path / 'lsq.pth', []

    def poison(tuning, *args):
        steps.append(tuning.step)
        if len(steps) == 4:
            with torch.no_grad():
                tuning.network.get_classifier().bias.fill_(float('nan'))
        return take_step(tuning, *args)

    take_step, downstream._take_step = downstream._take_step, poison
    try:
        with pytest.raises(UserError, match=r'step 3 \(epoch 0\): the loss is not finite; the last good checkpoint '
                                            r'is .*lsq.pth; try a smaller --learning_rate'):
            finetune(network, digits, recipe, str(path), Job(), IDENTITY)
    finally:
        downstream._take_step = take_step
    state = load_checkpoint(path)
    assert state['step'] == 2 and all(torch.isfinite(t).all() for t in state['state_dict'].values())


def test_the_recipes_are_the_published_ones():
    names = ['CIFAR10', 'CIFAR100', 'Flowers102', 'OxfordIIITPet', 'Food101', 'StanfordCars', 'FGVCAircraft']
    assert [find_recipe(name) for name in names] == [list(pair) for pair in zip(
        (0.0125, 0.0125, 0.15, 0.00375, 0.15, 0.15, 0.075), (4e-5, 4e-5, 4e-6, 4e-6, 4e-8, 0, 4e-8))]
    assert find_recipe('cifar-10', weight_decay=0.0) == [0.0125, 0.0]
    recipe = DownstreamRecipe(0.1, 0.0)
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs, recipe.label_smoothing, recipe.grad_clip_norm,
            recipe.momentum) == (200, 128, 2, 0.1, 1, 0.9)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR10's files as torchvision keeps them, with digits for pictures."""
    folder, (pixels, labels) = tmp_path / 'data' / 'cifar-10-batches-py', load_digits(return_X_y=True)
    folder.mkdir(parents=True)
    for number, (name, _) in enumerate(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list):
        part = (pixels[20 * number:20 * number + 20].reshape(-1, 8, 8) * 15.9).astype(np.uint8)
        rows = np.tile(part.repeat(4, 1).repeat(4, 2).reshape(20, -1), 3)
        content = {'data': rows, 'labels': labels[20 * number:20 * number + 20].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class{i}' for i in range(10)]}))
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda path, md5: os.path.isfile(path))
    return tmp_path / 'data'


def test_the_published_command_runs_as_written(tmp_path, cifar10, monkeypatch, capsys):
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'supernet_training').symlink_to(published_root())
    monkeypatch.chdir(tmp_path)
    words = f'--subnet_name SEQnet@vnni-A0 --dataset CIFAR10 --imagenet_path {cifar10}'.split()
    assert call(downstream_cls, monkeypatch, *words, '--num_epochs', 1, '--max_steps', 1, '--batch_size', 2,
                '--num_calib_batches', 1, '--num_eval_images', 2, '--num_workers', 0, '--device', 'cpu') == 0
    out, err = capsys.readouterr()
    assert 'SEQnet@vnni-A0 on CIFAR10: top-1' in out
    assert 'learning rate 0.0125, weight decay 4e-05, 10 classes' in err
    assert load_network('checkpoints/downstream/SEQnet@vnni-A0/cifar10/lsq.pth').num_classes == 10


def test_mistakes_end_in_one_line_and_code_2(tmp_path, lsq, monkeypatch, capsys):
    def said(text, *args):
        fails(downstream_cls, monkeypatch, capsys, text, *_args(lsq, tmp_path / 'out'), *args)

    said('expected nowhere/demo-012-111-align0/lsq.pth or nowhere/lsq.pth; train it with train_supernet.py '
         '--quant_mode, or give --from_scratch', '--checkpoint_path', 'nowhere')
    said('7 is not one of', '--subnet_name', str(min_subnet(DEMO)).replace('k3#3#3', 'k3#3#7'))
    said('is negative', '--weight_decay', -1)
    said('not from 0 to below 1', '--label_smoothing', 1)
    said('fewer than one step', '--batch_size', 5000)
    fails(downstream_cls, monkeypatch, capsys, 'no published recipe (there are CIFAR10',
          '--subnet_name', 'SEQnet@vnni-A0', '--dataset', 'digits')
    fails(downstream_cls, monkeypatch, capsys, "no network 'SEQnet@vnni-A7'", '--subnet_name', 'SEQnet@vnni-A7',
          '--dataset', 'CIFAR10')
    assert not (tmp_path / 'out').exists()


def test_from_scratch_in_fp32(tmp_path, monkeypatch, capsys):
    args = _args('nowhere', tmp_path, '--from_scratch', '--fp32', '--max_steps', 1, '--num_epochs', 1)
    assert call(downstream_cls, monkeypatch, *args) == 0
    assert 'min in fp32 from random weights' in capsys.readouterr().err
    assert not any(op.is_quantised for op in quantised_ops(load_network(tmp_path / FOLDER / 'checkpoint.pth')))
