"""Stable latency measurements on any device, in a journal as they come, so that a killed run continues.

A device has prepare(blocks) -> run and str(device); run(count) -> [ms] times `count` runs of an INT8 model of the
Blocks in a row, of an empty model for no blocks. modules/deploy has one for each runtime.

Models are measured in chunks. All models of a chunk take turns, several rounds of them, beside a reference model that
is in every chunk: a chunk in which the reference is slow was disturbed and is measured again.
"""
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..cli import positive, within
from ..errors import UserError
from ..files import Journal, hold, read_journal
from .tables import format_key, parse_key

FIRST_BLOCK = 'FirstConvBlock'      # begins whole networks, whose latency includes that of the call
QUANTILE = 0.25                     # of the rounds: other processes only ever add time, so the lower half is nearer
QUICK_CHUNKS = 0.1                  # quantile of the chunks: on a busy machine most may be disturbed
TRIES = 3                           # measurements of a disturbed chunk


def add_host_arguments(parser, runtime):
    """--core and --threads of a runtime on this machine."""
    parser.add_argument('--core', type=within(int, 0, 4095),
                        help='core of this machine to run on; default: the last one')
    parser.add_argument('--threads', type=positive(int), default=1,
                        help=f'threads of {runtime}; with more than one the process is not pinned')


def run_on_one_core(args):
    """Pin a run of one thread, as add_host_arguments() say."""
    if args.threads == 1:
        torch.set_num_threads(1)
        pin(args.core)


def pin(core=None):
    """Keep this process and its threads on one core, by default the last it may use; the core, None where the system
    cannot."""
    if not hasattr(os, 'sched_setaffinity'):
        return None
    allowed = os.sched_getaffinity(0)
    core = max(allowed) if core is None else core
    if core not in allowed:
        raise UserError(f'--core {core}: this process may use {" ".join(map(str, sorted(allowed)))}')
    os.sched_setaffinity(0, {core})
    return core


class Row(NamedTuple):
    """One measured item. use: what for (see builder.py); ms: without the cost of a call, but for whole networks.

    spread: (median - quantile) / quantile of the rounds; reference_ms: the reference model's in the same chunk;
    seconds: spent by the run so far.
    """
    chunk: int
    use: str
    ms: float
    spread: float
    reference_ms: float
    seconds: float
    blocks: tuple


@dataclass
class Timing:
    """How a chunk is measured: rounds of turns; in a turn one untimed run, then timed ones for about turn_ms.

    runs: so many timed ones and no untimed one, of a device that warms up by itself; warmup: untimed runs before.
    """
    rounds: int = 8
    turn_ms: float = 3.0
    max_runs: int = 10
    warmup: int = 3
    runs: int | None = None


def time_in_turns(runs, timing):
    """([ms], [spread]) of runs of prepared models, measured in turns."""
    medians = [[] for _ in runs]
    for run in runs if timing.warmup else ():
        run(timing.warmup)
    for _ in range(timing.rounds):
        for run, seen in zip(runs, medians):
            count = timing.runs
            if count is None:
                first, = run(1)         # brings the model back into the caches
                count = max(1, min(timing.max_runs, int(timing.turn_ms / max(first, 1e-6))))
            seen.append(statistics.median(run(count)))
    ms = np.quantile(medians, QUANTILE, axis=1)
    return ms.tolist(), (np.median(medians, axis=1) / ms - 1).tolist()


