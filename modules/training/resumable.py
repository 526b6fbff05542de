"""The training loop of all stages: runs that are stopped at any moment and resumed, and the images of their steps."""
import contextlib
import copy
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import UserError
from ..files import check_file, hold, set_aside
from .checkpoint import load_checkpoint, restore, save_checkpoint
from .data import Data, train_loader
from .distributed import any_rank, check_same, of_main
from .log import curves, note, progress


@dataclass(kw_only=True)
class ResumableRun:
    """What a run keeps beside its weights; `step` counts optimiser steps, settings decide the weights.

    A loss shows whether the state before it was good: `pending` is a checkpoint that write_pending() writes once the
    loss after it is known to be good. Subclasses say in content() what else a checkpoint holds, in PROGRESS
    {name: type} which of their fields, and in ADVICE what to try when a loss is not good.
    """
    PROGRESS: ClassVar = {'step': int, 'done': bool}
    ADVICE: ClassVar = 'a smaller learning rate'
    path: str
    optimizer: torch.optim.Optimizer
    settings: dict
    step: int = 0
    done: bool = False
    pending: dict = None

    def content(self):
        """{key: value} of a checkpoint: the weights, and what they belong to."""
        raise NotImplementedError

    @property
    def best_path(self):
        """checkpoint_best.pth beside checkpoint.pth."""
        root, ending = os.path.splitext(self.path)
        return f'{root}_best{ending}'

    def state(self):
        """What a checkpoint holds, copied: training continues."""
        return copy.deepcopy({**self.content(), 'optimizer': self.optimizer.state_dict(), 'settings': self.settings,
                              'epoch': self.step // self.settings['steps an epoch'],
                              **{key: getattr(self, key) for key in self.PROGRESS}})

    def save(self, job, path=None):
        """Write the present state to `path`, by default the run's own."""
        if job.is_main:
            save_checkpoint(path or self.path, self.state())

    def write_pending(self, job):
        """Write the pending state: the loss after it was good."""
        if self.pending and job.is_main:
            save_checkpoint(self.path, self.pending)
        self.pending = None

    def resume(self, checkpoint, steps, job):
        """Go on from the checkpoint of a run of `steps` steps in all; UserError as restore().

        A published one says epochs, not steps: it continues where its optimizer's state fits, and is kept as x_old.pth.
        """
        if 'step' not in checkpoint:
            checkpoint = self._published(checkpoint, steps, job)
        for key, value in restore(self.path, checkpoint, self.settings, self.optimizer, self.PROGRESS, steps).items():
            setattr(self, key, value)

    def _published(self, checkpoint, steps, job):
        epoch, old = checkpoint['epoch'], '{}_old{}'.format(*os.path.splitext(self.path))
        step = epoch * self.settings['steps an epoch'] if type(epoch) is int else -1
        state = {**{key: getattr(self, key) for key in self.PROGRESS}, 'step': step, 'settings': self.settings,
                 'optimizer': checkpoint['optimizer']}
        try:
            if not 0 <= step < steps or of_main(lambda: os.path.exists(old), job):
                raise UserError(f'epoch {epoch} of {steps // self.settings["steps an epoch"]}, or {old} is there')
            restore(self.path, state, self.settings, self.optimizer, self.PROGRESS, steps)
        except UserError as error:
            raise UserError(f'{self.path}: a published checkpoint that a run cannot continue from ({error}), and would '
                            'write over; give another output folder') from None
        if job.is_main:
            note(f'{self.path}: continues with epoch {epoch}; the published file is kept as {set_aside(self.path)}')
        return state

    def check_ranks(self, job):
        """UserError unless all ranks are at the same step; before the first one."""
        check_same(f'the step of {self.path}', self.step, job)

    def failure(self, what):
        """UserError of a run that a loss has stopped: `what`, the last good checkpoint and what to try."""
        kept = f'the last good checkpoint is {self.path}' if os.path.exists(self.path) else 'there is no checkpoint yet'
        return UserError(f'{what}; {kept}; try {self.ADVICE}')


