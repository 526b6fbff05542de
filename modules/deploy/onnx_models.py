"""Networks as ONNX models: a graph being written, and the fp32 and INT8 models made of it. Needs the onnx package.

INT8 models have uint8 activations and int8 weights on the trained LSQ+ scales; docs/onnx.md explains them.
"""
import json

import numpy as np

from ..modeling.network import io_sizes
from ..modeling.ops.lsq_plus import quantisation_of
from ..optional import need
from .float_exporter import FloatExporter, SymmetricExporter
from .int8_exporter import Int8Exporter
from .quantisation import IMAGE, check_bits

OPSET, IR_VERSION = 17, 8


class OnnxGraph:
    """Nodes and constants of one model; every method returns the name of the tensor it adds.

    Quantised operators are float ones between DequantizeLinear and QuantizeLinear, which ONNX Runtime fuses.
    float_swish: hswish and swish are taken of the float result of the operator before, into which OpenVINO fuses them,
    and not of codes; then their shift can be taken off. code_type: of activations.
    """

    image, has_floats = IMAGE, True     # has_floats: a tensor with several readers may stay float

    def __init__(self, code_type=np.uint8, float_swish=False):
        self.onnx, self.code_type, self.float_swish = need('onnx'), code_type, float_swish
        self.nodes, self.constants, self._names = [], {}, {IMAGE: 1}

    def name(self, wanted):
        """`wanted`, with a number after it where there is such a tensor already."""
        count = self._names[wanted] = self._names.get(wanted, 0) + 1
        return wanted if count == 1 else f'{wanted}_{count}'

    def constant(self, name, value, dtype=np.float32, shared=True):
        """A constant; equal ones (scales and zero points are many) are stored once, where they may be `shared`."""
        value = np.array(value, dtype, order='C')
        key = (value.dtype.str, value.shape, value.tobytes(), None if shared else name)
        if key not in self.constants:
            name = self.name(name)
            self.constants[key] = self.onnx.numpy_helper.from_array(value, name)
        return self.constants[key].name

    def add(self, op, inputs, name, **attributes):
        """A node with one output, `name` or near it."""
        output = self.name(name)
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], output, **attributes))
        return output

    # -- float operators --------------------------------------------------------------------------------------

    def weight(self, op, weight, name):
        """Constant weight of a torch op."""
        return self.constant(name, weight)

    def bias(self, bias, name):
        return self.constant(name, bias)

    def convolution(self, x, weight, bias, op, name):
        """A convolution like `op` (torch's)."""
        return self.add('Conv', [x, weight, bias], name, kernel_shape=list(op.kernel_size), strides=list(op.stride),
                        pads=list(op.padding) * 2, group=op.groups)

    def matmul(self, x, weight, bias, name):
        """x (N, C) times a weight (C', C), plus bias."""
        return self.add('Gemm', [x, weight, bias], name, transB=1)

    def activated(self, x, kind, name):
        """An activation (layout.Layer's) of a float tensor."""
        if kind is None:
            return x
        if kind == 'relu':
            return self.add('Relu', [x], name)
        if kind == 'relu6':
            return self.add('Clip', [x, self.constant('zero', 0.0), self.constant('six', 6.0)], name)
        if kind == 'hswish':
            return self.add('HardSwish', [x], name)
        return self.product(x, self.sigmoid(x, name + '.gate'), name)

    def hard_sigmoid(self, x, name):
        return self.add('HardSigmoid', [x], name, alpha=1 / 6, beta=0.5)

    def sigmoid(self, x, name):
        return self.add('Sigmoid', [x], name)

    def plus(self, x, value):
        """Float tensor and a number."""
        return self.add('Add', [x, self.constant('shift', value)], 'shifted') if value else x

    def minus(self, x, value):
        return self.add('Sub', [x, self.constant('shift', value)], 'shifted') if value else x

    def sum(self, x, y, name):
        return self.add('Add', [x, y], name)

    def product(self, x, y, name):
        return self.add('Mul', [x, y], name)

    def mean(self, x, name):
        """Over height and width, which stay as 1 x 1."""
        return self.add('GlobalAveragePool', [x], name)

    def flatten(self, x, name):
        """(N, C, 1, 1) to (N, C)."""
        return self.add('Flatten', [x], name)

    def features(self, x):
        """What a network without a classifier gives: (N, C * H * W)."""
        return self.flatten(x, 'features')

    # -- between codes and floats -----------------------------------------------------------------------------

    def quantise(self, x, params, name):
        """Codes of a float tensor, of the graph's code_type."""
        return self.add('QuantizeLinear', [x, self.constant('scale', params.scale),
                                           self.constant('zero', params.zero_point, self.code_type)], name)

    def dequantise(self, codes, params):
        """The float tensor behind codes, written again for each reader: ONNX Runtime fuses it with that one."""
        return self.add('DequantizeLinear', [codes, self.constant('scale', params.scale),
                                             self.constant('zero', params.zero_point, self.code_type)], codes + '.real')

    def clip(self, codes, params, low, high, shared=False):
        """uint8 codes kept within low..high; a pass over bytes, next to free. shared: of TfliteGraph."""
        if low <= 0 and high >= 255:
            return codes
        return self.add('Clip', [codes, self.constant('low', low, np.uint8), self.constant('high', high, np.uint8)],
                        codes + '.clipped')

    def int8_convolution(self, x, codes, scales, bias, op, name):
        """Float result of a convolution like `op` (torch's) with weights codes * scales (by output channel).

        x: QuantisedTensor; bias: float, rounded to what int32 holds.
        """
        weight, bias = self._int8_operands(x, codes, scales, bias, name)
        return self.convolution(self.dequantise(x.tensor, x.params), weight, bias, op, name + '.float')

    def int8_matmul(self, x, codes, scale, bias, name):
        """Float logits of a QuantisedTensor (N, C, 1, 1); weights codes * scale."""
        weight, bias = self._int8_operands(x, codes, np.full(len(codes), scale), bias, name)
        return self.matmul(self.dequantise(self.flatten(x.tensor, name + '.flat'), x.params), weight, bias, name)

    def _int8_operands(self, x, codes, scales, bias, name):
        weight, steps = self.dequantised(name + '.weight', codes, scales, np.int8), x.params.scale * scales
        return weight, self.dequantised(name + '.bias', np.round(bias / steps), steps, np.int32)

    def dequantised(self, name, codes, scales, dtype):
        """Float constant codes * scales, by the first axis."""
        # not shared: without VNNI, ONNX Runtime turns int8 weights into uint8, each with zero points of its own
        zeros = self.constant(name + '.zeros', np.zeros(len(scales)), dtype, shared=False)
        return self.add('DequantizeLinear', [self.constant(name + '.codes', codes, dtype, shared=False),
                                             self.constant(name + '.scale', scales), zeros], name, axis=0)

    def constant_map(self, values, params, name):
        """Float tensor of a constant map (C, H, W), stored as codes."""
        codes = (np.round(values[None] / params.scale) + params.zero_point).clip(0, 255)
        return self.dequantise(self.constant(name, codes, np.uint8), params)

    def hswish(self, codes, params, name):
        """Float hswish = x * clip(x + 3, 0, 6) / 6 of codes with code 0 at -3.

        clip(x + 3, 0, 6) is the very same bytes, clipped and read with another zero point and scale.
        """
        gate = self.clip(codes, params, 0, min(255, 2 * params.zero_point))
        gate_params = params._replace(scale=0.5 / params.zero_point, zero_point=0)
        return self.product(self.dequantise(codes, params), self.dequantise(gate, gate_params), name)

    # -- the model --------------------------------------------------------------------------------------------

    def model(self, network, output, metadata):
        """ModelProto of a Network from `image` (N, C, r, r) to `output`; metadata {key: anything json takes}."""
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        shape, outputs = io_sizes(network)
        graph = helper.make_graph(self.nodes, 'subnet',
                                  [helper.make_tensor_value_info(IMAGE, float32, ['N', *shape])],
                                  [helper.make_tensor_value_info(output, float32, ['N', outputs])],
                                  list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION,
                                  producer_name='spaceevo')
        helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
        self.onnx.checker.check_model(model)
        return model


def metadata_of(model):
    """{key: value} that OnnxGraph.model() was given."""
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def export_fp32(network, metadata=None):
    """ModelProto of a Network in eval mode on the CPU: images (N, 3, r, r) to logits (N, classes), or to features."""
    graph = OnnxGraph()
    return graph.model(network, FloatExporter(graph).write(network), metadata or {})


def export_int8(network, ranges, metadata=None, reduce_range=False, float_swish=False):
    """ModelProto of a Network in int8 and eval mode on the CPU; ranges: of quantisation.observe() on real images.

    reduce_range: weights of 7 bits, for x86 without VNNI; float_swish: see OnnxGraph, for OpenVINO. Networks with
    symmetric zero points need no ranges. UserError where an op has other than 8 bits, or weights of 7.
    """
    check_bits(network)
    if quantisation_of(network).get('zero_points') == 'symmetric':
        graph = OnnxGraph(np.int8)
        exporter = SymmetricExporter(graph, reduce_range)
    else:
        graph = OnnxGraph(float_swish=float_swish)
        exporter = Int8Exporter(graph, ranges, reduce_range)
    output = exporter.write(network)
    return graph.model(network, output, {**(metadata or {}), 'tensors': exporter.tensors})