class Profile:
    """Measurements of a device in a Journal; what is in it already is not measured again.

    settings: {name: value} of what the measurements depend on. max_drift: see quiet_chunks(); max_disturbed: share of
    the chunks that may be disturbed.
    """

    def __init__(self, path, device, reference, settings, resume=False, max_drift=0.1, max_disturbed=0.33,
                 timing=None):
        self.path, self.device, self.reference = path, device, reference
        self.max_drift, self.max_disturbed = max_drift, max_disturbed
        self.timing = timing or Timing()
        self._by_chunk, self._prepared = {}, None
        self.new = 0                        # chunks that this run measured
        hold(path)
        self._journal = Journal(path, settings, _parse_chunk, resume)
        self._saved = {rows[0].chunk: rows for rows in self._journal.entries}
        self._before = max((rows[-1].seconds for rows in self._saved.values()), default=0.0)
        self._began = time.monotonic()

    @property
    def rows(self):
        """[Row] of the chunks that were asked for."""
        return [row for rows in self._by_chunk.values() for row in rows]

    def start_over(self):
        """Chunks are asked for from 0 on once more; those measured so far are saved ones."""
        self._saved.update(self._by_chunk)
        self._by_chunk = {}

    @property
    def seconds(self):
        """Spent so far, by killed runs too."""
        return self._before + time.monotonic() - self._began

    def has(self, number):
        """Whether a chunk was measured by a killed run."""
        return number in self._saved

    def chunk(self, number, items):
        """[Row] of items [(use, blocks)]; UserError where the file has this chunk with others."""
        if self.has(number):
            rows = self._by_chunk[number] = self._saved[number]
            if [(row.use, row.blocks) for row in rows] != [(use, tuple(blocks)) for use, blocks in items]:
                raise UserError(f'{self.path}: chunk {number} holds other blocks than this version would measure; '
                                'start over, without --resume')
            return rows
        ms, spread, reference_ms = self._measure([blocks for _, blocks in items])
        rows = [Row(number, use, *row, reference_ms, self.seconds, tuple(blocks))
                for (use, blocks), *row in zip(items, ms, spread)]
        self._journal.append(_format_chunk(rows))
        self._by_chunk[number] = rows
        self.new += 1
        return rows

    def _measure(self, items):
        if self._prepared is None:
            self._prepared = [self.device.prepare(()), self.device.prepare(self.reference)]
        runs = self._prepared + [self.device.prepare(blocks) for blocks in items]
        best = None
        for _ in range(TRIES):
            (call, reference, *ms), (_, _, *spread) = time_in_turns(runs, self.timing)
            if best is None or reference < best[2]:
                ms = [t if blocks[0].name == FIRST_BLOCK else max(t - call, t / 100) for t, blocks in zip(ms, items)]
                best = ms, spread, reference
            if best[2] <= self.level(best[2]) * (1 + self.max_drift):
                break
        return best

    def level(self, more=None):
        """The reference's latency where nothing disturbs: that of the quickest tenth of the chunks."""
        seen = [rows[0].reference_ms for rows in self._by_chunk.values()] + ([] if more is None else [more])
        return float(np.quantile(seen, QUICK_CHUNKS))

    def quiet_chunks(self, max_drift=None):
        """Numbers of the chunks that were not disturbed: their reference is at most max_drift slower than elsewhere."""
        max_drift = self.max_drift if max_drift is None else max_drift
        level = self.level() if self._by_chunk else 0.0
        return {number for number, rows in self._by_chunk.items()
                if rows[0].reference_ms <= level * (1 + max_drift)}

    def disturbed(self, since=0):
        """Share of chunks that were disturbed, from number `since` on."""
        chunks = {number for number in self._by_chunk if number >= since}
        return len(chunks - self.quiet_chunks()) / len(chunks) if chunks else 0.0

    def check(self, since=0):
        """UserError where the machine is too noisy to believe its measurements, those from chunk `since` on."""
        if self.disturbed(since) > self.max_disturbed:
            seen = np.array([rows[0].reference_ms for number, rows in self._by_chunk.items() if number >= since])
            low, high = np.quantile(seen, (0.1, 0.9))
            raise UserError(
                f'too noisy: one and the same model took {low:.3f} to {high:.3f} ms (10th to 90th percentile), in '
                f'{self.disturbed(since):.0%} of {len(seen)} chunks it was more than {self.max_drift:.0%} off; no '
                'platform is written. Stop what else runs here, then --resume, or with a larger --max_disturbed')


def quiet_rows(path, max_drift=0.1):
    """[Row] of a file of measurements, those of disturbed chunks left out, see Profile.quiet_chunks()."""
    _, chunks, _ = read_journal(path, _parse_chunk)
    level = np.quantile([rows[0].reference_ms for rows in chunks], QUICK_CHUNKS)
    return [row for rows in chunks for row in rows if row.reference_ms <= level * (1 + max_drift)]


def _format_chunk(rows):
    """A chunk as a line, so that a kill leaves all of it or nothing."""
    return json.dumps({'chunk': rows[0].chunk, 'reference_ms': rows[0].reference_ms, 'seconds': rows[0].seconds,
                       'rows': [[row.use, row.ms, row.spread, ' '.join(map(format_key, row.blocks))] for row in rows]})


def _parse_chunk(line):
    chunk = json.loads(line)
    rows = [Row(int(chunk['chunk']), use, float(ms), float(spread), float(chunk['reference_ms']),
                float(chunk['seconds']), tuple(map(parse_key, blocks.split(' '))))
            for use, ms, spread, blocks in chunk['rows']]
    if not all(math.isfinite(value) for row in rows for value in row[2:6]) or not rows:
        raise ValueError('numbers have to be finite')
    return rows
