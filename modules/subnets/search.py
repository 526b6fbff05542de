"""Subnet search: evolution over a trained supernet's subnets whose predicted latency lies in a window.

Latencies come before accuracies: a subnet outside the window is never run. One that was scored is never run
again, whatever constraint it was scored for. Everything is a function of the seed and the scores, so a killed
search is resumed by replaying it (history.py), and any number of ranks takes the same decisions.
"""
import contextlib
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UserError
from ..history import History
from ..modeling.ops.lsq_plus import local_initialisation, quantise_weights_once
from ..search_space import sampling
from ..search_space.encoding import Subnet, parse_subnet, subnet_config
from ..settings import setting
from ..training.calibrate import calibrate
from ..training.checkpoint import load_checkpoint
from ..training.data import seed_of
from ..training.distributed import share, sum_over_ranks
from ..training.evaluate import accuracy, images_of, kept_subnet
from ..training.log import note, progress
from ..training.threads import thread_map

COLUMNS = ('top1', 'top5', 'loss')          # scores: percent, percent, mean cross-entropy
DRAWS, STEPS = 8, 400                       # a member: the nearest of 8 random subnets, walked into the window
STRENGTHS = (1.0, 0.3, 0.1)                 # of a walk's mutations: far leaps, and steps small enough to arrive
PATIENCE = 100                              # walks in a row without a new member after which a window is given up,
EMPTY_PATIENCE = 30                         # the same where it has no member yet,
ROUND_PATIENCE = 20                         # and a round of the search
TRIES = 50                                  # of a child, which then is a mutation that walks on
BEST = 10


class Window(NamedTuple):
    """Predicted latencies from `low` to `high` ms, both included."""
    low: float
    high: float

    def distance(self, ms):
        """ms to the window, 0 inside."""
        return max(self.low - ms, ms - self.high, 0.0)

    def __str__(self):
        return f'{self.low:g} to {self.high:g} ms'


def window_below(c, d):
    """The Window from c - d to c ms, or from two thirds of c, where d is more than c."""
    if d > c:
        note(f'--latency_delta {d:g} is more than {c:g} ms: a third is taken')
        d = float(f'{c / 3:.2g}')
    return Window(c - d, c)


class ScoredSubnet(NamedTuple):
    """A scored subnet; scores as COLUMNS. round: of the search, 0 for its random start, None of an earlier search."""
    subnet: Subnet
    ms: float
    scores: tuple
    round: int | None = None

    def rank(self):
        """Sorts the best first: by top-1 accuracy, of equal ones the faster."""
        return -self.scores[0], self.ms, str(self.subnet)


@dataclass(frozen=True)
class SearchRecipe:
    """Sizes of the evolution: flags of search_subnet.py."""
    population_size: int = setting(512, 'subnets alive at a time', least=1)
    num_rounds: int = setting(20, 'generations after the random start', least=1)
    num_mutations: int = setting(128, 'mutations a round', least=1)
    num_crossovers: int = setting(128, 'crossovers a round', least=1)
    parent_size: int | None = setting(None, 'parents of a round; default: the better half', least=1)


class SubnetSpace:
    """Subnets of a supernet (encoding.Supernet) with their predicted latencies; `reached`: smallest and largest, ms."""

    def __init__(self, supernet, predictor, arch_mutate_prob=0.1, resolution_mutate_prob=0.1, align=False):
        self.supernet, self.predictor, self.align = supernet, predictor, align
        self.probabilities = arch_mutate_prob, resolution_mutate_prob
        self.reached, self.count = (math.inf, -math.inf), 0
        self.extremes = [sampling.min_subnet(supernet), sampling.max_subnet(supernet)]
        for subnet in self.extremes:
            self.ms(subnet)

    def ms(self, subnet):
        """Predicted latency, ms."""
        ms = float(self.predictor.predict_subnet(subnet_config(self.supernet, subnet)))
        self.reached, self.count = (min(ms, self.reached[0]), max(ms, self.reached[1])), self.count + 1
        return ms

    def draw(self, rng):
        return sampling.sample_subnet(self.supernet, rng, self.align)

    def mutate(self, subnet, rng, strength=1.0):
        return sampling.mutate_subnet(self.supernet, subnet, rng, *(p * strength for p in self.probabilities),
                                      self.align)

    def cross(self, first, second, rng):
        return sampling.crossover_subnets(first, second, rng, self.align)


