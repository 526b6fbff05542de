"""A static Network written into a graph, layer by layer: in float, or in float between int8 quantisers.

A graph (onnx_models.OnnxGraph, tflite_models.TfliteGraph) writes the operators. int8_exporter.py writes networks on
integers.
"""
import numpy as np

from ..modeling.blocks import run_layers
from ..modeling.network import named_blocks
from .quantisation import QuantParams, activation_scale, affine, fold_norm, signed_codes, weight_codes


class Exporter:
    """The way through a Network's layouts; what a value is and how an operation is written, subclasses know."""

    def __init__(self, graph):
        self.graph = graph

    def write(self, network):
        """The graph's output: logits of a Network in eval mode on the CPU, features of one without a classifier."""
        x = self.image()
        for name, block in named_blocks(network):
            x = self.block(x, block, name)
        return x if network.num_classes else self.features(x, name)

    def block(self, x, block, name):
        """Value of a block's output."""
        return run_layers(block.layers,
                          lambda layer, v: self.layer(v, layer, getattr(block, layer.name), f'{name}.{layer.name}'), x,
                          lambda y, shortcut, activation: self.add(y, shortcut, activation, name))

    def layer(self, x, layer, module, name):
        """Value of a layout.Layer applied to x; module: torch's."""
        if layer.op in ('conv', 'dwconv'):
            return self.conv(x, getattr(module, layer.op), module.norm, layer.activation, f'{name}.{layer.op}')
        if layer.op == 'dwstack':
            *first, last = module.dwconv
            for i, op in enumerate(first):
                x = self.conv(x, op, None, None, f'{name}.dwconv.{i}')
            return self.conv(x, last, module.norm, layer.activation, f'{name}.dwconv.{len(first)}')
        if layer.op == 'se':
            return self.squeeze_excite(x, module.fc.reduce, module.fc.expand, name)
        if layer.op == 'mean':
            return self.mean(x, name)
        if layer.op == 'flatten':
            return self.flatten(x, name)
        if layer.op == 'linear':
            return self.linear(x, module, name)
        return x                                    # dropout


class FloatExporter(Exporter):
    """Writes a Network in float, batch norm folded into the convolutions; values are tensors of the graph."""

    def image(self):
        return self.graph.image

    def operands(self, x, op, norm, name):
        """(input, weight, bias) of a convolution with its batch norm, or of a linear layer (norm None)."""
        weight, bias = fold_norm(op, norm)
        return x, self.graph.weight(op, weight, name + '.weight'), self.graph.bias(bias, name + '.bias')

    def conv(self, x, op, norm, activation, name):
        y = self.graph.convolution(*self.operands(x, op, norm, name), op, name)
        return self.graph.activated(y, activation, unit_of(name))

    def squeeze_excite(self, x, reduce, expand, name):
        gate = self.conv(self.mean(x, name + '.mean'), reduce, None, 'relu', name + '.fc.reduce')
        gate = self.conv(gate, expand, None, None, name + '.fc.expand')
        return self.graph.product(x, self.graph.hard_sigmoid(gate, name + '.gate'), name)

    def mean(self, x, name):
        return self.graph.mean(x, name)

    def flatten(self, x, name):
        return self.graph.flatten(x, name)

    def linear(self, x, op, name):
        return self.graph.matmul(*self.operands(x, op, None, name), name)

    def add(self, y, shortcut, activation, name):
        return self.graph.activated(self.graph.sum(y, shortcut, name + '.add'), activation, name)

    def features(self, x, name):
        return self.graph.features(x)


class SymmetricExporter(FloatExporter):
    """Writes a Network with symmetric zero points into an ONNX graph of int8 codes: a float graph in which every input
    and weight of a quantised op is rounded to int8 with zero point 0, as TensorRT reads them.

    tensors: as of int8_exporter.Int8Exporter.
    """

    def __init__(self, graph, reduce_range=False):
        super().__init__(graph)
        self.reduce_range, self.tensors = reduce_range, {}

    def operands(self, x, op, norm, name):
        graph, params = self.graph, QuantParams(activation_scale(op)[0])
        codes, scale = weight_codes(op, self.reduce_range)
        factor, bias = affine(op, norm)
        codes, scales = signed_codes(codes, factor * scale, bias, params.scale)
        x = graph.quantise(x, params, name + '.input')
        self.tensors[name] = [x, *params, 0.0]
        return (graph.dequantise(x, params), graph.dequantised(name + '.weight', codes, scales, np.int8),
                graph.bias(bias, name + '.bias'))


def unit_of(name):
    """Name of the layer that a convolution belongs to: X of X.conv, X.dwconv and X.dwconv.2, X.fc of X.fc.reduce."""
    return name.rpartition('.')[0].removesuffix('.dwconv')
