"""Shared paths and fixtures. Figures under tests/golden are carried over from the published reference."""
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
GOLDEN = os.path.join(ROOT, 'tests', 'golden')
REFERENCE = os.path.join(os.path.dirname(ROOT), 'shared', 'reference')

needs_reference = pytest.mark.skipif(not os.path.isdir(REFERENCE), reason='needs ../shared/reference')


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
