"""Networks as TFLite models: operators written into the file format (a flatbuffer), with metadata. docs/tflite.md
explains them.

Models take one image (1, r, r, C) as float32, normalised, and give logits (1, classes) as float32; of a Network without
a classifier the last block's map (1, H, W, C). Needs ai-edge-litert, which has the format's classes.
"""
import json
from dataclasses import dataclass, replace

import numpy as np

from ..modeling.network import io_sizes
from ..optional import need
from .float_exporter import FloatExporter
from .int8_exporter import Int8Exporter
from .quantisation import QuantParams, params_for_range

LARGEST_WEIGHT = 127                    # TFLite's kernels rely on no weight being -128
METADATA = 'spaceevo'                   # the entry of the file's metadata that is ours
FORMAT = 3                              # version of the file format
# versions of operators, (of floats, of int8): the least that interpreters need for what is written here
VERSIONS = {'ADD': (1, 2), 'CONV_2D': (1, 3), 'DEPTHWISE_CONV_2D': (1, 3), 'DEQUANTIZE': (1, 2),
            'FULLY_CONNECTED': (1, 4), 'HARD_SWISH': (1, 1), 'LOGISTIC': (1, 2), 'MAXIMUM': (1, 2), 'MEAN': (1, 2),
            'MINIMUM': (1, 2), 'MUL': (1, 2), 'PAD': (1, 2), 'QUANTIZE': (1, 2)}
OPTIONS = {'ADD': 'AddOptions', 'CONV_2D': 'Conv2DOptions', 'DEPTHWISE_CONV_2D': 'DepthwiseConv2DOptions',
           'FULLY_CONNECTED': 'FullyConnectedOptions', 'MEAN': 'ReducerOptions', 'MUL': 'MulOptions'}
TYPES = {np.dtype(np.float32): 'FLOAT32', np.dtype(np.int32): 'INT32', np.dtype(np.int8): 'INT8'}


@dataclass(eq=False)
class TfliteTensor:
    """A tensor of a graph: its number, shape, the operator that writes it (None: the image, a constant), and what its
    codes mean (None: it has floats)."""
    index: int
    shape: tuple
    writer: object = None
    params: QuantParams | None = None


