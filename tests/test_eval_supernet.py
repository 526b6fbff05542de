"""eval_supernet.py --mode lat, as a user runs it."""
import csv
import os
import subprocess
import sys

import pytest

from modules.latency import LatencyPredictor
from modules.search_space.encoding import subnet_config
from modules.search_space.named import find_subnet, named_subnets

from .conftest import ROOT


def _run(folder, *args):
    return subprocess.run([sys.executable, os.path.join(ROOT, 'eval_supernet.py'), *args], cwd=folder,
                          capture_output=True, text=True)


def test_breakdown_of_given_subnets_adds_up(tmp_path):
    subnet = named_subnets()['SEQnet@vnni-A1'][1]
    done = _run(tmp_path, '--superspace', 'onnxw', '--supernet_choice', '151122-023231', '--mode', 'lat',
                '--subnet_choice', subnet, 'min')
    assert done.returncode == 0, done.stderr
    tables = [table.split('\n') for table in done.stdout.strip().split('\n\n')]
    assert len(tables) == 2 and subnet in tables[0][0]
    for table in tables:
        ms = [float(line.split()[-4]) for line in table[2:]]
        assert ms[-1] == pytest.approx(sum(ms[:-1]), abs=0.02)
    expected = LatencyPredictor('onnx_lut').predict_subnet(subnet_config(*find_subnet('SEQnet@vnni-A1')))
    assert float(tables[0][-1].split()[1]) == pytest.approx(expected, abs=1e-3)
    assert not os.listdir(tmp_path)


def test_distribution_draws_a_picture_and_is_seeded(tmp_path):
    args = ('--superspace', 'mobilew', '--supernet_choice', '123214-012321', '--mode', 'lat', '--num_samples', '50')
    assert _run(tmp_path, *args).returncode == 0
    folder = tmp_path / 'checkpoints' / 'eval_supernet' / 'mobilew-123214-012321'
    with open(folder / 'latency_tflite27_cpu_int8.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 50 and len({row['subnet'] for row in rows}) == 50
    assert all(0 < float(row['ms']) < 500 for row in rows)
    assert (folder / 'latency_tflite27_cpu_int8.png').read_bytes().startswith(b'\x89PNG')
    again = tmp_path / 'again'
    again.mkdir()
    assert _run(again, *args, '--output_path', str(tmp_path / 'other')).returncode == 0
    assert (tmp_path / 'other' / 'mobilew-123214-012321' / 'latency_tflite27_cpu_int8.csv').read_text() \
        == (folder / 'latency_tflite27_cpu_int8.csv').read_text()


@pytest.mark.parametrize('args, said', [
    (('--superspace', 'onnxw', '--supernet_choice', '1211224-133333'), '7 block types, expected 6'),
    (('--superspace', 'onnxw', '--supernet_choice', '121122-133333', '--subnet_choice', 'd1'), 'not a subnet encoding'),
    (('--supernet_choice', 'spaceevo@vnni', '--platform', 'nowhere.json'), 'nowhere.json'),
    (('--supernet_choice', 'spaceevo@vnni', '--num_samples', '0'), 'not a positive number'),
])
def test_mistakes_end_in_one_line_and_code_2(tmp_path, args, said):
    done = _run(tmp_path, *args)
    assert done.returncode == 2 and said in done.stderr.strip().split('\n')[-1]
    assert 'Traceback' not in done.stderr and not os.listdir(tmp_path)
