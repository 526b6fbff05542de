"""Progress of long jobs: a bar on a terminal, a line now and then in a log file, curves for TensorBoard."""
import contextlib
import functools
import os
import sys
import time
import types

from tqdm import tqdm

from ..cli import note

LOG_INTERVAL = 30           # seconds between lines where nobody watches


def progress(total, description, initial=0, enabled=True):
    """A tqdm bar of `total` steps with time left, of which `initial` are done; silent where not `enabled`."""
    watched = sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=description, disable=not enabled, file=sys.stderr,
                mininterval=0.2 if watched else LOG_INTERVAL, maxinterval=LOG_INTERVAL, dynamic_ncols=watched)


@contextlib.contextmanager
def run_log(path, append=False, enabled=True, show=None):
    """Yields say(line), which shows a line and writes it to a log file, both with the seconds since the start.

    append: continue with the file that is there; nothing happens where not `enabled`. show: function of a line, print
    by default.
    """
    started, mode = time.perf_counter(), 'a' if append else 'w'
    show = show or functools.partial(print, flush=True)
    with open(path, mode, buffering=1, encoding='utf-8') if enabled else contextlib.nullcontext() as log:
        def say(line):
            if log:
                line = f'[{time.perf_counter() - started:8.1f} s] {line}'
                show(line)
                print(line, file=log)
        yield say


def spare_tensorflow():
    """Let tensorboard use its own stand-in for TensorFlow, as it does where that is not installed.

    The real one would be imported for nothing but file names: seconds, and a crash where torchvision comes after it.
    """
    sys.modules.setdefault('tensorboard.compat.notf', types.ModuleType('tensorboard.compat.notf'))


def curves(folder, first_step=0, enabled=True):
    """torch's SummaryWriter of a folder; steps from `first_step` on replace older ones. None where not `enabled`."""
    if not enabled:
        return None
    spare_tensorflow()
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder, purge_step=first_step or None)


def light_curves(folder):
    """TensorBoard's writer of a folder for add_scalars(), without torch."""
    spare_tensorflow()
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    os.makedirs(folder, exist_ok=True)
    return EventFileWriter(folder)


def add_scalars(writer, step, values):
    """Add {tag: value} to light_curves(), as the scalars that torch's SummaryWriter writes."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


__all__ = ['LOG_INTERVAL', 'add_scalars', 'curves', 'light_curves', 'note', 'progress', 'run_log', 'spare_tensorflow']
