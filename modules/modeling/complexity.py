"""FLOPs (multiply-adds of convolutions, M) and params (M) from layouts; no tensor is made.

Linear layers are not counted in FLOPs; SE's 1x1 convolutions are. Params count every parameter: weights,
biases, batch norm's two per channel and LSQ+'s three (sw, sa, beta) per quantised op.
"""
from functools import lru_cache

from ..search_space.block import out_size
from ..search_space.encoding import sub_stage_blocks
from .layout import block_layout

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
def block_complexity(block):
    """(multiply-adds, params) of a Block; plain ints."""
    flops = params = 0
    pixels = block.hw
    for layer in block_layout(block):
        layer_hw = block.hw if layer.shortcut else pixels
        f, p = layer_complexity(layer, layer_hw)
        flops, params = flops + f, params + p
        if not layer.shortcut:
            pixels = 1 if layer.op == 'mean' else out_size(pixels, layer.stride)
    return flops, params


def config_complexity(blocks):
    """(MFLOPs, Mparams) of a sequence of Blocks."""
    flops = params = 0
    for block in blocks:
        f, p = block_complexity(block)
        flops, params = flops + f, params + p
    return flops / 1e6, params / 1e6


def network_complexity(network):
    """(MFLOPs, Mparams) of a Network, or of the active subnet of a Supernet."""
    active = getattr(network, 'get_active_subnet_config', None)
    return config_complexity((active() if active else network.config).blocks)


def sub_stage_complexity(superspace, block_id, sub_stage, input_shape):
    """(MFLOPs, Mparams) of a sub-stage, as in a block LUT's rows.

    Example: sub_stage_complexity('mobilew', 'stage3_5', '5#72#6_3#112#8', (1, 32, 28, 28)).
    """
    return config_complexity(sub_stage_blocks(superspace, block_id, sub_stage, input_shape))
