"""OpenVINO's tests, openvino_cases.py, in a process of their own.

In one that held TensorFlow and torch's compilers too, the tests after them ended in a segmentation fault now and then.
"""
import subprocess
import sys

import pytest

from .conftest import ROOT


def test_openvino():
    pytest.importorskip('openvino')
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', 'tests/openvino_cases.py'], cwd=ROOT, text=True,
                          check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
