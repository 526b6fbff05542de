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


@pytest.fixture
def two_threads():
    """Published figures of deep random networks hold for the order in which two threads add up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
