"""pipeline.py: all of it, shortened; killed at twenty random moments it ends with the same results."""
import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from modules.errors import UserError
from modules.pipeline import runner
from modules.pipeline.data import PipelineData, choose_data, keep_data
from modules.pipeline.runner import alone, check_flags, chosen_steps, print_steps, run_steps
from modules.pipeline.settings import Settings, load_settings
from modules.pipeline.steps import FLOPS, FOUND, LARGEST, SMALLEST, STEPS, Pipeline, Step, block_kd, supernets
from modules.pipeline.summary import Row, claims
from modules.search_space.encoding import parse_supernet
from modules.search_space.sampling import min_subnet

from .conftest import ROOT

FLAGS = ('--config-file', os.path.join(ROOT, 'pipelines', 'demo_quick.yaml'), '--platform', 'onnx_lut', '--dataset',
         'digits')
DIGITS = PipelineData('digits', 'dataset', '', 1000, 250)
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
    return subprocess.Popen([sys.executable, os.path.join(ROOT, 'pipeline.py'), *FLAGS, '--output_path', str(folder)],
                            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, preexec_fn=_heed_interrupts, **options)


def _finish(folder):
    process = _start(folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def _results(folder):
    """What a pipeline found: every number but measured times, with the folder's name taken out."""
    files = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if name.endswith(('.csv', '.yaml')) and name not in ('latency.csv', 'history.csv'):
                with open(path, encoding='utf-8') as f:
                    files[os.path.relpath(path, folder)] = [line.rsplit(',', 2)[0] if name == 'result.csv' else line
                                                            for line in f]       # which ends in two latencies
            elif name == 'history.csv':                  # in the order of evaluation, which a resume may change
                with open(path, encoding='utf-8') as f:
                    files[os.path.relpath(path, folder)] = sorted(line for line in f if not line.startswith('# '))
    return files


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """(folder, output) of an unbroken pipeline."""
    folder = tmp_path_factory.mktemp('demo') / 'whole'
    return folder, _finish(folder)


@pytest.mark.slow
def test_every_step_runs_and_is_summed_up(whole):
    folder, output = whole
    for number, step in enumerate(STEPS, 1):
        assert f'[{number}/{len(STEPS)}] {step.title}' in output
    text = (folder / 'summary.md').read_text()
    rows = {line.split(' | ')[0].removeprefix('| '): line.split(' | ') for line in text.splitlines()
            if line.startswith('| ') and ' ± ' in line}
    assert [*rows][0] == FOUND and set(rows) >= {LARGEST, SMALLEST} and len(rows) in (5, 6)
    assert 'shows that everything runs, no more' in text and 'efficientnet-lite0, ready-made, pretrained' in rows
    with open(next((folder / 'accuracy').iterdir()), newline='') as f:
        accuracy = [row['onnx'] for row in csv.DictReader(f) if row['kind'] == 'int8']
    assert f'{float(accuracy[0]):.2f} ±' in text and len(list((folder / 'accuracy').iterdir())) >= 3
    html = (folder / 'summary.html').read_text()
    assert html.count('src="data:image/png;base64,') == 2 and '<table>' in html and '.png"' not in html
    for picture in re.findall(r'\]\((\S+\.png)\)', text):
        assert (folder / picture).read_bytes()[:4] == b'\x89PNG'


@pytest.mark.slow
def test_a_second_run_does_nothing_again(whole):
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
    found_space, flops_space, settings = 'demo-000-011', 'demo-111-011', Settings()


def test_claims_say_what_the_numbers_show():
    found, quicker = Row(FOUND, 0.3, 0.5, 70.0, 10000), Row('smallest subnet', 0.1, 0.1, 71.0, 10000)
    flops = Row(FLOPS, 0.31, 0.4, 66.0, 10000)
    lines = claims(Spaces, [found, flops, quicker])
    assert '+4.00 ± 0.66 points (more than two standard errors), at 0.97 times' in lines[0]
    assert '-1.00 ± 0.64 points (within two standard errors), at 3.00 times' in lines[1]
    assert lines[-1] == 'Quicker and more accurate than what was found: smallest subnet (within two standard errors).'
    assert claims(Spaces, [found, flops])[-1] == 'Quicker and more accurate than what was found: none.'
    assert claims(Spaces, [found, quicker._replace(top1=72.0)])[-1].endswith(': smallest subnet.')
    assert claims(Spaces, [found, quicker])[-1].startswith('10,000 test images are too few')


def test_the_first_data_set_that_can_be_had_is_kept(tmp_path, monkeypatch):
    had, names = {'elpv'}, ['CIFAR10', 'elpv', 'imagenet']

    def open_data(path, name, valid_size):
        if name not in had:
            raise UserError(f'{name}: no network')
        return SimpleNamespace(train=range(1800), valid=range(min(valid_size, 450)))
    monkeypatch.setattr('modules.pipeline.data.open_data', open_data)
    record = str(tmp_path / 'data.json')
    data = choose_data('pictures', names, 500, record)
    assert data[:2] == ('elpv', 'pictures') and data[3:] == (1800, 450)
    assert 'no CIFAR-10, by torchvision: CIFAR10' in data.why and data.flags[-1] == 450
    keep_data(data, record)
    had.update(('CIFAR10', 'imagenet'))
    assert choose_data('pictures', names, 500, record) == data
    assert choose_data('pictures', names, 500).dataset == 'CIFAR10'
    assert choose_data('mine', ['imagenet'], 500, record).path == 'mine'
    had.clear()
    with pytest.raises(UserError, match='cats: no network'):
        choose_data('pictures', ['cats'], 500)
    with pytest.raises(UserError, match='no pictures to be had'):
        choose_data('pictures', names, 500)
    (tmp_path / 'data.json').write_text(json.dumps(data[:3]))
    with pytest.raises(UserError, match='data.json: of another version'):
        choose_data('pictures', names, 500, record)


def _pipeline(folder, images=1000, **settings):
    settings = {'platform': 'onnx_lut', 'steps': {'one': {}}} | settings
    return Pipeline(str(folder), DIGITS._replace(images=images), Settings(**settings))


@pytest.mark.parametrize('images, expected', [(45000, [1, 300]), (1800, [5, 56]), (10, [300, 1])])
def test_few_pictures_are_seen_in_several_epochs(images, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, 'spaces', [parse_supernet('demo-000-011')])
    (fp32, _), = supernets(_pipeline(tmp_path, images, steps={'supernets': {'train_steps': 300}}))
    assert [fp32[fp32.index(flag) + 1] for flag in ('--epochs', '--max_steps')] == expected


def test_block_kd_has_steps_part_by_part_and_begins_with_the_longest(tmp_path):
    parts = {'stage1': 2, 'stage2': 3, 'stage3': 5, 'stem': 1}
    steps = {'block_kd': {'train_steps': parts}, 'block_kd_lsq': {'train_steps': 4}}
    for nproc in 0, 2:
        chains = block_kd(_pipeline(tmp_path, steps=steps, nproc_per_node=nproc))
        said = [[(chain[-1][-1], command[command.index('--max_steps') + 1]) for command in chain] for chain in chains]
        assert said == [[(part, parts[part]), (part, 4)] for part in ('stage3', 'stage2', 'stage1', 'stem')]
    del parts['stem']
    with pytest.raises(UserError, match='steps: block_kd: train_steps: none for stem'):
        block_kd(_pipeline(tmp_path, steps=steps))
    with pytest.raises(UserError, match='steps: block_kd_lsq: train_steps: expected one number'):
        _pipeline(tmp_path, steps={'block_kd_lsq': {'train_steps': parts}}).length('block_kd_lsq')


def _shipped(name, **overrides):
    return load_settings(os.path.join(ROOT, 'pipelines', f'{name}.yaml'), overrides)


@pytest.mark.parametrize('name', sorted(path[:-5] for path in os.listdir(os.path.join(ROOT, 'pipelines'))))
def test_dry_runs_print_commands_that_their_scripts_take(name, tmp_path, monkeypatch):
    pipeline = Pipeline(str(tmp_path), DIGITS, _shipped(name), dry=True)
    lines = []
    print_steps(pipeline, chosen_steps(pipeline, STEPS), lines.append)
    commands = [line for line in lines if not line.startswith('#')]
    assert len(commands) >= 12 and len(lines) - len(commands) == len(chosen_steps(pipeline, STEPS))
    assert any('--supernet_choice FOUND_SPACE' in line for line in commands)
    check_flags(pipeline, chosen_steps(pipeline, STEPS))


def test_without_vnni_networks_are_fine_tuned_with_the_bits_they_are_exported_with(tmp_path):
    for narrow in (False, True):
        pipeline, lines = Pipeline(str(tmp_path), DIGITS, _shipped('demo'), narrow, dry=True), []
        print_steps(pipeline, chosen_steps(pipeline, STEPS), lines.append)
        tuned, exported = ([line for line in lines if script in line] for script in ('downstream_cls', 'eval_onnx'))
        assert tuned and all(('--weight_bits 7' in line) == narrow for line in tuned)
        assert exported and all(('--reduce_range' in line) == narrow for line in exported)


def test_a_flag_that_a_script_does_not_take_is_found_before_anything_runs(tmp_path):
    for flags, problem in (({'train_stps': 3}, 'unrecognized arguments: --train_stps 3'),
                           ({'label_smoothing': 'much'}, "--label_smoothing: invalid float value: 'much'")):
        pipeline = Pipeline(str(tmp_path), DIGITS, replace(_shipped('demo'), steps={'finish': flags}), dry=True)
        with pytest.raises(UserError, match=f'^steps: finish: downstream_cls.py: .*{problem}'):
            check_flags(pipeline, chosen_steps(pipeline, STEPS))


def test_a_window_without_subnets_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r'--latency 99: random networks of demo take 0\.\d+ to [\d.]+ ms on onnx_lut'):
        _ = _pipeline(tmp_path, latency=99.0).window
    c, d = _pipeline(tmp_path, latency=1.5, latency_width=0.2).window
    assert (c, d) == (1.5, 0.3)


