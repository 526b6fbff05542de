"""The operators of an INT8 network in TensorFlow, for int8.Int8Exporter. Needs tensorflow.

A quantised tensor is a float one behind a fake-quant op whose range is its grid's: the TFLite converter takes scale and
zero point from there and writes integer operators only. Codes are 0..255 here and 128 less in the file (int8).
"""
import numpy as np

from ..modeling.keras_network import is_depthwise, kernel_order, same_padding
from ..optional import need

WEIGHT = 127                            # TFLite's kernels rely on no weight being -128


class TfGraph:
    """Operators on `image`, a tensor (1, H, W, C); every method returns the tensor that it adds."""

    floats, float_swish = False, False  # every tensor with a reader is quantised

    def __init__(self, image):
        self.tf, self.image = need('tensorflow'), image
        self._floats = {}               # what each quantised tensor was before, by id

    def quantise(self, x, grid, name):
        """A float tensor on a grid (scale, zero)."""
        low, high = np.float32(-grid.scale * grid.zero), np.float32(grid.scale * (255 - grid.zero))
        codes = self.tf.quantization.fake_quant_with_min_max_vars(x, low, high, name=_scope(name))
        self._floats[id(codes)] = codes, x, name        # codes: kept, so that no other tensor gets its id
        return codes

    def real(self, codes, grid):
        return codes

    def clip_codes(self, codes, grid, low, high):
        """Codes kept within low..high.

        By the relu or relu6 of the operator that wrote them where its ends are these; otherwise by a pass over bytes.
        """
        _, x, name = self._floats.get(id(codes), (codes, None, None))
        six = round(6 / grid.scale) + grid.zero
        if x is not None and low == grid.zero and (high >= 255 or high == six) and (low > 0 or high < 255):
            return self.quantise((self.tf.nn.relu6 if high < 255 else self.tf.nn.relu)(x), grid, name)
        name = name or 'clipped'
        if high < 255:
            codes = self.quantise(self.tf.minimum(codes, np.float32(grid.scale * (high - grid.zero))), grid, name)
        if low > 0:                     # quantised anew: the converter turns a maximum with 0 into a relu of its own
            codes = self.quantise(self.tf.maximum(codes, np.float32(grid.scale * (low - grid.zero))), grid, name)
        return codes

    def conv(self, x, op, codes, scales, bias, name):
        """Float result of a convolution like `op` (torch's) with weights codes * scales (by output channel).

        x: (codes, grid); bias: float, which the converter rounds to int32 on the scale of the products.
        """
        x, tf = x[0], self.tf
        padding = 'SAME'
        if not same_padding(op, x.shape[1:3]):
            top, left = op.padding      # 0 is a code: the zero point
            x, padding = tf.pad(x, [[0, 0], [top, top], [left, left], [0, 0]]), 'VALID'
        weight = kernel_order(op, codes.clip(-WEIGHT, WEIGHT))
        strides = [1, *op.stride, 1]
        if is_depthwise(op):            # fake quant takes the last axis for the channels
            weight = self._weight(weight.swapaxes(2, 3), scales)
            y = tf.nn.depthwise_conv2d(x, tf.reshape(weight, (*op.kernel_size, -1, 1)), strides, padding)
        else:
            y = tf.nn.conv2d(x, self._weight(weight, scales), strides, padding)
        return tf.nn.bias_add(y, bias.astype(np.float32), name=_scope(name))

    def _weight(self, codes, scales):
        ends = (WEIGHT * scales).astype(np.float32)
        return self.tf.quantization.fake_quant_with_min_max_vars_per_channel(
            (codes * scales).astype(np.float32), -ends, ends, narrow_range=True)

    def linear(self, x, codes, scale, bias, name):
        """Logits (1, classes) of codes (1, 1, 1, C), x: (codes, grid)."""
        tf, end = self.tf, np.float32(WEIGHT * scale)
        weight = tf.quantization.fake_quant_with_min_max_vars(
            (codes.clip(-WEIGHT, WEIGHT).T * scale).astype(np.float32), -end, end, narrow_range=True)
        x = tf.reshape(x[0], (1, -1))
        return tf.nn.bias_add(tf.matmul(x, weight), bias.astype(np.float32), name=_scope(name))

    def real_map(self, values, grid, name):
        """A constant map (C, H, W) on a grid."""
        return self.quantise(values.transpose(1, 2, 0)[None].astype(np.float32), grid, name)

    def plus(self, x, value):
        return x + np.float32(value) if value else x

    def sum(self, x, y, name):
        return self.tf.add(x, y, name=_scope(name))

    def product(self, x, y, name):
        return self.tf.multiply(x, y, name=_scope(name))

    def sigmoid(self, x, name):
        return self.tf.sigmoid(x, name=_scope(name))

    def mean(self, x, name):
        return self.tf.reduce_mean(x, (1, 2), keepdims=True, name=_scope(name))

    def flatten(self, x, name):
        return x                        # a map stays one: putting channels first would cost a pass

    def hswish(self, codes, grid, name):
        """The pattern that the converter writes as one HARD_SWISH."""
        return self.tf.multiply(codes * self.tf.nn.relu6(codes + 3.0), np.float32(1 / 6), name=_scope(name))


def _scope(name):
    """A name that TensorFlow allows."""
    return name.replace('.', '/')
