"""Shared paths and fixtures. Figures under tests/golden are carried over from the published reference."""
import os
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
GOLDEN = os.path.join(ROOT, 'tests', 'golden')
REFERENCE = os.path.join(os.path.dirname(ROOT), 'shared', 'reference')

needs_reference = pytest.mark.skipif(not os.path.isdir(REFERENCE), reason='needs ../shared/reference')
