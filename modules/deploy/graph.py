"""An ONNX graph being written: nodes, constants, quantised tensors. Needs the onnx package."""
import json

import numpy as np

from ..errors import UserError

OPSET, IR_VERSION = 17, 8
IMAGE = 'image'                         # the input of every model
INSTALL = 'pip install -r requirements-onnx.txt'


def need(package):
    """The optional package (onnx, onnxruntime); UserError with the command that installs it where it lacks."""
    import importlib
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{package} is not installed: {INSTALL}') from None


class Graph:
    """Nodes and constants of one model; every method returns the name of the tensor it adds."""

    def __init__(self):
        self.onnx = need('onnx')
        self.nodes, self.constants, self._names = [], {}, {IMAGE: 1}

    def name(self, wanted):
        """`wanted`, with a number after it where there is such a tensor already."""
        count = self._names[wanted] = self._names.get(wanted, 0) + 1
        return wanted if count == 1 else f'{wanted}_{count}'

    def constant(self, name, value, dtype=np.float32):
        """A constant; equal ones (scales and zero points are many) are stored once."""
        value = np.array(value, dtype, order='C')
        key = (value.dtype.str, value.shape, value.tobytes())
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
        """uint8 codes of a float tensor on a grid (scale, zero)."""
        return self.add('QuantizeLinear', [x, self.constant('scale', grid.scale),
                                           self.constant('zero', grid.zero, np.uint8)], name)

    def real(self, codes, grid):
        """The float tensor behind uint8 codes, written anew for each reader: ONNX Runtime fuses it with that one."""
        return self.add('DequantizeLinear', [codes, self.constant('scale', grid.scale),
                                             self.constant('zero', grid.zero, np.uint8)], codes + '.real')

    def clip_codes(self, codes, low, high):
        """uint8 codes kept within low..high; a pass over bytes, next to free."""
        if low <= 0 and high >= 255:
            return codes
        return self.add('Clip', [codes, self.constant('low', low, np.uint8), self.constant('high', high, np.uint8)],
                        codes + '.clipped')

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
