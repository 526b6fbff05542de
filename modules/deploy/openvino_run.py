"""OpenVINO runs the same ONNX files: a session with what is used of ONNX Runtime's."""
import os
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..optional import need


class Given(NamedTuple):
    """An input of a model, as ONNX Runtime describes it."""
    name: str
    shape: tuple
    type: str


class OpenVinoSession:
    """A compiled model on `threads` threads of the CPU: get_inputs() and run() as of onnxruntime.InferenceSession.

    It is compiled for the batch of its first image, and again where another number of images comes: with a fixed shape
    OpenVINO plans the memory ahead.
    """

    def __init__(self, model, threads=1):
        ov = need('openvino')
        self._core, self._compiled = ov.Core(), {}
        self._options = {'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1, 'PERFORMANCE_HINT': 'LATENCY',
                         'INFERENCE_PRECISION_HINT': 'f32', 'ENABLE_CPU_PINNING': False}
        is_file = isinstance(model, (str, os.PathLike))
        try:
            self._model = self._core.read_model(os.fspath(model) if is_file else model.SerializeToString())
        except Exception as error:              # OpenVINO raises RuntimeErrors of several lines
            name = model if is_file else 'the model'
            raise UserError(f'{name}: OpenVINO cannot open it ({" ".join(str(error).split())[:120]})') from None

    def get_inputs(self):
        """[Given]; unknown sizes are None."""
        return [Given(given.any_name, tuple(size.get_length() if size.is_static else None
                                            for size in given.partial_shape),
                      f'tensor({given.element_type.get_type_name()})'.replace('u8', 'uint8').replace('f32', 'float'))
                for given in self._model.inputs]

    def run(self, _, feed):
        """The outputs of {input: array}, as arrays."""
        shapes = {name: tuple(array.shape) for name, array in feed.items()}
        key = tuple(sorted(shapes.items()))
        if key not in self._compiled:
            self._model.reshape(shapes)
            self._compiled[key] = self._core.compile_model(self._model, 'CPU', self._options).create_infer_request()
        request = self._compiled[key]
        results = request.infer(feed, share_inputs=True, share_outputs=False)
        return [np.asarray(value) for value in results.values()]
