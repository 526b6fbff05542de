"""A latency platform for any device: measure blocks and networks, fit, validate, write data/latency/<platform>/.

A block alone is measured in a loop: its weights stay in the processor's caches. In a network they are read from memory
each time, and the cost of calling the runtime is paid once, not once a block. So a block's latency in a network is
taken as: measured alone, plus a rate (ms per MB of weights), minus a constant for the call. Both numbers are fitted to
the differences between measured networks and the sums of their blocks' predictions. The nets are then fitted to single
blocks and whole random networks together. Nothing is fitted to held-out blocks and networks. With the model of another
platform to begin with, its nets are trained on, and few measurements do.
"""
import time
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from ..errors import UserError
from ..modeling.complexity import block_complexity
from .candidates import make_candidates, named_networks, random_network
from .kernel_model import kernels_of
from .regression import Design, fit_corrections, fit_nets

# what a row is measured for: to be fitted to, held out, held out and measured before, networks to fit to and to test
FIT, HELD_OUT, AGAIN, NETWORK, TEST = 'fit', 'held_out', 'again', 'network', 'test'
CHUNK = {FIT: 20, HELD_OUT: 3, AGAIN: 1, NETWORK: 1}          # items of a chunk
TESTS = 2, 1                # test networks of a chunk: until each was measured once, and later, when they are repeated
CHECK = 10                  # chunks between looks at the noise, after a share of the time: the start may be disturbed
PATIENCE = 0.3
DRIFT = 0.1                 # a chunk that is more off does not decide what is measured next, whatever --max_drift is:
                            # so a run can be resumed with another
FIRST_REFIT = 240           # blocks to fit to before errors are looked at; again whenever there are twice as many
FOLDS = 3                   # a third of the blocks tells errors to a fit of the others
EPOCHS, BATCH = 50, 128
PRIOR, NOISE = 0.06, 0.02   # of the corrections, see regression.fit_corrections
OUTLIER = 0.02              # relative residual of a network from which it counts less for the context
RATE = 0.05                 # of a Context, to begin with
MOST_CALL = 0.1             # its call constant is at most this share of the quickest tenth of blocks' latencies
LEAST_SHARE = 0.5           # of its time alone that a block takes in a network at least
NETWORK_DRAWS = 3           # of a network in an epoch; single blocks are drawn once
RESERVE = 0.12              # share of the time for the last fit and the pictures
LEAST = {FIT: 100, HELD_OUT: 10, NETWORK: 5, TEST: 3}       # rows without which nothing is fitted,
LEAST_MORE = {FIT: 20, HELD_OUT: 3, NETWORK: 1, TEST: 3}    # or no other platform's model is fitted to them


def weights_mb(block):
    """MB of a Block's INT8 weights: a byte per parameter."""
    return block_complexity(block)[1] / 1e6


def test_networks(superspaces, count, seed):
    """{name: Blocks}: published networks of the hyperspaces and `count` random subnets of each."""
    _, rng = make_candidates((), f'{seed} test')
    found = named_networks(superspaces)
    for space in superspaces:
        found.update((f'{space} random {i}', random_network(space, rng)) for i in range(count))
    return found


