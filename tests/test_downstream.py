"""downstream_cls.py: exact resumption after SIGKILL, the recipe by its numbers, and that it learns (digits)."""
import csv
import os
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torchvision import datasets

import downstream_cls
from modules.errors import UserError
from modules.files import write_csv
from modules.modeling.ops.lsq_plus import quantisation_of, quantised_ops
from modules.search_space.sampling import max_subnet, min_subnet, sample_subnet
from modules.training import downstream
from modules.training.calibrate import calibrate, norm_statistics
from modules.training.checkpoint import load_checkpoint
from modules.training.data import calibration_batches, eval_loader, open_data
from modules.training.distributed import Job
from modules.training.downstream import DownstreamRecipe, finetune, learning_rate_of, mixed_loss
from modules.training.evaluate import accuracy, images_of
from modules.zoo import build_network, load_network, take_out

from .checkpoints import call, fails, published_root, write_supernet
from .launching import run_script
from .test_eval_specific_net import write_pictures

pytestmark = pytest.mark.usefixtures('one_thread')
DEMO = 'demo-012-111'
IDENTITY = {'subnet_name': 'min', 'supernet': DEMO, 'subnet': str(min_subnet(DEMO)), 'num_classes': 10,
            'quant_mode': True}
RECIPE = DownstreamRecipe(learning_rate=0.1, weight_decay=4e-5, epochs=1, batch_size=8, warmup_epochs=0, max_steps=1,
                          num_calib_batches=2, num_eval_images=32)
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
            '--drop_rate', 0.2, '--augment', 'default', '--num_workers', 0, '--device', 'cpu', '--output_path', output,
            *more]


def test_a_killed_and_resumed_run_ends_with_the_unbroken_runs_weights(tmp_path, lsq, monkeypatch, capsys):
    def run(output, *more):
        assert call(downstream_cls, monkeypatch, *_args(lsq, output, *more)) == 0
        return capsys.readouterr().out

    said = run(tmp_path / 'whole')
    broken = tmp_path / 'broken' / FOLDER / 'lsq.pth'
    run_script('downstream_cls.py', *_args(lsq, tmp_path / 'broken'), kill_when=broken)
    assert not load_checkpoint(broken)['done']
    again = run(tmp_path / 'broken', '--resume')
    accuracy_line = next(line for line in said.split('\n') if line.startswith('min on digits: top-1'))
    assert accuracy_line in again and '(40 images)' in accuracy_line
    for name in ('lsq.pth', 'lsq_best.pth'):
        one, two = (load_checkpoint(tmp_path / run / FOLDER / name) for run in ('whole', 'broken'))
        assert one['step'] == two['step'] and one['results'] == two['results'] and one['best'] == two['best']
        assert all(torch.equal(tensor, two['state_dict'][key]) for key, tensor in one['state_dict'].items())
    assert os.listdir(tmp_path / 'whole' / FOLDER / 'tensorboard' / 'lsq')
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
    assert network.get_classifier().weight.shape == (10, 512)


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
    rates = (0.0125, 0.0125, 0.15, 0.00375, 0.15, 0.15, 0.075)
    assert tuple(map(learning_rate_of, names)) == rates and learning_rate_of('cifar-10') == 0.0125
    assert learning_rate_of('CIFAR10', keep_head=True) == learning_rate_of('fashion-mnist', keep_head=True) == 0.02
    recipe = DownstreamRecipe()
    assert (recipe.weight_decay, recipe.epochs, recipe.batch_size, recipe.warmup_epochs, recipe.label_smoothing,
            recipe.grad_clip_norm, recipe.momentum) == (1e-5, 200, 128, 2, 0.1, 1, 0.9)



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
    words = f'--subnet_name SEQnet@vnni-A0 --dataset_path {cifar10}'.split()
    assert call(downstream_cls, monkeypatch, *words, '--num_epochs', 1, '--max_steps', 1, '--batch_size', 2,
                '--num_calib_batches', 1, '--num_eval_images', 2, '--num_workers', 0, '--device', 'cpu') == 0
    out, err = capsys.readouterr()
    assert 'SEQnet@vnni-A0 on CIFAR10: top-1' in out
    assert 'learning rate 0.0125, weight decay 1e-05, 10 classes' in err
    assert load_network('checkpoints/downstream/SEQnet@vnni-A0/cifar10/lsq.pth').num_classes == 10


