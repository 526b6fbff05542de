"""Progress of long jobs: a bar on a terminal, a line now and then in a log file."""
import sys

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
