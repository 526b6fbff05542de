"""ONNX Runtime, or OpenVINO, as a device of modules/latency/profiling.py: INT8 models of blocks, chains and networks.

A block that is not the first of a network reads uint8 codes and one that is not the last writes them, as inside a
network: no float map is quantised or written that would not be there.
"""
import numpy as np

from ..modeling.network import io_sizes
from ..optional import need, version_of
from .chain import is_first, is_last, processor, random_chain, timed, write_chain
from .graph import IMAGE, IR_VERSION, OPSET, Graph
from .int8 import Codes, Int8Exporter
from .onnx_run import open_runtime
from .runtimes import ONNX_RUNTIMES


class OrtDevice:
    """This host with a runtime of ONNX_RUNTIMES on `threads` threads; reduce_range: models with weights of 7 bits."""

    def __init__(self, threads=1, reduce_range=False, runtime='onnxruntime'):
        need('onnx')
        self.threads, self.reduce_range = threads, reduce_range
        self.runtime, self.version = runtime, version_of(ONNX_RUNTIMES[runtime].packages[-1])

    def __str__(self):
        name, plural = ONNX_RUNTIMES[self.runtime].name, 's' * (self.threads > 1)
        return f'{processor()}, {name} {self.version}, {self.threads} thread{plural}' + \
            ', 7-bit weights' * self.reduce_range

    def prepare(self, blocks):
        """run(count) -> [ms] of the INT8 model of Blocks in a row, random weights; of an empty model for none."""
        open_model = open_runtime(self.runtime)
        options = ONNX_RUNTIMES[self.runtime].options
        session = open_model(chain_model(blocks, self.reduce_range, **options) if blocks else empty_model(),
                             self.threads)
        given, rng = session.get_inputs()[0], np.random.default_rng(0)
        shape = (1, *given.shape[1:])
        feed = {given.name: rng.integers(0, 256, shape, np.uint8) if 'uint8' in given.type
                else rng.standard_normal(shape, np.float32)}
        return timed(lambda: session.run(None, feed), self.threads)


def chain_model(blocks, reduce_range=False, float_swish=False):
    """ModelProto of Blocks in a row; codes in and out but at a network's two ends; options as of export_int8()."""
    network, ranges, images = random_chain(blocks)
    graph = Graph(float_swish=float_swish)
    y = write_chain(Int8Exporter(graph, ranges, reduce_range), network, ranges, images, blocks,
                    lambda target: Codes(graph.image, target.grid, target.shift))
    return _model(graph, io_sizes(network)[0], not is_first(blocks), y, not is_last(blocks))


def empty_model():
    """ModelProto that does next to nothing: what a call costs."""
    graph = Graph()
    return _model(graph, (8, 1, 1), True, graph.clip_codes(graph.image, None, 0, 200), True)


def _model(graph, shape, codes_in, output, codes_out):
    """ModelProto; codes are (N, H, W, C), in which ONNX Runtime computes: it then turns nothing around at the ends of
    a block that it would not turn around inside a network."""
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    before, after = [], []
    given, result = IMAGE, output
    if codes_in:
        given, shape = 'codes', (*shape[1:], shape[0])
        before = [helper.make_node('Transpose', [given], [IMAGE], perm=(0, 3, 1, 2))]
    if codes_out:
        result = 'result'
        after = [helper.make_node('Transpose', [output], [result], perm=(0, 2, 3, 1))]
    tensors = [helper.make_tensor_value_info(name, kinds.UINT8 if codes else kinds.FLOAT, sizes)
               for name, codes, sizes in ((given, codes_in, ['N', *shape]), (result, codes_out, None))]
    return helper.make_model(helper.make_graph([*before, *graph.nodes, *after], 'blocks', tensors[:1], tensors[1:],
                                               list(graph.constants.values())),
                             opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)
