"""What all scripts share: `run(main, get_args)` ends user errors with one line and exit code 2."""
import argparse
import contextlib
import importlib.util
import json
import os
import sys
import time
import traceback
from functools import cache

from .errors import UserError, one_line
from .original import reason, renamed


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and every default but None, which the help texts explain."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class _Ignored(argparse.Action):
    """A flag of the original that has no meaning in a script: a line says so."""

    def __call__(self, parser, namespace, values, option=None):
        note(f'{option}: taken, but {reason(option[2:])}')


class _Parser(argparse.ArgumentParser):
    """Also takes the original's flags (original.py), under the names here or with a line, without showing them."""

    def error(self, message):
        if 'TORCHELASTIC_ERROR_FILE' not in os.environ:
            super().error(message)
        _say_error(f'{self.prog}: error: {message}')
        sys.exit(2)

    def parse_known_args(self, args=None, namespace=None):
        words, own = list(sys.argv[1:] if args is None else args), self._option_string_actions
        names = [option[2:] for option in own if option.startswith('--')]
        for i, word in enumerate(words):
            flag, equals, value = word.partition('=')
            if flag.startswith('--') and flag not in own and reason(flag[2:]):
                new = renamed(flag[2:], names)
                if new:
                    words[i] = f'--{new}{equals}{value}'
                else:
                    self.add_argument(flag, nargs='*', action=_Ignored, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return super().parse_known_args(words, namespace)


def parser(docstring):
    """ArgumentParser whose description is the script's docstring.

    --plugin files are run here already: what they register is among the choices of other arguments.
    """
    plugins = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    plugins.add_argument('--plugin', action='append', metavar='FILE',
                         help='Python file that registers hyperspaces of your own (docs/your_hyperspace.md)')
    for path in plugins.parse_known_args()[0].plugin or ():
        load_plugin(os.path.abspath(path))
    return _Parser(description=docstring, formatter_class=_HelpFormatter, parents=[plugins])


def early_value(flag):
    """Value of a flag before all are parsed, for defaults that depend on it; None where it is not given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument(flag, dest='value', nargs='?')
    return early.parse_known_args()[0].value


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


INTERRUPTED = 130               # exit code after Ctrl-C
STOPPED = '\nstopped; with --resume the same command continues from its last checkpoint'


def run(main, get_args):
    """main(get_args()); a UserError, an OSError or a lack of memory is one line on stderr and exit code 2.

    A job that torchrun has restarted continues from its checkpoints, as with --resume.
    """
    for stream in (sys.stdout, sys.stderr):             # a file's name may hold what an encoding has not
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    args = None
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
        if code == INTERRUPTED and hasattr(args, 'resume'):
            note(STOPPED)
        sys.exit(code)


def exit_code(error):
    """Print the line of an error that is no bug and give its exit code; None, without a line, for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
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
    _say_error('error: ' + ' '.join(str(error).split('\n')))
    return 2


def _say_error(line):
    """The line on stderr; under torch's launcher, which writes pages when a rank ends, in the file of the reason that
    it shows at their very end, and there by the first rank alone that has something to say."""
    path = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if not path:
        print(line, file=sys.stderr)
        return
    with contextlib.suppress(FileExistsError):
        open(os.path.join(os.path.dirname(os.path.dirname(path)), 'told'), 'x').close()
        reply = {'message': line, 'extraInfo': {'py_callstack': line, 'timestamp': str(int(time.time()) - 1)}}
        with open(path, 'w', encoding='utf-8') as file:
            json.dump({'message': reply}, file)


def add_local_rank(parser):
    """--local_rank and --local-rank, one of which torch.distributed.launch passes, by its version."""
    parser.add_argument('--local_rank', '--local-rank', type=not_negative(int), help=argparse.SUPPRESS)


def note(line):
    """One line on stderr, of the first rank only."""
    if is_main_process():
        print(line, file=sys.stderr)


def is_main_process():
    """Whether this is rank 0, or the only one: the one that does what needs no more than one process."""
    return os.environ.get('RANK', '0') == '0'
