"""eval_supernet.py as a user runs it: latencies, and accuracies on one rank and two."""
import csv
import os
import random

import pytest
import torch

import eval_supernet
from modules.latency import LatencyPredictor
from modules.search_space.encoding import subnet_config
from modules.search_space.named import find_subnet, named_subnets
from modules.search_space.sampling import max_subnet, sample_subnet
from modules.subnets.evaluate import EvaluationSettings, evaluate_static, evaluation_images
from modules.training.checkpoint import load_checkpoint
from modules.training.data import open_data
from modules.training.distributed import Job
from modules.training.evaluate import evaluate_subnet

from .checkpoints import call, fails, random_supernet, write_supernet
from .launching import run_script

pytestmark = pytest.mark.usefixtures('one_thread')


def test_breakdown_of_given_subnets_adds_up(tmp_path, monkeypatch, capsys):
    subnet = named_subnets()['SEQnet@vnni-A1'][1]
    monkeypatch.chdir(tmp_path)
    assert call(eval_supernet, monkeypatch, '--superspace', 'onnxw', '--supernet_choice', '151122-023231', '--mode',
                'lat', '--subnet_choice', subnet, 'min') == 0
    tables = [table.split('\n') for table in capsys.readouterr().out.strip().split('\n\n')]
    assert len(tables) == 2 and subnet in tables[0][0]
    for table in tables:
        ms = [float(line.split()[-4]) for line in table[2:]]
        assert ms[-1] == pytest.approx(sum(ms[:-1]), abs=0.02)
    expected = LatencyPredictor('onnx_lut').predict_subnet(subnet_config(*find_subnet('SEQnet@vnni-A1')))
    assert float(tables[0][-1].split()[1]) == pytest.approx(expected, abs=1e-3)
    assert not os.listdir(tmp_path)


