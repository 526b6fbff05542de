"""Packages that only some commands need: imported where they are used, with a line that says what to install."""
import importlib
import importlib.metadata

from .errors import UserError

LISTS = {'onnx': 'requirements-onnx.txt', 'onnxruntime': 'requirements-onnx.txt',
         'openvino': 'requirements-openvino.txt',
         **dict.fromkeys(('ai_edge_litert', 'flatbuffers'), 'requirements-tflite.txt')}


def need(name):
    """The optional module, e.g. onnx or ai_edge_litert.interpreter; UserError says how to install what lacks."""
    package = name.partition('.')[0]
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{package} is not installed: pip install -r {LISTS[package]}') from None


def version_of(name):
    """The version of an installed module."""
    version = getattr(need(name), '__version__', None) or importlib.metadata.version(name)
    return version.partition('-')[0]            # OpenVINO adds its build