def measure(profile, superspaces, tests, minutes, seed=0, say=print):
    """Fill a Profile until the minutes are used up, by killed runs too: chunks of blocks and networks, of blocks more
    where a fit to the others is wrong, and test networks again and again. tests: of test_networks().

    What is measured depends on the seed and on what was measured before, not on the clock, which only ends it.
    """
    profile.start_over()
    candidates, rng = make_candidates(superspaces, seed)
    end, refit, number, held = 60 * minutes * (1 - RESERVE), FIRST_REFIT, 0, []
    known = 0                                       # chunks of killed runs
    once = -(-len(tests) // TESTS[0])               # chunks until each test network was measured
    while profile.seconds < end or profile.has(number):
        fresh = candidates.draw(CHUNK[HELD_OUT], held_out=True)
        again = [rng.choice(held) for _ in range(CHUNK[AGAIN] if held else 0)]
        held += fresh
        count, first = (TESTS[0], TESTS[0] * number) if number < once else (TESTS[1], TESTS[1] * (number - once))
        chosen = [list(tests)[i % len(tests)] for i in range(first, first + count)]
        items = [(f'{TEST} {name}', tests[name]) for name in chosen]
        items += [(FIT, (block,)) for block in _lost(candidates, profile) + candidates.draw(CHUNK[FIT])]
        items += [(HELD_OUT, (block,)) for block in fresh] + [(AGAIN, (block,)) for block in again]
        items += [(NETWORK, random_network(superspaces[number % len(superspaces)], rng))] * CHUNK[NETWORK]
        known += profile.has(number)
        profile.chunk(number, items)
        _progress(profile, number, end, say)
        number += 1
        if (number - known) % CHECK == 0 and number > known and profile.seconds > PATIENCE * end:
            profile.check(since=known)              # of this run: after a noisy one, --resume is to measure more
        fitted = rows_of(profile, FIT, DRIFT)
        if len(fitted) >= refit:
            refit = 2 * len(fitted)
            blocks, errors = fold_errors(fitted, seed)
            candidates.aim(blocks, errors)
            worst = sorted(candidates.weights, key=candidates.weights.get)[-3:]
            say(f'{len(fitted)} blocks: median error of a third by a fit to the others '
                f'{100 * np.median(np.abs(errors)):.1f} %; more of {", ".join(map(_region_name, worst))}')


def _lost(candidates, profile):
    """Blocks of small regions that disturbed chunks alone have measured: they are measured again."""
    known = {row.blocks for row in rows_of(profile, FIT, DRIFT)}
    return [block for block in candidates.small_drawn if (block,) not in known][:CHUNK[FIT]]


def _progress(profile, number, end, say):
    left = max(0.0, end - profile.seconds)
    say(f'chunk {number}: {len(profile.rows)} measured, {left // 60:.0f} min {left % 60:02.0f} s left')


def _region_name(region):
    name, activation, kernel, octave = region
    return f'{name} {activation} k{kernel} at {2 ** octave} px'


def rows_of(profile, use, max_drift=None):
    """Rows measured for `use`, without those of disturbed chunks; max_drift: by default the profile's."""
    quiet = profile.quiet_chunks(max_drift)
    return [row for row in profile.rows if row.use.partition(' ')[0] == use and row.chunk in quiet]


def adapted(blocks, ms, base=None, seed=0):
    """KernelModel of single Blocks that took ms (array); base: KernelModel to begin with."""
    return _fit_nets('', Design([[block] for block in blocks]), ms, [np.arange(len(ms))], EPOCHS, seed, base)


def fold_errors(rows, seed):
    """(Blocks, relative errors) of a third of single-block rows, predicted by a fit to the others."""
    design, ms = Design([row.blocks for row in rows]), np.array([row.ms for row in rows])
    fold = np.arange(len(rows)) % FOLDS == 0
    model = _fit_nets('', design, ms, [np.flatnonzero(~fold)], EPOCHS, seed)
    errors = design.predict(model)[fold] / ms[fold] - 1
    return [row.blocks[0] for row, chosen in zip(rows, fold) if chosen], errors


def _fit_nets(platform, design, ms, groups, epochs, seed, base=None):
    return fit_nets(platform, design, ms, [(group, len(group)) for group in groups], tiled=True, block_factor=True,
                    epochs=epochs, batch=BATCH, seed=seed, base=base)


def kernels_in(items):
    """Names of the kernels in tuples of Blocks."""
    return {kernel.name for block in {block for blocks in items for block in blocks} for kernel in kernels_of(block)}


class Context(NamedTuple):
    """What a block costs more inside a network than alone: rate in ms per MB of its weights, less `call` in ms."""
    rate: float
    call: float

    def in_network(self, block, ms):
        """ms inside a network of a Block that takes `ms` alone."""
        return max(ms + self.rate * weights_mb(block) - self.call, LEAST_SHARE * ms)


def fit_context(platform, singles, networks, epochs, seed, base=None):
    """Context that explains rows of networks by a fit to rows of single blocks."""
    design, ms = Design([row.blocks for row in singles]), np.array([row.ms for row in singles])
    model = _fit_nets(platform, design, ms, [np.arange(len(ms))], epochs, seed, base)
    most = MOST_CALL * np.quantile(ms, 0.1)
    sums = Design([row.blocks for row in networks]).predict(model)
    ms = np.array([row.ms for row in networks])
    terms = np.array([[sum(map(weights_mb, row.blocks)), -len(row.blocks)] for row in networks])
    units = np.array([RATE, most])
    found = least_squares(lambda x: (terms @ (units * x) + sums) / ms - 1, (1.0, 0.0), bounds=((0, -1), (np.inf, 1)),
                          loss='soft_l1', f_scale=OUTLIER)
    return Context(*map(float, units * found.x))


class Platform:
    """A fitted model and how good it is: KernelModel `model`, Context `context`, blocks and networks.

    held_out: [(Block, predicted ms, measured ms)]; networks: [(name, predicted, measured)]; again: [(measured ms,
    measured ms before)]. base: KernelModel of another platform to begin with.
    """

    def __init__(self, name, profile, epochs=EPOCHS, seed=0, base=None):
        rows = {use: rows_of(profile, use) for use in (*LEAST, AGAIN)}
        found = {use: len({row.blocks for row in rows[use]}) for use in LEAST}
        needed = LEAST if base is None else LEAST_MORE
        lack = [f'{found[use]} {use}' for use, least in needed.items() if found[use] < least]
        wanted = kernels_in(row.blocks for use in (NETWORK, TEST, HELD_OUT) for row in rows[use])
        known = kernels_in(row.blocks for row in rows[FIT]) | set(base.nets if base else ())
        lack += [f'no {kernel}' for kernel in sorted(wanted - known)]
        if lack:
            raise UserError(f'{name}: too little was measured undisturbed ({", ".join(lack)}; needed: '
                            f'{", ".join(f"{n} {use}" for use, n in needed.items())}): --resume with more --minutes')
        start = time.monotonic()
        self.name, self.rows = name, rows
        self.context = fit_context(name, rows[FIT], rows[NETWORK], epochs, seed, base)
        items = rows[FIT] + rows[NETWORK]
        design, ms = Design([row.blocks for row in items]), np.array([self.in_network(row) for row in items])
        everything = np.arange(len(items))
        networks = np.repeat(everything[len(rows[FIT]):], NETWORK_DRAWS)
        self.model = _fit_nets(name, design, ms, [everything[:len(rows[FIT])], networks], epochs, seed,
                               base)
        self.model.corrections = fit_corrections(self.model, design, ms, everything, PRIOR, NOISE)
        self.held_out = [(row.blocks[0], *pair) for row, pair in zip(rows[HELD_OUT], self._pairs(rows[HELD_OUT]))]
        self.networks = self._test(rows[TEST])
        before = {row.blocks: self.in_network(row) for row in rows[HELD_OUT]}
        self.again = [(self.in_network(row), before[row.blocks]) for row in rows[AGAIN] if row.blocks in before]
        self.fit_seconds = time.monotonic() - start

    def in_network(self, row):
        """ms of a row: of a single block as part of a network."""
        return self.context.in_network(row.blocks[0], row.ms) if row.use in (FIT, HELD_OUT, AGAIN) else row.ms

    def _test(self, rows):
        """[(name, predicted, median of what was measured in all chunks)] of the test networks."""
        named = {}
        for row in rows:
            named.setdefault(row.use.partition(' ')[2], []).append(row)
        pairs = self._pairs([rows[0] for rows in named.values()])
        return [(name, predicted, float(np.median([row.ms for row in rows])))
                for (name, rows), (predicted, _) in zip(named.items(), pairs)]

    def _pairs(self, rows):
        predicted = Design([row.blocks for row in rows]).predict(self.model)
        return [(float(ms), self.in_network(row)) for ms, row in zip(predicted, rows)]
