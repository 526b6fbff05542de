"""The tail statistics behind the Q-T score of a space, exactly or by sampling.

Definition (SpaceEvo, section 3; the code that published the LUTs): of n = 100,000 random subnets of a space,
each a resolution and one LUT row per stage at that resolution, p is the share with latency <= c, and L is the
mean NSR loss of the k = 50 lowest-loss ones among those. The space's score under c is 1 / (max(1, (t/p)^a) L).

Both estimators take the LUTs as `Tables` and give a list of `Tail`s, one per constraint. The mathematics of
`ExactEstimator` is in docs/space_search.md.
"""
import zlib
from typing import NamedTuple

import numpy as np
from scipy import fft, special

from ..search_space.block import out_size
from ..search_space.encoding import parse_block_id
from ..search_space.superspace import get_superspace
from .lut import lut_resolutions

NUM_SUBNETS, NUM_BEST = 100_000, 50


class Tail(NamedTuple):
    """Under one constraint: p = share of feasible subnets, mean NSR loss of the best (inf where none is feasible).

    found: probability that n draws hold a feasible subnet at all (1 or 0 for the definition's own draws).
    """
    p: float
    loss: float
    found: float


class Tables:
    """Latency (ms) and loss of the LUT rows by (lut id, resolution), and the latency of the unsearched stages.

    fixed_latency: {resolution (pixels): ms}.
    """

    def __init__(self, luts, superspace, fixed_latency):
        space = get_superspace(superspace)
        self.resolutions = lut_resolutions(luts, space)
        self.fixed = [float(fixed_latency[resolution]) for resolution in self.resolutions]
        self.rows = {}
        for lut_id, lut in luts.items():
            stride = space.input_stride(parse_block_id(space, lut_id).stage)
            masks = [lut.hw == out_size(resolution, stride) for resolution in self.resolutions]
            self.rows[lut_id] = [(lut.latency[mask], lut.loss[mask]) for mask in masks]

    def latency_range(self, lut_ids):
        """(smallest, largest) latency in ms of a subnet made of these six files' rows."""
        low = min(fixed + sum(self.rows[i][r][0].min() for i in lut_ids) for r, fixed in enumerate(self.fixed))
        high = max(fixed + sum(self.rows[i][r][0].max() for i in lut_ids) for r, fixed in enumerate(self.fixed))
        return float(low), float(high)

    def draw(self, lut_ids, count, rng):
        """(latency in ms, loss), each (count,): independent random subnets; rng a numpy Generator."""
        resolutions = np.sort(rng.integers(len(self.resolutions), size=count))
        latency, loss, start = np.empty(count), np.empty(count), 0
        for r, fixed in enumerate(self.fixed):
            stop = start + int(np.sum(resolutions == r))
            latency[start:stop], loss[start:stop] = fixed, 0
            for lut_id in lut_ids:
                row_latency, row_loss = self.rows[lut_id][r]
                pick = rng.integers(len(row_latency), size=stop - start)
                latency[start:stop] += row_latency[pick]
                loss[start:stop] += row_loss[pick]
            start = stop
        return latency, loss


def tail_of_draws(latency, loss, constraint, num_best=NUM_BEST):
    """Tail by its definition, from subnets that were drawn."""
    feasible = loss[latency <= constraint]
    if not len(feasible):
        return Tail(0.0, float('inf'), 0.0)
    best = feasible if len(feasible) <= num_best else np.partition(feasible, num_best - 1)[:num_best]
    return Tail(len(feasible) / len(loss), float(best.mean(dtype=np.float64)), 1.0)


def _generator(seed, *names):
    """numpy Generator of its own for these names: the order in which spaces are scored does not matter."""
    return np.random.default_rng([seed % 2 ** 32, zlib.crc32(' '.join(names).encode())])


class IndependentEstimator:
    """The definition, word for word: independent draws of its own for every space (slow; for comparisons)."""

    def __init__(self, tables, constraints, seed=0, num_subnets=NUM_SUBNETS, num_best=NUM_BEST):
        self.tables, self.constraints = tables, tuple(constraints)
        self.num_subnets, self.num_best, self.seed = num_subnets, num_best, seed

    def tails(self, lut_ids):
        latency, loss = self.tables.draw(lut_ids, self.num_subnets, _generator(self.seed, *lut_ids))
        return [tail_of_draws(latency, loss, c, self.num_best) for c in self.constraints]


