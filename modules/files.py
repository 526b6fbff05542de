"""What is written is a whole file, under a temporary name and then renamed, or a journal, appended to as it comes."""
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import time

from .errors import UserError

START_OVER = 'start over without --resume'        # what helps where a journal cannot be continued
_ABANDONED = 3600           # seconds without a write after which no writer is thought to live
_held = {}                  # {path: its open lock file}


@contextlib.contextmanager
def atomic_path(path):
    """A temporary path beside `path` (its folder is made); renamed to `path` when the block ends well.

    The file keeps its ending, so that libraries which look at it write the right format. After an error
    nothing is left behind and what was at `path` is untouched. What a killed process left of this very file an hour
    ago is removed first.
    """
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    _remove_abandoned(folder, name)
    temporary = temporary_path(path, os.getpid())
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def temporary_path(path, process):
    """The name under which a process (its number) writes the file `path` with atomic_path."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f'.tmp-{process}@{name}')


def _remove_abandoned(folder, name):
    """Remove temporary files of `name` that nobody has written for an hour: their writers are dead."""
    pattern, others = re.compile(rf'\.tmp-\d+@{re.escape(name)}'), []
    with contextlib.suppress(OSError):              # a folder that may be written, not read
        others = os.listdir(folder)
    for match in filter(None, map(pattern.fullmatch, others)):
        with contextlib.suppress(OSError):          # gone already, or not ours to remove
            path = os.path.join(folder, match[0])
            if time.time() - os.path.getmtime(path) > _ABANDONED:
                os.remove(path)


def check_file(path):
    """UserError where no file can be written at `path`: it is a folder, or something in the way to it is a file."""
    path = os.path.abspath(path)
    if os.path.isdir(path):
        raise UserError(f'{path}: is a folder, expected a file')
    folder = os.path.dirname(path)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise UserError(f'{folder}: is a file, expected a folder')


def hold(path):
    """Keep other processes from holding `path`, a file to be written, until this one ends, however it ends.

    UserError where another one holds it. Leaves a file .<name>.lock beside it; processes forked later hold nothing.
    On a file system without locks nobody holds anything.
    """
    import fcntl
    path = os.path.abspath(path)
    if path in _held:
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    lock = open(os.path.join(folder, f'.{name}.lock'), 'a')
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise UserError(f'{path}: another process is writing it; wait for its end, or give another output folder') \
            from None
    except OSError:                                 # a file system without locks
        pass
    _held[path] = lock


def set_aside(path):
    """Rename a file that starts over from x.csv to x_old.csv, which is replaced; its new path, None where it is not."""
    if not os.path.exists(path):
        return None
    root, ending = os.path.splitext(path)
    os.replace(path, f'{root}_old{ending}')
    return f'{root}_old{ending}'


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that takes the place of `folder` when the block ends well; nothing is left of it else."""
    parent, name = os.path.split(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f'.{name}-', dir=parent)
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        if os.path.isdir(folder):
            os.rename(folder, temporary + '-old')
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary + '-old', ignore_errors=True)


def file_digest(path):
    """First 16 hex digits of the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def write_text(path, text):
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary, open(temporary, 'w', encoding='utf-8') as f:
        f.write(text)


def write_csv(path, columns, rows):
    """Write a CSV with a line of column names atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([columns, *rows])
    write_text(path, text.getvalue())


class Journal:
    """An append-only file: a line `# {settings}` in JSON, perhaps one of column names, then whole lines as they come.

    settings: {name: JSON value} of what the lines depend on. With `resume` the lines that are there are kept, see
    read_journal(); without, an old file is renamed to `set_aside`. `entries` are what parse(line) made of them.
    """

    def __init__(self, path, settings, parse, resume=False, columns=(), otherwise=START_OVER):
        self.entries, self.set_aside, size = [], None, 0
        if not resume:
            self.set_aside = set_aside(path)
        elif os.path.exists(path):
            _, self.entries, size = read_journal(path, parse, settings, otherwise)
        if not size:
            write_text(path, f'# {json.dumps(settings)}\n' + (','.join(columns) + '\n' if columns else ''))
        self._file = open(path, 'ab')
        if 0 < size < self._file.tell():            # else it stays untouched until something is added
            self._file.truncate(size)

    def append(self, *cells):
        """Write a line of comma-separated cells, so that a kill loses at most this one."""
        self._file.write((','.join(map(str, cells)) + '\n').encode())
        self._file.flush()

    def close(self):
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_journal(path, parse, settings=None, otherwise=START_OVER):
    """(settings, [parse(line) of the whole lines after them], bytes of all these) of a Journal.

    settings: those that it has to have, None for any. UserError where it has others, and where parse() raises
    ValueError, TypeError or LookupError; `otherwise`: what else helps then. The bytes are 0 where not even the settings
    are whole.
    """
    with open(path, 'rb') as file:
        data = file.read()
    whole = data[:data.rfind(b'\n') + 1]
    if not whole and b'# {'.startswith(data[:3]):
        return None, [], 0
    first, *lines = whole.decode(errors='replace').split('\n')[:-1] or ['']
    before = _settings_of(path, first, otherwise)
    for key in [*settings, *before] if settings is not None else ():
        now = json.loads(json.dumps(settings.get(key)))
        if before.get(key) != now:
            raise UserError(f'{path}: made with {key} {before.get(key)}, not {now}; use that, or {otherwise}')
    entries = []
    for number, line in enumerate(lines, 2):
        try:
            entries.append(parse(line))
        except (ValueError, TypeError, LookupError) as error:
            reason = f' ({error})' if str(error) else ''
            raise UserError(f'{path}:{number}: not a line of this run: {line[:200]!r}{reason}; {otherwise}') from None
    return before, entries, len(whole)


def _settings_of(path, line, otherwise):
    try:
        settings = json.loads(line.removeprefix('# ')) if line.startswith('# ') else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f'{path}: does not begin with what it depends on, `# {{…}}` in JSON, so it is damaged or of an '
                        f'older version; {otherwise}')
    return settings