class TfliteGraph:
    """Operators of one model on `image`, (1, H, W, C); every method returns the TfliteTensor that it adds.

    An operator's result has floats until it is quantised, which makes it an operator on integers. Codes are 0..255 in
    the methods and 128 less in the file (int8). shape: (C, H, W) of the image; reads_codes: the image is one of codes.
    """

    has_floats, float_swish = False, False      # of INT8 models: every tensor with a reader is quantised

    def __init__(self, shape, reads_codes=False):
        self.schema, self.reads_codes = need('ai_edge_litert.schema_py_generated'), reads_codes
        self._buffers, self._tensors, self._kinds, self._operators = [self.schema.BufferT()], [], [], []
        self._integers = {}                     # constants of shapes, by their bytes
        self.image = self._tensor('image', (1, *shape[1:], shape[0]), np.float32)

    def _tensor(self, name, shape, dtype):
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank = name, [int(size) for size in shape], True
        tensor.type = getattr(self.schema.TensorType, TYPES[np.dtype(dtype)])
        self._tensors.append(tensor)
        return TfliteTensor(len(self._tensors) - 1, tuple(shape))

    def constant(self, name, values, scales=None, zero_point=0, axis=0):
        """A constant array of float32, int32 or int8; scales: of its integers, one or by `axis`."""
        constant = self._tensor(name, values.shape, values.dtype)
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self._tensors[constant.index].buffer = len(self._buffers)
        self._buffers.append(buffer)
        if scales is not None:
            self._set_scales(constant, scales, zero_point, axis)
        return constant

    def _set_scales(self, tensor, scales, zero_point, axis=0):
        """Say in the file what the integers of a tensor mean."""
        scales = np.atleast_1d(np.float32(scales))
        quantization = self._tensors[tensor.index].quantization = self.schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = scales, np.full(len(scales), zero_point, np.int64)
        quantization.quantizedDimension = axis

    def _codes(self, tensor, params):
        """The tensor, from now on of codes."""
        tensor.params, self._tensors[tensor.index].type = params, self.schema.TensorType.INT8
        self._set_scales(tensor, params.scale, params.zero_point - 128)
        return tensor

    def _coded_constant(self, name, codes, params):
        constant = self.constant(name, np.int8(codes - 128.0), params.scale, params.zero_point - 128)
        constant.params = params
        return constant

    def _shape_constant(self, values):
        values = np.array(values, np.int32)
        if values.tobytes() not in self._integers:
            self._integers[values.tobytes()] = self.constant(f'integers{len(self._integers)}', values)
        return self._integers[values.tobytes()]

    def add(self, kind, inputs, shape, name, **options):
        """An operator; its result has floats. options: fields of the operator's options in the file format."""
        schema, operator, result = self.schema, self.schema.OperatorT(), self._tensor(name, shape, np.float32)
        operator.inputs, operator.outputs = [x.index for x in inputs], [result.index]
        if kind in OPTIONS:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, OPTIONS[kind])
            operator.builtinOptions = getattr(schema, OPTIONS[kind] + 'T')()
            vars(operator.builtinOptions).update(options)
        self._kinds.append(kind)
        self._operators.append(operator)
        result.writer = operator
        return result

    # -- float operators --------------------------------------------------------------------------------------

    def weight(self, op, weight, name):
        """Constant weight of a torch op in TFLite's order."""
        return self.constant(name, np.float32(kernel_order(op, weight) if weight.ndim == 4 else weight))

    def bias(self, bias, name):
        return self.constant(name, np.float32(bias))

    def convolution(self, x, weight, bias, op, name):
        """A convolution like `op` (torch's)."""
        hw, padding = x.shape[1:3], self.schema.Padding.SAME
        if not same_padding(op, hw):
            (top, left), padding = op.padding, self.schema.Padding.VALID
            shape = (1, hw[0] + 2 * top, hw[1] + 2 * left, x.shape[3])
            x, params = self.add('PAD', [x, self._shape_constant([[0, 0], [top, top], [left, left], [0, 0]])], shape,
                                 name + '.padded'), x.params
            if params is not None:              # 0 is one of the codes
                self._codes(x, params)
        height, width = ((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in zip(
            hw, op.padding, op.kernel_size, op.stride))
        kind, options = ('DEPTHWISE_CONV_2D', {'depthMultiplier': 1}) if is_depthwise(op) else ('CONV_2D', {})
        return self.add(kind, [x, weight, bias], (1, height, width, bias.shape[0]), name, padding=padding,
                        strideH=op.stride[0], strideW=op.stride[1], **options)

    def matmul(self, x, weight, bias, name):
        """x (1, 1, 1, C) times a weight (C', C), plus bias."""
        return self.add('FULLY_CONNECTED', [x, weight, bias], (1, bias.shape[0]), name)

    def activated(self, x, kind, name):
        """An activation (layout.Layer's) of a float tensor that nothing else reads."""
        if kind is None:
            return x
        if kind in ('relu', 'relu6'):
            return self._saturated(x, kind)
        if kind == 'hswish':
            return self.hswish(x, None, name)
        return self.product(x, self.sigmoid(x, name + '.gate'), name)

    def _saturated(self, x, kind):
        """x, whose writer takes the relu or relu6 too."""
        x.writer.builtinOptions.fusedActivationFunction = getattr(self.schema.ActivationFunctionType, kind.upper())
        return x

    def hard_sigmoid(self, x, name):
        sixth = self.constant(name + '.sixth', np.float32([1 / 6]))
        return self.product(self._saturated(self.plus(x, 3.0), 'relu6'), sixth, name)

    def sigmoid(self, x, name):
        return self.add('LOGISTIC', [x], x.shape, name)

    def plus(self, x, value):
        """x and a number."""
        if not value:
            return x
        if x.params is None:
            return self.sum(x, self.constant('shift', np.float32([value])), 'shifted')
        params = params_for_range(value, value)
        code = np.round(np.array([value]) / params.scale) + params.zero_point
        return self.sum(x, self._coded_constant('shift', code, params), 'shifted')

    def sum(self, x, y, name):
        return self.add('ADD', [x, y], x.shape, name)

    def product(self, x, y, name):
        return self.add('MUL', [x, y], x.shape, name)

    def mean(self, x, name):
        """Over height and width, which stay as 1 x 1."""
        return self.add('MEAN', [x, self._shape_constant([1, 2])], (1, 1, 1, x.shape[3]), name, keepDims=True)

    def flatten(self, x, name):
        return x                        # matmul() reads a map of one pixel

    def features(self, x):
        return x                        # a map stays one: putting channels first would cost a pass

    def hswish(self, x, params, name):
        """Of floats, and of codes."""
        return self.add('HARD_SWISH', [x], x.shape, name)

    # -- between codes and floats -----------------------------------------------------------------------------

    def quantise(self, x, params, name):
        """Codes of a tensor: what wrote its floats writes codes then; codes of other params are converted."""
        if x.params == params:          # whoever reads it here may not change its writer
            return replace(x, writer=None)
        if x.params is None and (x.writer is not None or self.reads_codes):
            return self._codes(x, params)
        return self._codes(self.add('QUANTIZE', [x], x.shape, name), params)

    def dequantise(self, codes, params):
        return codes

    def dequantised(self, codes):
        """Floats of codes, for the end of a model."""
        return self.add('DEQUANTIZE', [codes], codes.shape, 'output')

    def clip(self, codes, params, low, high, shared=False):
        """Codes kept within low..high; shared: something else reads them as they are.

        By the relu or relu6 of the operator that wrote them where its ends are these; otherwise by a pass over bytes.
        """
        zero_point, six = params.zero_point, round(6 / params.scale) + params.zero_point
        ends = low == zero_point and (high >= 255 or high == six) and (low > 0 or high < 255)
        if ends and not shared and hasattr(getattr(codes.writer, 'builtinOptions', None), 'fusedActivationFunction'):
            return self._saturated(codes, 'relu6' if high < 255 else 'relu')
        for kind, end, wanted in (('MINIMUM', high, high < 255), ('MAXIMUM', low, low > 0)):
            if wanted:
                code = self._coded_constant(f'{kind.lower()}.end', np.array([end]), params)
                codes = self._codes(self.add(kind, [codes, code], codes.shape, 'clipped'), params)
        return codes

    def int8_convolution(self, x, codes, scales, bias, op, name):
        """Float result of a convolution like `op` (torch's) with weights codes * scales (by output channel).

        x: QuantisedTensor; bias: float, rounded to int32 on the scale of the products.
        """
        codes = np.int8(kernel_order(op, codes.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT)))
        weight = self.constant(name + '.weight', codes, scales, axis=3 if is_depthwise(op) else 0)
        return self.convolution(x.tensor, weight, self._int8_bias(x, scales, bias, name), op, name)

    def int8_matmul(self, x, codes, scale, bias, name):
        """Float logits (1, classes) of a QuantisedTensor (1, 1, 1, C); weights codes * scale."""
        weight = self.constant(name + '.weight', np.int8(codes.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT)), scale)
        return self.matmul(x.tensor, weight, self._int8_bias(x, scale, bias, name), name)

    def _int8_bias(self, x, scales, bias, name):
        steps = np.float32(x.params.scale) * np.float32(scales)
        return self.constant(name + '.bias', np.int32(np.round(bias / steps).clip(-2**31, 2**31 - 1)), steps)

    def constant_map(self, values, params, name):
        """A constant map (C, H, W)."""
        codes = (np.round(values.transpose(1, 2, 0)[None] / params.scale) + params.zero_point).clip(0, 255)
        return self._coded_constant(name, codes, params)

    # -- the model --------------------------------------------------------------------------------------------

    def model(self, output, metadata=None):
        """The file's bytes, from `image` to `output`; metadata {key: anything json takes}."""
        schema, model, graph = self.schema, self.schema.ModelT(), self.schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = 'main', self._tensors, self._operators
        graph.inputs, graph.outputs = [self.image.index], [output.index]
        versions, model.operatorCodes = {}, []
        for kind, operator in zip(self._kinds, self._operators):
            types = {self._tensors[i].type for i in operator.inputs}
            version = VERSIONS[kind][schema.TensorType.INT8 in types]
            if (kind, version) not in versions:
                code = schema.OperatorCodeT()
                code.version, code.builtinCode = version, getattr(schema.BuiltinOperator, kind)
                code.deprecatedBuiltinCode = code.builtinCode       # of old interpreters; holds what is below 127
                versions[kind, version] = len(model.operatorCodes)
                model.operatorCodes.append(code)
            operator.opcodeIndex = versions[kind, version]
        entry, buffer = schema.MetadataT(), schema.BufferT()
        buffer.data = np.frombuffer(json.dumps(metadata or {}).encode(), np.uint8)
        entry.name, entry.buffer = METADATA, len(self._buffers)
        model.version, model.description, model.subgraphs = FORMAT, 'SpaceEvo', [graph]
        model.buffers, model.metadata = [*self._buffers, buffer], [entry]
        builder = need('flatbuffers').Builder(1 << 20)
        builder.Finish(model.Pack(builder), b'TFL3')
        return bytes(builder.Output())


