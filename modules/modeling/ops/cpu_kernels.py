"""fake_quantise.cpp, compiled for this CPU where it is first used: half a second with g++ or $CXX."""
import ctypes
import functools
import os
import shlex
import subprocess
import tempfile

import torch

from ...errors import UserError, one_line

# -O3 makes branches of the comparisons, ten times as slow
_FLAGS = ('-O2', '-march=native', '-fopenmp', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math', '-fPIC',
          '-shared')
_NUMBERS, _LEVELS = ctypes.c_void_p, [ctypes.c_float] * 3


@functools.cache
def library():
    """The kernels; UserError where they cannot be compiled."""
    source = os.path.join(os.path.dirname(__file__), 'fake_quantise.cpp')
    with tempfile.TemporaryDirectory() as folder:
        built = os.path.join(folder, 'fake_quantise.so')
        compiler = shlex.split(os.environ.get('CXX', 'g++'))
        try:
            subprocess.run([*compiler, *_FLAGS, '-o', built, source], check=True, capture_output=True,
                           text=True)
            kernels = ctypes.CDLL(built)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = one_line(getattr(error, 'stderr', None) or error)[:200]
            raise UserError(f'--compile: no C++ compiler that works here: {reason}') from None
    kernels.quantise.argtypes = [ctypes.c_long, *[_NUMBERS] * 4, *_LEVELS, ctypes.c_int]
    kernels.quantise_backward.argtypes = [ctypes.c_long, *[_NUMBERS] * 7, *_LEVELS, ctypes.c_double, ctypes.c_int]
    kernels.quantise.restype = kernels.quantise_backward.restype = None
    return kernels


def quantise(x, scale, beta, levels, dtype):
    """x, fake-quantised, in dtype; x and scales float32 on a CPU, x dense, in whatever order."""
    y = torch.empty_like(x)
    library().quantise(x.numel(), x.data_ptr(), scale.data_ptr(), _pointer(beta), y.data_ptr(), levels.low, levels.high,
                       levels.least, torch.get_num_threads())
    return y.to(dtype)


def quantise_backward(dy, x, scale, beta, levels):
    """(dx, dscale, dbeta) of quantise(); dy and x in one order."""
    dy = dy.float()
    dx, dscale, dbeta = (None if tensor is None else torch.empty_like(tensor) for tensor in (x, scale, beta))
    library().quantise_backward(x.numel(), dy.data_ptr(), x.data_ptr(), scale.data_ptr(), _pointer(beta), dx.data_ptr(),
                                dscale.data_ptr(), _pointer(dbeta), levels.low, levels.high, levels.least,
                                levels.gradient_factor, torch.get_num_threads())
    return dx, dscale, dbeta


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()