def test_mistakes_end_in_one_line_and_code_2(tmp_path, lsq, monkeypatch, capsys):
    def said(text, *args):
        fails(downstream_cls, monkeypatch, capsys, text, *_args(lsq, tmp_path / 'out'), *args)

    said('expected nowhere/demo-012-111-align0/lsq.pth or nowhere/lsq.pth; train it with train_supernet.py '
         '--quant_mode, or give --from_scratch', '--checkpoint_path', 'nowhere')
    said('7 is not one of', '--subnet_name', str(min_subnet(DEMO)).replace('k3#3#3', 'k3#3#7'))
    said('is negative', '--weight_decay', -1)
    said('is not below 1', '--label_smoothing', 1)
    said('fewer than one step', '--batch_size', 5000)
    fails(downstream_cls, monkeypatch, capsys, 'no published recipe (there are CIFAR10',
          '--subnet_name', 'SEQnet@vnni-A0', '--dataset', 'digits')
    fails(downstream_cls, monkeypatch, capsys, "no network 'SEQnet@vnni-A7'", '--subnet_name', 'SEQnet@vnni-A7',
          '--dataset', 'CIFAR10')
    assert not (tmp_path / 'out').exists()


def test_the_originals_recipe_and_test_only(tmp_path, lsq, monkeypatch, capsys):
    write_pictures(tmp_path / 'imagenet', ['n01440764', 'n01443537'])
    args = _args(lsq, tmp_path / 'out', '--recipe', 'original', '--imagenet_path', tmp_path / 'imagenet',
                 '--num_epochs', 1)
    assert call(downstream_cls, monkeypatch, *args) == 0
    said = capsys.readouterr().out
    path = tmp_path / 'out' / f'{DEMO}_min_digits.pth'
    state, network = load_checkpoint(path), load_network(path)
    assert state['settings']['seed'] == 42 and state['fp32_head']
    assert [op.is_quantised for op in quantised_ops(network)].count(False) == 1
    assert not network.get_classifier().is_quantised
    assert call(downstream_cls, monkeypatch, *args, '--test_only') == 0
    assert capsys.readouterr().out == said
    fails(downstream_cls, monkeypatch, capsys, '--imagenet_path: ', *args, '--imagenet_path', tmp_path / 'out')


def test_from_scratch_in_fp32(tmp_path, monkeypatch, capsys):
    args = _args('nowhere', tmp_path, '--from_scratch', '--fp32', '--max_steps', 1, '--num_epochs', 1)
    assert call(downstream_cls, monkeypatch, *args) == 0
    assert 'min in fp32 from random weights' in capsys.readouterr().err
    assert not any(op.is_quantised for op in quantised_ops(load_network(tmp_path / FOLDER / 'checkpoint.pth')))


# finishing: a found subnet on the data of its supernet

FOUND = sample_subnet(DEMO, random.Random(3))
COLUMNS = ('subnet', 'ms', 'MFLOPs', 'Mparams', 'valid_top1', 'test_top1', 'test_top5', 'test_loss')


@pytest.fixture(scope='module')
def supernets(tmp_path_factory):
    """A root of the fp32 checkpoint of DEMO, and best_c2_d1.csv, whose second row is FOUND."""
    root = tmp_path_factory.mktemp('spaceevo@demo')
    write_supernet(root / f'{DEMO}-align0' / 'checkpoint.pth', DEMO, 10)
    write_csv(root / 'best_c2_d1.csv', COLUMNS, [(subnet, *'1234567') for subnet in (min_subnet(DEMO), FOUND)])
    return root


def _finish(supernets, output, *more):
    return _args(supernets, output, '--learning_rate', 0.02, '--num_epochs', 1, '--batch_size', 4, *more)