def test_a_space_that_is_too_slow_for_the_window_is_not_taken(tmp_path):
    slow = parse_supernet('demo-111-111')
    quickest = _pipeline(tmp_path).predict(slow, min_subnet(slow))
    pipeline = _pipeline(tmp_path, latency=quickest)
    folder = Path(pipeline.search_folder(pipeline.window[0]))
    folder.mkdir(parents=True)
    (folder / 'top50.csv').write_text('rank,supernet\n1,demo-111-111\n2,demo-000-000\n3,demo-000-111\n')
    assert pipeline.found_space == parse_supernet('demo-000-000')
    (folder / 'top50.csv').write_text('rank,supernet\n1,demo-111-111\n')
    with pytest.raises(UserError, match='no space with subnets of'):
        _ = pipeline.found_space


@pytest.mark.parametrize('text, problem', [
    ('steps: {lunch: {}}', 'steps: unknown lunch'), ('steps: [1]', 'steps: expected names'), ('speed: 9', 'unknown'),
    ('latency: fast', 'is not of type float'),
    ('baselines: [resnet18]\nsteps: {accuracy: {}}', 'baselines: trained beside the supernets'),
    ('steps: {teacher: 3}', 'teacher: expected flags'),
    ('for_data: {elpv: 3}', 'mine.yaml: for_data: elpv: expected keys'),
    ('for_data: {elpv: {steps: {}}}', 'elpv: expected keys and values, without'),
    ('for_data: {elpv: {valid_size: 9}}', 'elpv: expected keys and values, without .*valid_size'),
    ('for_data: {elpv: {speed: 9}}', 'for_data: elpv: unknown key')])
