"""The score of a space against its definition, the evolution, and search_block_kd.py as users run it."""
import csv
import dataclasses
import os
import random
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import search_block_kd
from modules import evolution
from modules.block_kd import searcher as searcher_module
from modules.block_kd.lut import read_luts
from modules.block_kd.score import ExactEstimator, IndependentEstimator, Tables, tail_of_draws
from modules.block_kd.searcher import BlockKDSearcher, lut_ids, num_spaces, search_spaces, uniform_spaces
from modules.errors import UserError
from modules.history import History
from modules.latency import LatencyPredictor
from modules.modeling.complexity import config_complexity
from modules.search_space.encoding import parse_supernet, subnet_config
from modules.search_space.sampling import max_subnet, min_subnet, sample_supernet
from modules.search_space.superspace import get_superspace

from .checkpoints import call, fails
from .conftest import REFERENCE, needs_reference
from .documented import load_script, parse_command
from .launching import run_script
from .test_lut import SHIPPED, make_lut

FIXED = {160: 1.0, 192: 1.5, 224: 2.0}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A folder with block LUTs of 45 rows for the whole superspace onnx."""
    folder = tmp_path_factory.mktemp('lut')
    for lut_id in get_superspace('onnx').lut_ids():
        make_lut(folder / 'onnx' / f'{lut_id}.csv', 'onnx', lut_id, count=45)
    return str(folder)


@pytest.fixture(scope='module')
def small_tables(small):
    return Tables(read_luts(small, 'onnx'), 'onnx', FIXED)


def mean_loss(make, ids, index, seeds):
    tails = [make(seed).tails(ids)[index] for seed in range(seeds)]
    return np.mean([tail.p for tail in tails]), np.mean([tail.loss for tail in tails if tail.p])


@pytest.mark.parametrize('choice, constraints, faster', [('onnxw-151122-023231', (10, 20), 1),
                                                         ('onnxw-000000-000000', (8, 40), 1),
                                                         ('onnxw-132435-012300', (12, 20), 1),
                                                         ('onnxw-151122-023231', (10, 20), 50)])
def test_exact_is_the_expectation_of_the_definition(choice, constraints, faster):
    """Also on a device, or of networks, so fast that all take less than a millisecond."""
    ids = lut_ids(parse_supernet(choice))
    luts = {lut_id: dataclasses.replace(lut, latency=lut.latency / faster)
            for lut_id, lut in read_luts(SHIPPED, 'onnxw', ids).items()}
    tables = Tables(luts, 'onnxw', {resolution: ms / faster for resolution, ms in FIXED.items()})
    constraints = [constraint / faster for constraint in constraints]
    exact = ExactEstimator(tables, constraints).tails(ids)
    for index, tail in enumerate(exact):
        p, loss = mean_loss(lambda seed: IndependentEstimator(tables, constraints, seed), ids, index, 40)
        assert abs(tail.loss / loss - 1) < 0.002
        assert abs(tail.p - p) < 0.02 * p + 3 * (p / 4e6) ** 0.5


@pytest.mark.parametrize('num_subnets, num_best, constraint', [(2000, 5, 9.0), (500, 50, 12.0), (300, 50, 20.0),
                                                               (300, 300, 14.0), (200, 1, 16.0)])
def test_exact_for_any_number_of_draws(small_tables, num_subnets, num_best, constraint):
    """Also where fewer than num_best are feasible."""
    ids = lut_ids(parse_supernet('onnx-012340-000000'))
    tail, = ExactEstimator(small_tables, [constraint], num_subnets, num_best).tails(ids)
    rng = np.random.default_rng(0)
    drawn = [tail_of_draws(*small_tables.draw(ids, num_subnets, rng), constraint, num_best) for _ in range(1500)]
    found = [draw for draw in drawn if draw.p]
    error = np.std([draw.loss for draw in found]) / len(found) ** 0.5
    assert abs(tail.loss - np.mean([draw.loss for draw in found])) < 4 * error + 0.002 * tail.loss
    assert abs(tail.found - len(found) / len(drawn)) < 0.05


def test_none_and_all_feasible(small_tables):
    ids = lut_ids(parse_supernet('onnx-111111-000000'))
    low, high = small_tables.latency_range(ids)
    none, everything, more = ExactEstimator(small_tables, [low - 0.5, high + 0.5, 1e6]).tails(ids)
    assert none.p == 0 and none.loss == float('inf')
    assert everything.p == pytest.approx(1, abs=1e-6) and more.p == pytest.approx(1, abs=1e-6)
    assert everything.loss == pytest.approx(more.loss, rel=1e-3)


def test_eval_individual(small):
    searcher = BlockKDSearcher(small, 'onnx', 'onnx_lut', [9, 14.5], 0.08, 0.01)
    score, latency_loss, acc_loss = searcher.eval_individual('012340', '000000')
    assert searcher.eval_individual([0, 1, 2, 3, 4, 0], (0,) * 6) == (score, latency_loss, acc_loss)
    single = [BlockKDSearcher(os.path.join(small, 'onnx'), 'onnx', None, c, 0.08, 0.01).eval_individual(
        (0, 1, 2, 3, 4, 0), '000000') for c in (9, 14.5)]
    assert score == pytest.approx(sum(s for s, _, _ in single), rel=1e-3)
    assert latency_loss == pytest.approx(np.mean([s[1] for s in single]), rel=1e-3)
    assert acc_loss == pytest.approx(np.mean([s[2] for s in single]), rel=1e-3)
    for s, penalty, loss in single:
        assert s == pytest.approx(1 / (penalty * loss)) and type(s) is float
    hopeless = BlockKDSearcher(small, 'onnx', None, 0.1, 0.08, 0.01).eval_individual('000000', '000000')
    assert hopeless == (0.0, float('inf'), float('inf'))
    for bad in (('01234', '000000'), ('012349', '000000'), ('012340', '000001')):
        with pytest.raises(UserError):
            searcher.eval_individual(*bad)
    with pytest.raises(UserError, match='latency_constraint'):
        BlockKDSearcher(small, 'onnx', None, [10, -1])


def test_flops_can_stand_in_the_place_of_latency(small):
    """Of the LUT's rows, and of the stem and the head."""
    searcher = BlockKDSearcher(small, 'onnx', 'mflops', 300)
    for lut_id, lut in read_luts(small, 'onnx').items():
        assert sorted(np.concatenate([flops for flops, _ in searcher.tables.rows[lut_id]])) == sorted(lut.flops)
    fixed = [config_complexity(searcher_module.unsearched_blocks('onnx', resolution))[0]
             for resolution in searcher.tables.resolutions]
    assert searcher.tables.fixed == pytest.approx(fixed)
    assert searcher.name() == 'onnx, 300 MFLOPs'