def walk(space, window, start, seen, rng, steps):
    """A subnet in the window whose string is not in `seen`: the first on a path from `start`, else None.

    The path takes mutations, at most `steps`, that are not further from the window than what they come from.
    """
    member, distance = start, window.distance(space.ms(start))
    for _ in range(steps):
        if not distance and str(member) not in seen:
            return member
        child = space.mutate(member, rng, rng.choice(STRENGTHS))
        child_distance = window.distance(space.ms(child))
        if child_distance <= distance:
            member, distance = child, child_distance
    return member if not distance and str(member) not in seen else None


def initial_population(space, window, size, rng):
    """Up to `size` different subnets in the window; fewer where there are hardly more. UserError: none found.

    Every member is the nearest of a few random subnets, walked into the window. After failures walks also start
    at members, or at the smallest and the largest subnet.
    """
    found, failures = {}, 0
    while len(found) < size and failures < (PATIENCE if found else EMPTY_PATIENCE):
        if failures % 2:
            start = rng.choice(list(found.values()) or space.extremes)
        else:
            start = min((space.draw(rng) for _ in range(DRAWS)),
                        key=lambda subnet: (window.distance(space.ms(subnet)), str(subnet) in found))
        member = walk(space, window, start, found, rng, STEPS)
        if member is None:
            failures += 1
        else:
            found[str(member)] = member
    if not found:
        raise UserError(f'{space.supernet}: found no subnet of {window} (predicted on {space.predictor.platform}); '
                        f'reachable: {space.reached[0]:.4g} to {space.reached[1]:.4g} ms, by the smallest, the largest '
                        f'and {space.count - 2} more subnets; change --latency_constraint or --latency_delta')
    return list(found.values())


def offspring(space, window, parents, seen, rng, recipe):
    """New subnets in the window: mutations, then crossovers of parents; fewer where nothing new is found."""
    children, seen, failures = [], set(seen), 0

    def mutation():
        return space.mutate(rng.choice(parents), rng)

    def crossover():
        return space.cross(*(rng.sample(parents, 2) if len(parents) > 1 else parents * 2), rng)

    for make in [mutation] * recipe.num_mutations + [crossover] * recipe.num_crossovers:
        tries = (make() for _ in range(TRIES))
        child = next((child for child in tries if str(child) not in seen and not window.distance(space.ms(child))),
                     None) or walk(space, window, rng.choice(parents), seen, rng, TRIES)
        if child is not None:
            seen.add(str(child))
            children.append(child)
            continue
        failures += 1
        if failures == ROUND_PATIENCE:
            break
    return children


