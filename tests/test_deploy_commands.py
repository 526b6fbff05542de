"""The commands of onnx_tools and of tflite_tools, which share their code: export, reuse, evaluation, refusals."""
import importlib
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from modules.deploy.export import Entry, RunImages, read_entries
from modules.deploy.runtimes import ONNX, TFLITE
from modules.modeling.ops.lsq_plus import quantised_ops
from modules.search_space.sampling import max_subnet, min_subnet
from modules.training.data import ImageSet, open_data

from .blocks import DEMO, subnet_list, write_trained
from .checkpoints import call, fails, random_supernet, write_supernet
from .conftest import ROOT

RUNTIMES = {runtime.ending: runtime for runtime in (ONNX, TFLITE)}
ENTRY = Entry(DEMO, min_subnet(DEMO))


@pytest.fixture(params=list(RUNTIMES))
def tools(request):
    """A runtime and its scripts: runtime, export, benchmark, evaluate."""
    runtime = RUNTIMES[request.param]
    if any(importlib.util.find_spec(package) is None for package in runtime.packages):
        pytest.skip(f'needs {" and ".join(runtime.packages)}')
    names = {'export': f'export_{runtime.ending}', 'benchmark': 'benchmark', 'evaluate': f'eval_{runtime.ending}'}
    return SimpleNamespace(runtime=runtime, **{key: importlib.import_module(f'{runtime.ending}_tools.{name}')
                                               for key, name in names.items()})


def test_other_mistakes_are_one_line(tools, tmp_path, monkeypatch, capsys):
    path = subnet_list(tmp_path / 'in.csv', min_subnet(DEMO))
    fails(tools.export, monkeypatch, capsys, 'resolution 47', '--input', subnet_list(
        tmp_path / 'r.csv', str(max_subnet(DEMO)).replace('r48', 'r47')))
    fails(tools.export, monkeypatch, capsys, 'no checkpoint of demo-012-000', '--input', path, '--dataset', 'digits',
          '--checkpoint_path', tmp_path)
    fails(tools.evaluate, monkeypatch, capsys, 'random weights have no accuracy', '--input', path, '--skip_weights')


def test_missing_packages_are_one_line(tools, tmp_path, monkeypatch, capsys):
    options = ['--input', subnet_list(tmp_path / 'in.csv', min_subnet(DEMO)), '--model_path', tmp_path / 'models']
    said = '{} is not installed: pip install -r requirements-'
    for package in tools.runtime.packages:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            exports = [tools.export] if package in tools.runtime.export_packages else []
            for script in (tools.benchmark, tools.evaluate, *exports):
                fails(script, monkeypatch, capsys, said.format(package), *options)
    assert not (tmp_path / 'models').exists()


def test_shipped_list(tools):
    entries = read_entries(tools.runtime.input)
    assert {entry.supernet.superspace.name for entry in entries} == {'onnxw', 'mobilew'}
    assert entries[0].name.startswith('onnxw_151122_023231_') and len(entries[0].name.split('_')[-1]) == 6


def test_models_are_used_again(tools, tmp_path, monkeypatch, capsys):
    runtime, path, models = tools.runtime, subnet_list(tmp_path / 'in.csv', min_subnet(DEMO)), tmp_path / 'models'
    options = ['--input', path, '--model_path', models]
    plain, int8 = (f'{ENTRY.name}{kind}.{runtime.ending}' for kind in ('', '_quant_int8'))

    def as_it_was(*more):
        assert call(tools.export, monkeypatch, '--skip_weights', *options, *more) == 0
        return capsys.readouterr().out.count('as it was')
    assert as_it_was() == 0
    files = {entry: os.stat(models / entry).st_mtime_ns for entry in os.listdir(models)}
    assert sorted(files) == [plain, int8]
    assert as_it_was() == 2
    assert files == {entry: os.stat(models / entry).st_mtime_ns for entry in os.listdir(models)}
    (models / plain).write_bytes(b'half a model')
    assert as_it_was() == 1
    assert as_it_was('--seed', 1) == 0              # other weights
    facts = runtime.metadata(runtime.read(models / plain))
    assert facts['subnet'] == str(min_subnet(DEMO)) and facts['supernet'] == str(DEMO)
    os.remove(models / int8)
    for _ in range(2):
        assert call(tools.benchmark, monkeypatch, *options, '--warmup', 1, '--runs', 5) == 0
    output = capsys.readouterr().out                # reading it empties it
    assert all(word in output for word in ('mean', 'median', 'p5', 'p95', 'with random weights'))
    lines = (models / 'latency.csv').read_text().split('\n')
    assert len(lines) == 3 and lines[2] == ''
    name, fp32, int8_ms, speed_up, device, software = lines[0].split(',')
    assert name == f'demo-{DEMO.choice}-{min_subnet(DEMO)}' and device and software.startswith(runtime.name)
    assert float(speed_up) == pytest.approx(float(fp32) / float(int8_ms), rel=0.01)
    path.write_text(path.read_text().replace(DEMO.choice, DEMO.choice.replace('_', '-')))
    assert as_it_was('--seed', 1) == 1                                  # the same models by the other spelling
    assert sorted(os.listdir(models)) == sorted([*files, 'latency.csv'])
    os.remove(models / plain)
    as_it_was('--seed', 1)
    assert sorted(os.listdir(models)) == sorted([plain.replace('012_000', '012-000'), int8, 'latency.csv'])


