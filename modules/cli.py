"""What all scripts share: `run(main, get_args)` ends user errors with one line and exit code 2."""
import argparse
import importlib.util
import os
import sys
import traceback
from functools import cache

from .errors import UserError, one_line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and every default but None, which the help texts explain."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(docstring):
    """ArgumentParser whose description is the script's docstring.

    --plugin files are run here already: what they register is among the choices of other arguments.
    """
    plugins = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    plugins.add_argument('--plugin', action='append', metavar='FILE',
                         help='Python file that registers hyperspaces of your own (docs/your_hyperspace.md)')
    for path in plugins.parse_known_args()[0].plugin or ():
        load_plugin(os.path.abspath(path))
    return argparse.ArgumentParser(description=docstring, formatter_class=_HelpFormatter, parents=[plugins])


@cache
def load_plugin(path):
    """Run a Python file, once in a process."""
    name = 'plugin_' + os.path.basename(path).removesuffix('.py')
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError(f'--plugin {path}: not a Python file *.py')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    if not os.path.isfile(path):
        raise UserError(f'--plugin {path}: No such file')
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f'--plugin {path}: {error}') from None
    except Exception as error:                          # any, since it is any code
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = getattr(error, 'lineno', None) or (lines[-1] if lines else '')
        raise UserError(f'--plugin {path}:{where}: {type(error).__name__}: {one_line(error)}') from error


def positive(kind):
    """argparse type: a positive int or float."""
    def parse(text):
        value = kind(text)
        if not 0 < value < float('inf'):
            raise argparse.ArgumentTypeError(f'{text} is not a positive number')
        return value
    parse.__name__ = f'positive {kind.__name__}'
    return parse


def within(kind, low, high, open_end=False):
    """argparse type: an int or float from low to high (ends included; with open_end below high)."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or open_end and value == high:
            end = f'below {high}' if open_end else high
            raise argparse.ArgumentTypeError(f'{text} is not from {low} to {end}')
        return value
    parse.__name__ = kind.__name__
    return parse


def not_negative(kind):
    """argparse type: an int or float that is neither negative nor infinite."""
    def parse(text):
        value = kind(text)
        if not 0 <= value < float('inf'):
            raise argparse.ArgumentTypeError(f'{text} is negative' if value < 0 else f'{text} is not a finite number')
        return value
    parse.__name__ = kind.__name__
    return parse


SHARE = within(float, 0, 1, open_end=True)          # of momentum, dropout, …: 1 would leave nothing
SEED = within(int, 0, 2 ** 32 - 1)


def run(main, get_args):
    """main(get_args()); a UserError, an OSError or a lack of memory is one line on stderr and exit code 2.

    A job that torchrun has started anew goes on from its checkpoints, as with --resume.
    """
    for stream in (sys.stdout, sys.stderr):             # a file's name may hold what an encoding has not
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        args = get_args()
        for name, value in getattr(args, '__dict__', {}).items():
            if value == '':
                raise UserError(f"--{name} '': an empty value")
        if getattr(args, 'resume', None) is False:
            args.resume = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0
        main(args)
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        if code is None:
            raise
        sys.exit(code)


def exit_code(error):
    """Print the line of an error that is no bug and give its exit code; None, without a line, for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, MemoryError):
        error = f'not enough memory: {one_line(error)}'
    elif type(error).__name__ == 'OutOfMemoryError':    # torch's, of a GPU; this module does without torch
        error = (f'not enough GPU memory: {one_line(error)[:160]}; lower the batch size, --num_threads or '
                 '--cache_gb; train_supernet.py takes the same steps in parts with --accumulate')
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        reason = 'a file, not a folder' if isinstance(error, FileExistsError) else error.strerror
        error = f'{error.filename2 or error.filename}: {reason}'        # of a rename the second
    elif not isinstance(error, (UserError, OSError)):   # OSError: a missing file, a full disk
        return None
    print('error: ' + ' '.join(str(error).split('\n')), file=sys.stderr)
    return 2


def add_local_rank(parser):
    """--local_rank and --local-rank, one of which torch.distributed.launch passes, by its version."""
    parser.add_argument('--local_rank', '--local-rank', type=not_negative(int), help=argparse.SUPPRESS)


def is_main_process():
    """Whether this is rank 0, or the only one: the one that does what needs no more than one process."""
    return os.environ.get('RANK', '0') == '0'
