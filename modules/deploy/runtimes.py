"""What runs exported models on this machine: ONNX Runtime, OpenVINO, LiteRT; how their models are written and read."""
import os
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from .. import ROOT
from ..cli import note
from ..errors import UserError
from ..files import atomic_path
from ..optional import need, version_of
from . import onnx_models, tflite_models
from .onnx_models import IR_VERSION, OPSET

EXACT_SUMS = 'session.x64quantprecision', '1'       # sums of uint8 x int8 in 32 bits; with VNNI half as fast as without
FITTING = 64                # weights up to here: two products with uint8 fit into 16 bits


class OpenModel(NamedTuple):
    """A model in memory. run(images (N, C, r, r)) gives logits (N, classes); invoke() is one run of one image, for
    timing."""
    run: Callable
    invoke: Callable


class Runtime:
    """What runs models of one kind. A model is what it exports and opens: a ModelProto of ONNX, a .tflite's bytes.

    ending: of files, <ending>_tools/ and checkpoints/models/<ending>_model/; export_packages, run_packages: what
    exporting and running need; int8_mark: in the names of INT8 files that another runtime would not want.
    """

    name = ending = int8_mark = ''
    export_packages = run_packages = ()

    @property
    def packages(self):
        """What exporting and running need."""
        return tuple(dict.fromkeys((*self.export_packages, *self.run_packages)))

    @property
    def version(self):
        return version_of(self.run_packages[-1])

    @property
    def input(self):
        """The list of subnets that is shipped."""
        return os.path.join(ROOT, f'{self.ending}_tools', 'input.csv')

    @property
    def models(self):
        """Default folder of the models."""
        return os.path.join('checkpoints', 'models', f'{self.ending}_model')

    def int8_options(self, reduce_range):
        """Options of export_int8() in which models differ; reduce_range: weights of 7 bits."""
        return {'reduce_range': True} if reduce_range else {}

    def export_fp32(self, network, metadata):
        """Model of a Network in eval mode on the CPU."""
        raise NotImplementedError

    def export_int8(self, network, ranges, metadata, **options):
        """Model of a Network in int8 and eval mode; ranges: of quantisation.observe(); options: int8_options()."""
        raise NotImplementedError

    def metadata(self, model):
        """{key: value} that a model was exported with."""
        raise NotImplementedError

    def open(self, model, threads=1):
        """OpenModel of a file or a model; UserError where it cannot be opened."""
        raise NotImplementedError

    def to_bytes(self, model):
        return model

    def from_bytes(self, data):
        return data

    def path(self, folder, entry, quant_mode):
        """<folder>/<entry name>{,_quant_int8<mark>}.<ending> of an export.Entry, or the file with the choice in another
        spelling if that is there."""
        spellings = [entry.choice, entry.supernet.choice, entry.supernet.choice.replace('_', '-')]
        kind = f'_quant_int8{self.int8_mark}' if quant_mode else ''
        paths = [os.path.join(folder, f'{entry.named(choice)}{kind}.{self.ending}') for choice in spellings]
        return next(filter(os.path.isfile, paths), paths[0])

    def read(self, path, key=None):
        """Model of a file; None where there is none, it is damaged or its fingerprint is not `key`."""
        if not os.path.isfile(path):
            return None
        try:
            with open(path, 'rb') as f:
                model = self.from_bytes(f.read())
            return model if key is None or self.metadata(model).get('fingerprint') == key else None
        except Exception:                       # a damaged file raises what protobuf or flatbuffers please
            return None

    def write(self, path, model):
        """Write a model, whole or not at all."""
        with atomic_path(path) as temporary, open(temporary, 'wb') as f:
            f.write(self.to_bytes(model))


# -- ONNX Runtime -----------------------------------------------------------------------------------------------