def evolve(space, window, initial, score, rng, recipe):
    """Yields (round, [ScoredSubnet, …]) of the initial population (round 0) and of each round's children, all scored.

    score([Subnet, …]) gives their scores in order. Parents are the better half of the population (or the best
    recipe.parent_size), which is the best that was found so far. Ends early where a round finds no new subnet. rng:
    random.Random.
    """
    population, seen, batch = [], set(), initial
    for number in range(recipe.num_rounds + 1):
        if number:
            parents = [member.subnet for member in population[:recipe.parent_size or max(1, len(population) // 2)]]
            batch = offspring(space, window, parents, seen, rng, recipe)
        if not batch:
            return
        seen.update(map(str, batch))
        members = [ScoredSubnet(subnet, space.ms(subnet), tuple(scores), number)
                   for subnet, scores in zip(batch, score(batch))]
        population = sorted(population + members, key=ScoredSubnet.rank)[:recipe.population_size]
        yield number, members


class SharedHistory:
    """Scores by encoding, the same on every rank; the first rank keeps them in `folder` (evolution.History)."""

    def __init__(self, folder, settings, job, resume=False):
        def check(encoding, scores):
            parse_subnet(encoding, settings['supernet'])
            top1, top5, loss = scores
            if not (0 <= top1 <= 100 and 0 <= top5 <= 100 and loss >= 0):
                raise ValueError
        self.history = History(folder, COLUMNS, settings, resume, check) if job.is_main else None
        self.entries = dict(share(self.history.entries if job.is_main else None, job))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.history is not None:
            self.history.close()

    def add(self, encoding, scores):
        self.entries[encoding] = scores
        if self.history is not None:
            self.history.get(encoding, lambda: scores)


def score_subnets(subnets, measure, history, job, at_once=1, tick=lambda count: None):
    """Scores of subnets in order; those that the history lacks are measured, each by one rank.

    measure([Subnet, …]) iterates over the scores of this rank's share, `at_once` subnets at most. tick(count) is
    called as scores come. Alike sizes are measured side by side, so that ranks wait little for each other.
    """
    keys = [str(subnet) for subnet in subnets]
    digest = seed_of(*keys) % 2 ** 32
    if sum_over_ranks([digest], job)[0] != digest * job.world_size:
        raise UserError(f'rank {job.rank}: ranks propose different subnets; are their machines and packages the same?')
    new = sorted((subnet for key, subnet in zip(keys, subnets) if key not in history.entries),
                 key=lambda subnet: (subnet.resolution, sum(subnet.depths)))
    tick(len(keys) - len(new))
    step, width = job.world_size * at_once, len(COLUMNS)
    for first in range(0, len(new), step):
        together = new[first:first + step]
        values = [0.0] * (width * len(together))
        for i, scores in enumerate(measure(together[job.rank::job.world_size])):
            place = width * (job.rank + i * job.world_size)
            values[place:place + width] = scores
        values = sum_over_ranks(values, job)
        for i, subnet in enumerate(together):
            history.add(str(subnet), tuple(values[width * i:width * (i + 1)]))
        tick(len(together))
    return [history.entries[key] for key in keys]


def measure_with(model, calibration, valid, job, threads=1):
    """measure() for score_subnets(): accuracy of static copies, which batch norm is calibrated for.

    calibration, valid: all the images, on every rank (DecodedImages). A copy's scores depend on nothing else, and
    on a CPU each is computed on one core, `threads` at a time: they are the same on any number of ranks.
    """
    def copy(subnet):
        with kept_subnet(model):
            model.set_active_subnet(subnet)
            return quantise_weights_once(model.get_active_subnet().to(job.device))

    def run(network):
        calibrate(network, images_of(calibration, job.device))
        return accuracy(network, valid, job.alone())[:len(COLUMNS)]

    def measure(subnets):
        with local_initialisation():
            yield from thread_map(run, map(copy, subnets), threads)

    return measure


def search_windows(space, starts, score, recipe, seed, job, say):
    """ScoredSubnets of one search for each {Window: initial population}; score(subnets, tick) gives their scores.

    say(line) hears of each round. Every search has random numbers of its own, whatever else is searched.
    """
    found = []
    children = recipe.num_rounds * (recipe.num_mutations + recipe.num_crossovers)
    total = sum(map(len, starts.values())) + children * len(starts)
    with contextlib.closing(progress(total, f'{space.supernet} subnets', enabled=job.is_main)) as bar:
        for window, initial in starts.items():
            if len(initial) < recipe.population_size:
                say(f'{window}: only {len(initial)} subnets found to start with, not {recipe.population_size}; '
                    'the search continues with them')
            mine, number = [], -1
            for number, members in evolve(space, window, initial, lambda subnets: score(subnets, bar.update),
                                          random.Random(f'{seed} search {window}'), recipe):
                mine += members
                top = best_members(mine, window, 1)[0]
                say(f'{window}: round {number}/{recipe.num_rounds}: {len(members)} subnets, mean '
                    f'{sum(m.scores[0] for m in members) / len(members):.2f}%, best so far {top.scores[0]:.2f}% at '
                    f'{top.ms:.4g} ms: {top.subnet}')
            if number < recipe.num_rounds:
                say(f'{window}: round {number + 1} found no new subnet: the search ends with {len(mine)}')
            found += mine
    return found


def trained_valid_size(path):
    """The --valid_size that the checkpoint at `path` was trained with, None where it does not say."""
    checkpoint = load_checkpoint(path)
    settings = checkpoint.get('settings') if isinstance(checkpoint, dict) else None
    return settings.get('valid_size') if isinstance(settings, dict) else None


def note_trained_images(path, num_valid):
    """Say so where the checkpoint at `path` was trained on some of the first `num_valid` held-out images."""
    held_out = trained_valid_size(path)
    if held_out is not None and held_out < num_valid:
        note(f'{path}: trained with --valid_size {held_out}, so it has seen {num_valid - held_out} of the {num_valid} '
             f'images that are held out here; give --valid_size {held_out}')


def best_members(members, window, count=BEST):
    """The best ScoredSubnets in the window, best first."""
    return sorted((m for m in members if not window.distance(m.ms)), key=ScoredSubnet.rank)[:count]