def test_a_wrong_key_is_one_line(text, problem, tmp_path):
    (tmp_path / 'mine.yaml').write_text(text)
    with pytest.raises(UserError, match=problem):
        load_settings(str(tmp_path / 'mine.yaml'), {})


def test_a_data_set_has_settings_of_its_own_and_the_command_line_wins(tmp_path):
    elpv = DIGITS._replace(dataset='elpv')
    for line, data, wanted in (({}, DIGITS, ('demo', 32)), ({}, elpv, ('demo_96', 16)),
                               ({'batch_size': 8}, elpv, ('demo_96', 8)), ({'batch_size': 8}, DIGITS, ('demo', 8))):
        pipeline = Pipeline(str(tmp_path), data, _shipped('demo', **line), dry=True)
        assert (pipeline.space, pipeline.settings.batch_size) == wanted


def test_processes_of_gpus_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, 'spaces', [parse_supernet('demo-000-011'), parse_supernet('demo-111-011')])
    step = next(step for step in STEPS if step.name == 'supernets')
    pipeline = _pipeline(tmp_path, nproc_per_node=4, steps={'supernets': {'amp': True}})
    (chain,) = runner._chains(pipeline, step)
    launched = ['-m', 'torch.distributed.run', '--nproc_per_node', '4', 'train_supernet.py']
    assert len(chain) == 4 and all(command[:5] == launched for command in chain)
    assert [c.count('--amp') for c in chain] == [1, 0, 1, 0]


