"""Tars of pictures that are read in place: where each picture is, scanned once and kept as an index."""
import contextlib
import hashlib
import json
import os
import tarfile

from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import UserError
from ..files import write_text
from .log import note


def is_picture(name):
    """Whether a file's name ends as a picture's."""
    return name.lower().endswith(IMG_EXTENSIONS)


def tar_index(path):
    """([(name, offset, size), …] of the pictures in a tar, function that keeps this index); offsets and sizes in bytes.

    Read once, then kept as JSON beside the tar or in ~/.cache/spaceevo; used while size and time of the tar agree.
    """
    stat = os.stat(path)
    stamp = {'version': 1, 'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:12]
    places = [path + '.index.json',
              os.path.join(cache, 'spaceevo', f'{digest}-{os.path.basename(path)}.index.json')]
    for place in places:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(place, encoding='utf-8') as f:
                index = json.load(f)
            if all(index[key] == value for key, value in stamp.items()):
                members = list(zip(index['names'], index['offsets'], index['sizes'], strict=True))
                if all(_is_member(*member, stat.st_size) for member in members):
                    return members, lambda: None
    note(f'{path}: looking for the pictures in it (once)')
    members = _scan_tar(path)

    def keep():
        _keep_index(path, places, stamp, members)

    return members, keep


def _is_member(name, offset, size, end):
    """Whether these can be a picture in a tar of `end` bytes; UnicodeError for a name that no file has."""
    return (isinstance(name, str) and bool(os.fsencode(name)) and type(offset) is type(size) is int
            and 0 <= offset <= offset + size <= end and size >= 0)


def _keep_index(path, places, stamp, members):
    """Write an index to the first of the places that can be written to."""
    names, offsets, sizes = map(list, zip(*members)) if members else ([], [], [])
    text = json.dumps({**stamp, 'names': names, 'offsets': offsets, 'sizes': sizes})
    for place in places:
        with contextlib.suppress(OSError):
            write_text(place, text)
            return
    note(f'{path}: its index could not be kept ({" ".join(places)})')


def _scan_tar(path):
    """The pictures of a tar; members that are tars themselves, as in ILSVRC's train tar, are classes."""
    members = []
    try:
        with open(path, 'rb') as outer, open(path, 'rb') as inner:
            for member in _tar_files(outer, os.path.getsize(path)):
                if member.name.endswith('.tar'):
                    label = os.path.basename(member.name)[:-len('.tar')]
                    inner.seek(member.offset_data)
                    members += [(f'{label}/{os.path.basename(nested.name)}', nested.offset_data, nested.size)
                                for nested in _tar_files(inner, member.offset_data + member.size)
                                if is_picture(nested.name)]
                elif is_picture(member.name):
                    members.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError, ValueError) as error:     # ValueError: a damaged header
        raise UserError(f'{path}: expected an uncompressed tar, found one that cannot be read: {error}') from None
    return members


def _tar_files(file, end):
    """TarInfos of the plain files in the tar that begins at the file's position and ends before byte `end`.

    tarfile takes a damaged header, and the end of the file, for the end of the tar; here they are a ReadError.
    """
    with tarfile.open(fileobj=file, mode='r:') as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()         # a million TarInfos would stay in memory
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f'{member.name} is cut off')
            if member.isfile():
                yield member
        file.seek(tar.offset)
        if tar.offset >= end or any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f'damaged or cut off at byte {tar.offset}')
