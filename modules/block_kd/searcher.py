"""The Q-T score of spaces from block LUTs, and the evolution over spaces (SpaceEvo, section 3)."""
import dataclasses
import hashlib
import math
from functools import cached_property
from typing import NamedTuple

from .. import evolution
from ..errors import UserError
from ..files import write_csv
from ..latency import MFLOPS, unit_of
from ..search_space import sampling
from ..search_space.block import out_size
from ..search_space.encoding import Supernet, parse_supernet, stage_blocks, subnet_config
from ..search_space.macro_arch import IMAGE_CHANNELS, SEARCHABLE_STAGES
from ..search_space.superspace import get_superspace
from .lut import read_luts
from .score import ExactEstimator, IndependentEstimator, Tables

ESTIMATORS = {'exact': ExactEstimator, 'independent': IndependentEstimator}


class SpaceScore(NamedTuple):
    """Score of a space; latency_loss, acc_loss: means over constraints of max(1, (t/p)^a) and L; tails: p and L."""
    score: float
    latency_loss: float
    acc_loss: float
    tails: list

    def numbers(self):
        """Score, latency_loss, acc_loss, then p and L for each constraint."""
        return (self.score, self.latency_loss, self.acc_loss) + tuple(v for tail in self.tails for v in tail[:2])


def lut_ids(supernet):
    """The six block LUTs (`stage3_1_2`) of a Supernet."""
    stages = supernet.superspace.searchable_stages
    return [f'{stage}_{block_type}_{window}'
            for stage, block_type, window in zip(stages, supernet.block_types, supernet.windows)]


def unsearched_blocks(superspace, resolution):
    """Blocks of the unsearched stages at minimum width and depth for an image resolution (pixels).

    The stages before and after are at their minimum width too, over their whole width list.
    """
    space = get_superspace(superspace)
    blocks, cin, hw = [], IMAGE_CHANNELS, resolution
    for stage in space.stages:
        if stage.name not in SEARCHABLE_STAGES:
            block_type = space.block_type(stage.name)
            choice = block_type.kernels[0], stage.widths[0], block_type.expands[0]
            blocks += stage_blocks(stage, block_type, [choice] * stage.depths[0], cin, hw)
        cin, hw = stage.widths[0], out_size(hw, stage.stride)
    return blocks


class PlatformLatency(dict):
    """{resolution (pixels): latency in ms of the unsearched stages}, predicted when first asked for."""

    def __init__(self, superspace, platform, trust_pickles):
        super().__init__()
        self.superspace, self.platform, self.trust_pickles = superspace, platform, trust_pickles

    @cached_property
    def predictor(self):
        from ..latency import LatencyPredictor
        return LatencyPredictor(self.platform, trust_pickles=self.trust_pickles)

    def __missing__(self, resolution):
        self[resolution] = float(sum(self.predictor.predict_blocks(unsearched_blocks(self.superspace, resolution))))
        return self[resolution]


