"""Data sets out of packages, for machines that reach package mirrors only; nobody has to be root."""
import glob
import os
import subprocess
import sys
import tempfile
import zipfile

from ..errors import UserError
from ..files import new_folder

SECONDS = 600                   # of a download that does not end


def fetch_fashion_mnist(path):
    """Fashion-MNIST from Debian's package dataset-fashion-mnist into <path>/fashion-mnist."""
    with _downloads(path) as folder:
        _run(['apt-get', 'download', 'dataset-fashion-mnist'], folder)
        with new_folder(os.path.join(path, 'fashion-mnist')) as new:
            _run(['dpkg-deb', '-x', *glob.glob(os.path.join(glob.escape(folder), '*.deb')), 'unpacked'], folder)
            source = os.path.join(folder, 'unpacked', 'usr', 'share', 'datasets', 'fashion-mnist')
            for name in os.listdir(source):
                os.replace(os.path.join(source, name), os.path.join(new, name))


def fetch_elpv(path):
    """The solar cells of PyPI's elpv-dataset (labels.csv, images/) into <path>/elpv."""
    with _downloads(path) as folder:
        _run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', 'elpv-dataset'], folder)
        wheel, = glob.glob(os.path.join(glob.escape(folder), '*.whl'))
        with new_folder(os.path.join(path, 'elpv')) as new, zipfile.ZipFile(wheel) as archive:
            inside = 'elpv_dataset/data/'
            for name in archive.namelist():
                if name.startswith(inside) and not name.endswith('/'):
                    target = os.path.join(new, *name.removeprefix(inside).split('/'))
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(target, 'wb') as file:
                        file.write(archive.read(name))


def _downloads(path):
    """A folder for downloads in `path`, which is made; removed at the end."""
    os.makedirs(path, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix='.download-', dir=path)


def _run(command, folder):
    """Run a command in a folder; UserError with its last line where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f'{command[0]}: {error}') from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'ended with code {done.returncode}']
        raise UserError(f'{" ".join(command[:2])}: {lines[-1]}')
