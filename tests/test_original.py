"""What a user of the original brings: command lines, train.yaml, notebook calls, networks outside their windows."""
import importlib
import os
import random
import re
import shutil
import sys

import pytest
import torch

from modules.block_kd import lut
from modules.latency import LatencyPredictor
from modules.modeling.ops.lsq_plus import quantize_activation, quantize_weight, set_quant_mode
from modules.modeling.supernet import Supernet
from modules.search_space.encoding import EncodingError, parse_subnet, subnet_config
from modules.search_space.sampling import max_subnet, min_subnet
from modules.search_space.superspace import get_available_superspaces
from modules.settings import load_config
from modules.training.losses import NSRLoss, nsr_loss
from modules.training.supernet_trainer import SupernetRecipe

from .conftest import ROOT
from .launching import launch

SUPERNET = '--supernet_choice demo-222-111'
NEEDED = {'train_block_kd': '--superspace demo --output_path x', 'train_supernet': SUPERNET,
          'lsq_block_kd': '--superspace demo --output_path x --teacher_checkpoint_path x', 'eval_supernet': SUPERNET,
          'eval_block_kd': '--superspace demo --teacher_checkpoint_path x',
          'search_block_kd': '--superspace demo --latency_constraint 1', 'eval_specific_net': '--model_name x',
          'search_subnet': f'{SUPERNET} --latency_constraint 1'}
LINE = object()                         # a flag that has no meaning in the script: a line says so
# (script, the original's flag and its value, what of our arguments has which value)
FLAGS = [
    ('search_subnet', '--max_time_budget 7', 'num_rounds', 7),
    ('search_subnet', '--mutation_size 7', 'num_mutations', 7),
    ('search_subnet', '--crossover_size 7', 'num_crossovers', 7),
    ('search_subnet', '--parent_size 7', 'parent_size', 7),
    ('search_subnet', '', 'latency_delta', 5.0),
    ('search_subnet', '', 'arch_mutate_prob', 0.3),
    ('search_subnet', '', 'resolution_mutate_prob', 0.5),
    ('search_block_kd', '--parent_size 7', 'parent_sample_size', 7),
    ('search_block_kd', '--cycles=7', 'num_spaces', 7),
    ('search_block_kd', '--manual_seed 7', 'seed', 7),
    ('eval_supernet', '', 'mode', 'acc'),
    ('eval_supernet', '--supernet_choice demo-000-111 demo-111-111', 'supernet_choice',
     ['demo-000-111', 'demo-111-111']),
    ('eval_supernet', '--batch_size_per_gpu 7', 'batch_size', 7),
    ('eval_supernet', '--augment auto_augment_tf', 'augment', LINE),
    ('eval_specific_net', '--augment default', 'augment', LINE),
    ('eval_block_kd', '--augment default', 'augment', LINE),
    ('onnx_tools.export_onnx', '--augment default', 'augment', LINE),
    ('onnx_tools.export_onnx', '--resume root', 'checkpoint_path', 'root'),
    ('search_subnet', '--post_bn_calibration_batch_num 7', 'num_calib_batches', 7),
    ('search_subnet', '--data_loader_workers_per_gpu 7', 'num_workers', 7),
    ('search_subnet', '--test_only', 'test_only', LINE),
    ('eval_block_kd', '--debug_batches 7', 'debug_batches', 7),
    ('train_block_kd', '--debug_batches 7', 'debug_batches', 7),
    ('train_block_kd', '--epochs 7', 'num_epochs', 7),
    ('train_block_kd', '--batch_size_per_gpu 7', 'train_batch_size', 7),
    ('train_block_kd', '--print_freq 7', 'print_freq', LINE),
    ('train_block_kd', '--test_only', 'test_only', True),
    ('lsq_block_kd', '--batch_size_per_gpu 7', 'train_batch_size', 7),
    ('eval_block_kd', '--batch_size_per_gpu 7', 'eval_batch_size', 7),
    ('lsq_finetune_teacher', '--manual_seed 7', 'seed', 7),
    ('lsq_finetune_teacher', '--test_only', 'test_only', True),
    ('train_supernet', '--train_batch_size 7', 'batch_size_per_gpu', 7),
    ('train_supernet', '--post_bn_calibration_batch_num 7', 'num_calib_batches', 7),
    ('train_supernet', '--test_only', 'test_only', True),
    ('downstream_cls', '--epochs 7', 'num_epochs', 7),
    ('downstream_cls', '--lr_warmup 7', 'warmup_epochs', 7),
    ('downstream_cls', '--max_grad_norm 7', 'grad_clip_norm', 7),
    ('downstream_cls', '--train_batch_size 7', 'batch_size', 7),
    ('downstream_cls', '--print_freq 7', 'print_freq', LINE),
    ('downstream_cls', '--test_only', 'test_only', True),
    ('downstream_cls', '', 'dataset', 'CIFAR10'),
    ('downstream_cls', '', 'subnet_name', 'SEQnet@vnni-A0'),
    ('downstream_cls', '--imagenet_path x', 'imagenet_path', 'x'),
    ('downstream_cls', '--lr 0.5', 'learning_rate', 0.5),
    ('train_supernet', '--lr 0.5', 'base_lr', 0.5),
    ('train_supernet', '--num_epochs 7', 'epochs', 7),
    ('eval_block_kd', '--test_batch_size 7', 'eval_batch_size', 7),
    ('search_block_kd', '--output_path x', 'output_dir', 'x'),
    ('search_subnet', '--output_dir x', 'output_path', 'x'),
    ('train_supernet', '--workers 7', 'num_workers', 7),
    ('train_supernet', '--dist_url tcp://127.0.0.1:1', 'dist_url', LINE),
]


