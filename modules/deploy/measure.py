"""Exported models measured, whatever runs them: latencies in turns, accuracy beside torch's."""
import time
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..training.evaluate import confusion_table


class Latency(NamedTuple):
    """Milliseconds of one image over all timed runs."""
    mean: float
    median: float
    p5: float
    p95: float

    @property
    def typical(self):
        """What tables and speed-ups show: a busy moment of the machine does not move it."""
        return self.median

    def __str__(self):
        return f'mean {self.mean:.3f} ms, median {self.median:.3f}, p5 {self.p5:.3f}, p95 {self.p95:.3f}'


def in_turns(calls, warmup=100, runs=100, rounds=10):
    """{name: Latency} of {name: function}, taken in turns: a busy moment of the machine meets them all."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    times = {name: [] for name in calls}
    while min(map(len, times.values())) < runs:
        for name, call in calls.items():
            for _ in range(min(max(1, runs // rounds), runs - len(times[name]))):
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: Latency(float(np.mean(ms)), *map(float, np.percentile(ms, (50, 5, 95))))
            for name, ms in times.items()}


@torch.no_grad()
def compare(network, run, batches, resize):
    """A torch Network and run(images (N, 3, r, r)) -> logits on batches (images, labels).

    (percent right by torch, by run(), percent of images of the same first class, rms of the difference of the logits
    over their standard deviation, number of images, confusion table (C, C) of run()); resize(images, size): to the
    network's resolution.
    """
    ours, theirs, labels = [], [], []
    network.eval()
    for images, truth in batches:
        images = resize(images, network.resolution)
        ours.append(network(images).numpy())
        theirs.append(run(images.numpy()))
        labels.append(truth.numpy())
    if not labels:
        raise UserError('no images to evaluate on')
    ours, theirs, labels = map(np.concatenate, (ours, theirs, labels))
    first, second = ours.argmax(1), theirs.argmax(1)
    confusion = confusion_table(*map(torch.as_tensor, (labels, second)), ours.shape[1]).numpy()
    error = np.sqrt(np.mean((ours - theirs) ** 2)) / max(ours.std(), 1e-12)
    return (*(100 * float(np.mean(right)) for right in (first == labels, second == labels, first == second)),
            float(error), len(labels), confusion)


def describe(runtime, torch, exported, agree, error, images):
    """What compare() found, as a line."""
    return (f'torch {torch:.2f}%  {runtime} {exported:.2f}%  agreement {agree:.2f}%  logit error {error:.4f}  '
            f'({images} images)')
