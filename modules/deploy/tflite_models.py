"""Networks as TFLite models: operators in TensorFlow, converted, with metadata. docs/tflite.md explains them.

Models take one image (1, r, r, C) as float32, normalised, and give logits (1, classes) as float32; of a Network without
a classifier the last block's map (1, H, W, C). Needs tensorflow and ai-edge-litert.
"""
import json
import warnings

import numpy as np

from ..modeling.network import io_sizes
from ..optional import need
from .float_exporter import FloatExporter
from .int8_exporter import Int8Exporter

LARGEST_WEIGHT = 127                    # TFLite's kernels rely on no weight being -128
METADATA = 'spaceevo'                   # the entry of the file's metadata that is ours


class TfGraph:
    """Operators on `image`, a tensor (1, H, W, C); every method returns the tensor that it adds.

    A quantised tensor is a float one behind a fake-quant op whose range is that of its codes: the converter takes scale
    and zero point from there and writes integer operators only. Codes are 0..255 here and 128 less in the file (int8).
    """

    has_floats, float_swish = False, False      # of INT8 models: every tensor with a reader is quantised

    def __init__(self, image):
        self.tf, self.image = need('tensorflow'), image
        self._floats = {}               # what each quantised tensor was before, by id

    # -- float operators --------------------------------------------------------------------------------------

    def weight(self, op, weight, name):
        """Constant weight of a torch op in TensorFlow's order."""
        return np.float32(kernel_order(op, weight) if weight.ndim == 4 else weight.T)

    def bias(self, bias, name):
        return np.float32(bias)

    def convolution(self, x, weight, bias, op, name):
        """A convolution like `op` (torch's)."""
        tf, padding = self.tf, 'SAME'
        if not same_padding(op, x.shape[1:3]):
            top, left = op.padding      # of codes too: 0 is one of them
            x, padding = tf.pad(x, [[0, 0], [top, top], [left, left], [0, 0]]), 'VALID'
        convolve = tf.nn.depthwise_conv2d if is_depthwise(op) else tf.nn.conv2d
        y = convolve(x, weight, [1, *op.stride, 1], padding)
        return tf.nn.bias_add(y, bias, name=_scope(name))

    def matmul(self, x, weight, bias, name):
        """x (1, C) times a weight (C, C'), plus bias."""
        return self.tf.nn.bias_add(self.tf.matmul(x, weight), bias, name=_scope(name))

    def activated(self, x, kind, name):
        """An activation (layout.Layer's) of a float tensor."""
        if kind is None:
            return x
        if kind == 'hswish':
            return self.hswish(x, None, name)
        return {'relu': self.tf.nn.relu, 'relu6': self.tf.nn.relu6, 'swish': self.tf.nn.silu}[kind](x)

    def hard_sigmoid(self, x, name):
        return self.tf.multiply(self.tf.nn.relu6(x + 3.0), np.float32(1 / 6), name=_scope(name))

    def sigmoid(self, x, name):
        return self.tf.sigmoid(x, name=_scope(name))

    def plus(self, x, value):
        return x + np.float32(value) if value else x

    def sum(self, x, y, name):
        return self.tf.add(x, y, name=_scope(name))

    def product(self, x, y, name):
        return self.tf.multiply(x, y, name=_scope(name))

    def mean(self, x, name):
        """Over height and width, which stay as 1 x 1."""
        return self.tf.reduce_mean(x, (1, 2), keepdims=True, name=_scope(name))

    def flatten(self, x, name):
        """(1, 1, 1, C) to (1, C)."""
        return self.tf.reshape(x, (1, -1))

    def features(self, x):
        return x                        # a map stays one: putting channels first would cost a pass

    def hswish(self, x, params, name):
        """The pattern that the converter writes as one HARD_SWISH; of codes too."""
        return self.tf.multiply(x * self.tf.nn.relu6(x + 3.0), np.float32(1 / 6), name=_scope(name))

    # -- between codes and floats -----------------------------------------------------------------------------

    def quantise(self, x, params, name):
        """Codes of a float tensor."""
        low, high = (np.float32(params.scale * (code - params.zero_point)) for code in (0, 255))
        codes = self.tf.quantization.fake_quant_with_min_max_vars(x, low, high, name=_scope(name))
        self._floats[id(codes)] = codes, x, name        # codes: kept, so that no other tensor gets its id
        return codes

    def dequantise(self, codes, params):
        return codes

    def clip(self, codes, params, low, high):
        """Codes kept within low..high.

        By the relu or relu6 of the operator that wrote them where its ends are these; otherwise by a pass over bytes.
        """
        _, x, name = self._floats.get(id(codes), (codes, None, None))
        zero_point, six = params.zero_point, round(6 / params.scale) + params.zero_point
        if x is not None and low == zero_point and (high >= 255 or high == six) and (low > 0 or high < 255):
            return self.quantise((self.tf.nn.relu6 if high < 255 else self.tf.nn.relu)(x), params, name)
        name = name or 'clipped'
        if high < 255:
            codes = self.tf.minimum(codes, np.float32(params.scale * (high - zero_point)))
            codes = self.quantise(codes, params, name)
        if low > 0:
            codes = self.tf.maximum(codes, np.float32(params.scale * (low - zero_point)))
            # quantised once more: the converter turns a maximum with 0 into a relu of its own
            codes = self.quantise(codes, params, name)
        return codes

    def int8_convolution(self, x, codes, scales, bias, op, name):
        """Float result of a convolution like `op` (torch's) with weights codes * scales (by output channel).

        x: QuantisedTensor; bias: float, which the converter rounds to int32 on the scale of the products.
        """
        weight = kernel_order(op, codes.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT))
        if is_depthwise(op):            # fake quant takes the last axis for the channels
            weight = self.tf.reshape(self._int8_weight(weight.swapaxes(2, 3), scales), (*op.kernel_size, -1, 1))
        else:
            weight = self._int8_weight(weight, scales)
        return self.convolution(x.tensor, weight, np.float32(bias), op, name)

    def _int8_weight(self, codes, scales):
        ends = np.float32(LARGEST_WEIGHT * scales)
        return self.tf.quantization.fake_quant_with_min_max_vars_per_channel(
            np.float32(codes * scales), -ends, ends, narrow_range=True)

    def int8_matmul(self, x, codes, scale, bias, name):
        """Float logits (1, classes) of a QuantisedTensor (1, 1, 1, C); weights codes * scale."""
        end = np.float32(LARGEST_WEIGHT * scale)
        weight = self.tf.quantization.fake_quant_with_min_max_vars(
            np.float32(codes.clip(-LARGEST_WEIGHT, LARGEST_WEIGHT).T * scale), -end, end, narrow_range=True)
        return self.matmul(self.flatten(x.tensor, name), weight, np.float32(bias), name)

    def constant_map(self, values, params, name):
        """A constant map (C, H, W)."""
        return self.quantise(np.float32(values.transpose(1, 2, 0)[None]), params, name)


