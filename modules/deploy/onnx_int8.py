"""An LSQ+ Network as INT8 ONNX: uint8 activations and int8 weights on the trained scales. docs/onnx.md explains it."""
from ..modeling.network import io_sizes
from .graph import Graph
from .int8 import write_int8


def export_int8(network, ranges, metadata=None, reduce_range=False, float_swish=False):
    """ModelProto of a Network in int8 and eval mode on the CPU; ranges: of trace.observe() on real images.

    reduce_range: weights of 7 bits, for x86 without VNNI; float_swish: see graph.Graph, for OpenVINO.
    """
    graph = Graph(float_swish)
    output, exporter = write_int8(graph, network, ranges, reduce_range)
    shape, outputs = io_sizes(network)
    return graph.model(shape, output, outputs, {**(metadata or {}), 'tensors': exporter.tensors})
