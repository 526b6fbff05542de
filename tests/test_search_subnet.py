"""Subnet search: the evolution with a fake accuracy, and search_subnet.py as users run it, killed and resumed."""
import csv
import itertools
import os
import random

import pytest
import torch

import search_subnet
from modules.errors import UserError
from modules.figures import pareto_front
from modules.latency import LatencyPredictor
from modules.modeling.ops.lsq_plus import quantised_ops, set_quant_mode
from modules.modeling.supernet import Supernet
from modules.search_space.encoding import parse_supernet
from modules.subnets.results import all_members
from modules.subnets.search import (
    SearchRecipe,
    SharedHistory,
    SubnetSpace,
    Window,
    best_members,
    evolve,
    initial_population,
    note_trained_images,
    score_subnets,
    search_windows,
    trained_valid_size,
    window_below,
)
from modules.training.calibrate import initialize_all_scales
from modules.training.distributed import Job

from .checkpoints import call, fails
from .conftest import ROOT
from .launching import run_script

RECIPE = SearchRecipe(population_size=20, num_rounds=4, num_mutations=5, num_crossovers=5)
pytestmark = pytest.mark.usefixtures('deep_space')
DEEP, PLUGIN = 'demo_deep-012-111', ('--plugin', os.path.join(ROOT, 'benchmarks', 'onnxw_small.py'))
WINDOW = Window(0.9, 1.1)
pytestmark = pytest.mark.usefixtures('one_thread')             # as the scripts below run


def test_a_delta_larger_than_the_constraint_is_a_third(capsys):
    assert window_below(15, 5) == Window(10, 15) and window_below(5, 5) == Window(0, 5)
    low, high = window_below(0.3, 5)
    assert high == 0.3 and low == pytest.approx(0.2) and 'a third is taken' in capsys.readouterr().err


def test_the_held_out_images_are_the_supernets(tmp_path):
    torch.save({'settings': {'valid_size': 321}}, tmp_path / 'a.pth')
    torch.save({'state_dict': {}}, tmp_path / 'b.pth')
    assert trained_valid_size(str(tmp_path / 'a.pth')) == 321 and trained_valid_size(str(tmp_path / 'b.pth')) is None



@pytest.fixture(scope='module')
def space(deep_space):
    return SubnetSpace(parse_supernet(DEEP), LatencyPredictor('onnx_lut'))


class Fake:
    """Accuracies of subnets by `value`, and a list of what was measured; it is killed at measurement `die_at`."""

    def __init__(self, value=lambda subnet, count: sum(subnet.widths) / 10 + subnet.resolution / 1000, die_at=None):
        self.value, self.die_at, self.measured = value, die_at, []

    def __call__(self, subnets):
        for subnet in subnets:
            if len(self.measured) == self.die_at:
                raise KeyboardInterrupt
            self.measured.append(str(subnet))
            yield self.value(subnet, len(self.measured)), 0.0, 0.0


def _search(space, folder, windows, fake, recipe=RECIPE, seed=0, resume=False):
    """(found ScoredSubnets, all ScoredSubnets, lines said) of a search with a fake accuracy."""
    said = []
    starts = {w: initial_population(space, w, recipe.population_size, random.Random(f'{seed} {w}')) for w in windows}
    with SharedHistory(str(folder), {'seed': seed, 'supernet': str(space.supernet)}, Job(), resume) as history:
        def score(subnets, tick):
            return score_subnets(subnets, fake, history, Job(), 3, tick)
        found = search_windows(space, starts, score, recipe, seed, Job(), said.append)
        return found, all_members(space, history, found), said


def test_nothing_is_measured_twice_and_the_window_is_kept(space, tmp_path):
    fake = Fake()
    found, members, said = _search(space, tmp_path, [WINDOW], fake)
    assert len(found) == len(members) == len(fake.measured) == len(set(fake.measured)) == 20 + 4 * 10
    assert all(WINDOW.low <= member.ms <= WINDOW.high for member in found)
    assert [sum(member.round == i for member in found) for i in range(5)] == [20, 10, 10, 10, 10]
    assert len(said) == 5 and 'round 4/4: 10 subnets' in said[-1]
    means = [sum(m.scores[0] for m in found if m.round == i) / (20 if i == 0 else 10) for i in range(5)]
    assert means[4] > means[2] > means[0]