def _scope(name):
    """A name that TensorFlow allows."""
    return name.replace('.', '/')


def same_padding(op, hw):
    """Whether TensorFlow's SAME padding of a map of hw (height, width) is torch's, op.padding on every side.

    SAME adds as little as gives ceil(size / stride) pixels, the odd one at the end: other pixels at a stride of 2.
    """
    return all(max((-(-size // stride) - 1) * stride + kernel - size, 0) == 2 * padding
               for size, stride, kernel, padding in zip(hw, op.stride, op.kernel_size, op.padding))


def kernel_order(op, weight):
    """A convolution's weight (C', C / groups, kh, kw) in TensorFlow's order: (kh, kw, C, C'), depth-wise (kh, kw, C',
    1)."""
    return weight.transpose(2, 3, 0, 1) if is_depthwise(op) else weight.transpose(2, 3, 1, 0)


def is_depthwise(op):
    return op.groups > 1


def export_fp32(network, metadata=None):
    """Bytes of the fp32 .tflite of a Network in eval mode on the CPU; metadata {key: anything json takes}."""
    model = convert(network, lambda image: FloatExporter(TfGraph(image)).write(network))
    return _with_metadata(model, metadata or {})


def export_int8(network, ranges, metadata=None):
    """Bytes of the INT8 .tflite of a Network in int8 and eval mode; ranges: of quantisation.observe() on real images.

    UserError where an op has other than 8 bits, or weights of 7.
    """
    model = convert(network, lambda image: Int8Exporter(TfGraph(image), ranges).write(network), quantised=True)
    return _with_metadata(model, metadata or {})


def convert(network, write, quantised=False):
    """Bytes of what write(image) computes; quantised: on integers between its fake-quant ops."""
    tf = need('tensorflow')
    channels, height, width = io_sizes(network)[0]
    image = tf.TensorSpec((1, height, width, channels), tf.float32, 'image')
    function = tf.function(write, input_signature=[image], autograph=False).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    if quantised:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with warnings.catch_warnings():     # that it was given no images: the fake-quant ops have the ranges
        warnings.simplefilter('ignore')
        return converter.convert()


def read_tree(model):
    """(flatbuffers' schema, the tree) of a model's bytes."""
    schema = need('ai_edge_litert.schema_py_generated')
    return schema, schema.ModelT.InitFromObj(schema.Model.GetRootAs(model))


def write_tree(tree):
    """A model's bytes of a tree."""
    builder = need('flatbuffers').Builder(1 << 20)
    builder.Finish(tree.Pack(builder), b'TFL3')
    return bytes(builder.Output())


def _with_metadata(model, metadata):
    """A model's bytes with `metadata` in them."""
    schema, tree = read_tree(model)
    entry, buffer = schema.MetadataT(), schema.BufferT()
    entry.name, entry.buffer, buffer.data = METADATA, len(tree.buffers), list(json.dumps(metadata).encode())
    tree.buffers.append(buffer)
    tree.metadata = [*(tree.metadata or []), entry]
    return write_tree(tree)


def metadata_of(model):
    """{key: value} that a model's bytes were exported with; ValueError where they are none of ours."""
    tree = need('ai_edge_litert.schema_py_generated').Model.GetRootAs(model)
    for entry in map(tree.Metadata, range(tree.MetadataLength())):
        if entry.Name() == METADATA.encode():
            return json.loads(tree.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    raise ValueError('no model of this exporter')
