"""Published supernets and subnets by name: data/search_results.yaml."""
import os
from functools import cache

import yaml

from .. import ROOT
from .encoding import EncodingError, parse_subnet, parse_supernet

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