class OnnxRuntime(Runtime):
    name, ending = 'ONNX Runtime', 'onnx'
    export_packages, run_packages = ('onnx',), ('onnx', 'onnxruntime')
    export_fp32 = staticmethod(onnx_models.export_fp32)
    export_int8 = staticmethod(onnx_models.export_int8)
    metadata = staticmethod(onnx_models.metadata_of)

    def open_session(self, model, threads=1):
        return open_session(model, threads)

    def open(self, model, threads=1):
        session = self.open_session(model, threads)
        return OpenModel(partial(run_session, session), one_image(session))

    def to_bytes(self, model):
        return model.SerializeToString()

    def from_bytes(self, data):
        return need('onnx').load_from_string(data)


@cache
def sums_are_exact():
    """Whether ONNX Runtime here adds products of uint8 and int8 in 32 bits by itself: on x86 without VNNI in 16, which
    saturate."""
    ort = need('onnxruntime')
    onnx = need('onnx')
    helper, kinds = onnx.helper, onnx.TensorProto
    rows, depth = 16, 64
    weights = helper.make_tensor('weights', kinds.INT8, (depth, rows), np.full(depth * rows, 127, np.int8).tobytes(),
                                 raw=True)
    given, result = (helper.make_tensor_value_info(name, kind, (rows, width)) for name, kind, width in (
        ('codes', kinds.UINT8, depth), ('sums', kinds.INT32, rows)))
    node = helper.make_node('MatMulInteger', ['codes', 'weights'], ['sums'])
    model = helper.make_model(helper.make_graph([node], 'sums', [given], [result], [weights]),
                              ir_version=IR_VERSION, opset_imports=[helper.make_opsetid('', OPSET)])
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    sums, = session.run(None, {'codes': np.full((rows, depth), 255, np.uint8)})
    return bool((sums == depth * 255 * 127).all())


def fits_16_bits(model):
    """Whether no two products of uint8 and the int8 constants of a model (file or ModelProto) can leave int16."""
    onnx = need('onnx')
    if _is_file(model):
        model = onnx.load(model)
    constants = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
                 if tensor.data_type == onnx.TensorProto.INT8)
    return all(np.abs(values.astype(np.int16)).max(initial=0) <= FITTING for values in constants)


def _is_file(model):
    return isinstance(model, (str, os.PathLike))


def _cannot_open(runtime, model, error):
    """UserError for a model that a runtime refuses with a class of its own."""
    name, reason = os.fspath(model) if _is_file(model) else 'the model', ' '.join(str(error).split())
    return UserError(f'{name}: {runtime} cannot open it ({reason[:120]})')


def open_session(model, threads=1, profile=None):
    """ONNX Runtime session of a file or a ModelProto on `threads` threads of the CPU.

    Its sums are exact: by ONNX Runtime's slow mode where this processor needs that and the weights have 8 bits.
    profile: beginning of the path that end_profiling() of the session writes a profile to.
    """
    ort = need('onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        if not sums_are_exact() and not fits_16_bits(model):
            options.add_session_config_entry(*EXACT_SUMS)
        source = os.fspath(model) if _is_file(model) else model.SerializeToString()
        return ort.InferenceSession(source, options, providers=['CPUExecutionProvider'])
    except Exception as error:                  # ONNX Runtime raises classes of its own
        raise _cannot_open('ONNX Runtime', model, error) from None


def run_session(session, images):
    """Logits (N, classes) of images (N, 3, r, r) as an array."""
    return session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images, np.float32)})[0]


def one_image(session):
    """A function that runs a session on one image of noise, for timing."""
    given = session.get_inputs()[0]
    feed = {given.name: np.random.default_rng(0).standard_normal((1, *given.shape[1:]), np.float32)}
    return partial(session.run, None, feed)


# -- OpenVINO, which runs the same fp32 files -------------------------------------------------------------------

class OpenVino(OnnxRuntime):
    name, int8_mark = 'OpenVINO', '_openvino'
    run_packages = ('onnx', 'openvino')

    def int8_options(self, reduce_range):
        return {'float_swish': True, **super().int8_options(reduce_range)}

    def open_session(self, model, threads=1):
        session = OpenVinoSession(model, threads)
        if not fits_16_bits(model) and not sums_are_exact():
            _say_saturating()
        return session