class BlockKDSearcher:
    """Scores the spaces of a hyperspace on a platform.

    lut_dir: the folder that holds <superspace>/stage*_*_*.csv[.gz], or that folder itself. latency_constraint:
    ms, one number or several; then scores add up and the two losses are means. platform: None for the hyperspace's
    own, mflops for the LUT's FLOPs in the place of its latencies; trust_pickles: as for LatencyPredictor.
    estimator: exact or independent (score.py), which draws with `seed`. wanted: block-LUT ids to read
    when not all are needed. Raises LutError for a missing file or a bad row.
    """

    def __init__(self, lut_dir, superspace, platform, latency_constraint, lat_loss_t=0.1, lat_loss_a=0.01,
                 estimator='exact', seed=0, wanted=None, trust_pickles=False):
        self.superspace = get_superspace(superspace)
        self.platform = platform or self.superspace.platform
        given = latency_constraint if isinstance(latency_constraint, (list, tuple)) else [latency_constraint]
        try:
            self.constraints = tuple(float(constraint) for constraint in given)
        except (TypeError, ValueError):
            raise UserError(f'latency_constraint {latency_constraint!r}: expected positive numbers') from None
        shown = [f'{constraint:g}' for constraint in self.constraints]
        if len(set(shown)) < len(shown):
            raise UserError(f'latency_constraint {" ".join(shown)}: the same one twice')
        for name, values in (('latency_constraint', self.constraints), ('lat_loss_t', (lat_loss_t,)),
                             ('lat_loss_a', (lat_loss_a,))):
            if not values or not all(0 < value < float('inf') for value in values):
                raise UserError(f'{name} {" ".join(map(str, values)) or "of no value"}: expected positive numbers')
        if estimator not in ESTIMATORS:
            raise UserError(f'estimator {estimator!r} is not one of {" ".join(ESTIMATORS)}')
        self.t, self.a = lat_loss_t, lat_loss_a
        luts = read_luts(lut_dir, self.superspace, wanted)
        if self.platform == MFLOPS:
            luts = {lut_id: dataclasses.replace(lut, latency=lut.flops) for lut_id, lut in luts.items()}
        self.latency = PlatformLatency(self.superspace, self.platform, trust_pickles)
        self.tables = Tables(luts, self.superspace, self.latency)
        options = {} if estimator == 'exact' else {'seed': seed}
        self.estimator = ESTIMATORS[estimator](self.tables, self.constraints, **options)
        self.settings = {'superspace': self.superspace.name, 'platform': self.platform,
                         'latency_constraint': self.constraints, 'latency_loss_t': self.t, 'latency_loss_a': self.a,
                         'estimator': estimator, 'luts': self._digest()}

    def name(self):
        """`mobilew, 15 and 20 ms`."""
        return f'{self.superspace.name}, {" and ".join(f"{c:g}" for c in self.constraints)} {unit_of(self.platform)}'

    def _digest(self):
        """12 hex digits that change with any latency or loss used."""
        digest = hashlib.sha256(repr((self.tables.resolutions, self.tables.fixed)).encode())
        for lut_id in sorted(self.tables.rows):
            digest.update(lut_id.encode())
            for latency, loss in self.tables.rows[lut_id]:
                digest.update(latency.tobytes() + loss.tobytes())
        return digest.hexdigest()[:12]

    def parse(self, supernet):
        """Supernet of this hyperspace from `151122-023231`, its full name or a Supernet."""
        return parse_supernet(supernet, self.superspace)

    def evaluate(self, supernet):
        """SpaceScore of a Supernet."""
        tails = self.estimator.tails(lut_ids(supernet))
        # found is 1 unless the estimator gives expectations and n draws may hold no feasible subnet at all
        penalties = [self._penalty(tail) for tail in tails]
        score = sum(tail.found / (penalty * tail.loss) for tail, penalty in zip(tails, penalties))
        count = len(tails)
        return SpaceScore(float(score), float(sum(penalties) / count), sum(tail.loss for tail in tails) / count, tails)

    def _penalty(self, tail):
        """max(1, (t / p)^a), infinite where no subnet is feasible."""
        try:
            return max(1.0, (self.t * tail.found / tail.p) ** self.a)
        except (OverflowError, ZeroDivisionError):
            return float('inf')

    def eval_individual(self, block_choices, width_window_choices):
        """(score, latency_loss, acc_loss) of the space with these block types and width windows for stages 1..6.

        Both as '151122' or as a sequence of ints. score = sum over constraints of 1 / (max(1, (t/p)^a) L); the
        other two are the means over the constraints of max(1, (t/p)^a) and of L, inf where nothing is feasible.
        """
        text = '_'.join(''.join(map(str, choices)) for choices in (block_choices, width_window_choices))
        return tuple(self.evaluate(self.parse(text))[:3])

    def latency_range(self, supernet):
        """Predicted latency in ms of the smallest and of the largest subnet of a Supernet."""
        return tuple(self.latency.predictor.predict_subnet(subnet_config(supernet, extreme(supernet)))
                     for extreme in (sampling.min_subnet, sampling.max_subnet))

    def check_entry(self, encoding, numbers):
        """ValueError or UserError for what cannot be the SpaceScore.numbers() of a space that is searched."""
        self.parse(encoding)
        score, *others = numbers
        if not (0 <= score < math.inf and min(others) >= 0):
            raise ValueError

    def columns(self):
        """Names of SpaceScore.numbers()."""
        names = ['score', 'latency_loss', 'acc_loss']
        return names + [f'{name}@{c:g}' for c in self.constraints for name in ('p', 'L')]


def uniform_spaces(superspace):
    """Each block type x width window used everywhere (stages with fewer windows use their last)."""
    space = get_superspace(superspace)
    counts = [space.stage(name).num_windows for name in space.searchable_stages]
    return [Supernet(space, (block_type,) * len(counts), tuple(min(window, count - 1) for count in counts))
            for block_type in range(len(space.block_types)) for window in range(max(counts))]


def num_spaces(superspace):
    """How many spaces a hyperspace has."""
    space, count = get_superspace(superspace), 1
    for name in space.searchable_stages:
        count *= len(space.block_types) * space.stage(name).num_windows
    return count


def search_spaces(searcher, history, rng, total=5000, population_size=500, parent_sample_size=125):
    """Regularised evolution over the spaces of a BlockKDSearcher; gives (Supernet, its numbers) as they come.

    history: evolution.History with the searcher's columns. rng: random.Random. No space is scored twice.
    """
    space = searcher.superspace

    def score(supernet):
        return history.get(str(supernet), lambda: searcher.evaluate(supernet).numbers())

    mutations = [lambda parent: sampling.mutate_block_type(parent, rng)]
    if any(space.stage(name).num_windows > 1 for name in space.searchable_stages):
        mutations.append(lambda parent: sampling.mutate_window(parent, rng))
    return evolution.regularized_evolution(
        uniform_spaces(space), lambda: sampling.sample_supernet(space, rng), mutations, score, rng,
        min(total, num_spaces(space)), population_size, parent_sample_size)


def describe(supernet):
    """Lines that say in words what a Supernet offers in each searched stage."""
    return [f'  {stage}: {block_type.name}, kernels {_listed(block_type.kernels)}, expand ratios '
            f'{_listed(block_type.expands)}, widths {_listed(widths)}, {spec.depths[0]} to {spec.depths[-1]} blocks'
            for stage, (spec, block_type, widths) in supernet.choices.items() if stage in SEARCHABLE_STAGES]


def _listed(values):
    return '/'.join('-' if value is None else str(value) for value in values)


def write_table(path, searcher, supernets, numbers):
    """CSV of spaces in the order given: rank by score, supernet, smallest and largest latency, score, losses, p and L.
    """
    by_score = sorted(range(len(numbers)), key=lambda i: -numbers[i][0])
    ranks = {i: rank for rank, i in enumerate(by_score, 1)}
    write_csv(path, ['rank', 'supernet', 'min_latency_ms', 'max_latency_ms'] + searcher.columns(),
              [[ranks[i], supernet] + [f'{ms:.4f}' for ms in searcher.latency_range(supernet)]
               + [f'{value:.6g}' for value in values] for i, (supernet, values) in enumerate(zip(supernets, numbers))])
