"""What runs exported models, and how its models are written and read."""
import os
from collections.abc import Callable
from typing import NamedTuple

from .. import ROOT
from ..optional import need
from . import onnx_fp32, onnx_int8, tflite
from .graph import metadata


class Runtime(NamedTuple):
    """A runtime. A model is what it exports and opens: a ModelProto of ONNX, the bytes of a .tflite file."""
    name: str
    ending: str                 # of files; <ending>_tools/, checkpoints/models/<ending>_model/
    exporters: tuple            # packages that the exporters need
    packages: tuple             # that exporting and running need
    export_fp32: Callable       # (network, facts) -> model
    export_int8: Callable       # (network, ranges, facts, **options) -> model
    facts: Callable             # model -> the facts it was exported with
    dump: Callable              # model -> bytes
    load: Callable              # bytes -> model
    options: dict = {}          # of export_int8, always
    mark: str = ''              # in the names of INT8 files that another runtime would not want

    @property
    def input(self):
        """The list of subnets that is shipped."""
        return os.path.join(ROOT, f'{self.ending}_tools', 'input.csv')

    @property
    def models(self):
        """Default folder of the models."""
        return os.path.join('checkpoints', 'models', f'{self.ending}_model')


def _load_onnx(data):
    return need('onnx').load_from_string(data)


ONNX = Runtime('ONNX Runtime', 'onnx', ('onnx',), ('onnx', 'onnxruntime'), onnx_fp32.export_fp32,
               onnx_int8.export_int8, metadata, lambda model: model.SerializeToString(), _load_onnx)
OPENVINO = ONNX._replace(name='OpenVINO', packages=('onnx', 'openvino'), options={'float_swish': True},
                         mark='_openvino')
ONNX_RUNTIMES = {'onnxruntime': ONNX, 'openvino': OPENVINO}
TFLITE = Runtime('TFLite', 'tflite', ('tensorflow', 'ai_edge_litert'), ('tensorflow', 'ai_edge_litert'),
                 tflite.export_tflite_fp32, tflite.export_tflite_int8, tflite.facts, bytes, bytes)
