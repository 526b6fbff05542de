"""A static Network as a Keras model, layer by layer from the same layouts. Needs tensorflow.

    model = keras_network(network)          # (1, r, r, 3) to (1, classes), NHWC; weights and statistics copied

Layers are called as the torch modules are (stages.stage1.0.depth_conv.norm). The way to fp32 TFLite, and to anything
else that reads Keras models.
"""
from ..optional import need
from .blocks import run_layers
from .network import io_sizes, named_blocks


def same_padding(op, hw):
    """Whether TensorFlow's SAME padding of a map of hw (height, width) is torch's, op.padding on every side.

    SAME adds as little as gives ceil(size / stride) pixels, the odd one at the end: other pixels at a stride of 2.
    """
    return all(max((-(-size // stride) - 1) * stride + kernel - size, 0) == 2 * padding
               for size, stride, kernel, padding in zip(hw, op.stride, op.kernel_size, op.padding))


def kernel_order(op, weight):
    """A convolution's weight (C', C / groups, kh, kw) as Keras has it: (kh, kw, C, C'), depth-wise (kh, kw, C', 1)."""
    return weight.transpose(2, 3, 0, 1) if is_depthwise(op) else weight.transpose(2, 3, 1, 0)


def is_depthwise(op):
    return op.groups > 1


def _array(tensor):
    return tensor.detach().cpu().float().numpy()


class KerasBuilder:
    """Writes torch modules of a Network as Keras layers with their weights; values are Keras tensors (N, H, W, C)."""

    def __init__(self):
        self.layers = need('tensorflow').keras.layers

    def apply(self, layer, x, *weights):
        y = layer(x)
        if weights:
            layer.set_weights(weights)
        return y

    def conv(self, x, op, name):
        padding = 'same'
        if not same_padding(op, x.shape[1:3]):
            x, padding = self.layers.ZeroPadding2D(op.padding, name=name + '.pad')(x), 'valid'
        options = {'kernel_size': op.kernel_size, 'strides': op.stride, 'padding': padding, 'name': name,
                   'use_bias': op.bias is not None}
        layer = (self.layers.DepthwiseConv2D(**options) if is_depthwise(op)
                 else self.layers.Conv2D(op.out_channels, **options))
        weights = [kernel_order(op, _array(op.weight))] + ([] if op.bias is None else [_array(op.bias)])
        return self.apply(layer, x, *weights)

    def norm(self, x, norm, name):
        layer = self.layers.BatchNormalization(epsilon=norm.eps, name=name)
        return self.apply(layer, x, *map(_array, (norm.weight, norm.bias, norm.running_mean, norm.running_var)))

    def activation(self, x, kind, name):
        if kind is None:
            return x
        if kind in ('relu', 'relu6'):
            return self.layers.ReLU(6.0 if kind == 'relu6' else None, name=name)(x)
        return self.layers.Activation({'hswish': 'hard_silu', 'swish': 'silu', 'hsigmoid': 'hard_sigmoid'}[kind],
                                      name=name)(x)

    def mean(self, x, name):
        return self.layers.GlobalAveragePooling2D(keepdims=True, name=name)(x)

    def unit(self, x, layer, unit, name):
        """A layer of a layout (layout.Layer) applied to x; unit: its torch module."""
        if layer.op in ('conv', 'dwconv', 'dwstack'):
            for key, op in unit.named_modules(prefix=name):
                if hasattr(op, 'kernel_size'):
                    x = self.conv(x, op, key)
            return self.activation(self.norm(x, unit.norm, name + '.norm'), layer.activation, name + '.act')
        if layer.op == 'se':
            gate = self.conv(self.mean(x, name + '.mean'), unit.fc.reduce, name + '.fc.reduce')
            gate = self.conv(self.activation(gate, 'relu', name + '.fc.relu'), unit.fc.expand, name + '.fc.expand')
            return self.layers.Multiply(name=name)([x, self.activation(gate, 'hsigmoid', name + '.fc.hsigmoid')])
        if layer.op == 'mean':
            return self.mean(x, name)
        if layer.op == 'flatten':
            return self.layers.Flatten(name=name)(x)
        if layer.op == 'linear':
            dense = self.layers.Dense(unit.out_features, name=name)
            return self.apply(dense, x, _array(unit.weight).T, _array(unit.bias))
        return self.layers.Dropout(unit.p, name=name)(x)

    def block(self, x, block, name):
        def add(y, shortcut, activation):
            return self.activation(self.layers.Add(name=name + '.add')([y, shortcut]), activation, name + '.act')
        return run_layers(block.layers, lambda layer, v: self.unit(v, layer, getattr(block, layer.name),
                                                                   f'{name}.{layer.name}'), x, add)


def keras_network(network, batch_size=1):
    """Keras model of a Network, its weights copied: images (N, r, r, C) of its resolution to logits (N, classes).

    Of a Network without a classifier: to the last block's map (N, H, W, C). batch_size None: any.
    """
    keras = need('tensorflow').keras
    channels, *hw = io_sizes(network)[0]
    builder = KerasBuilder()
    x = image = keras.Input((*hw, channels), batch_size, name='image')
    for name, block in named_blocks(network):
        x = builder.block(x, block, name)
    return keras.Model(image, x)