@pytest.mark.parametrize('tools', ['onnx', pytest.param('tflite', marks=pytest.mark.slow)], indirect=True)
def test_two_exports_at_once_do_not_mix(tools, tmp_path):
    """Of other weights into one folder: both end well, and each model is whole and one of the two."""
    models, runtime = tmp_path / 'models', tools.runtime
    command = [sys.executable, os.path.join(ROOT, f'{runtime.ending}_tools', f'export_{runtime.ending}.py'),
               '--skip_weights', '--input', subnet_list(tmp_path / 'in.csv', min_subnet(DEMO)), '--model_path', models]
    runs = [subprocess.Popen([*command, '--seed', str(seed)], stdout=subprocess.DEVNULL) for seed in (0, 1)]
    assert [run.wait() for run in runs] == [0, 0]
    paths = sorted(models.iterdir())
    assert len(paths) == 2
    for path in paths:
        facts = runtime.metadata(runtime.read(path))
        assert facts['weights'] in ('random weights, seed 0', 'random weights, seed 1')


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        TFLITE.write(tmp_path / 'models' / 'a.tflite', 'no bytes')
    assert not list((tmp_path / 'models').iterdir())


def test_a_checkpoint_of_a_supernet(tools, tmp_path, monkeypatch, capsys):
    for file, quant in (('checkpoint.pth', False), ('lsq.pth', True)):
        write_supernet(tmp_path / 'demo-012-000-align0' / file, str(DEMO), 10, quant)
    options = ['--input', subnet_list(tmp_path / 'in.csv', min_subnet(DEMO)), '--model_path', tmp_path / 'models',
               '--checkpoint_path', tmp_path, '--dataset', 'digits', '--num_calib_batches', 2, '--num_workers', 0,
               '--quant_mode']
    assert call(tools.export, monkeypatch, *options) == 0
    assert 'lsq.pth)' in capsys.readouterr().out
    assert call(tools.export, monkeypatch, *options) == 0
    assert capsys.readouterr().out.count('as it was') == 2
    (tmp_path / 'demo-012-000-align0').rename(tmp_path / 'demo-012-000-align1')
    fails(tools.export, monkeypatch, capsys, '-align0/checkpoint.pth', *options)
    assert call(tools.export, monkeypatch, *options, '--align_sample') == 0
    assert capsys.readouterr().out.count('as it was') == 2


def test_pictures_are_decoded_once_for_all_models_of_a_run(tmp_path, monkeypatch):
    """Also for LSQ+ scales that were never trained; the same models and figures as of runs of one subnet."""
    pytest.importorskip('onnxruntime')
    evaluate = importlib.import_module('onnx_tools.eval_onnx')
    write_supernet(tmp_path / 'checkpoint.pth', str(DEMO), 10)
    partly_trained = random_supernet(str(DEMO), 10, quant=True)
    quantised_ops(partly_trained)[-1].scales_initialized = False
    torch.save({'state_dict': partly_trained.state_dict()}, tmp_path / 'lsq.pth')
    decoded, rows, read = [], [], ImageSet.__getitem__
    monkeypatch.setattr(ImageSet, '__getitem__', lambda images, key: decoded.append(key) or read(images, key))
    smallest, largest = min_subnet(DEMO), max_subnet(DEMO)
    for number, subnets in enumerate(([smallest, largest], [smallest], [largest])):
        decoded.clear()
        assert call(evaluate, monkeypatch, '--input', subnet_list(tmp_path / 'in.csv', *subnets), '--quant_mode',
                    '--checkpoint_path', tmp_path, '--dataset', 'digits', '--num_calib_batches', 2, '--batch_size', 8,
                    '--num_eval_images', 20, '--num_workers', 0, '--model_path', tmp_path / str(number), '--output',
                    tmp_path / 'eval.csv') == 0
        assert len(decoded) == 2 * 8 + 20
        rows.append((tmp_path / 'eval.csv').read_text().splitlines()[1:])
    assert rows[0] == rows[1] + rows[2]
    for model in (tmp_path / '0').iterdir():
        assert model.read_bytes() == next(tmp_path.glob(f'[12]/{model.name}')).read_bytes()


def test_some_classes_of_imagenet_are_numbered_as_a_network_of_all_numbers_them(tmp_path):
    for name in ('n01440764', 'n02102040'):                 # 0 and 217
        for number in range(6):
            path = tmp_path / name / f'{number}.png'
            path.parent.mkdir(exist_ok=True)
            Image.new('RGB', (40, 40), (number, 0, 0)).save(path)
    settings = SimpleNamespace(batch_size=4, num_calib_batches=1, seed=0, num_workers=0)
    images = RunImages(open_data(tmp_path, image_size=32, valid_size=1), settings, passes=2)
    assert {int(label) for _, labels in images.test for label in labels} <= {0, 1}
    images.fit_classes(1000, 'a network')
    assert {int(label) for _, labels in images.test for label in labels} <= {0, 217}
    assert len(images.metadata(ENTRY)['classes']) == 1000


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """File of a demo subnet trained on digits, then LSQ+."""
    path = tmp_path_factory.mktemp('trained') / 'net.pth'
    write_trained(path)
    return path


def test_a_trained_network_keeps_its_accuracy(tools, trained, tmp_path, monkeypatch, capsys):
    assert call(tools.evaluate, monkeypatch, '--network', trained, '--quant_mode', '--dataset', 'digits',
                '--num_workers', 0, '--model_path', tmp_path, '--num_calib_batches', 4, '--output',
                tmp_path / 'eval.csv') == 0
    assert capsys.readouterr().out.count('agreement') == 2
    fp32, int8 = (line.split(',') for line in (tmp_path / 'eval.csv').read_text().strip().split('\n')[1:])
    ours, theirs, agree = map(float, int8[3:6])
    assert float(fp32[5]) == 100 and ours > 90 and abs(ours - theirs) <= 1 and agree >= 98
