"""Names of supernets and subnets: the published ones (data/search_results.yaml), max, min, and rows of tables."""
import csv
import hashlib
import os
import re
from functools import cache

import yaml

from .. import ROOT
from ..errors import one_line
from .encoding import EncodingError, parse_subnet, parse_supernet
from .sampling import max_subnet, min_subnet
from .superspace import SearchSpaceError

SEARCH_RESULTS = os.path.join(ROOT, 'data', 'search_results.yaml')
EXTREMES = {'max': max_subnet, 'min': min_subnet}


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


def choose_subnet(supernet, choice, allow='weights'):
    """encoding.Subnet of max, min or an encoding, checked to be in the supernet; allow: as for check_subnet()."""
    return EXTREMES[choice](supernet) if choice in EXTREMES else parse_subnet(choice, supernet, allow)


def network_of(name, supernet, superspace):
    """(name, encoding.Supernet, encoding.Subnet) of --subnet_name; a row of a table is named by its encoding."""
    if supernet is None:
        if '.csv' in name:
            raise EncodingError(f'--subnet_name {name}: of which supernet? give --supernet_choice')
        return name, *find_subnet(name)
    supernet = find_supernet(supernet, superspace)
    listed = listed_subnet(name, supernet)
    return (name, supernet, choose_subnet(supernet, name)) if listed is None else (str(listed), supernet, listed)


def folder_name(name, supernet, subnet):
    """SEQnet@vnni-A0; of subnets without a name <supernet>_max, _min or _<6 hex digits>, since encodings are long."""
    if '@' in name:
        return name
    return f'{supernet}_{name if name in EXTREMES else hashlib.sha256(str(subnet).encode()).hexdigest()[:6]}'
