"""Several processes without a launcher between: an error of one ends all, and rank 0 alone decides what is resumed."""
import argparse
import contextlib
import os
import shutil
import subprocess
import sys

import pytest
import torch

from modules.cli import run
from modules.training.distributed import distributed_job

from .conftest import ROOT
from .launching import free_port

FAILING = """
import sys, torch
from modules.cli import run
from modules.training.distributed import barrier, distributed_job
def main(kind):
    with distributed_job() as job:
        barrier(job)
        if job.is_main:
            raise {'memory': torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
                   'bug': ValueError('a bug')}[kind]
        barrier(job)
run(main, lambda: sys.argv[1])
"""
SHARED = """
import os, sys
from modules.cli import run
from modules.training.distributed import check_same, distributed_job, gather, of_main, share
def main(folder):
    with distributed_job() as job:
        path = os.path.join(folder, 'state')
        if not job.is_main:
            path += ' of a disk that rank 0 does not see'
            open(path, 'w').write('another')
        print(of_main(lambda: open(path).read() if os.path.exists(path) else 'none', job), gather(job.rank, job),
              share(job.rank, job), flush=True)
        check_same('the step', 7, job)
        check_same('the step', job.rank, job)
run(main, lambda: sys.argv[1])
"""

AVERAGED = """
import sys, torch
from torch import nn
from modules.cli import run
from modules.training import gradients
from modules.training.distributed import distributed_job, gather
def main(bucket):
    gradients.BUCKET = int(bucket)
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))       # the last is never used, the third by one loss only
    with distributed_job() as job:
        x = torch.randn(4, 8) + job.rank
        losses = [nn.Sequential(*(layers[i] for i in used))(x).square().sum() for used in ((0, 2, 3), (0, 1, 3))]
        plain = [torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True, allow_unused=True,
                                     materialize_grads=True) for loss in losses]
        mean = [sum(values) / job.world_size for values in zip(*gather([a + b for a, b in zip(*plain)], job))]
        average = gradients.GradientAverage(layers.parameters(), job)
        losses[0].backward()
        average.backward(losses[1])
        left = len(average._travelling)
        average.finish()
        close = [torch.allclose(p.grad, m) for p, m in zip(layers.parameters(), mean) if p.grad is not None]
        print(left, len(average._travelling), sum(close), len(close), flush=True)
run(main, lambda: sys.argv[1])
"""


def ranks(program, *args, world=2):
    """[(exit code, stdout, stderr), …] of `world` processes that meet at a port of this machine."""
    port = free_port()
    started = [subprocess.Popen([sys.executable, '-c', program, *map(str, args)], text=True, cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, 'OMP_NUM_THREADS': '1', 'RANK': str(rank), 'WORLD_SIZE': str(world),
                                     'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'CUDA_VISIBLE_DEVICES': ''})
               for rank in range(world)]
    try:
        return [(process.communicate(timeout=90), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize('kind, line, code', [
    ('memory', 'error: not enough GPU memory: CUDA out of memory', 2), ('bug', 'ValueError: a bug', 1)])
def test_one_failing_rank_ends_all(kind, line, code):
    ((_, err), first), ((_, others), second) = ranks(FAILING, kind)
    assert first == code and line in err and second == 2
    assert others.count('error: ') == 1 and 'error: rank 1: another rank is gone' in others, others
    assert kind == 'bug' or err.count('\n') == 1 and 'Traceback' not in err, err


def test_rank_0_alone_looks_for_files_and_steps_are_compared(tmp_path):
    ended = ranks(SHARED, tmp_path)
    assert all(out == 'none [0, 1] 0\n' and code == 2 for (out, _), code in ended), ended
    assert all('ranks differ in the step: 0 1' in err for (_, err), _ in ended), ended


@pytest.mark.parametrize('restarts, goes_on', [('0', False), ('2', True)])
def test_a_job_that_torchrun_starts_anew_goes_on_from_its_checkpoints(monkeypatch, restarts, goes_on):
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', restarts)
    seen = []
    run(lambda args: seen.append(args.resume), lambda: argparse.Namespace(resume=False))
    assert seen == [goes_on]


def test_deterministic_is_what_torch_is_told():
    with torch_is_deterministic(), distributed_job(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ['CUBLAS_WORKSPACE_CONFIG']
    with distributed_job():
        assert not torch.are_deterministic_algorithms_enabled()


@contextlib.contextmanager
def torch_is_deterministic():
    """Inside it may be; afterwards it is not."""
    before = os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cudnn.benchmark = before[1]
        os.environ.pop('CUBLAS_WORKSPACE_CONFIG')
        if before[0] is not None:
            os.environ['CUBLAS_WORKSPACE_CONFIG'] = before[0]


@pytest.mark.parametrize('bucket, buckets', [(1, '8 8'), (800, '1 2'), (10 ** 9, '0 1')])
def test_gradients_leave_in_buckets_during_the_last_backward_pass(bucket, buckets):
    ended = ranks(AVERAGED, bucket)
    assert all(out == f'{buckets} 8 8\n' and code == 0 for (out, _), code in ended), ended


def on_two_hosts(folders, script, *args):
    """Run a script on two launchers of two ranks each, `{}` in its arguments replaced by each one's own folder."""
    port, env = free_port(), {**os.environ, 'OMP_NUM_THREADS': '1'}
    started = [subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--node_rank', str(node), '--nproc_per_node',
         '2', '--master_addr', '127.0.0.1', '--master_port', str(port), os.path.join(ROOT, script),
         *(str(arg).replace('{}', str(folder)) for arg in args)], env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT) for node, folder in enumerate(folders)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], '\n'.join(outputs)
    return outputs


@pytest.mark.slow
def test_four_ranks_on_two_hosts_without_a_common_disk(tmp_path):
    """Training, its resumption (one host alone has the checkpoint) and a subnet search."""
    hosts = [tmp_path / name for name in ('first', 'second')]
    data = ('--superspace', 'demo', '--supernet_choice', '222-111', '--dataset', 'digits', '--dataset_path', '{}',
            '--num_workers', 0, '--valid_size', 16, '--device', 'cpu')
    train = ('train_supernet.py', '--config-file', os.path.join(ROOT, 'supernet_training_configs', 'demo.yaml'), *data,
             '--output_path', '{}', '--epochs', 1, '--batch_size_per_gpu', 4, '--accumulate', 2, '--max_steps', 2,
             '--num_calib_batches', 4, '--num_valid_images', 16, '--quant_mode', '--from_scratch')
    first, second = on_two_hosts(hosts, *train)
    checkpoint = hosts[0] / 'demo-222-111-align0' / 'lsq.pth'
    assert checkpoint.is_file() and not hosts[1].joinpath('demo-222-111-align0').exists() and 'max: top-1' in first
    assert 'already trained' in on_two_hosts(hosts, *train, '--resume')[0]
    hosts[1].joinpath('demo-222-111-align0').mkdir(parents=True)
    shutil.copy(checkpoint, hosts[1] / 'demo-222-111-align0')
    first, second = on_two_hosts(
        hosts, 'search_subnet.py', *data, '--checkpoint_path', '{}', '--output_path', '{}/search',
        '--latency_constraint', 1, '--latency_delta', 0.5, '--population_size', 4, '--num_rounds', 1,
        '--num_mutations', 2, '--num_crossovers', 2, '--num_valid_images', 8, '--num_threads', 1,
        '--num_calib_batches', 1, '--num_eval_images', 8, '--batch_size', 8)
    assert any(hosts[0].joinpath('search').rglob('*.csv')) and not any(hosts[1].joinpath('search').rglob('*.csv'))
