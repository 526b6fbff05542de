"""Files that are whole or not there: written under a temporary name, then renamed."""
import contextlib
import os


@contextlib.contextmanager
def atomic_path(path):
    """A temporary path beside `path` (its folder is made); renamed to `path` when the block ends well.

    The file keeps its ending, so that libraries which look at it write the right format. After an error
    nothing is left behind and what was at `path` is untouched.
    """
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f'.tmp-{os.getpid()}-{name}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def write_text(path, text):
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary, open(temporary, 'w', encoding='utf-8') as f:
        f.write(text)