@pytest.mark.parametrize('script, words, name, value', FLAGS)
def test_flags(script, words, name, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [script, *NEEDED.get(script, '').split(), *words.split()])
    args = importlib.import_module(script).get_args()
    said = capsys.readouterr().err
    if value is LINE:
        assert not hasattr(args, name) and said.startswith(f'--{name}: taken, but ') and said.count('\n') == 1
    else:
        assert getattr(args, name) == value and not said


def test_a_flag_that_nobody_knows_is_still_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['x', *NEEDED['search_subnet'].split(), '--no_such_flag', '1'])
    with pytest.raises(SystemExit):
        importlib.import_module('search_subnet').get_args()
    assert '--no_such_flag' in capsys.readouterr().err


def test_train_yaml(tmp_path, capsys):
    """Its sections and keys, as far as they are known."""
    path = tmp_path / 'train.yaml'
    path.write_text('seed: 3\nepochs: 20\nbatch_size_per_gpu: 8\nweight_decay: 1e-5\npost_bn_calibration_batch_num: 9\n'
                    'data_loader_workers_per_gpu: 4\nresume: null\noptimizer:\n  method: sgd\n  momentum: 0.8\n'
                    'lr_scheduler:\n  method: warmup_cosine_lr\n  base_lr: 0.2\n  warmup_epochs: 3\n')
    recipe = load_config(SupernetRecipe, path)
    assert recipe == SupernetRecipe(seed=3, epochs=20, batch_size_per_gpu=8, num_calib_batches=9, momentum=0.8,
                                    base_lr=0.2, warmup_epochs=3.0)
    assert capsys.readouterr().err.endswith(': keys of the original without a meaning here: '
                                            'data_loader_workers_per_gpu resume optimizer.method lr_scheduler.method\n')
    path.write_text(path.read_text() + '  momentum: 0.7\n')
    with pytest.raises(ValueError, match='lr_scheduler.momentum: 0.7, but momentum is 0.8 already'):
        load_config(SupernetRecipe, path)
    assert load_config(SupernetRecipe, os.path.join(ROOT, 'supernet_training_configs', 'train.yaml')).epochs == 360


# ---- networks outside their width windows

def _narrowed(supernet):
    """The largest subnet with a stage1 width below its window, as text."""
    subnet = max_subnet(supernet)
    widths = list(subnet.widths)
    widths[sum(subnet.depths[:2])] = 32
    return str(subnet).replace('#'.join(map(str, subnet.widths)), '#'.join(map(str, widths)))


def test_a_width_outside_its_window(capsys):
    name = 'onnxw-121122-133333'
    subnet = _narrowed(name)
    with pytest.raises(EncodingError, match='stage1 block 0: width 32 is not one of 48 64'):
        parse_subnet(subnet, name)
    assert LatencyPredictor('onnx_lut').predict_subnet(subnet_config(name, subnet)) > 0
    assert 'stage1 block 0: width 32 is outside its window 48 64' in capsys.readouterr().err
    with pytest.raises(EncodingError, match='width 64 is not one of 32 48'):        # which its weights do not hold
        parse_subnet(max_subnet(name), 'onnxw-121122-033333', 'weights')
    supernet = Supernet.build_from_str('demo-000-111', 10).eval()
    wide = str(max_subnet(supernet.encoding))
    narrow = wide.replace('w24#24#64#64', 'w24#24#32#32')
    assert wide != narrow and supernet.set_active_subnet(narrow) == narrow
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(supernet.get_active_subnet()(x), supernet(x))


# ---- files that win over the shipped ones

