"""Stable latency measurements on any device, appended to a CSV as they come, so that a killed run goes on.

A device has prepare(blocks) -> run and str(device); run(count) -> [ms] times `count` runs of an INT8 model of the
Blocks in a row, of an empty model for no blocks. modules/deploy has one for each runtime.

Models are measured in chunks. All models of a chunk take turns, several rounds of them, beside a reference model that
is in every chunk: a chunk in which the reference is slow was disturbed and is measured again.
"""
import csv
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files import hold, set_aside, write_text
from .kernel_model import LatencyError
from .tables import format_key, parse_key

FIRST_BLOCK = 'FirstConvBlock'      # begins whole networks, whose latency includes that of the call
QUANTILE = 0.25                     # of the rounds: other processes only ever add time, so the lower half is nearer
QUICK_CHUNKS = 0.1                  # quantile of the chunks: on a busy machine most may be disturbed
TRIES = 3                           # measurements of a disturbed chunk
FIELDS = 'chunk', 'use', 'ms', 'rounds_spread', 'reference_ms', 'seconds', 'blocks'


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
class Turns:
    """How a chunk is measured: rounds of turns; in a turn one untimed run, then timed ones for about turn_ms.

    runs: so many timed ones and no untimed one, of a device that warms up by itself; warmup: untimed runs before.
    """
    rounds: int = 8
    turn_ms: float = 3.0
    max_runs: int = 10
    warmup: int = 3
    runs: int | None = None


def take_turns(runs, turns):
    """([ms], [spread]) of runs of prepared models, measured in turns."""
    medians = [[] for _ in runs]
    for run in runs if turns.warmup else ():
        run(turns.warmup)
    for _ in range(turns.rounds):
        for run, seen in zip(runs, medians):
            count = turns.runs
            if count is None:
                first, = run(1)         # brings the model back into the caches
                count = max(1, min(turns.max_runs, int(turns.turn_ms / max(first, 1e-6))))
            seen.append(statistics.median(run(count)))
    ms = np.quantile(medians, QUANTILE, axis=1)
    return ms.tolist(), (np.median(medians, axis=1) / ms - 1).tolist()


class Profile:
    """Measurements of a device in a CSV; what is in it already is not measured again.

    facts: {name: value} of what the measurements depend on, the file's first line. A file of other facts, or one
    that is damaged before its last line, is a UserError; a last line that a killed run left unfinished goes.
    max_drift: see quiet_chunks(); max_disturbed: share of the chunks that may be disturbed.
    """

    def __init__(self, path, device, reference, facts, resume=False, max_drift=0.1, max_disturbed=0.33,
                 turns=None):
        self.path, self.device, self.reference = path, device, reference
        self.max_drift, self.max_disturbed = max_drift, max_disturbed
        self.turns = turns or Turns()
        self._by_chunk, self._saved, self._prepared = {}, {}, None
        self.new = 0                        # chunks that this run measured
        hold(path)
        header = '# ' + json.dumps(facts) + '\n' + ','.join(FIELDS) + '\n'
        if resume and os.path.isfile(path):
            for row in _read(path, header):
                self._saved.setdefault(row.chunk, []).append(row)
        else:
            set_aside(path)
            write_text(path, header)
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
                                'begin anew, without --resume')
            return rows
        ms, spread, reference_ms = self._measure([blocks for _, blocks in items])
        rows = [Row(number, use, *row, reference_ms, self.seconds, tuple(blocks))
                for (use, blocks), *row in zip(items, ms, spread)]
        _append(self.path, rows)
        self._by_chunk[number] = rows
        self.new += 1
        return rows

    def _measure(self, items):
        if self._prepared is None:
            self._prepared = [self.device.prepare(()), self.device.prepare(self.reference)]
        runs = self._prepared + [self.device.prepare(blocks) for blocks in items]
        best = None
        for _ in range(TRIES):
            (call, reference, *ms), (_, _, *spread) = take_turns(runs, self.turns)
            if best is None or reference < best[2]:
                best = [max(t - call * (blocks[0].name != FIRST_BLOCK), t / 100) for t, blocks in zip(ms, items)], \
                    spread, reference
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


def _append(path, rows):
    """Whole chunks only: one write, so that a killed run leaves at most an unfinished last line."""
    lines = [[row.chunk, row.use, repr(row.ms), f'{row.spread:.4f}', repr(row.reference_ms), f'{row.seconds:.1f}',
              ' '.join(map(format_key, row.blocks))] for row in rows]
    with open(path, 'ab', buffering=0) as f:
        f.write((''.join(','.join(map(str, line)) + '\n' for line in lines) + f'# end {rows[0].chunk}\n').encode())


def _read(path, header):
    """[Row] of a file's whole chunks; cuts off what a killed run left after them."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            text = f.read()
    except UnicodeDecodeError as error:
        raise LatencyError(f'{path}: not text ({error.reason}); begin anew, without --resume') from None
    if not text.startswith(header):
        raise UserError(f'{path}: measured on another device, for other spaces or with another seed '
                        f'({text.partition(chr(10))[0][:200]}); begin anew, without --resume')
    rows, chunk, whole = [], [], len(header)
    position = whole
    for line in text[len(header):].splitlines(keepends=True):
        position += len(line)
        if line.startswith('# end ') and line.endswith('\n'):
            rows, chunk, whole = rows + chunk, [], position
        elif line.endswith('\n'):
            chunk.append(_parse(path, line))
    if whole < len(text):
        write_text(path, text[:whole])
    return rows


def quiet_rows(path, max_drift=0.1):
    """[Row] of a measurements.csv, those of disturbed chunks left out, see Profile.quiet_chunks()."""
    with open(path, encoding='utf-8', newline='') as f:
        header = f.readline() + f.readline()
    rows = _read(path, header)
    level = np.quantile(list({row.chunk: row.reference_ms for row in rows}.values()), QUICK_CHUNKS)
    return [row for row in rows if row.reference_ms <= level * (1 + max_drift)]


def _parse(path, line):
    cells = next(csv.reader([line]))
    try:
        number, use, *numbers, blocks = cells
        ms, spread, reference_ms, seconds = values = list(map(float, numbers))
        if not all(map(math.isfinite, values)):
            raise ValueError('numbers have to be finite')
        return Row(int(number), use, ms, spread, reference_ms, seconds, tuple(map(parse_key, blocks.split(' '))))
    except ValueError as error:
        raise LatencyError(f'{path}: {line.strip()[:120]!r}: not a measurement ({error})') from None
