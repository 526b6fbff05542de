"""ONNX models run: sessions, latencies, accuracy beside torch's, and the error report by layer."""
import os
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .graph import IMAGE, IR_VERSION, OPSET, metadata, need
from .measure import in_turns
from .openvino_run import OpenVinoSession
from .trace import op_inputs

EXACT_SUMS = 'session.x64quantprecision', '1'       # sums of uint8 x int8 in 32 bits; with VNNI half as fast as without
FITTING = 64                # weights up to here: two products with uint8 fit into 16 bits


@cache
def sums_are_exact():
    """Whether ONNX Runtime here adds products of uint8 and int8 in 32 bits by itself: on x86 without VNNI in 16, which
    saturate."""
    ort, onnx = need('onnxruntime'), need('onnx')
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
    if isinstance(model, (str, os.PathLike)):
        model = onnx.load(model)
    constants = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
                 if tensor.data_type == onnx.TensorProto.INT8)
    return all(np.abs(values.astype(np.int16)).max(initial=0) <= FITTING for values in constants)


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
    name = model if isinstance(model, (str, os.PathLike)) else 'the model'
    try:
        if not sums_are_exact() and not fits_16_bits(model):
            options.add_session_config_entry(*EXACT_SUMS)
        if not isinstance(model, (str, os.PathLike)):
            model = model.SerializeToString()
        return ort.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    except Exception as error:                  # ONNX Runtime raises classes of its own
        raise UserError(f'{name}: ONNX Runtime cannot open it ({str(error)[:120]})') from None


def open_runtime(name):
    """open(model, threads) of `onnxruntime` or `openvino`, which gives a session."""
    return OpenVinoSession if name == 'openvino' else open_session


def run_session(session, images):
    """Logits (N, classes) of images (N, 3, r, r) as an array."""
    return session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images, np.float32)})[0]


def runner(session):
    """A function that runs a session on one image of noise, for timing."""
    given = session.get_inputs()[0]
    feed = {given.name: np.random.default_rng(0).standard_normal((1, *given.shape[1:]), np.float32)}
    return partial(session.run, None, feed)


def latencies(sessions, warmup=100, runs=100, rounds=10):
    """{name: Latency} of {name: session} of one image, taken in turns."""
    return in_turns({name: runner(session) for name, session in sessions.items()}, warmup, runs, rounds)


class LayerError(NamedTuple):
    """How far the input of a quantised op is from torch's: rms over the standard deviation, mean over its scale;
    added: the part of rms that is more than the op before had."""
    name: str
    rms: float
    bias: float
    added: float

    def __str__(self):
        return f'{self.name:<44} {self.rms:8.4f} {self.added:8.4f} {self.bias:+8.3f}'


def layer_errors(network, model, images):
    """[LayerError] of the inputs of all quantised ops in order, and of the logits; model: ModelProto of the Network.

    images (N, 3, r, r). The graph is run with every quantised tensor as an output.
    """
    onnx = need('onnx')
    tensors = metadata(model)['tensors']
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    have = {output.name for output in model.graph.output}
    wanted = dict.fromkeys(entry[0] for entry in tensors.values() if entry[0] not in have)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    values = open_session(watched).run([model.graph.output[0].name, *wanted], {IMAGE: images.numpy()})
    logits, codes = values[0], dict(zip(wanted, values[1:]))
    inputs, expected = op_inputs(network, images)
    errors = []
    for name, (tensor, scale, zero, shift) in tensors.items():
        ours, theirs = inputs[name].numpy(), scale * (codes[tensor].astype(np.float32) - zero) + shift
        difference = theirs.reshape(ours.shape) - ours
        errors.append(_layer_error(name, difference, ours.std(), scale, errors))
    expected = expected.numpy()
    return [*errors, _layer_error('logits', logits - expected, expected.std(), expected.std(), errors)]


def _layer_error(name, difference, deviation, step, before):
    rms = float(np.sqrt(np.mean(difference ** 2)) / max(deviation, 1e-12))
    last = before[-1].rms if before else 0.0
    return LayerError(name, rms, float(difference.mean() / max(step, 1e-12)), max(0.0, rms ** 2 - last ** 2) ** 0.5)
