"""Packages that only some commands need: imported where they are used, with a line that says what to install."""
import importlib
import importlib.metadata
import os

from .errors import UserError

LISTS = {'onnx': 'requirements-onnx.txt', 'onnxruntime': 'requirements-onnx.txt',
         'openvino': 'requirements-openvino.txt',
         **dict.fromkeys(('tensorflow', 'ai_edge_litert', 'flatbuffers'), 'requirements-tflite.txt')}


def need(name):
    """The optional module, e.g. onnx or ai_edge_litert.interpreter; UserError says how to install what lacks."""
    package = name.partition('.')[0]
    try:
        if package == 'tensorflow':
            _prepare_tensorflow()
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{package} is not installed: pip install -r {LISTS[package]}') from None


def version_of(name):
    """The version of an installed module."""
    version = getattr(need(name), '__version__', None) or importlib.metadata.version(name)
    return version.partition('-')[0]            # OpenVINO adds its build


def _prepare_tensorflow():
    """torch and torchvision first: imported after TensorFlow they crash (both bring a protobuf and an LLVM)."""
    import torch  # noqa: F401
    import torchvision  # noqa: F401
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')          # no lines about instruction sets
