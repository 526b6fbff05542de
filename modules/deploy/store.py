"""Exported models on disk: the list of subnets, file names, and whether a file is still what would be written."""
import codecs
import csv
import hashlib
import os
from typing import NamedTuple

from ..errors import UserError
from ..files import atomic_path
from ..modeling.ops.lsq_plus import quantisation_of
from ..search_space.encoding import Subnet, Supernet, parse_subnet, parse_supernet
from ..search_space.superspace import SearchSpaceError

VERSION = 3                     # of the exporters: another number makes every model be written anew


class Entry(NamedTuple):
    """One line of input.csv; written: its supernet's choice as it stands there, None for 151122_023231."""
    supernet: Supernet
    subnet: Subnet
    written: str | None = None

    @property
    def choice(self):
        return self.written or self.supernet.choice

    @property
    def name(self):
        """onnxw_151122_023231_1a2b3c: superspace, choice, the beginning of sha256(subnet)."""
        return self.named(self.choice)

    def named(self, choice):
        """The name with the choice in another spelling."""
        digest = hashlib.sha256(str(self.subnet).encode()).hexdigest()[:6]
        return f'{self.supernet.superspace.name}_{choice}_{digest}'


def read_entries(path, allow='stage'):
    """[Entry] of a csv of `<superspace>,<supernet_choice>,<subnet_choice>` lines; # begins a comment.

    allow: as for encoding.check_subnet().
    UserError names the number of a wrong line; the same subnet twice is wrong too.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file; a line of it is <superspace>,<supernet_choice>,<subnet_choice>')
    entries = {}
    with open(path, 'rb') as f:
        lines = f.read().removeprefix(codecs.BOM_UTF8).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = [cell.strip() for cell in next(csv.reader([line.decode()], strict=True), [])]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f'{path} line {number}: not a line of values ({error})') from None
        if not any(row) or row[0].startswith('#'):
            continue
        where = f'{path} line {number}'
        if len(row) != 3:
            raise UserError(f'{where}: {len(row)} values, expected <superspace>,<supernet_choice>,<subnet_choice>')
        try:
            supernet = parse_supernet(row[1], row[0])
            entry = Entry(supernet, parse_subnet(row[2], supernet, allow))
            written = row[1].removeprefix(f'{row[0]}-')
        except SearchSpaceError as error:
            raise UserError(f'{where}: {error}') from None
        if entry in entries:
            raise UserError(f'{where}: the same subnet as in line {entries[entry][0]}')
        entries[entry] = number, entry._replace(written=written)
    if not entries:
        raise UserError(f'{path}: no subnet in it; a line is <superspace>,<supernet_choice>,<subnet_choice>')
    return [entry for _, entry in entries.values()]


def model_path(folder, entry, quant_mode, ending='onnx', mark=''):
    """<folder>/<entry name>{,_quant_int8<mark>}.<ending>, or the file with the choice in another spelling if there.

    ending, mark: of a Runtime.
    """
    spellings = [entry.choice, entry.supernet.choice, entry.supernet.choice.replace('_', '-')]
    kind = f'_quant_int8{mark}' if quant_mode else ''
    paths = [os.path.join(folder, f'{entry.named(choice)}{kind}.{ending}')
             for choice in spellings]
    return next(filter(os.path.isfile, paths), paths[0])


def fingerprint(network, *more):
    """sha256 of a network's weights, statistics, scales and bits and of `more` (what else the model depends on)."""
    digest = hashlib.sha256(repr((VERSION, quantisation_of(network), *map(str, more))).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + str(tensor.dtype).encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_model(path, runtime, key=None):
    """Model of a file of a Runtime; None where there is none, it is damaged or its fingerprint is not `key`."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, 'rb') as f:
            model = runtime.load(f.read())
        return model if key is None or runtime.facts(model).get('fingerprint') == key else None
    except Exception:                           # a damaged file raises what protobuf or flatbuffers please
        return None


def write_model(path, data):
    """Write a model's bytes, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as f:
        f.write(data)


def append_line(path, line):
    """Add a line to a file in one write, so that lines of two runs do not mix."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, 'ab', buffering=0) as f:
        f.write((line + '\n').encode())
