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


class Operator(NamedTuple):
    """An operator of a compiled model: kind (OpenVINO's layer type), precisions of what it reads and of its outputs
    (u8, f32, …), ms of its last run, and the names of the ONNX nodes that became it."""
    kind: str
    reads: str
    writes: tuple
    ms: float
    nodes: tuple


class OpenVinoSession:
    """A compiled model on `threads` threads of the CPU: get_inputs() and run() as of onnxruntime.InferenceSession.

    profile: its operators are timed, for operators().

    It is compiled for the batch of its first image, and again where another number of images comes: with a fixed shape
    OpenVINO plans the memory ahead.
    """

    def __init__(self, model, threads=1, profile=False):
        ov = need('openvino')
        self._core, self._compiled = ov.Core(), {}
        self._options = {'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1, 'PERFORMANCE_HINT': 'LATENCY',
                         'INFERENCE_PRECISION_HINT': 'f32', 'ENABLE_CPU_PINNING': False, 'PERF_COUNT': profile}
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

    def operators(self):
        """[Operator] that the last run executed, in order, constants and what was folded left out; after run()."""
        request, = self._compiled.values()
        found = []
        for node in request.get_compiled_model().get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind, reads, writes, names, us = (str(info[key].value) for key in (
                'layerType', 'runtimePrecision', 'outputPrecisions', 'originalLayersNames', 'execTimeMcs'))
            if us.isdigit():
                found.append(Operator(kind, reads, tuple(writes.split(',')), int(us) / 1000, tuple(names.split(','))))
        return found