class ExactEstimator:
    """The expectation of the definition over its draws, without drawing: two-dimensional FFT of the LUTs.

    Each file at each resolution is a distribution on a latency x loss grid; a space's is the convolution of its
    six, that is the product of their spectra. From the loss distribution of the feasible subnets, G(x) =
    P(latency <= c and loss <= x), follows the expected sum of the k lowest of n losses.
    """

    LATENCY_STEP, LOSS_STEP = 0.08, 0.0085      # widths of a bin, ms and NSR: errors of L below 0.02 %
    LATENCY_BINS = 64       # at least, up to the constraint: for networks of a few ms, 0.08 are too wide
    MAX_BINS = 1024         # of an axis; wider bins where that does not do (c of 100 ms, losses of untrained nets)
    DAMPING = 20.0          # latency mass one grid length beyond the constraint wraps around scaled by exp(-20)
    MARGIN = 8              # loss bins left free below the smallest sum: each row spreads over 3 bins

    def __init__(self, tables, constraints, num_subnets=NUM_SUBNETS, num_best=NUM_BEST):
        self.tables, self.constraints = tables, tuple(constraints)
        self.num_subnets, self.num_best = num_subnets, num_best
        self.curve = _expected_count(num_best, num_subnets)
        stages = {}
        for lut_id, rows in tables.rows.items():
            stages.setdefault(lut_id.split('_')[0], []).append(rows)
        spread = {stage: max(max(r[1].max() for r in rows) - min(r[1].min() for r in rows) for rows in files)
                  for stage, files in stages.items()}
        least = min(fixed + sum(min(rows[r][0].min() for rows in files) for files in stages.values())
                    for r, fixed in enumerate(tables.fixed))
        most = max(fixed + sum(max(rows[r][0].max() for rows in files) for files in stages.values())
                   for r, fixed in enumerate(tables.fixed))
        length = max(min(max(self.constraints), most) - least, 0)
        step = min(self.LATENCY_STEP, length / self.LATENCY_BINS) or self.LATENCY_STEP
        latency_bins, self.latency_step = self._axis(length, step)
        loss_bins, self.loss_step = self._axis(sum(spread.values()), self.LOSS_STEP)
        self.bins = latency_bins, loss_bins
        self.damping = self.DAMPING / latency_bins               # per bin
        self.spectra = {}

    def _axis(self, length, step):
        """(bins, their width) of a periodic axis of at least `length` with the margins."""
        bins = fft.next_fast_len(int(length / step) + 2 * self.MARGIN + 2, real=True)
        if bins > self.MAX_BINS:
            bins, step = self.MAX_BINS, length / (self.MAX_BINS - 2 * self.MARGIN - 2)
        return bins, step

    def _spectrum(self, lut_id):
        """[(least latency in ms, rfft2 of the damped grid)] by resolution and the file's least loss."""
        if lut_id not in self.spectra:
            rows = self.tables.rows[lut_id]
            least_loss = min(loss.min() for _, loss in rows)
            spectra = []
            for latency, loss in rows:
                least = latency.min()
                x, y = (latency - least) / self.latency_step, (loss - least_loss) / self.loss_step
                near = x < self.bins[0] - 2 * self.MARGIN       # the others are above every constraint
                grid = _deposit(x[near], y[near], self.bins) / len(latency)
                grid *= np.exp(-self.damping * self._positions())[:, None]
                spectra.append((least, fft.rfft2(grid)))
            self.spectra[lut_id] = least_loss, spectra
        return self.spectra[lut_id]

    def tails(self, lut_ids):
        files = [self._spectrum(lut_id) for lut_id in lut_ids]
        joint = 0
        for r, fixed in enumerate(self.tables.fixed):
            room = np.array(self.constraints) - fixed - sum(spectra[r][0] for _, spectra in files)
            product = files[0][1][r][1] * files[1][1][r][1]
            for _, spectra in files[2:]:
                product *= spectra[r][1]
            # einsum, not @: BLAS would start threads for this small product and wait longer than it works
            joint = joint + np.einsum('cl,lx->cx', self._below(room / self.latency_step), product)
        mass = fft.irfft(joint, self.bins[1], axis=1) / len(self.tables.fixed)      # (constraints, loss bins)
        mass = np.roll(mass, self.MARGIN, axis=1)
        least_loss = sum(loss for loss, _ in files)
        centres = least_loss + self.loss_step * (np.arange(self.bins[1]) - self.MARGIN)
        return [self._tail(row, centres) for row in mass]

    def _positions(self):
        """Latency bins of the periodic axis, its end read as -8 .. -1: (latency bins,)."""
        return (np.arange(self.bins[0]) + self.MARGIN) % self.bins[0] - self.MARGIN

    def _below(self, room):
        """Spectral weights that sum a damped latency axis up to `room` bins: (constraints, latency bins)."""
        position = self._positions()
        step = np.clip(room[:, None] - position + 0.5, 0, 1) * np.exp(self.damping * position)
        return fft.ifft(step, axis=1)

    def _tail(self, mass, centres):
        """Tail from the feasible mass in each loss bin."""
        below = np.maximum.accumulate(np.maximum(np.cumsum(mass), 0))
        p = float(min(below[-1], 1.0))
        expected = p * self.num_subnets
        if expected < 1e-6:
            return Tail(0.0, float('inf'), 0.0)
        taken = np.interp(below * self.num_subnets, *self.curve)
        loss = float(np.sum(np.diff(taken, prepend=0) * centres) / taken[-1])
        return Tail(p, loss, float(-np.expm1(-expected)))


def _expected_count(k, n):
    """(m, E[min(k, Bin(n, m/n))]) on a fine grid of m: how many of the k lowest have loss below G = m/n."""
    m = np.concatenate([np.linspace(0, 4 * k + 100, 8 * k + 4001), [n]])
    u = np.minimum(m / n, 1)
    expected = m * special.bdtr(k - 2, n - 1, u) if k > 1 else np.zeros_like(m)
    return m, expected + k * special.bdtrc(k - 1, n, u)


def _deposit(x, y, shape):
    """Points as masses on a periodic grid; their means, variances and covariance are kept.

    Each point spreads over 3 x 3 bins with the weights of quadratic interpolation; x, y in bins.
    """
    grid = np.zeros(shape)
    cells, weights = [], []
    for value in (x, y):
        centre = np.rint(value)
        d = value - centre
        cells.append(centre.astype(int))
        weights.append((d * (d - 1) / 2, 1 - d * d, d * (d + 1) / 2))
    for i in range(3):
        for j in range(3):
            index = (cells[0] + i - 1) % shape[0], (cells[1] + j - 1) % shape[1]
            np.add.at(grid, index, weights[0][i] * weights[1][j])
    return grid
