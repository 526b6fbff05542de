"""Progress of long jobs: a bar on a terminal, a line now and then in a log file, curves for TensorBoard."""
import sys
import types

from tqdm import tqdm

from ..cli import is_main_process

LOG_INTERVAL = 30           # seconds between lines where nobody watches


def progress(total, description, initial=0, enabled=True):
    """A tqdm bar of `total` steps with time left, of which `initial` are done; silent where not `enabled`."""
    watched = sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=description, disable=not enabled, file=sys.stderr,
                mininterval=0.2 if watched else LOG_INTERVAL, maxinterval=LOG_INTERVAL, dynamic_ncols=watched)


def note(line):
    """One line on stderr, of the first rank only."""
    if is_main_process():
        print(line, file=sys.stderr)


def spare_tensorflow():
    """Let tensorboard use its own stand-in for TensorFlow, as it does where that is not installed.

    The real one would be imported for nothing but file names: seconds, and a crash where torchvision comes after it.
    """
    sys.modules.setdefault('tensorboard.compat.notf', types.ModuleType('tensorboard.compat.notf'))


def curves(folder, first_step=0, enabled=True):
    """torch's SummaryWriter of a folder, in which steps from `first_step` on are anew; None where not `enabled`."""
    if not enabled:
        return None
    spare_tensorflow()
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder, purge_step=first_step or None)