def same_padding(op, hw):
    """Whether TFLite's SAME padding of a map of hw (height, width) is torch's, op.padding on every side.

    SAME adds as little as gives ceil(size / stride) pixels, the odd one at the end: other pixels at a stride of 2.
    """
    return all(max((-(-size // stride) - 1) * stride + kernel - size, 0) == 2 * padding
               for size, stride, kernel, padding in zip(hw, op.stride, op.kernel_size, op.padding))


def kernel_order(op, weight):
    """A convolution's weight (C', C / groups, kh, kw) in TFLite's order: (C', kh, kw, C), depth-wise (1, kh, kw,
    C')."""
    return weight.transpose(1, 2, 3, 0) if is_depthwise(op) else weight.transpose(0, 2, 3, 1)


def is_depthwise(op):
    return op.groups > 1


def export_fp32(network, metadata=None):
    """Bytes of the fp32 .tflite of a Network in eval mode on the CPU; metadata {key: anything json takes}."""
    graph = TfliteGraph(io_sizes(network)[0])
    return graph.model(FloatExporter(graph).write(network), metadata)


def export_int8(network, ranges, metadata=None):
    """Bytes of the INT8 .tflite of a Network in int8 and eval mode; ranges: of quantisation.observe() on real images.

    UserError where an op has other than 8 bits, or weights of 7.
    """
    graph = TfliteGraph(io_sizes(network)[0])
    codes = Int8Exporter(graph, ranges).write(network)
    return graph.model(graph.dequantised(codes), metadata)


def metadata_of(model):
    """{key: value} that a model's bytes were exported with; ValueError where they are none of ours."""
    tree = need('ai_edge_litert.schema_py_generated').Model.GetRootAs(model)
    for entry in map(tree.Metadata, range(tree.MetadataLength())):
        if entry.Name() == METADATA.encode():
            return json.loads(tree.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    raise ValueError('no model of this exporter')
