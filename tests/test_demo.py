"""The demo: all of it, shortened; killed at twenty random moments it ends with the same results."""
import contextlib
import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from modules.demo import runner
from modules.demo.data import DemoData, choose_data, keep_data
from modules.demo.runner import alone, run_steps
from modules.demo.steps import BASELINES, FLOPS, FOUND, STEPS, Demo, Step, supernets
from modules.demo.summary import Row, claims
from modules.errors import UserError
from modules.search_space.encoding import parse_supernet

from .conftest import ROOT

FLAGS = ('--quick', '--platform', 'onnx_lut', '--dataset', 'digits')
KILLS, LONGEST = 20, 30                 # seconds between a start and a kill, at most


def _family(pid):
    """The process and all its descendants."""
    try:
        with open(f'/proc/{pid}/task/{pid}/children', encoding='ascii') as f:
            children = f.read().split()
    except FileNotFoundError:
        children = []
    return [pid] + [member for child in children for member in _family(int(child))]


def _heed_interrupts():
    """A shell's background jobs ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start(folder, **options):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, os.path.join(ROOT, 'demo.py'), *FLAGS, '--output_path', str(folder)],
                            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, preexec_fn=_heed_interrupts, **options)


def _finish(folder):
    process = _start(folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def _results(folder):
    """What a demo found: every number but measured times, with the folder's name taken out."""
    files = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if name.endswith(('.csv', '.yaml')) and name not in ('latency.csv', 'history.csv'):
                with open(path, encoding='utf-8') as f:
                    files[os.path.relpath(path, folder)] = f.read()
            elif name == 'history.csv':                  # in the order of evaluation, which a resume may change
                with open(path, encoding='utf-8') as f:
                    files[os.path.relpath(path, folder)] = sorted(f)
    return files


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(folder, output) of an unbroken demo."""
    folder = tmp_path_factory.mktemp('demo') / 'whole'
    return folder, _finish(folder)


@pytest.mark.slow
def test_every_step_runs_and_is_summed_up(whole):
    folder, output = whole
    for number, step in enumerate(STEPS, 1):
        assert f'[{number}/{len(STEPS)}] {step.title}' in output
    assert 'minutes, ' in output
    text = (folder / 'summary.md').read_text()
    rows = {line.split(' | ')[0].removeprefix('| '): line.split(' | ') for line in text.splitlines() if ' ± ' in line}
    assert [*rows][0] == FOUND and set(rows) >= {'largest subnet', 'smallest subnet',
                                                 *(what for what, _ in BASELINES.values())}
    with open(next((folder / 'accuracy').iterdir()), newline='') as f:
        accuracy = [row['onnx'] for row in csv.DictReader(f) if row['kind'] == 'int8']
    assert f'{float(accuracy[0]):.2f} ±' in text and len(list((folder / 'accuracy').iterdir())) >= 3
    html = (folder / 'summary.html').read_text()
    assert html.count('src="data:image/png;base64,') == 2 and '<table>' in html and '.png"' not in html
    for picture in re.findall(r'\]\((\S+\.png)\)', text):
        assert (folder / picture).read_bytes()[:4] == b'\x89PNG'


@pytest.mark.slow
def test_a_second_demo_does_nothing_anew(whole):
    folder, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*.pth')}
    output = _finish(folder)
    assert output.count('done before') == len(STEPS) and '$ python' not in output
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*.pth')}


@pytest.mark.slow
def test_twenty_kills_change_nothing(whole, tmp_path):
    rng, folder, steps = random.Random(0), tmp_path / 'killed', set()
    for _ in range(KILLS):
        process = _start(folder)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.5, LONGEST))
        for pid in _family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        steps.add(len(list((folder / 'done').glob('*.json'))) if (folder / 'done').exists() else 0)
    _finish(folder)
    assert len(steps) > 2, 'the kills met more than the beginning'
    ours, theirs = _results(folder), _results(whole[0])
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for path, text in theirs.items():
        assert ours[path] == text, path


class Spaces:
    found_space, flops_space = 'demo-000-011', 'demo-111-011'


def test_claims_say_what_the_numbers_show():
    found, quicker = Row(FOUND, 0.3, 0.5, 70.0, 10000), Row('smallest subnet', 0.1, 0.1, 71.0, 10000)
    flops = Row(FLOPS, 0.31, 0.4, 66.0, 10000)
    lines = claims(Spaces, [found, flops, quicker])
    assert '+4.00 ± 0.66 points (more than two standard errors), at 0.97 times' in lines[0]
    assert '-1.00 ± 0.64 points (within two standard errors), at 3.00 times' in lines[1]
    assert lines[-1] == 'Quicker and more accurate than what was found: smallest subnet.'


def test_the_first_data_set_that_can_be_had_is_kept(tmp_path, monkeypatch):
    had = {'elpv'}

    def open_data(path, name, valid_size):
        if name not in had:
            raise UserError(f'{name}: no network')
        return SimpleNamespace(train=range(1800))
    monkeypatch.setattr('modules.demo.data.open_data', open_data)
    record = str(tmp_path / 'data.json')
    data = choose_data('pictures', None, record)
    assert (data.dataset, data.images) == ('elpv', 1800) and data.space == 'demo_96'
    assert 'no CIFAR-10, by torchvision: CIFAR10' in data.why
    keep_data(data, record)
    had.update(('CIFAR10', 'imagenet'))
    assert choose_data('pictures', None, record) == data
    assert choose_data('pictures').dataset == 'CIFAR10' and choose_data('mine', 'imagenet').path == 'mine'
    had.clear()
    with pytest.raises(UserError, match='cats: no network'):
        choose_data('pictures', 'cats')
    with pytest.raises(UserError, match='no pictures to be had'):
        choose_data('pictures')


@pytest.mark.parametrize('images, expected', [(45000, [1, 300]), (1800, [5, 56]), (10, [300, 1])])
def test_few_pictures_are_seen_in_several_epochs(images, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(Demo, 'spaces', [parse_supernet('demo-000-011')])
    (fp32, _), = supernets(Demo(str(tmp_path), DemoData('digits', 'dataset', '', images), platform='onnx_lut'))
    assert [fp32[fp32.index(flag) + 1] for flag in ('--epochs', '--max_steps')] == expected


def _one_step(folder, code, side_by_side=False):
    demo = Demo(str(folder), DemoData('digits', 'dataset', '', 1000), platform='onnx_lut')
    return demo, (Step('one', 'a step', 1, lambda demo: code, side_by_side),)


MEET = '''import pathlib, sys, time
folder, name, other, code = pathlib.Path(sys.argv[1]), *sys.argv[2:]
(folder / name).touch()
for _ in range(600):
    if (folder / other).exists():
        sys.exit(int(code))
    time.sleep(0.1)
(folder / f'{name} waited in vain').touch()
sys.exit(9)
'''


def _meet(tmp_path, name, other, code=0):
    (tmp_path / 'meet.py').write_text(MEET)
    return [str(tmp_path / 'meet.py'), str(tmp_path), name, other, code]


def test_chains_run_side_by_side_and_their_commands_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'usable_cores', lambda: 2)
    chains = [[_meet(tmp_path, 'a', 'b'), _meet(tmp_path, 'end', 'end')], [_meet(tmp_path, 'b', 'a')],
              [_meet(tmp_path, 'c', 'end')]]
    said = []
    with alone(str(tmp_path)) as lock:
        run_steps(*_one_step(tmp_path, chains, side_by_side=True), lock, said.append)
    names = [line.split()[-3] for line in said if 'meet.py' in line]
    assert names[:2] == ['a', 'b'] and sorted(names) == ['a', 'b', 'c', 'end']


def test_a_chain_that_fails_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'usable_cores', lambda: 2)
    chains = [[_meet(tmp_path, 'a', 'never')], [_meet(tmp_path, 'b', 'a', 3), _meet(tmp_path, 'c', 'c')]]
    with alone(str(tmp_path)) as lock, pytest.raises(UserError, match='meet.py ended with code 3'):
        run_steps(*_one_step(tmp_path, chains, side_by_side=True), lock, lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} & {'a', 'b', 'c', 'a waited in vain', 'done'} == {'a', 'b'}


def test_a_script_that_fails_ends_the_demo(tmp_path):
    demo, steps = _one_step(tmp_path, [['train_supernet.py', '--supernet_choice', 'demo-999-111']])
    with alone(str(tmp_path)) as lock, pytest.raises(UserError, match='train_supernet.py ended with code 2'):
        run_steps(demo, steps, lock, lambda line: None)
    assert not (tmp_path / 'done').exists()


def test_other_commands_than_before_are_refused(tmp_path):
    said = []
    with alone(str(tmp_path)) as lock:
        demo, steps = _one_step(tmp_path, [['search_block_kd.py', '--help']])
        assert run_steps(demo, steps, lock, said.append)[0] > 0
        with pytest.raises(UserError, match='made with other commands'):
            run_steps(*_one_step(tmp_path, [['search_block_kd.py', '--version']]), lock, said.append)


def test_two_demos_do_not_mix(tmp_path):
    with alone(str(tmp_path)), pytest.raises(UserError, match='another demo'), alone(str(tmp_path)):
        pass


def test_ctrl_c_is_harmless(tmp_path):
    process = _start(tmp_path / 'demo')
    for line in process.stdout:
        if '$ python' in line:
            break
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and 'the same command goes on' in output and 'Traceback' not in output, output