def test_distribution_draws_a_picture_and_is_seeded(tmp_path, monkeypatch):
    args = ('--superspace', 'mobilew', '--supernet_choice', '123214-012321', '--mode', 'lat', '--num_samples', '50')
    monkeypatch.chdir(tmp_path)
    assert call(eval_supernet, monkeypatch, *args) == 0
    folder = tmp_path / 'checkpoints' / 'eval_supernet' / 'mobilew-123214-012321'
    with open(folder / 'latency_tflite27_cpu_int8.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 50 and len({row['subnet'] for row in rows}) == 50
    assert all(0 < float(row['ms']) < 500 for row in rows)
    assert (folder / 'latency_tflite27_cpu_int8.png').read_bytes().startswith(b'\x89PNG')
    assert call(eval_supernet, monkeypatch, *args, '--output_path', tmp_path / 'other') == 0
    assert (tmp_path / 'other' / 'mobilew-123214-012321' / 'latency_tflite27_cpu_int8.csv').read_text() \
        == (folder / 'latency_tflite27_cpu_int8.csv').read_text()


@pytest.mark.parametrize('args, said', [
    (('--superspace', 'onnxw', '--supernet_choice', '1211224-133333'), '7 block types, expected 6'),
    (('--superspace', 'onnxw', '--supernet_choice', '121122-133333', '--subnet_choice', 'd1'), 'not a subnet encoding'),
    (('--supernet_choice', 'spaceevo@vnni', '--platform', 'nowhere.json'), 'nowhere.json'),
    (('--supernet_choice', 'spaceevo@vnni', '--num_samples', '0'), 'not a positive number'),
])
def test_mistakes_end_in_one_line_and_code_2(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    fails(eval_supernet, monkeypatch, capsys, said, *args)
    assert not os.listdir(tmp_path)


SUPERNET, SHORT = 'demo-012-111', ['--num_eval_images', '100', '--num_calib_batches', '3', '--batch_size', '32',
                                   '--num_workers', '0', '--device', 'cpu', '--dataset', 'digits']
SUBNET = str(sample_subnet(SUPERNET, random.Random(1)))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """<root>/demo-012-111-align0/{checkpoint,lsq}.pth of random weights with ten classes, in the published format."""
    folder = tmp_path_factory.mktemp('supernets')
    for name, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(folder / f'{SUPERNET}-align0' / name, SUPERNET, 10, quant)
    return folder


def _accuracies(folder, kind):
    with open(folder / SUPERNET / f'accuracy_{kind}.csv', newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize('kind', ['fp32', 'int8'])
def test_accuracy_is_the_same_on_one_rank_and_two(tmp_path, root, monkeypatch, kind):
    choices = ['012-111'] * (1 + (kind == 'fp32'))           # several supernets in one job
    args = ['--superspace', 'demo', '--supernet_choice', *choices, '--mode', 'acc', '--resume', root,
            '--subnet_choice', 'max', SUBNET, *SHORT, *(['--quant_mode'] if kind == 'int8' else [])]
    output = run_script('eval_supernet.py', *args, '--output_path', tmp_path / 'two', ranks=2)
    assert output.count('(100 images)') == 2 * len(choices)
    assert call(eval_supernet, monkeypatch, *args, '--output_path', tmp_path / 'one') == 0
    one, two = (_accuracies(tmp_path / folder, kind) for folder in ('one', 'two'))
    assert [row['subnet'] for row in one] == [row['subnet'] for row in two] == [str(max_subnet(SUPERNET)), SUBNET]
    for ours, theirs in zip(one, two):
        assert {key: ours[key] for key in ('MFLOPs', 'Mparams', 'ms')} == {
            key: theirs[key] for key in ('MFLOPs', 'Mparams', 'ms')}
        assert float(ours['loss']) == pytest.approx(float(theirs['loss']), rel=0.01)
        assert float(ours['top1']) == pytest.approx(float(theirs['top1']), abs=4)        # percent, of 100 images
    # by hand, through the extracted static network
    supernet = random_supernet(SUPERNET, 10, kind == 'int8')
    data = open_data('.', 'digits', image_size=48)
    images = list(evaluation_images(data, Job(), EvaluationSettings(
        batch_size=32, num_calib_batches=3, num_eval_images=100)))
    static = evaluate_static(supernet, SUBNET, *images, Job())
    assert float(one[1]['top1']) == pytest.approx(static.top1, abs=1.01)
    assert float(one[1]['loss']) == pytest.approx(static.loss, rel=1e-3)


def test_test_images_are_decoded_once_for_several_subnets_if_they_fit(root, capsys):
    data = open_data('.', 'digits', image_size=48)
    decoded = []
    transform = data.test.transform
    data.test.transform = lambda image: decoded.append(1) or transform(image)
    supernet, results = random_supernet(SUPERNET, 10), []
    for cache_gb, times in ((1.0, 1), (1e-6, 2)):
        decoded.clear()
        images = evaluation_images(data, Job(), EvaluationSettings(
            batch_size=32, num_calib_batches=2, num_eval_images=64, cache_gb=cache_gb), passes=2)
        results += [evaluate_subnet(supernet, SUBNET, *images, Job()) for _ in range(2)]
        assert len(decoded) in (64 * times, 64 * times + 1)              # one to see how large they are
    assert len(set(results)) == 1
    assert 'decoded per subnet' in capsys.readouterr().err


def test_scales_that_were_never_trained_are_initialised_and_said(tmp_path, root, monkeypatch, capsys):
    state = load_checkpoint(root / f'{SUPERNET}-align0' / 'lsq.pth')['state_dict']
    for name, value in (('sw', 1), ('sa', 1), ('beta', 0)):
        state[f'module.stages.logits.blocks.0.linear.{name}'].fill_(value)
    torch.save({'state_dict': state}, tmp_path / 'lsq.pth')
    assert call(eval_supernet, monkeypatch, '--supernet_choice', SUPERNET, '--mode', 'acc', '--resume', tmp_path,
                '--quant_mode', '--subnet_choice', 'min', *SHORT, '--output_path', tmp_path / 'out') == 0
    assert 'the LSQ+ scales of 1 ops were never trained' in capsys.readouterr().err


def test_accuracy_mistakes_end_in_one_line_and_code_2(tmp_path, root, monkeypatch, capsys):
    base = ['--supernet_choice', SUPERNET, '--mode', 'acc', '--output_path', tmp_path / 'out', *SHORT]

    def said(text, *args):
        fails(eval_supernet, monkeypatch, capsys, text, *base, *args)

    said(f'no checkpoint of {SUPERNET}: expected {tmp_path}/{SUPERNET}-align0/lsq.pth', '--resume', tmp_path,
         '--quant_mode')
    said('-align1/checkpoint.pth', '--resume', root, '--align_sample')
    said('not the weights of supernet demo-111-111', '--supernet_choice', 'demo-111-111', '--resume',
         root / f'{SUPERNET}-align0' / 'checkpoint.pth')
    said('kernel 7 is not one of 5', '--resume', root, '--subnet_choice', 'max',
         str(max_subnet(SUPERNET)).replace('#5#5', '#5#7', 1))
    write_supernet(tmp_path / 'seven.pth', SUPERNET, 7)
    said(f'the data set has 10 classes, {tmp_path}/seven.pth tells 7 apart', '--resume', tmp_path / 'seven.pth')
    assert not (tmp_path / 'out').exists()
