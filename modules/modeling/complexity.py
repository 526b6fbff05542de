"""FLOPs (multiply-adds of convolutions, M) and params (M) from layouts; no tensor is made.

Linear layers are not counted in FLOPs; SE's 1x1 convolutions are. Params count every parameter: weights,
biases, batch norm's two per channel and LSQ+'s three (sw, sa, beta) per quantised op.
"""
from functools import lru_cache

from ..search_space.encoding import EncodingError, parse_block_id, parse_sub_stage, stage_config
from ..search_space.superspace import get_superspace
from .layout import Sizes, block_layout, out_size

LSQ_PARAMS = 3


def layer_complexity(layer, hw):
    """(multiply-adds, params) of one layer whose input is hw x hw."""
    pixels = out_size(hw, layer.stride) ** 2
    norm = 2 * layer.cout
    if layer.op == 'conv':
        weights = layer.kernel ** 2 * layer.cin * layer.cout
        return weights * pixels, weights + LSQ_PARAMS + norm
    if layer.op in ('dwconv', 'dwstack'):
        weights = layer.kernel ** 2 * layer.cout * layer.repeat
        return weights * pixels, weights + LSQ_PARAMS * layer.repeat + norm
    if layer.op == 'se':
        weights = 2 * layer.cin * layer.mid
        return weights, weights + layer.mid + layer.cin + 2 * LSQ_PARAMS
    if layer.op == 'linear':
        return 0, layer.cin * layer.cout + layer.cout + LSQ_PARAMS
    return 0, 0


@lru_cache(maxsize=1 << 18)
def block_complexity(name, sizes, hw):
    """(multiply-adds, params) of block type `name` at `sizes` with an hw x hw input; plain ints."""
    flops = params = 0
    pixels = hw
    for layer in block_layout(name, sizes):
        layer_hw = hw if layer.shortcut else pixels
        f, p = layer_complexity(layer, layer_hw)
        flops, params = flops + f, params + p
        if not layer.shortcut:
            pixels = 1 if layer.op == 'mean' else out_size(pixels, layer.stride)
    return flops, params


def config_complexity(blocks):
    """(MFLOPs, Mparams) of a sequence of BlockConfigs."""
    flops = params = 0
    for block in blocks:
        f, p = block_complexity(block.name, block_sizes(block), block.hw)
        flops, params = flops + f, params + p
    return flops / 1e6, params / 1e6


def network_complexity(network):
    """(MFLOPs, Mparams) of a Network, or of the active subnet of a Supernet."""
    active = getattr(network, 'get_active_subnet_config', None)
    return config_complexity((active() if active else network.config).blocks)


def block_sizes(block):
    """Sizes of a BlockConfig."""
    return Sizes(block.cin, block.cout, block.kernel_size, block.expand_ratio, block.stride or 1, block.activation)


def sub_stage_config(superspace, block_id, sub_stage, input_shape):
    """BlockConfigs of a sub-stage string; input_shape is (N, C, H, W) of the stage's input, H = W.

    Raises EncodingError where the sub-stage or its input channels are not in the space.
    """
    space = get_superspace(superspace)
    block_id = parse_block_id(space, block_id)
    blocks = parse_sub_stage(space, block_id, sub_stage)
    shape = tuple(input_shape or ())
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] < 1:
        raise EncodingError(f'{block_id}: input shape {input_shape} is not (N, C, H, W) with H = W')
    widths = space.input_widths(block_id.stage)
    if input_shape[1] not in widths:
        raise EncodingError(f'{space.name} {block_id}: input width {input_shape[1]} is not one of '
                            + ' '.join(map(str, widths)))
    return stage_config(space.stage(block_id.stage), space.block_type(*block_id[:2]), blocks,
                        input_shape[1], input_shape[2])


def sub_stage_complexity(superspace, block_id, sub_stage, input_shape):
    """(MFLOPs, Mparams) of a sub-stage, as in a block LUT's rows.

    Example: sub_stage_complexity('mobilew', 'stage3_5', '5#72#6_3#112#8', (1, 32, 28, 28)).
    """
    return config_complexity(sub_stage_config(superspace, block_id, sub_stage, input_shape))