@pytest.mark.parametrize('ranks', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_finishing_is_resumed_exactly_and_a_row_is_its_encoding(tmp_path, supernets, monkeypatch, capsys, ranks):
    def run(output, *more):
        if ranks > 1:
            return run_script('downstream_cls.py', *_finish(supernets, output, '--distill', *more), ranks=ranks)
        assert call(downstream_cls, monkeypatch, *_finish(supernets, output, '--distill', *more)) == 0
        return ''.join(capsys.readouterr())

    row = '--subnet_name', f'{supernets}/best_c2_d1.csv:2'
    said = run(tmp_path / 'whole', '--subnet_name', str(FOUND))
    assert f'{DEMO}-align0/checkpoint.pth: fp32 weights: int8 begins with LSQ+ scales that are initialised' in said
    assert '10 classes, 0.5 of the loss from the largest subnet of' in said
    name, = os.listdir(tmp_path / 'whole')
    assert name.startswith(f'{DEMO}_') and len(name) == len(DEMO) + 7
    whole, broken = (tmp_path / run / name / 'digits' / 'lsq.pth' for run in ('whole', 'broken'))
    run_script('downstream_cls.py', *_finish(supernets, tmp_path / 'broken', '--distill', *row), ranks=ranks,
               kill_when=broken)
    assert not load_checkpoint(broken)['done']
    run(tmp_path / 'broken', '--resume', *row)
    one, two = load_checkpoint(whole), load_checkpoint(broken)
    assert one['step'] == two['step'] == 3 and one['results'] == two['results']
    assert all(torch.equal(tensor, two['state_dict'][key]) for key, tensor in one['state_dict'].items())
    if ranks == 1:
        other = tmp_path / 'other.pth'
        write_supernet(other, DEMO, 10, quant=True)
        resumed = _finish(supernets, tmp_path / 'broken', '--resume', *row)
        for text, *more in (('begun with distill 0.5, not 0.25', '--distill', 0.25),
                            ('begun with distill 0.5, not None', '--keep_head'),
                            ('begun with kept_head_of', '--distill', '--checkpoint_path', other),
                            ('no checkpoint of demo-012-111', '--distill', '--checkpoint_path', tmp_path / 'gone')):
            fails(downstream_cls, monkeypatch, capsys, text, *resumed, *more)


def test_a_finished_network_is_exported_as_it_is(tmp_path, supernets, monkeypatch, capsys):
    pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    from onnx_tools import eval_onnx
    assert call(downstream_cls, monkeypatch, *_finish(
        supernets, tmp_path, '--subnet_name', f'{supernets}/best_c2_d1.csv', '--keep_head', '--max_steps', 80,
        '--num_eval_images', 100, '--batch_size', 16, '--learning_rate', 0.1, '--warmup_epochs', 0)) == 0
    path, = tmp_path.glob(f'{DEMO}_*/digits/lsq.pth')
    state = load_checkpoint(path)
    assert state['subnet'] == str(min_subnet(DEMO)) == state['subnet_name']
    assert all(op.is_quantised and op.scales_initialized for op in quantised_ops(load_network(path)))
    assert call(eval_onnx, monkeypatch, '--network', path, '--quant_mode', '--dataset', 'digits', '--num_workers', 0,
                '--num_eval_images', 100, '--model_path', tmp_path / 'models', '--output', tmp_path / 'x.csv') == 0
    capsys.readouterr()
    with open(tmp_path / 'x.csv', encoding='utf-8') as file:
        int8 = list(csv.DictReader(file))[1]
    assert int8['kind'] == 'int8' and float(int8['agree']) >= 95 and float(int8['onnx']) > 70
    # the images of the fine-tuning are those of the deployment
    assert float(int8['torch']) == pytest.approx(state['results']['test']['top1'], abs=1e-3)


def test_quantisation_for_runtimes_is_kept_and_resumed_as_it_was(tmp_path, lsq, monkeypatch, capsys):
    args, bits, whole = _args(lsq, tmp_path, '--num_epochs', 1), ('--weight_bits', 7), ('--integer_zero_points',)
    assert call(downstream_cls, monkeypatch, *args, *bits, *whole) == 0
    assert quantisation_of(load_network(tmp_path / FOLDER / 'lsq.pth')) == {'weight_bits': 7, 'zero_points': 'integer'}
    for text, *more in (('begun with weight_bits 7, not 8', '--resume', *whole),
                        ('begun with zero_points integer, not real', '--resume', *bits),
                        ('begun with zero_points integer, not symmetric', '--resume', *bits, '--symmetric'),
                        ('not allowed with argument', *whole, '--symmetric'),
                        *(('--fp32: without --weight_bits', '--fp32', *flags) for flags in (bits, whole))):
        fails(downstream_cls, monkeypatch, capsys, text, *args, *more)


def test_a_share_of_the_gradient_comes_from_the_teacher():
    generator = torch.Generator().manual_seed(0)
    logits, answers = (torch.randn(5, 4, generator=generator, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 3, 1, 1, 2])
    loss = mixed_loss(logits, labels, answers, 0.3, label_smoothing=0.1)
    loss.backward()
    student, teacher = logits.detach().softmax(1), answers.detach().softmax(1)
    wanted = 0.9 * F.one_hot(labels, 4) + 0.1 / 4
    torch.testing.assert_close(logits.grad, (0.7 * (student - wanted) + 0.3 * (student - teacher)) / 5)
    assert answers.grad is None
    kl = (teacher * (teacher / student).log()).sum(1).mean()
    torch.testing.assert_close(loss.detach(), 0.7 * -(wanted * student.log()).sum(1).mean() + 0.3 * kl)
    torch.testing.assert_close(mixed_loss(logits, labels, label_smoothing=0.1),
                               F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_the_teacher_is_calibrated_and_stays_as_it_is(tmp_path, supernets, digits):
    path = supernets / f'{DEMO}-align0' / 'checkpoint.pth'
    result = {}
    for share in (None, 1.0):
        network, teacher = take_out(DEMO, (FOUND, max_subnet(DEMO)), path, True)
        assert all(op.is_quantised and not op.scales_initialized for op in quantised_ops(network))
        assert not any(op.is_quantised for op in quantised_ops(teacher))
        before = {name: tensor.clone() for name, tensor in teacher.named_parameters()}
        recipe = replace(RECIPE, distill=share)
        finetune(network, digits, recipe, str(tmp_path / f'{share}.pth'), Job(), IDENTITY, teacher=teacher)
        result[share] = network.state_dict()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.named_parameters())
    twin, = take_out(DEMO, (max_subnet(DEMO),), path, False)
    calibrate(twin, images_of(calibration_batches(digits.train, 8, 2)))
    for one, two in zip(norm_statistics(teacher), norm_statistics(twin)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)     # another memory format
    head = 'stages.logits.0.linear.bias'
    assert not torch.allclose(result[None][head], result[1.0][head], atol=1e-4)


def test_int8_weights_are_taken_before_fp32_ones(supernets, tmp_path):
    assert downstream_cls.find_start(DEMO, True, supernets, False, True).endswith('checkpoint.pth')
    folder = tmp_path / f'{DEMO}-align0'
    for name, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(folder / name, DEMO, 10, quant)
    path = downstream_cls.find_start(DEMO, True, tmp_path, False, True)
    assert path.endswith('lsq.pth')
    for network in take_out(DEMO, (FOUND, max_subnet(DEMO)), path, True):
        assert all(op.is_quantised and op.scales_initialized for op in quantised_ops(network))


def test_mistakes_of_finishing_end_in_one_line_and_code_2(tmp_path, lsq, supernets, monkeypatch, capsys):
    def said(text, *more):
        fails(downstream_cls, monkeypatch, capsys, text, *_finish(supernets, tmp_path / 'out', *more))

    def table(text):
        (tmp_path / 'best.csv').write_bytes(text)
        return '--subnet_name', f'{tmp_path}/best.csv:2'

    said('the data set has 10 classes, ', '--checkpoint_path', lsq, '--keep_head')
    said('lsq.pth tells 6 apart', '--checkpoint_path', lsq, '--distill')
    said('--from_scratch: random weights have no head', '--distill', '--from_scratch')
    said('expected nowhere/demo-012-111-align0/checkpoint.pth or nowhere/checkpoint.pth; train it with '
         'train_supernet.py', '--checkpoint_path', 'nowhere', '--keep_head')
    said('none.csv: No such file', '--subnet_name', 'none.csv')
    for row in ('0', '3', 'x', ''):
        said(f"best_c2_d1.csv: no row '{row}'; it has 2, counted from 1", '--subnet_name',
             f'{supernets}/best_c2_d1.csv:{row}')
    said("best.csv: no column 'subnet'", *table(b'a,b\n1,2\n3,4\n'))
    said("best.csv row 2: ", *table(f'ms,subnet\n1,{FOUND}\n2,{FOUND}x\n'.encode()))
    said("best.csv row 2: ", *table(b'ms,subnet\n1,d\n2\n'))
    said('best.csv: not a table', *table(b'subnet\n\xff\n'))
    fails(downstream_cls, monkeypatch, capsys, 'best_c2_d1.csv: of which supernet? give --supernet_choice',
          '--subnet_name', f'{supernets}/best_c2_d1.csv', '--dataset', 'digits', '--keep_head')
    assert not (tmp_path / 'out').exists()