def test_the_last_generation_counts(space, tmp_path):
    found, members, _ = _search(space, tmp_path, [WINDOW], Fake(lambda subnet, count: count))
    assert {member.round for member in best_members(members, WINDOW)} == {4}


def test_parents_are_the_better_half_of_the_best_so_far(space, monkeypatch):
    parents = []
    mutate = SubnetSpace.mutate
    monkeypatch.setattr(SubnetSpace, 'mutate',
                        lambda self, subnet, *more: parents.append(str(subnet)) or mutate(self, subnet, *more))
    initial = initial_population(space, WINDOW, 10, random.Random(0))
    values = {str(subnet): i for i, subnet in enumerate(initial)}
    recipe = SearchRecipe(10, 1, 40, 0)
    rounds = evolve(space, WINDOW, initial, lambda subnets: [(values.get(str(s), -1), 0, 0) for s in subnets],
                    random.Random(0), recipe)
    next(rounds)
    parents.clear()
    next(rounds)
    # a walk continues from children, which are no members
    assert {values[parent] for parent in parents if parent in values} == {5, 6, 7, 8, 9}


def test_an_empty_window_says_what_can_be_reached(space):
    with pytest.raises(UserError, match=r'found no subnet of 7.5 to 8 ms .*reachable: 0\.\d+ to 2\.\d+ ms'):
        initial_population(space, Window(7.5, 8), 5, random.Random(0))


def test_a_tiny_window_is_searched_all_the_same(space, tmp_path):
    largest = space.ms(space.extremes[1])
    for width, most in ((1e-9, 1), (0.0001, 19)):                   # the largest subnet, and a few others
        fake = Fake()
        found, _, said = _search(space, tmp_path, [Window(largest - width, largest)], fake, SearchRecipe(20, 1, 3, 3))
        assert 1 <= len(found) <= most and len(set(fake.measured)) == len(fake.measured) == len(found)
        assert 'subnets found to start with, not 20' in said[0]
        assert most > 1 or 'round 1 found no new subnet: the search ends with 1' in said[-1]


def test_a_narrow_window_of_a_large_space_is_filled():
    onnxw = SubnetSpace(parse_supernet('onnxw-121122-133333'), LatencyPredictor('onnx_lut'))
    for window in (Window(9.9, 10), Window(69.9, 70)):              # neither holds one of 1000 random subnets
        population = initial_population(onnxw, window, 30, random.Random(0))
        assert len(set(map(str, population))) == 30
        assert not any(window.distance(onnxw.ms(subnet)) for subnet in population)


def test_aligned_samples_stay_aligned():
    aligned = SubnetSpace(parse_supernet(DEEP), LatencyPredictor('onnx_lut'), align=True)
    rounds = evolve(aligned, WINDOW, initial_population(aligned, WINDOW, 10, random.Random(0)),
                    lambda subnets: [(0, 0, 0)] * len(subnets), random.Random(0), RECIPE)
    for _, members in rounds:
        assert all(len(set(blocks)) == 1 for member in members for blocks in member.subnet.stages().values())


def test_constraints_share_what_is_scored_and_do_not_change_each_other(space, tmp_path):
    largest = space.ms(space.extremes[1])
    windows = [Window(largest - 0.003, largest), Window(largest - 0.002, largest)]
    both, alone = Fake(), Fake()
    found, members, _ = _search(space, tmp_path / 'both', windows, both)
    assert len(set(both.measured)) == len(both.measured) == len(members) < len(found)
    single, _, _ = _search(space, tmp_path / 'one', windows[1:], alone)
    assert [str(m.subnet) for m in found[-len(single):]] == [str(m.subnet) for m in single]