def checkpoint_to_resume(path, resume, job, read=load_checkpoint):
    """What is in the checkpoint of a run that continues, None where it begins; on every rank what rank 0 sees.

    Without `resume` one that is there is kept as x_old.pth. No other process may train it from now on.
    UserError: another one does, none can be written there, or what is there is no state of a run of ours: it would be
    written over.
    """
    def found():
        check_file(path)
        hold(path)
        if not os.path.isfile(path):
            return None
        if not resume:
            note(f'{path}: of an earlier run, kept as {set_aside(path)}')
            return None
        checkpoint = read(path)
        if not (isinstance(checkpoint, Mapping) and 'optimizer' in checkpoint and {'step', 'epoch'} & set(checkpoint)):
            raise UserError(f'{path}: no run to continue (no step and optimizer in it), and a new one would write '
                            'over it: give another output folder')
        return checkpoint
    return of_main(found, job)


def steps_per_epoch(data, batch_size, seed, job, max_steps=None):
    """Optimiser steps of an epoch, at most `max_steps` of them."""
    steps = len(train_loader(data.train, batch_size, 0, seed, job.rank, job.world_size))
    return min(steps, max_steps or steps)


@dataclass(frozen=True)
class Schedule:
    """Which images the steps of a training take, and how often its state is written.

    batch_size: images a step and rank; steps: of an epoch; total: of all epochs, the last of which may be shorter;
    checkpoint_freq: steps between states within an epoch.
    """
    data: Data
    batch_size: int
    seed: int
    steps: int
    total: int
    checkpoint_freq: int
    workers: int = 0

    @property
    def epochs(self):
        return -(-self.total // self.steps)


def epoch_batches(schedule, job, epoch, first):
    """(step, images, labels) of an epoch, from step `first` on; steps count through all epochs.

    Images (N, 3, S, S) and labels (N,) are on the job's device.
    """
    begin, s = epoch * schedule.steps, schedule
    start, end = max(first, begin), min(begin + s.steps, s.total)
    loader = train_loader(s.data.train, s.batch_size, epoch, s.seed, job.rank, job.world_size, s.workers, start - begin)
    for step, (images, labels) in zip(range(start, end), loader.to(job.device)):
        yield step, images, labels.to(job.device, non_blocking=True)


def train(runs, schedule, job, title, curves_folder, take_step, end_epoch=None):
    """Take the steps that `runs` (ResumableRuns of one schedule, which see the same images) have not taken yet.

    take_step(runs whose step it is, images, labels, epoch, writer) takes it and returns {name: text} to show;
    end_epoch(epoch, writer) validates, and says of a run that it is done. A state is written once the next loss has
    shown that it is good, the last one of a run that is done at once. Ctrl-C and SIGTERM let the step under way and one
    more be taken, which writes the state between them, then KeyboardInterrupt is raised; a second Ctrl-C does not wait.
    """
    first = min((run.step for run in runs if not run.done), default=schedule.total)
    with _interrupts(job) as interrupted, progress(schedule.total, title, first, job.is_main) as bar, \
            curves(curves_folder, first, job.is_main) or contextlib.nullcontext() as writer:
        stopping = False
        for epoch in range(first // schedule.steps, schedule.epochs):
            for step, images, labels in epoch_batches(schedule, job, epoch, first):
                active = [run for run in runs if run.step == step and not run.done]
                shown = take_step(active, images, labels, epoch, writer)
                if stopping:
                    raise KeyboardInterrupt
                for run in active:
                    run.step = step + 1
                bar.update()
                bar.set_postfix(shown, refresh=False)
                stopping = interrupted()
                if stopping or (step + 1) % schedule.checkpoint_freq == 0:
                    for run in active:
                        run.pending = run.state()
            ended = [run for run in runs if not run.done]
            if end_epoch:
                end_epoch(epoch, writer)
            for run in ended:
                run.pending = run.state()
        for run in runs:
            if run.done:
                run.write_pending(job)
        if interrupted():                           # in the last step, or while it was validated
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupts(job):
    """Yields a function that says whether Ctrl-C or SIGTERM has asked a rank to end. A signal that is ignored stays so.

    Of one process a second signal ends it at once; torchrun sends its ranks two for one Ctrl-C.
    """
    asked = []

    def ask(*_):
        if asked and job.world_size == 1:
            raise KeyboardInterrupt
        asked.append(True)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: any_rank(bool(asked), job)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
