"""Shared paths and fixtures. Figures under tests/golden are carried over from the published reference."""
import os
import runpy
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
GOLDEN = os.path.join(ROOT, 'tests', 'golden')
REFERENCE = os.path.join(os.path.dirname(ROOT), 'shared', 'reference')

needs_reference = pytest.mark.skipif(not os.path.isdir(REFERENCE), reason='needs ../shared/reference')


@pytest.fixture(scope='module')
def deep_space():
    """demo_deep of benchmarks/onnxw_small.py, a space with more blocks and subnets than demo has."""
    from modules.search_space.superspace import SUPERSPACES
    before = set(SUPERSPACES)
    runpy.run_path(os.path.join(ROOT, 'benchmarks', 'onnxw_small.py'))
    yield
    for name in SUPERSPACES.keys() - before:
        del SUPERSPACES[name]


def _threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def one_thread():
    """Sums in the order that a process with OMP_NUM_THREADS=1 takes; and threads that only wait for each other."""
    yield from _threads(1)


@pytest.fixture
def two_threads():
    """Published figures of deep random networks hold for the order in which two threads add up."""
    yield from _threads(2)
