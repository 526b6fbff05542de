"""An ONNX graph being written: nodes, constants, quantised tensors. Needs the onnx package."""
import json

import numpy as np

from ..optional import need

OPSET, IR_VERSION = 17, 8
IMAGE = 'input'                         # the input of every model


class Graph:
    """Nodes and constants of one model; every method returns the name of the tensor it adds.

    From quantise() on: what int8.Int8Exporter asks of any runtime. Quantised operators are float ones between
    DequantizeLinear and QuantizeLinear, which ONNX Runtime fuses. float_swish: hswish and swish are taken of the float
    result of the operator before, into which OpenVINO fuses them, and not of bytes. code_type: of activations.
    """

    image, floats = IMAGE, True         # floats: a tensor with several readers may stay float

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

    def quantise(self, x, grid, name):
        """Codes of a float tensor on a grid (scale, zero), uint8 unless the graph has int8 ones."""
        return self.add('QuantizeLinear', [x, self.constant('scale', grid.scale),
                                           self.constant('zero', grid.zero, self.code_type)], name)

    def real(self, codes, grid):
        """The float tensor behind codes, written anew for each reader: ONNX Runtime fuses it with that one."""
        return self.add('DequantizeLinear', [codes, self.constant('scale', grid.scale),
                                             self.constant('zero', grid.zero, self.code_type)], codes + '.real')

    def clip_codes(self, codes, grid, low, high):
        """uint8 codes kept within low..high; a pass over bytes, next to free."""
        if low <= 0 and high >= 255:
            return codes
        return self.add('Clip', [codes, self.constant('low', low, np.uint8), self.constant('high', high, np.uint8)],
                        codes + '.clipped')

    def conv(self, x, op, codes, scales, bias, name):
        """Float result of a convolution like `op` (torch's) with weights codes * scales (by output channel).

        x: (codes, grid); bias: float, rounded to what int32 holds.
        """
        x, grid = x
        weight = self.dequantised(name + '.weight', codes, scales, np.int8)
        bias = self._bias(name + '.bias', bias, grid.scale * scales)
        return self.add('Conv', [self.real(x, grid), weight, bias], name + '.float', **conv_attributes(op))

    def linear(self, x, codes, scale, bias, name):
        """Float logits of codes (N, C, 1, 1) of a tensor, x: (codes, grid)."""
        x, grid = x
        scales = np.full(len(codes), scale)
        weight = self.dequantised(name + '.weight', codes, scales, np.int8)
        bias = self._bias(name + '.bias', bias, grid.scale * scales)
        x = self.real(self.add('Flatten', [x], name + '.flat'), grid)
        return self.add('Gemm', [x, weight, bias], name, transB=1)

    def _bias(self, name, bias, steps):
        return self.dequantised(name, np.round(bias / steps), steps, np.int32)

    def dequantised(self, name, codes, scales, dtype):
        """Float constant codes * scales, by the first axis."""
        # not shared: without VNNI, ONNX Runtime turns int8 weights into uint8, each with zero points of its own
        zeros = self.constant(name + '.zeros', np.zeros(len(scales)), dtype, shared=False)
        return self.add('DequantizeLinear', [self.constant(name + '.codes', codes, dtype, shared=False),
                                             self.constant(name + '.scale', scales), zeros], name, axis=0)

    def real_map(self, values, grid, name):
        """A constant map (C, H, W) on a grid."""
        codes = (np.round(values[None] / grid.scale) + grid.zero).clip(0, 255)
        return self.real(self.constant(name, codes, np.uint8), grid)

    def activated(self, x, kind, name):
        """Float tensor: an activation (layout.Layer's) of a float tensor."""
        if kind is None:
            return x
        if kind == 'relu':
            return self.add('Relu', [x], name)
        if kind == 'relu6':
            return self.add('Clip', [x, self.constant('zero', 0.0), self.constant('six', 6.0)], name)
        if kind == 'hswish':
            return self.add('HardSwish', [x], name)
        return self.product(x, self.sigmoid(x, name + '.gate'), name)

    def plus(self, x, value):
        """Float tensor and a number."""
        return self.add('Add', [x, self.constant('shift', value)], 'shifted') if value else x

    def minus(self, x, value):
        return self.add('Sub', [x, self.constant('shift', value)], 'shifted') if value else x

    def sum(self, x, y, name):
        return self.add('Add', [x, y], name)

    def product(self, x, y, name):
        return self.add('Mul', [x, y], name)

    def sigmoid(self, x, name):
        return self.add('Sigmoid', [x], name)

    def mean(self, x, name):
        return self.add('GlobalAveragePool', [x], name)

    def flatten(self, x, name):
        return self.add('Flatten', [x], name)

    def hswish(self, codes, grid, name):
        """Float hswish = x * clip(x + 3, 0, 6) / 6 of codes with code 0 at -3.

        clip(x + 3, 0, 6) is the very same bytes, clipped and read with another zero and scale.
        """
        gate = self.clip_codes(codes, grid, 0, min(255, 2 * grid.zero))
        return self.product(self.real(codes, grid), self.real(gate, grid._replace(scale=0.5 / grid.zero, zero=0)), name)

    def model(self, shape, output, outputs, metadata):
        """ModelProto from `image` (N, *shape) to `output` (N, outputs); metadata {key: anything json takes}."""
        h, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        graph = h.make_graph(self.nodes, 'subnet', [h.make_tensor_value_info(IMAGE, float32, ['N', *shape])],
                             [h.make_tensor_value_info(output, float32, ['N', outputs])], list(self.constants.values()))
        model = h.make_model(graph, opset_imports=[h.make_opsetid('', OPSET)], ir_version=IR_VERSION,
                             producer_name='spaceevo')
        h.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
        self.onnx.checker.check_model(model)
        return model


def metadata(model):
    """{key: value} that Graph.model() was given."""
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def conv_attributes(op):
    """Attributes of ONNX's Conv of a torch convolution."""
    return {'kernel_shape': list(op.kernel_size), 'strides': list(op.stride), 'pads': list(op.padding) * 2,
            'group': op.groups}