def test_the_score_penalises_few_feasible_subnets(small):
    ids = {c: BlockKDSearcher(small, 'onnx', None, c, 0.3, 0.5) for c in (8, 30)}
    tight, loose = (searcher.evaluate(searcher.parse('012340-000000')) for searcher in ids.values())
    assert tight.latency_loss == pytest.approx((0.3 / tight.tails[0].p) ** 0.5, rel=1e-6)
    assert loose.latency_loss == 1


def test_seeds_of_the_search():
    for name, types, windows in (('mobilew', 7, 7), ('onnxw', 6, 4), ('onnx', 5, 1)):
        spaces = uniform_spaces(name)
        assert len({str(s) for s in spaces}) == len(spaces) and len({s.block_types for s in spaces}) == types
        assert len(spaces) == types * windows
    assert num_spaces('onnx') == 5 ** 6


def run_search(small, folder, total, seed=0, resume=False, population=30):
    searcher = BlockKDSearcher(small, 'onnx', None, [12], 0.08, 0.01)
    with History(str(folder), searcher.columns(), searcher.settings, resume, searcher.check_entry) as history:
        found = search_spaces(searcher, history, random.Random(seed), total, population, 8)
        return [(str(supernet), numbers) for supernet, numbers in found]


def test_search_repeats_nothing_and_is_seeded(small, tmp_path):
    found = run_search(small, tmp_path / 'a', 150)
    assert len(found) == len({name for name, _ in found}) == 150
    assert found == run_search(small, tmp_path / 'b', 150)
    assert found != run_search(small, tmp_path / 'c', 150, seed=1)
    assert max(numbers[0] for _, numbers in found[30:]) > max(numbers[0] for _, numbers in found[:30])


