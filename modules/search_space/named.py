"""Published supernets and subnets by name: data/search_results.yaml."""
import csv
import os
import re
from functools import cache

import yaml

from .. import ROOT
from ..errors import one_line
from .encoding import EncodingError, parse_subnet, parse_supernet
from .superspace import SearchSpaceError

SEARCH_RESULTS = os.path.join(ROOT, 'data', 'search_results.yaml')


@cache
def _results():
    with open(SEARCH_RESULTS, encoding='utf-8') as f:
        return yaml.safe_load(f)


def named_supernets():
    """{supernet name: encoding}, such as 'spaceevo@vnni': 'onnxw-151122-023231'."""
    return dict(_results()['specific_supernet_encoding_dict'])


def named_subnets():
    """{subnet name: (supernet name, subnet encoding)}, such as 'SEQnet@vnni-A0'."""
    return {name: tuple(entry) for name, entry in _results()['specific_subnet_encoding_dict'].items()}


def find_supernet(name, superspace=None):
    """encoding.Supernet from a published name or an encoding (with `superspace`, from its choice part)."""
    if isinstance(name, str) and '@' in name and name not in named_supernets():
        raise EncodingError(f'no supernet {name!r}; published: {" ".join(named_supernets())}')
    try:
        return parse_supernet(named_supernets().get(name, name), superspace)
    except EncodingError as error:
        raise EncodingError(f'{name}: {error}' if name in named_supernets() else str(error)) from None


def find_subnet(name):
    """(encoding.Supernet, encoding.Subnet) of a published subnet name."""
    if name not in named_subnets():
        raise EncodingError(f'no network {name!r}; published: {" ".join(named_subnets())}')
    supernet, subnet = named_subnets()[name]
    supernet = find_supernet(supernet)
    return supernet, parse_subnet(subnet, supernet)


def listed_subnet(text, supernet):
    """encoding.Subnet of a row of a CSV with a column `subnet`, such as search_subnet.py's best_c15_d2.csv.

    text: `<path>.csv`, its first row, or `<path>.csv:<row>`, counted from 1 below the column names; None for any other
    text. EncodingError names the file and the row; OSError: no such file.
    """
    match = re.fullmatch(r'(.+\.csv)(?::(.*))?', text)
    if match is None:
        return None
    path, row = match[1], '1' if match[2] is None else match[2]
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or (), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise EncodingError(f'{path}: not a table ({one_line(error)})') from None
    if 'subnet' not in columns:
        raise EncodingError(f"{path}: no column 'subnet'; expected such as best_c15_d2.csv of search_subnet.py")
    if row not in map(str, range(1, len(rows) + 1)):
        raise EncodingError(f'{path}: no row {row!r}; it has {len(rows)}, counted from 1')
    try:
        return parse_subnet(rows[int(row) - 1]['subnet'], supernet)
    except SearchSpaceError as error:
        raise EncodingError(f'{path} row {row}: {error}') from None