@cache
def _say_saturating():
    """Once: what no option of OpenVINO mends."""
    note('OpenVINO: on this processor, without VNNI, sums of 8-bit weights saturate, and answers may be wrong; export '
         'with --reduce_range')


class SessionInput(NamedTuple):
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
        self._core, self._compiled = need('openvino').Core(), {}
        self._options = {'INFERENCE_NUM_THREADS': threads, 'NUM_STREAMS': 1, 'PERFORMANCE_HINT': 'LATENCY',
                         'INFERENCE_PRECISION_HINT': 'f32', 'ENABLE_CPU_PINNING': False, 'PERF_COUNT': profile}
        try:
            self._model = self._core.read_model(os.fspath(model) if _is_file(model) else model.SerializeToString())
        except Exception as error:              # OpenVINO raises RuntimeErrors of several lines
            raise _cannot_open('OpenVINO', model, error) from None

    def get_inputs(self):
        """[SessionInput]; unknown sizes are None."""
        kinds = {'u8': 'uint8', 'f32': 'float'}
        found = []
        for given in self._model.inputs:
            kind = given.element_type.get_type_name()
            shape = tuple(size.get_length() if size.is_static else None for size in given.partial_shape)
            found.append(SessionInput(given.any_name, shape, f'tensor({kinds.get(kind, kind)})'))
        return found

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


# -- LiteRT -----------------------------------------------------------------------------------------------------

class LiteRt(Runtime):
    name, ending = 'TFLite', 'tflite'
    export_packages = run_packages = ('ai_edge_litert',)
    export_fp32 = staticmethod(tflite_models.export_fp32)
    export_int8 = staticmethod(tflite_models.export_int8)
    metadata = staticmethod(tflite_models.metadata_of)

    def int8_options(self, reduce_range):
        return {}

    def open(self, model, threads=1):
        interpreter = Interpreter(model, threads)
        return OpenModel(interpreter.run, interpreter.invoke)


class Interpreter:
    """A TFLite model (a file or bytes) of one image on `threads` threads; UserError where TFLite cannot open it."""

    def __init__(self, model, threads=1):
        litert = need('ai_edge_litert.interpreter')
        source = {'model_path': os.fspath(model)} if _is_file(model) else {'model_content': model}
        try:
            self._litert = litert.Interpreter(**source, num_threads=threads)
            self._litert.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise _cannot_open('TFLite', model, error) from None
        self._input, self._output = self._litert.get_input_details()[0], self._litert.get_output_details()[0]
        noise = np.random.default_rng(0).standard_normal(self._input['shape'], np.float32)
        # a block of a network takes codes: there the noise spreads over them
        spread = 1 if self._input['dtype'] == np.float32 else 30
        self._set(spread * noise)

    def _set(self, values):
        self._litert.set_tensor(self._input['index'], values.astype(self._input['dtype']))

    def run(self, images):
        """Logits (N, classes) of images (N, C, r, r), normalised; without a classifier features (N, C * H * W)."""
        outputs = []
        for image in np.ascontiguousarray(np.asarray(images, np.float32).transpose(0, 2, 3, 1)):
            self._set(image[None])
            self.invoke()
            outputs.append(self._litert.get_tensor(self._output['index']))
        outputs = np.concatenate(outputs)
        return outputs if outputs.ndim == 2 else outputs.transpose(0, 3, 1, 2).reshape(len(outputs), -1)

    def invoke(self):
        """One run on the last image (noise before the first), for timing."""
        self._litert.invoke()


ONNX, OPENVINO, TFLITE = OnnxRuntime(), OpenVino(), LiteRt()
ONNX_RUNTIMES = {'onnxruntime': ONNX, 'openvino': OPENVINO}