def test_published_luts_copied_to_the_shipped_ones_win(tmp_path, monkeypatch, capsys):
    for name in ('stage1_0_0', 'stage1_1_0'):
        shutil.copy(os.path.join(lut.SHIPPED, 'onnxw', f'{name}.csv.gz'), tmp_path)
    (tmp_path / 'onnxw').mkdir()
    for path in tmp_path.glob('*.gz'):
        path.rename(tmp_path / 'onnxw' / path.name)
    published = tmp_path / 'onnxw' / 'stage1_0_0.csv'
    published.write_text('')
    with pytest.raises(ValueError, match='keep one'):
        lut.lut_files(tmp_path, 'onnxw', ['stage1_0_0'])
    monkeypatch.setattr(lut, 'SHIPPED', str(tmp_path))
    assert lut.lut_files(tmp_path, 'onnxw', ['stage1_0_0', 'stage1_1_0'])['stage1_0_0'] == str(published)
    assert '1 of 2 block LUTs are the shipped models of the published ones' in capsys.readouterr().err


def test_a_registered_predictor_of_a_shipped_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    registry = tmp_path / '.nn_meter' / 'config' / 'predictors.yaml'
    registry.parent.mkdir(parents=True)
    registry.write_text(f'- name: tflite27_cpu_int8\n  version: 1.0\n  package_location: {tmp_path}\n')
    assert LatencyPredictor('tflite27_cpu_int8').table
    assert 'tflite27_cpu_int8: the model in' in capsys.readouterr().err
    with pytest.raises(ValueError, match=r'has no \*.pkl'):
        LatencyPredictor('tflite27_cpu_int8', trust_pickles=True)
    assert 'the predictor that is registered with nn-Meter, not the model in' in capsys.readouterr().err


# ---- Python

def test_a_quantised_op_of_your_own():
    """The example in docs/python.md, and the same with the bases in the original's order."""
    with open(os.path.join(ROOT, 'docs', 'python.md'), encoding='utf-8') as file:
        example, = [code for code in re.findall('```python\n(.*?)```', file.read(), re.DOTALL) if 'QBase' in code]
    for text in (example, example.replace('(QBase, nn.Conv1d)', '(nn.Conv1d, QBase)')):
        names = {}
        exec(text, names)
        op, x = names['op'], torch.randn(2, 4, 9)
        assert op.scales_initialized and op.is_quantised
        twin = set_quant_mode(type(op)(4, 8, 3))
        twin.load_state_dict(op.state_dict())
        assert twin.scales_initialized and torch.equal(twin(x), op(x))
        weight = quantize_weight(op.weight, op.sw, 8, is_training=True)
        quantised = quantize_activation(x, op.sa, 8, op.beta, training=False)
        torch.testing.assert_close(op(x), torch.conv1d(quantised, weight, op.bias))


def test_notebook_calls():
    supernet = Supernet('demo', '222', [1, 1, 1], num_classes=7)
    assert str(supernet.encoding) == 'demo-222-111' and supernet(torch.randn(2, 3, 48, 48)).shape == (2, 7)
    supernet.active_resolution = 32
    assert supernet.active_resolution == 32 and supernet.sample_min_subnet() == str(min_subnet('demo-222-111'))
    with pytest.raises(EncodingError):
        supernet.active_resolution = 33
    supernet.set_dropout_rate(0.3)
    supernet.zero_last_gamma()
    supernet.align_sample = True
    first = parse_subnet(supernet.sample_active_subnet(random.Random(1)), supernet.encoding)
    assert all(len(set(blocks)) == 1 for blocks in first.stages().values())
    second = supernet.mutate(first, 1.0, 1.0, random.Random(2))
    assert second != str(first) and supernet.crossover(first, second) == str(supernet.active_subnet)
    maps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert NSRLoss('student')(*maps) == nsr_loss(*maps, 'student')
    noise = (maps[0] - maps[1]).square().mean((2, 3))
    torch.testing.assert_close(nsr_loss(*maps, 'student'), (noise / maps[0].var((2, 3))).mean())
    assert 'mobile_v1_res' in get_available_superspaces()
    for path, name in (('latency_predictor', 'LatencyPredictor'), ('block_kd.search', 'BlockKDSearcher'),
                       ('zoo', 'get_subnet')):
        assert hasattr(importlib.import_module(f'modules.{path}'), name)


def test_an_error_under_a_launcher_is_said_once_and_last():
    said = launch('torch.distributed.launch', 'eval_supernet.py', '--supernet_choice', 'demo-999-111', code=1)
    last = [line for line in said.split('\n') if line.strip('= ')][-1]
    assert said.count('error: ') == 1 and "error: 'demo-999-111': demo stage1: block type 9" in last