@pytest.mark.parametrize('cut', [0, 30, 2000, -5])
def test_a_killed_search_ends_like_an_unbroken_one(small, tmp_path, cut):
    unbroken = run_search(small, tmp_path, 100)
    history = (tmp_path / 'history.csv').read_bytes()
    (tmp_path / 'history.csv').write_bytes(history[:cut])
    assert run_search(small, tmp_path, 100, resume=True) == unbroken
    assert (tmp_path / 'history.csv').read_bytes() == history


def test_resume_looks_up_what_was_scored(small, tmp_path, monkeypatch):
    run_search(small, tmp_path, 60)
    monkeypatch.setattr(BlockKDSearcher, 'evaluate', lambda *_: pytest.fail('scored twice'))
    run_search(small, tmp_path, 60, resume=True)


def test_resume_refuses_another_search(tmp_path):
    with History(str(tmp_path), ['score'], {'seed': 0}):
        pass
    with pytest.raises(UserError, match='seed 0, not 1'):
        History(str(tmp_path), ['score'], {'seed': 1}, resume=True)
    (tmp_path / 'history.csv').write_text('# {"seed": 0}\nencoding,score\nonnx-000000-000000,x\n')
    with pytest.raises(UserError, match='history.csv:3: not a line'):
        History(str(tmp_path), ['score'], {'seed': 0}, resume=True)
    (tmp_path / 'history.csv').write_text('encoding,score\nonnx-000000-000000,0.5\n')           # as it once began
    with pytest.raises(UserError, match='history.csv: .*older version'):
        History(str(tmp_path), ['score'], {'seed': 0}, resume=True)


def test_a_small_space_can_be_searched_whole():
    members = [(a, b) for a in range(4) for b in range(5)]
    rng = random.Random(0)

    def mutate(member):
        return (rng.randrange(4), member[1]) if rng.random() < 0.5 else (member[0], rng.randrange(5))

    found = list(evolution.regularized_evolution([(0, 0)], lambda: rng.choice(members), [mutate, mutate],
                                                 lambda member: (sum(member),), rng, 20, 5, 3))
    assert sorted(member for member, _ in found) == members


@pytest.mark.parametrize('superspace, constraints, platform', [('mobilew', (15, 20), 'tflite27_cpu_int8'),
                                                               ('onnxw', (10,), 'onnx_lut')])
