"""THE idea of this code base: a block is a function from sizes to a list of layers.

From that one list come the dynamic block of a supernet (at the largest sizes it allocates, at the active sizes
it says which slices to take), the static torch block, the exported models, FLOPs and params, and the kernels a latency
predictor sums. Layer names are state-dict keys, by which weights are copied from one to the other.

A layer reads the output of the layer before it, except that `shortcut` layers read the block's input; `add`
adds the shortcut (the block's input where no shortcut layer stands before it) and applies its activation.

A block type of your own: register_block(), docs/your_hyperspace.md.
Block definitions: SpaceEvo; their parts are MobileNetV1-V3, ResNet, SE-Net and EfficientNetV2's Fused-MBConv.
"""
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Layer:
    """One layer of a block.

    op: conv (conv + batch norm + activation), dwconv (the same, depth-wise), dwstack (`repeat` depth-wise
    convs, then one batch norm + activation), se (squeeze-excitation with `mid` channels), mean (global mean,
    kept 1x1), flatten, dropout, linear, add. cin, cout in channels; activation None: none.
    """
    name: str
    op: str
    cin: int
    cout: int
    kernel: int = 1
    stride: int = 1
    activation: str | None = None
    mid: int = 0
    repeat: int = 1
    shortcut: bool = False


def div8(v):
    """The multiple of 8 nearest to `v` (halves up, at least 8), one step more where that lost over 10 %."""
    rounded = max(8, int(v + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * v else rounded


def _se(channels, mid):
    return Layer('se', 'se', channels, channels, mid=mid)


def _downsample(s):
    return Layer('downsample', 'conv', s.cin, s.cout, 1, s.stride, shortcut=True)


def _add(s, activation=None):
    return Layer('add', 'add', s.cout, s.cout, activation=activation)


def mobilenet_v1(s, full=False):
    return [Layer('depth_conv', 'dwconv', s.cin, s.cin, s.kernel, s.stride, s.activation),
            Layer('point_conv', 'conv', s.cin, s.cout, 1, 1, s.activation)]


def mobilenet_v1_dual(s, full=False):
    layers = [Layer('depth_conv1', 'dwconv', s.cin, s.cin, s.kernel, s.stride, s.activation),
              Layer('point_conv1', 'conv', s.cin, s.cout, 1, 1, s.activation),
              Layer('depth_conv2', 'dwconv', s.cout, s.cout, s.kernel, 1, s.activation),
              Layer('point_conv2', 'conv', s.cout, s.cout, 1, 1, s.activation)]
    if full or s.cin != s.cout or s.stride > 1:
        layers.append(_downsample(s))
    return layers + [_add(s)]


def inverted_residual(s, full=False, se=False, downsample=False, stack=False):
    """MobileNetV2/V3 blocks; `downsample`: a projected shortcut where the identity does not fit; `stack`: 3x3s."""
    hidden = div8(s.expand * s.cin)
    layers = []
    if full or hidden != s.cin:
        layers.append(Layer('point_conv1', 'conv', s.cin, hidden, 1, 1, s.activation))
    if stack:
        layers.append(Layer('depth_conv', 'dwstack', hidden, hidden, 3, s.stride, s.activation,
                            repeat=(s.kernel - 1) // 2))
    else:
        layers.append(Layer('depth_conv', 'dwconv', hidden, hidden, s.kernel, s.stride, s.activation))
    if se:
        layers.append(_se(hidden, div8(hidden // 4)))
    layers.append(Layer('point_conv2', 'conv', hidden, s.cout))
    identity = s.stride == 1 and s.cin == s.cout
    if downsample and (full or not identity):
        layers.append(_downsample(s))
    return layers + [_add(s)] if downsample or identity else layers


def resnet(s, full=False, se=False):
    hidden = div8(s.expand * s.cout)
    layers = [Layer('conv1', 'conv', s.cin, hidden, 1, 1, s.activation),
              Layer('conv2', 'conv', hidden, hidden, s.kernel, s.stride, s.activation)]
    if se:
        layers.append(_se(hidden, div8(s.cin // 4)))
    layers.append(Layer('conv3', 'conv', hidden, s.cout))
    if full or s.stride > 1 or s.cin != s.cout:
        layers.append(_downsample(s))
    return layers + [_add(s, s.activation)]


def fused_mbconv(s, full=False, se=False):
    hidden = div8(s.expand * s.cin)
    layers = [Layer('fused_conv', 'conv', s.cin, hidden, s.kernel, s.stride, s.activation)]
    if se:
        layers.append(_se(hidden, div8(s.cin // 4)))
    layers.append(Layer('point_conv', 'conv', hidden, s.cout))
    if full or s.stride > 1 or s.cin != s.cout:
        layers.append(_downsample(s))
    return layers + [_add(s)]


def conv_block(s, full=False):
    return [Layer('conv', 'conv', s.cin, s.cout, s.kernel, s.stride, s.activation)]


def feature_mix(s, full=False):
    return [Layer('pool', 'mean', s.cin, s.cin)] + conv_block(s)


def logits(s, full=False):
    return [Layer('flatten', 'flatten', s.cin, s.cin), Layer('dropout', 'dropout', s.cin, s.cin),
            Layer('linear', 'linear', s.cin, s.cout)]


def _with(function, **options):
    return lambda s, full=False: function(s, full, **options)


LAYOUTS = {
    'FirstConvBlock': conv_block,
    'FinalExpandBlock': conv_block,
    'FeatureMixBlock': feature_mix,
    'LogitsBlock': logits,
    'MobileNetV1Block': mobilenet_v1,
    'MobileNetV1DualBlock': mobilenet_v1_dual,
    'MobileNetV2Block': inverted_residual,
    'MobileNetV3Block': _with(inverted_residual, se=True),
    'MobileNetV2ResBlock': _with(inverted_residual, downsample=True),
    'MobileNetV3ResBlock': _with(inverted_residual, se=True, downsample=True),
    'MobileNetV2K3ResBlock': _with(inverted_residual, downsample=True, stack=True),
    'MobileNetV3K3ResBlock': _with(inverted_residual, se=True, downsample=True, stack=True),
    'ResNetBlock': resnet,
    'ResNetSEBlock': _with(resnet, se=True),
    'FusedMBConvResBlock': fused_mbconv,
    'FusedMBConvSEResBlock': _with(fused_mbconv, se=True),
}


def register_block(name, layout):
    """Make `layout`, a function (Block, full) -> [Layer, …], the block type `name` for BlockType rows.

    full: also the layers only some sizes need, such as a shortcut's convolution. Raises UserError for a name that is
    taken, or that a latency table's keys, parts joined by _, cannot hold.
    """
    if not name.isalnum() or name in LAYOUTS:
        raise UserError(f'block type {name!r}: {"exists" if name in LAYOUTS else "letters and digits only"}')
    LAYOUTS[name] = layout


def block_layout(block, full=False):
    """List of Layers of a search_space.block.Block; `full` keeps the layers only some sizes need.

    Raises ValueError for an unknown block type.
    """
    if block.name not in LAYOUTS:
        raise ValueError(f'no block type {block.name!r}; known: {" ".join(LAYOUTS)}')
    return LAYOUTS[block.name](block, full)
