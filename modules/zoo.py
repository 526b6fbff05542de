"""Named networks: data/search_results.yaml -> supernets and subnets."""
import os
from functools import cache

import yaml

from . import ROOT
from .errors import UserError
from .modeling.network import Network
from .search_space.encoding import parse_subnet, parse_supernet

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
    if name in named_supernets():
        return parse_supernet(named_supernets()[name], superspace)
    return parse_supernet(name, superspace)


def find_subnet(name):
    """(encoding.Supernet, encoding.Subnet) of a published subnet name."""
    if name not in named_subnets():
        raise UserError(f'no network {name!r}; known: {" ".join(named_subnets())}')
    supernet, subnet = named_subnets()[name]
    supernet = find_supernet(supernet)
    return supernet, parse_subnet(subnet, supernet)


def get_subnet(name, num_classes=1000):
    """Randomly initialised static Network of a published subnet name."""
    return Network.build(*find_subnet(name), num_classes=num_classes)
