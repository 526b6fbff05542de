"""The published commands of the supernet stages as written, under plain python, torch.distributed.launch and torchrun.

Shortened by more flags only. Plain runs of most of them, and what they compute, are in the tests of their stages.
"""
import os
import random

import pytest
import torch

from modules.search_space.sampling import sample_subnet
from modules.training.checkpoint import load_checkpoint

from .checkpoints import published_root, write_supernet
from .conftest import ROOT
from .launching import run_script
from .test_eval_specific_net import write_pictures

LAUNCHERS = ['torch.distributed.launch', 'torch.distributed.run']
SHORT = ['--num_workers', 0, '--device', 'cpu', '--num_calib_batches', 1]
TRAINING = [*SHORT, '--batch_size_per_gpu', 2, '--max_steps', 1, '--epochs', 1, '--num_valid_images', 4,
            '--valid_size', 4]
EVALUATION = [*SHORT, '--batch_size', 2, '--num_eval_images', 2]
SEARCH = [*EVALUATION, '--population_size', 2, '--num_rounds', 1, '--num_mutations', 1, '--num_crossovers', 1,
          '--num_valid_images', 2, '--valid_size', 4]
DOWNSTREAM = [*EVALUATION, '--num_epochs', 1, '--max_steps', 1, '--learning_rate', 0.01, '--weight_decay', 4e-5]
MOBILEW, ONNXW = 'mobilew-123214-012321', 'onnxw-121122-133333'


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """A working folder as users have it: dataset/ of ImageNet's form, checkpoints/, supernet_training_configs/."""
    folder = tmp_path_factory.mktemp('users')
    write_pictures(folder / 'dataset', ['n01440764', 'n01443537', 'n15075141'])
    (folder / 'supernet_training_configs').symlink_to(os.path.join(ROOT, 'supernet_training_configs'))
    trained = folder / 'checkpoints' / 'supernet_training'
    trained.mkdir(parents=True)
    (trained / 'spaceevo@vnni').symlink_to(published_root() / 'spaceevo@vnni')
    for name, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(trained / f'{ONNXW}-align0' / name, ONNXW, 1000, quant)
    return folder


def _runs(tree, command, short, ranks, launcher, said):
    script, *words = command.replace('${IN}', 'dataset').replace('${C}', 'checkpoints').split()
    output = run_script(script, *words, *short, ranks=ranks, launcher=launcher, cwd=tree)
    assert said in output, output


@pytest.mark.parametrize('ranks, launcher', [(1, None), *((2, launcher) for launcher in LAUNCHERS)])
def test_supernet_training(tree, ranks, launcher):
    train = ('train_supernet.py --config-file supernet_training_configs/train.yaml --superspace mobilew '
             '--supernet_choice 123214-012321 --batch_size_per_gpu ')
    folder = tree / 'checkpoints' / 'supernet_training' / f'{MOBILEW}-align0'
    for file in ('checkpoint.pth', 'lsq.pth'):
        (folder / file).unlink(missing_ok=True)
    _runs(tree, train + '64 --resume', TRAINING, ranks, launcher, f'{MOBILEW} max: top-1')
    _runs(tree, train + '32 --quant_mode', TRAINING, ranks, launcher, f'{MOBILEW} max: top-1')
    weights = [load_checkpoint(folder / file)['state_dict'] for file in ('checkpoint.pth', 'lsq.pth')]
    assert weights[0].keys() == weights[1].keys()
    scales = [key for key in weights[0] if key.endswith('.sa')]
    assert all(weights[0][key] == 1 for key in scales) and any(weights[1][key] != 1 for key in scales)
    assert all(torch.isfinite(tensor).all() for tensor in weights[1].values())


@pytest.mark.parametrize('launcher', LAUNCHERS)
@pytest.mark.parametrize('command, short, said', [
    ('eval_specific_net.py --model_name spaceevo@vnni --dataset_dir ${IN} --quant_mode', EVALUATION, 'min: top-1'),
    ('eval_specific_net.py --model_name SEQnet@vnni-A0 --dataset_dir ${IN}', EVALUATION, 'SEQnet@vnni-A0: top-1'),
    ('search_subnet.py --superspace onnxw --supernet_choice 121122-133333 --dataset_path ${IN} '
     '--output_path ${C}/search_subnet --checkpoint_path ${C}/supernet_training --latency_constraint 15 '
     '--latency_delta 2 --batch_size 32 --num_calib_batches 20', SEARCH, 'round 1/1'),
    ('downstream_cls.py --subnet_name SEQnet@vnni-A0 --dataset digits --imagenet_path ${IN}', DOWNSTREAM,
     'SEQnet@vnni-A0 on digits: top-1')])
def test_evaluation_search_and_downstream(tree, command, short, said, launcher):
    _runs(tree, command, short, 2, launcher, said)


@pytest.mark.parametrize('ranks, launcher', [(1, None), *((2, launcher) for launcher in LAUNCHERS)])
def test_eval_supernet(tree, ranks, launcher):
    subnets = ' '.join(str(sample_subnet(ONNXW, random.Random(seed))) for seed in (0, 1))
    command = ('eval_supernet.py --superspace onnxw --supernet_choice 121122-133333 --mode {} --resume '
               '${C}/supernet_training --dataset_dir ./dataset --subnet_choice ' + subnets)
    _runs(tree, command.replace('{}', 'acc') + ' --quant_mode', EVALUATION, ranks, launcher, '(2 images)')
    if ranks == 1:
        _runs(tree, command.replace('{}', 'acc'), EVALUATION, ranks, launcher, '(2 images)')
        _runs(tree, f'eval_supernet.py --superspace onnxw --supernet_choice 121122-133333 --mode lat --subnet_choice '
              f'{subnets}', [], ranks, launcher, 'total')