@pytest.mark.parametrize('die_at', [0, 7, 20, 33])
def test_a_broken_search_resumes_to_the_unbroken_ones_end(space, tmp_path, die_at):
    whole, broken, rest = Fake(), Fake(die_at=die_at), Fake()
    expected = _search(space, tmp_path / 'whole', [WINDOW], whole)
    with pytest.raises(KeyboardInterrupt):
        _search(space, tmp_path / 'broken', [WINDOW], broken)
    kept = _lines(tmp_path / 'broken' / 'history.csv') - 2
    assert die_at - 3 < kept <= die_at                              # three are measured at a time
    assert _search(space, tmp_path / 'broken', [WINDOW], rest, resume=True)[:2] == expected[:2]
    assert rest.measured == whole.measured[kept:]
    assert (tmp_path / 'broken' / 'history.csv').read_text() == (tmp_path / 'whole' / 'history.csv').read_text()


def test_other_settings_are_refused_and_an_old_history_is_kept_aside(space, tmp_path):
    _search(space, tmp_path, [WINDOW], Fake())
    before = (tmp_path / 'history.csv').read_text()
    with pytest.raises(UserError, match='made with seed 0, not 1'):
        _search(space, tmp_path, [WINDOW], Fake(), seed=1, resume=True)
    _search(space, tmp_path, [WINDOW], Fake(), seed=1)
    assert (tmp_path / 'history_old.csv').read_text() == before


@pytest.mark.parametrize('scores', ['inf,0.0,0.0', '-1.0,0.0,0.0', '101.0,0.0,0.0', '50.0,1e9,0.0', '50.0,60.0,-1.0'])
def test_scores_that_no_subnet_has_are_refused(space, tmp_path, scores):
    _search(space, tmp_path, [WINDOW], Fake())
    facts, header, first, *rest = (tmp_path / 'history.csv').read_text().splitlines(keepends=True)
    (tmp_path / 'history.csv').write_text(''.join([facts, header, first.split(',')[0], f',{scores}\n', *rest]))
    with pytest.raises(UserError, match='history.csv:3: '):
        _search(space, tmp_path, [WINDOW], Fake(), resume=True)


def test_scores_of_an_earlier_search_count_among_the_best(space, tmp_path):
    found, _, _ = _search(space, tmp_path, [Window(0.9, 1.0)], Fake())
    _, members, _ = _search(space, tmp_path, [Window(0.95, 1.1)], Fake(lambda *_: 0.0), resume=True)
    best = best_members(members, Window(0.95, 1.1))
    assert best and all(member.scores[0] > 0 for member in best)
    assert {member.round for member in members} >= {None, 0, 4} and len(members) > len(found)


def test_pareto_front():
    points = [(2, 50), (1, 40), (3, 50), (4, 60), (2, 45)]
    assert pareto_front(points, tuple) == [(1, 40), (2, 50), (4, 60)]


@pytest.fixture(scope='module')
def root(tmp_path_factory, deep_space):
    """Root of the checkpoints: LSQ+ supernets with random weights."""
    root, rng = tmp_path_factory.mktemp('supernet_training'), random.Random(0)
    for encoding, classes in ((DEEP, 10), ('demo_deep-000-111', 7), ('onnxw-121122-133333', 2)):
        torch.manual_seed(0)
        supernet = set_quant_mode(Supernet.build_from_str(encoding, classes))
        if encoding == DEEP:
            initialize_all_scales(supernet, torch.randn(4, 3, 48, 48), supernet.set_max_subnet,
                                  itertools.repeat(lambda: supernet.sample_active_subnet(rng)), patience=20)
        else:
            for op in quantised_ops(supernet):
                op.initialize_scales(torch.tensor([-1.0, 5.0]))
        (root / f'{encoding}-align0').mkdir()
        torch.save({'epoch': 1, 'state_dict': supernet.state_dict()}, root / f'{encoding}-align0' / 'lsq.pth')
    return root


