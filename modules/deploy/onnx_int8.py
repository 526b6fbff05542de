"""An LSQ+ Network as INT8 ONNX: uint8 activations and int8 weights on the trained scales. docs/onnx.md explains it.

Networks with symmetric zero points become a float graph instead, in which every input and weight of a quantised op is
rounded to int8 with zero point 0: QuantizeLinear and DequantizeLinear as TensorRT reads them.
"""
import numpy as np

from ..modeling.network import io_sizes
from ..modeling.ops.lsq_plus import quantisation_of
from .folding import activation_scale, affine, signed_codes, weight_codes
from .graph import Graph
from .int8 import Grid, check_bits, write_int8
from .onnx_fp32 import FloatExporter, write_float


class SymmetricExporter(FloatExporter):
    """Writes a Network with symmetric zero points; tensors as of int8.Int8Exporter."""

    def __init__(self, reduce_range=False):
        self.graph, self.reduce_range, self.tensors = Graph(np.int8), reduce_range, {}

    def operands(self, x, op, norm, name):
        graph, grid = self.graph, Grid(activation_scale(op)[0])
        codes, scale = weight_codes(op, self.reduce_range)
        factor, bias = affine(op, norm)
        codes, scales = signed_codes(codes, factor * scale, bias, grid.scale)
        x = graph.quantise(x, grid, name + '.input')
        self.tensors[name] = [x, *grid, 0.0]
        return [graph.real(x, grid), graph.dequantised(name + '.weight', codes, scales, np.int8),
                graph.constant(name + '.bias', bias)]


def export_int8(network, ranges, metadata=None, reduce_range=False, float_swish=False):
    """ModelProto of a Network in int8 and eval mode on the CPU; ranges: of trace.observe() on real images.

    reduce_range: weights of 7 bits, for x86 without VNNI; float_swish: see graph.Graph, for OpenVINO. Symmetric zero
    points need no ranges.
    """
    facts = {**(metadata or {})}
    if quantisation_of(network).get('zero_points') == 'symmetric':
        check_bits(network)
        exporter = SymmetricExporter(reduce_range)
        facts['tensors'] = exporter.tensors
        return write_float(exporter, network, facts)
    graph = Graph(float_swish=float_swish)
    output, exporter = write_int8(graph, network, ranges, reduce_range)
    shape, outputs = io_sizes(network)
    return graph.model(shape, output, outputs, {**facts, 'tensors': exporter.tensors})