def test_search_commands(tmp_path, monkeypatch, capsys, superspace, constraints, platform):
    command = ['--superspace', superspace, '--latency_constraint', *constraints, '--platform', platform,
               '--latency_loss_t', 0.08, '--latency_loss_a', 0.01, '--lut_path', SHIPPED,
               '--output_dir', tmp_path / 'search', '--num_spaces', 60, '--population_size', 40]
    assert call(search_block_kd, monkeypatch, *command) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / 'search' / superspace / f'c{"+".join(map(str, constraints))}_t0.08_a0.01'
    for name in ('search.png', 'cdf.png', 'top10.png'):
        assert (folder / name).read_bytes().startswith(b'\x89PNG')
    with open(folder / 'top50.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50 and rows[0]['supernet'].startswith(superspace)
    scores = [float(row['score']) for row in rows]
    assert scores == sorted(scores, reverse=True)
    best, predictor = rows[0]['supernet'], LatencyPredictor(platform)
    for name, extreme in (('min_latency_ms', min_subnet), ('max_latency_ms', max_subnet)):
        assert rows[0][name] == f'{predictor.predict_subnet(subnet_config(best, extreme(best))):.4f}'
    assert 'best' in out and '60/60' in err and (folder / 'search.log').read_text().count('\n') >= 3
    curves = EventAccumulator(str(folder)).Reload()
    assert set(curves.Tags()['scalars']) == {'score/best', 'score/mean'}
    assert curves.Scalars('score/best')[-1].value == pytest.approx(scores[0], rel=1e-4)
    commands = [parse_command(line.strip()) for line in out.splitlines()[-2:]]
    for command in commands:
        monkeypatch.setattr(sys, 'argv', [command.script, *command.words])
        load_script(command.script).get_args()
    assert not [name for name in os.listdir(folder) if '.tmp' in name]


def test_supernet_choices_command(tmp_path, monkeypatch):
    """From any folder, with the default LUTs."""
    monkeypatch.chdir(tmp_path)
    assert call(search_block_kd, monkeypatch, '--superspace', 'onnxw', '--latency_constraint', 15, '--platform',
                'onnx_lut', '--latency_loss_t', 0.08, '--supernet_choices', '111111_000000', '222222_000000') == 0
    path = tmp_path / 'checkpoints' / 'block_kd' / 'search' / 'onnxw' / 'c15_t0.08_a0.01' / 'supernet_choices.csv'
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [row['supernet'] for row in rows] == ['onnxw-111111-000000', 'onnxw-222222-000000']
    searcher = BlockKDSearcher(SHIPPED, 'onnxw', 'onnx_lut', 15, 0.08, 0.01, wanted=lut_ids(
        parse_supernet('onnxw-222222-000000')))
    assert [row['rank'] for row in rows] == ['1', '2'] and float(rows[0]['score']) > float(rows[1]['score'])
    assert float(rows[1]['score']) == pytest.approx(searcher.eval_individual('222222', '000000')[0], rel=1e-4)


def test_under_launchers_one_process_does_the_work(tmp_path):
    output = run_script('search_block_kd.py', '--superspace', 'onnxw', '--latency_constraint', 15,
                        '--supernet_choices', 'spaceevo@vnni', '--output_dir', tmp_path, ranks=2)
    assert output.count('onnxw-151122-023231  score') == 1


def test_a_spoilt_history_is_refused_by_line(tmp_path):
    with History(tmp_path, ['score'], {}) as history:
        history.get('a', lambda: [1.0])
    whole = (tmp_path / 'history.csv').read_bytes()
    for spoilt in (b'\xff\xfe\n', b'b\n', b'b,x\n', b'a,2.0\n'):
        (tmp_path / 'history.csv').write_bytes(whole + spoilt)
        with pytest.raises(UserError, match=r'history.csv:4: '):
            History(tmp_path, ['score'], {}, resume=True)


@pytest.mark.parametrize('change', [('score', 'inf'), ('score', '-1'), ('p@12', '-0.5'), ('L@12', '-inf'),
                                    ('acc_loss', '-1')])
def test_scores_that_no_space_has_are_refused(small, tmp_path, change):
    run_search(small, tmp_path, 30)
    facts, header, first, *rest = (tmp_path / 'history.csv').read_text().splitlines(keepends=True)
    numbers = dict(zip(header.strip().split(','), first.strip().split(','))) | dict([change])
    (tmp_path / 'history.csv').write_text(''.join([facts, header, ','.join(numbers.values()) + '\n', *rest]))
    with pytest.raises(UserError, match='history.csv:3: '):
        run_search(small, tmp_path, 30, resume=True)


@pytest.mark.parametrize('args, message', [
    (['--superspace', 'onnxv'], 'onnxv'),
    (['--superspace', 'onnxw', '--supernet_choices', '999999_000000'], 'block type 9'),
    (['--superspace', 'onnxw', '--latency_constraint', '-3'], '-3'),
    (['--superspace', 'onnxw', '--lut_path', 'nowhere'], 'nowhere'),
    (['--superspace', 'onnxw', '--platform', 'abacus'], 'abacus'),
])
def test_user_errors(tmp_path, monkeypatch, capsys, args, message):
    if '--supernet_choices' not in args:
        args = args + ['--supernet_choices', '111111']
    fails(search_block_kd, monkeypatch, capsys, message, '--latency_constraint', 15, '--output_dir', tmp_path / 'out',
          *args)
    assert not os.path.exists(tmp_path / 'out')


@needs_reference
@pytest.mark.parametrize('space, constraints', [('onnxw', (10, 15, 20)), ('mobilew', (15, 20, 25))])
def test_published_and_shipped_luts_rank_spaces_alike(space, constraints):
    from scipy.stats import spearmanr
    rng, losses = random.Random(3), []
    supernets = [sample_supernet(space, rng) for _ in range(150)]
    for folder in (SHIPPED, os.path.join(REFERENCE, 'lut')):
        searcher = BlockKDSearcher(folder, space, None, constraints)
        losses.append([[tail.loss for tail in searcher.evaluate(supernet).tails] for supernet in supernets])
    for shipped, published in zip(*(zip(*rows) for rows in losses)):
        pairs = [pair for pair in zip(shipped, published) if max(pair) < float('inf')]
        assert len(pairs) > 140 and spearmanr(*zip(*pairs))[0] >= 0.99