def _one_step(folder, code, side_by_side=False):
    return _pipeline(folder), (Step('one', 'a step', lambda pipeline: code, side_by_side),)


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


def test_chains_take_turns(tmp_path, monkeypatch):
    """A core that is free begins the next chain before it continues one: what is left at the end is short."""
    monkeypatch.setattr(runner, 'usable_cores', lambda: 1)
    chains = [[_meet(tmp_path, 'a', 'a'), _meet(tmp_path, 'b', 'a')], [_meet(tmp_path, 'c', 'a')]]
    said = []
    with alone(str(tmp_path)) as lock:
        run_steps(*_one_step(tmp_path, chains, side_by_side=True), lock, said.append)
    assert [line.split()[-3] for line in said if 'meet.py' in line] == ['a', 'c', 'b']


def test_a_chain_that_fails_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'usable_cores', lambda: 2)
    chains = [[_meet(tmp_path, 'a', 'never')], [_meet(tmp_path, 'b', 'a', 3), _meet(tmp_path, 'c', 'c')]]
    with alone(str(tmp_path)) as lock, pytest.raises(UserError, match='meet.py ended with code 3'):
        run_steps(*_one_step(tmp_path, chains, side_by_side=True), lock, lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} & {'a', 'b', 'c', 'a waited in vain', 'done'} == {'a', 'b'}


def test_a_script_that_fails_ends_it_all(tmp_path):
    pipeline, steps = _one_step(tmp_path, [['train_supernet.py', '--supernet_choice', 'demo-999-111']])
    with alone(str(tmp_path)) as lock, pytest.raises(UserError, match='train_supernet.py ended with code 2'):
        run_steps(pipeline, steps, lock, lambda line: None)
    assert not (tmp_path / 'done').exists()


def test_other_commands_than_before_are_refused(tmp_path):
    said = []
    with alone(str(tmp_path)) as lock:
        pipeline, steps = _one_step(tmp_path, [['search_block_kd.py', '--help']])
        assert run_steps(pipeline, steps, lock, said.append)[0] > 0
        with pytest.raises(UserError, match='made with other commands'):
            run_steps(*_one_step(tmp_path, [['search_block_kd.py', '--version']]), lock, said.append)


def test_two_pipelines_do_not_mix(tmp_path):
    with alone(str(tmp_path)), pytest.raises(UserError, match='another pipeline'), alone(str(tmp_path)):
        pass


def test_ctrl_c_is_harmless(tmp_path):
    process = _start(tmp_path / 'demo')
    for line in process.stdout:
        if '$ python' in line:
            break
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130 and 'the same command continues' in output and 'Traceback' not in output, output


def test_plugins_reach_every_script(tmp_path):
    pipeline = Pipeline(str(tmp_path), DIGITS, _shipped('demo'), dry=True, plugins=['/my space.py'])
    lines = []
    print_steps(pipeline, chosen_steps(pipeline, STEPS), lines.append)
    assert all("--plugin '/my space.py'" in line for line in lines if line.startswith('python '))
