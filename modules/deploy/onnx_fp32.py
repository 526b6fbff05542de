"""A static Network as fp32 ONNX: batch norm folded into the convolutions, one graph node per operation."""
from ..modeling.blocks import run_layers
from ..modeling.network import io_sizes, named_blocks
from .folding import folded
from .graph import IMAGE, Graph, conv_attributes


class FloatExporter:
    """Writes a Network into self.graph."""

    def __init__(self):
        self.graph = Graph()

    def operands(self, x, op, norm, name):
        """[input, weight, bias] of a convolution with its batch norm, or of a linear layer (norm None)."""
        weight, bias = folded(op, norm)
        return [x, self.graph.constant(name + '.weight', weight), self.graph.constant(name + '.bias', bias)]

    def conv(self, x, op, norm, name):
        return self.graph.add('Conv', self.operands(x, op, norm, name), name, **conv_attributes(op))

    def unit(self, x, layer, unit, name):
        """A layer of a layout (layout.Layer) applied to x; unit: its torch module."""
        if layer.op in ('conv', 'dwconv'):
            op = unit.conv if layer.op == 'conv' else unit.dwconv
            return self.graph.activated(self.conv(x, op, unit.norm, f'{name}.{layer.op}'), layer.activation, name)
        if layer.op == 'dwstack':
            for i, op in enumerate(unit.dwconv):
                x = self.conv(x, op, unit.norm if i == len(unit.dwconv) - 1 else None, f'{name}.dwconv.{i}')
            return self.graph.activated(x, layer.activation, name)
        if layer.op == 'se':
            mean = self.graph.add('GlobalAveragePool', [x], name + '.mean')
            gate = self.graph.add('Relu', [self.conv(mean, unit.fc.reduce, None, name + '.fc.reduce')], name + '.relu')
            gate = self.conv(gate, unit.fc.expand, None, name + '.fc.expand')
            gate = self.graph.add('HardSigmoid', [gate], name + '.gate', alpha=1 / 6, beta=0.5)
            return self.graph.add('Mul', [x, gate], name)
        if layer.op == 'mean':
            return self.graph.add('GlobalAveragePool', [x], name)
        if layer.op == 'flatten':
            return self.graph.add('Flatten', [x], name)
        if layer.op == 'linear':
            return self.graph.add('Gemm', self.operands(x, unit, None, name), name, transB=1)
        return x                                            # dropout

    def block(self, x, block, name):
        def add(y, shortcut, activation):
            return self.graph.activated(self.graph.sum(y, shortcut, name + '.add'), activation, name)
        return run_layers(block.layers, lambda layer, v: self.unit(v, layer, getattr(block, layer.name),
                                                                   f'{name}.{layer.name}'), x, add)


def export_fp32(network, metadata=None):
    """ModelProto of a Network in eval mode on the CPU: images (N, 3, r, r) to logits (N, classes), or to features."""
    return write_float(FloatExporter(), network, metadata or {})


def write_float(exporter, network, metadata):
    """ModelProto of a Network that a FloatExporter writes."""
    x = IMAGE
    for name, block in named_blocks(network):
        x = exporter.block(x, block, name)
    if not network.num_classes:
        x = exporter.graph.add('Flatten', [x], 'features')
    shape, outputs = io_sizes(network)
    return exporter.graph.model(shape, x, outputs, metadata)
