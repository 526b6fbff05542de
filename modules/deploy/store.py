"""Exported models on disk: the list of subnets, file names, and whether a file is still what would be written."""
import csv
import hashlib
import json
import os
from typing import NamedTuple

from ..errors import UserError
from ..files import atomic_path
from ..search_space.encoding import Subnet, Supernet, parse_subnet, parse_supernet
from ..search_space.superspace import SearchSpaceError

VERSION = 1                     # of the exporters: another number makes every model be written anew


class Entry(NamedTuple):
    """One line of input.csv."""
    supernet: Supernet
    subnet: Subnet

    @property
    def name(self):
        """onnxw_151122_023231_1a2b3c: superspace, choice, the beginning of sha256(subnet)."""
        digest = hashlib.sha256(str(self.subnet).encode()).hexdigest()[:6]
        return f'{self.supernet.superspace.name}_{self.supernet.choice}_{digest}'


def read_entries(path):
    """[Entry] of a csv of `<superspace>,<supernet_choice>,<subnet_choice>` lines; # begins a comment.

    UserError names the number of a wrong line; the same subnet twice is wrong too.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file; a line of it is <superspace>,<supernet_choice>,<subnet_choice>')
    entries = {}
    with open(path, encoding='utf-8', newline='') as f:
        for number, row in enumerate(csv.reader(f), 1):
            row = [cell.strip() for cell in row]
            if not any(row) or row[0].startswith('#'):
                continue
            where = f'{path} line {number}'
            if len(row) != 3:
                raise UserError(f'{where}: {len(row)} values, expected <superspace>,<supernet_choice>,<subnet_choice>')
            try:
                supernet = parse_supernet(row[1], row[0])
                entry = Entry(supernet, parse_subnet(row[2], supernet))
            except SearchSpaceError as error:
                raise UserError(f'{where}: {error}') from None
            if entry in entries:
                raise UserError(f'{where}: the same subnet as in line {entries[entry]}')
            entries[entry] = number
    if not entries:
        raise UserError(f'{path}: no subnet in it; a line is <superspace>,<supernet_choice>,<subnet_choice>')
    return list(entries)


def model_path(folder, entry, quant_mode):
    """<folder>/<entry name>{,_quant_int8}.onnx"""
    return os.path.join(folder, entry.name + '_quant_int8' * quant_mode + '.onnx')


def fingerprint(network, *more):
    """sha256 of a network's weights, statistics and LSQ+ scales and of `more` (what else the model depends on)."""
    digest = hashlib.sha256(repr((VERSION, *map(str, more))).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + str(tensor.dtype).encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def metadata(model):
    """{key: value} that Graph.model() was given."""
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def read_model(path, key=None):
    """ModelProto of a file, None where there is none, it cannot be read or its fingerprint is not `key`."""
    import onnx
    if not os.path.isfile(path):
        return None
    try:
        model = onnx.load(path)
        return model if key is None or metadata(model).get('fingerprint') == key else None
    except Exception:                           # a damaged file raises what protobuf pleases
        return None


def write_model(path, model):
    """Write a ModelProto, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, 'wb') as f:
        f.write(model.SerializeToString())
