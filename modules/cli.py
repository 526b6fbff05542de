"""What all scripts share: `run(main, get_args)` ends user errors with one line and exit code 2."""
import argparse
import os
import sys

from .errors import UserError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it is written, and every default."""


def parser(docstring):
    """ArgumentParser whose description is the script's docstring."""
    return argparse.ArgumentParser(description=docstring, formatter_class=_HelpFormatter)


def positive(kind):
    """argparse type: a positive int or float."""
    def parse(text):
        value = kind(text)
        if not 0 < value < float('inf'):
            raise argparse.ArgumentTypeError(f'{text} is not a positive number')
        return value
    parse.__name__ = f'positive {kind.__name__}'
    return parse


def run(main, get_args):
    """main(get_args()); a UserError or an OSError is one line on stderr and exit code 2."""
    try:
        main(get_args())
    except (UserError, OSError) as error:               # OSError: a missing file, a full disk
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error):
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        error = f'{error.filename}: {error.strerror}'
    print('error: ' + ' '.join(str(error).split('\n')), file=sys.stderr)
    return 2


def add_local_rank(parser):
    """--local_rank and --local-rank, one of which torch.distributed.launch passes, by its version."""
    parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)


def is_main_process():
    """Whether this is rank 0, or the only one: the one that does what needs no more than one process."""
    return os.environ.get('RANK', '0') == '0'
