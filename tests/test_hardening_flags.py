"""Malformed configurations and flags: one error line that names the culprit, code 2, nothing written; help."""

import subprocess
import sys

import pytest

from .conftest import ROOT
from .hardening import RUNS, every, refused, world

# ---- configurations

KEY = 'bad.yaml'
CONFIGS = {
    'unknown_key': ('epoch: 1', "'epoch'"),
    'unknown_section': ('other:\n  epochs: 1', "'other'"),
    'unknown_in_section': ('quant:\n  epoch: 1', 'quant.epoch'),
    'text': ('epochs: many', "epochs: 'many'"),
    'float_epochs': ('epochs: 1.5', '1.5'),
    'bool_epochs': ('epochs: true', 'True'),
    'null': ('epochs:', 'None'),
    'list_value': ('base_lr: [0.1]', '[0.1]'),
    'negative': ('epochs: -1', 'epochs: -1'),
    'zero': ('epochs: 0', 'epochs: 0'),
    'nan': ('base_lr: .nan', 'base_lr: nan'),
    'inf': ('base_lr: .inf', 'base_lr: inf'),
    'negative_lr': ('base_lr: -0.1', '-0.1'),
    'alpha_nan': ('alpha_min: .nan', 'alpha_min: nan'),
    'momentum': ('momentum: 1.5', 'momentum: 1.5'),
    'dropout': ('dropout: 1.5', 'dropout: 1.5'),
    'label_smoothing': ('label_smoothing: 2', 'label_smoothing: 2'),
    'batch': ('batch_size_per_gpu: 0', 'batch_size_per_gpu: 0'),
    'arch_training': ('num_arch_training: 0', 'num_arch_training: 0'),
    'valid_freq': ('valid_freq: 0', 'valid_freq: 0'),
    'checkpoint_freq': ('checkpoint_freq: 0', 'checkpoint_freq: 0'),
    'calib': ('num_calib_batches: 0', 'num_calib_batches: 0'),
    'huge_batch': ('batch_size_per_gpu: 10000000000', '10000000000'),
    'augment': ('augment: mixup', 'mixup'),
    'augment_type': ('augment: 5', '5'),
    'gamma': ('zero_last_gamma: 1', '1'),
    'huge_seed': (f'seed: {"9" * 400}', KEY),
    'twice': ('epochs: 1\nepochs: 2', KEY),
    'list': ('- epochs', 'list'),
    'scalar': ('epochs', 'str'),
    'empty': ('', 'NoneType'),
    'tab': ('epochs:\n\t- 1', KEY + ':2'),
    'brackets': ('epochs: [1', KEY),
    'number_key': ('1: 1', '1'),
    'null_key': ('~: 1', 'None'),
    'list_key': ('? [1, 2]\n: 1', KEY),
    'two_documents': ('epochs: 1\n---\na: 1', KEY),
    'object': ('epochs: !!python/object/apply:os.getcwd []', KEY),
    'tag': ('epochs: !x 1', KEY),
    'latin1': (b'# caf\xe9\nepochs: 1', KEY),
    'binary': (bytes(range(256)), KEY),
    'date': ('epochs: 2020-13-45', KEY),
    'section_list': ('quant: [1]', 'quant'),
    'merge': ('<<: 5', KEY),
    'lr_text': ('base_lr: 0,1', '0,1'),
    'nested_section': ('quant:\n  quant:\n    epochs: 1', 'quant.quant'),
    'huge_float': ('warmup_epochs: 1.0e+999', 'warmup_epochs'),
    'hex': ('epochs: 0xfffffffffffffffffffff', 'epochs'),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_configurations(name, tmp_path):
    content, reason = CONFIGS[name]
    path = tmp_path / KEY
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(world().base('supernet', ['--config-file', str(path)]), str(path), reason)


def test_a_configuration_that_is_a_folder_or_is_missing(tmp_path):
    for path in (tmp_path, tmp_path / 'nowhere.yaml'):
        refused(world().base('supernet', ['--config-file', str(path)]), str(path))


# ---- flags

BAD_COUNTS = ['0', '-1', 'nan', 'inf', '1.5', 'many', '', '1e3']
COUNTS = {
    'teacher': ['num_epochs', 'train_batch_size', 'image_size', 'max_steps', 'num_eval_images', 'checkpoint_freq'],
    'block_kd': [
        'hw_list',
        'num_epochs',
        'train_batch_size',
        'lr_step_size',
        'num_calib_batches',
        'checkpoint_freq',
        'max_steps',
        'num_valid_batches',
    ],
    'lut': [
        'hw_list',
        'num_samples_per_stage',
        'calib_batch_size',
        'num_calib_batches',
        'eval_batch_size',
        'num_eval_batches',
        'num_threads',
    ],
    'spaces': ['num_spaces', 'population_size', 'parent_sample_size'],
    'supernet': [
        'epochs',
        'batch_size_per_gpu',
        'num_arch_training',
        'valid_freq',
        'num_calib_batches',
        'checkpoint_freq',
    ],
    'subnets': [
        'population_size',
        'num_rounds',
        'num_mutations',
        'num_crossovers',
        'num_valid_images',
        'num_threads',
        'batch_size',
        'num_calib_batches',
        'num_eval_images',
    ],
    'distribution': ['num_samples'],
    'published': ['batch_size', 'num_calib_batches', 'num_eval_images'],
    'downstream': [
        'num_epochs',
        'batch_size',
        'num_calib_batches',
        'eval_freq',
        'checkpoint_freq',
        'max_steps',
        'num_eval_images',
    ],
    'export': ['batch_size', 'num_calib_batches', 'report_images'],
    'eval_onnx': ['num_eval_images', 'threads'],
    'benchmark': ['threads', 'warmup', 'runs'],
}
BAD_NUMBERS = ['-1', 'nan', 'inf', 'x', '', '1e999']
NUMBERS = {
    'teacher': ['learning_rate', 'momentum', 'weight_decay'],
    'block_kd': ['weight_decay'],
    'lut': ['cache_budget_gb'],
    'spaces': ['latency_constraint', 'latency_loss_t', 'latency_loss_a'],
    'supernet': [
        'warmup_epochs',
        'base_lr',
        'momentum',
        'weight_decay',
        'label_smoothing',
        'dropout',
        'grad_clip_value',
        'iw_clip',
    ],
    'subnets': ['latency_constraint', 'latency_delta', 'arch_mutate_prob', 'resolution_mutate_prob', 'cache_gb'],
    'downstream': [
        'learning_rate',
        'weight_decay',
        'warmup_epochs',
        'momentum',
        'label_smoothing',
        'grad_clip_norm',
        'drop_rate',
    ],
}
SEEDED = ['teacher', 'block_kd', 'lut', 'spaces', 'supernet', 'subnets', 'accuracy', 'downstream', 'export']
LOADING = ['teacher', 'block_kd', 'lut', 'supernet', 'subnets', 'accuracy', 'downstream', 'export', 'eval_onnx']
# one value for each flag, so that all of them come often; of what scripts share all values once and each script once
FLAGS = [
    (run, flag, values[number % len(values)])
    for table, values in ((COUNTS, BAD_COUNTS), (NUMBERS, BAD_NUMBERS))
    for number, (run, flag) in enumerate((run, flag) for run, flags in table.items() for flag in flags)
]
SHARED = {
    'seed': (SEEDED, ['x', '1.5', '', 'nan', '-1', '9' * 30]),
    'num_workers': (LOADING, ['-1', 'x', '1.5', 'nan', '100000']),
    'valid_size': (LOADING, ['-1', 'x', '1.5', 'nan']),
    'augment': (['teacher', 'block_kd', 'downstream'], ['mixup']),
    'dataset': (LOADING, ['cats']),
    'device': ([run for run in LOADING if 'onnx' not in run and run != 'export'], ['tpu']),
    'local_rank': (['supernet', 'spaces', 'lut'], ['-1', 'x', '1.5']),
    'superspace': (['latency', 'block_kd', 'lut', 'spaces', 'supernet', 'subnets'], ['mobile', '', 'DEMO', '../demo']),
}
for name, (runs, values) in SHARED.items():
    FLAGS += [(run, name, value) for run, value in every(runs[0], runs[1:], values, values[0])]
FLAGS += [
    ('block_kd', 'hw_list', '100'),
    ('block_kd', 'hw_list', '1'),
    ('lut', 'hw_list', '33'),
    ('lut', 'hw_list', '99999999'),
    ('block_kd', 'hw_list', '4'),
    ('lut', 'width_window_filter', '9'),
    ('lut', 'width_window_filter', '-1'),
    ('lut', 'width_window_filter', 'x'),
    ('block_kd', 'teacher_arch', 'resnet50'),
    ('block_kd', 'teacher_arch', 'efficientnet-b9'),
    ('block_kd', 'teacher_arch', ''),
    ('teacher', 'teacher_arch', 'vit_base_patch16_224'),
    ('lut', 'teacher_arch', '../x'),
    ('block_kd', 'nsr_signal', 'both'),
    ('block_kd', 'parallel', 'all'),
    ('block_kd', 'train_batch_size', '100000'),
    ('supernet', 'batch_size_per_gpu', '100000'),
    ('downstream', 'batch_size', '100000'),
    ('teacher', 'train_batch_size', '100000'),
    ('spaces', 'estimator', 'guess'),
    ('accuracy', 'mode', 'speed'),
    ('published', 'model_name', 'SEQnet@nowhere'),
    ('published', 'model_name', ''),
    ('published', 'model_name', 'resnet18'),
    ('downstream', 'dataset', 'ImageNet21k'),
    ('supernet', 'augment', 'mixup'),
    ('subnets', 'latency_constraint', '0.0001'),
    ('subnets', 'latency_constraint', '1000000'),
    ('subnets', 'arch_mutate_prob', '1.5'),
    ('subnets', 'resolution_mutate_prob', '2'),
    ('teacher', 'momentum', '1'),
    ('downstream', 'max_steps', '0'),
    ('supernet', 'momentum', '1'),
    ('supernet', 'nonsense', '1'),
    ('latency', 'nonsense', '1'),
    ('block_kd', 'learning_rate_list', '0.1'),
    ('spaces', 'resume', 'x'),
]


@pytest.mark.parametrize('run, flag, value', FLAGS, ids=lambda value: value[:24])
def test_flags(run, flag, value):
    culprit = {'1000000': '1e+06', '0.1': '--learning_rate_list'}.get(value, value)
    refused(world().base(run, [f'--{flag}={value}']), culprit)


def test_each_run_takes_its_own_arguments():
    assert {script for script, _ in RUNS.values()} > {'train_supernet', 'onnx_tools.benchmark'} and len(FLAGS) > 180


@pytest.mark.parametrize('words, culprit', [
    (['train_supernet.py', '--supernet_choice', 'demo-222-111', '--config-file', 'nowhere.yaml'], 'nowhere.yaml'),
    (['onnx_tools/export_onnx.py', '--skip_weights', '--input', 'nowhere.csv'], 'nowhere.csv')])
def test_as_a_process(words, culprit, tmp_path):
    done = subprocess.run(
        [sys.executable, f'{ROOT}/{words[0]}', *words[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'error: ' in done.stderr.strip().split('\n')[-1] and culprit in done.stderr.strip().split('\n')[-1]
    assert not list(tmp_path.iterdir())