def _arguments(root, output, *more):
    return ['--superspace', 'demo_deep', '--supernet_choice', '012-111', '--dataset', 'digits', '--dataset_path', root,
            '--valid_size', 40, '--output_path', output, '--checkpoint_path', root, '--latency_constraint', 0.9, 1.0,
            '--latency_delta', 0.15, '--batch_size', 10, '--num_calib_batches', 2, '--population_size', 8,
            '--num_rounds', 2, '--num_mutations', 2, '--num_crossovers', 2, '--num_eval_images', 20,
            '--num_workers', 0, '--device', 'cpu', *more]


def _entries(folder):
    return (folder / 'history.csv').read_text().splitlines()


def _lines(path):
    return path.read_text().count('\n') if path.exists() else 0


def test_killed_and_resumed_on_one_and_two_ranks_it_ends_as_the_unbroken_search(root, tmp_path, monkeypatch):
    """Killed plain, resumed on two ranks of which one is killed, resumed on two; against one process."""
    assert call(search_subnet, monkeypatch, *_arguments(root, tmp_path / 'whole')) == 0
    whole, folder = (tmp_path / run / DEEP for run in ('whole', 'broken'))
    arguments, history = _arguments(root, tmp_path / 'broken'), folder / 'history.csv'
    run_script('search_subnet.py', *PLUGIN, *arguments, kill_when=lambda: _lines(history) > 4)
    assert 4 < len(_entries(folder)) < len(_entries(whole))
    output = run_script('search_subnet.py', *PLUGIN, *arguments, '--resume', ranks=2, victims=slice(-1, None),
                        kill_when=lambda: _lines(history) > 13)
    assert 'another rank is gone' in output, output
    assert 13 < len(_entries(folder)) < len(_entries(whole))
    run_script('search_subnet.py', *PLUGIN, *arguments, '--resume', ranks=2)
    for file in ('scored.csv', 'best_c0.9_d0.15.csv', 'best_c1_d0.15.csv', 'search.png'):
        assert (folder / file).read_bytes() == (whole / file).read_bytes(), file
    assert sorted(_entries(folder)) == sorted(_entries(whole))
    with open(whole / 'best_c1_d0.15.csv', newline='', encoding='utf-8') as file:
        best = list(csv.DictReader(file))
    assert len(best) == 10 and all(0.85 <= float(row['ms']) <= 1.0 for row in best)
    accuracies = [float(row['valid_top1']) for row in best]
    assert accuracies == sorted(accuracies, reverse=True) and all(row['test_top1'] for row in best)
    log = (whole / 'search.log').read_text()
    assert 'round 2/2' in log and best[0]['subnet'] in log


def test_held_out_images_that_were_trained_on_are_reported(tmp_path, capsys):
    torch.save({'state_dict': {}, 'settings': {'valid_size': 100}}, tmp_path / 'lsq.pth')
    for num_valid in (100, 140):
        assert not capsys.readouterr().err
        note_trained_images(str(tmp_path / 'lsq.pth'), num_valid)
    assert 'it has seen 40 of the 140 images that are held out here; give --valid_size 100' in capsys.readouterr().err


@pytest.mark.parametrize('more, said', [
    (['--latency_constraint', '9'], 'found no subnet of 8.85 to 9 ms'),
    (['--checkpoint_path', 'nowhere'], f'no checkpoint of {DEEP}: expected nowhere/{DEEP}-align0/lsq.pth'),
    (['--align_sample'], f'{DEEP}-align1/lsq.pth'),
    (['--fp32'], f'{DEEP}-align0/checkpoint.pth'),
    (['--supernet_choice', '000-111'], 'the data set has 10 classes'),
    (['--valid_size', '0'], '--valid_size 0: no held-out images'),
    (['--platform', 'nowhere.json'], 'nowhere.json'),
    (['--supernet_choice', '012-119'], 'width window 9')])
def test_mistakes_end_in_one_line(root, tmp_path, monkeypatch, capsys, more, said):
    fails(search_subnet, monkeypatch, capsys, said, *_arguments(root, tmp_path, *more))
    assert not os.listdir(tmp_path)
