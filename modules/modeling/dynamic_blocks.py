"""Dynamic blocks: the layout at the largest sizes allocates, the layout at the active sizes says what runs."""
from torch import nn

from ..search_space.block import Block
from .blocks import NORMALISED, StaticBlock, run_layers
from .layout import block_layout
from .ops.dynamic_op import (
    DynamicConvNormAct,
    DynamicDepthConvNormAct,
    DynamicDepthStackNormAct,
    DynamicLinear,
    DynamicSE,
)
from .ops.lsq_plus import quantised_ops
from .ops.op import GlobalMean, take

DYNAMIC_UNITS = {'conv': DynamicConvNormAct, 'dwconv': DynamicDepthConvNormAct,
                 'dwstack': DynamicDepthStackNormAct, 'se': DynamicSE,
                 'linear': lambda layer: DynamicLinear(layer.cin, layer.cout)}
STATELESS_UNITS = {'mean': GlobalMean, 'flatten': nn.Flatten, 'dropout': lambda: nn.Dropout(0.0)}


class DynamicBlock(nn.Module):
    """A block of type `block_type` (superspace.BlockType) with the largest weights.

    cin, cout: largest channels; stride as built. `active` (search_space.block.Block) is what the next forward computes.
    """

    def __init__(self, block_type, cin, cout, stride):
        super().__init__()
        self.name, self.stride, self.activation = block_type.name, stride, block_type.activation
        largest = block_type.kernels[-1], cout, block_type.expands[-1]
        self.layers = block_layout(self._at(cin, *largest), full=True)
        for layer in self.layers:
            if layer.op in DYNAMIC_UNITS:
                self.add_module(layer.name, DYNAMIC_UNITS[layer.op](layer))
            elif layer.op != 'add':
                self.add_module(layer.name, STATELESS_UNITS[layer.op]())
        self.set_active(cin, *largest)

    def _at(self, cin, kernel, cout, expand):
        return Block(self.name, 0, cin, cout, kernel, expand, self.stride, self.activation)

    def set_active(self, cin, kernel, cout, expand):
        """Use `cin` input and `cout` output channels, kernel `kernel` and expand ratio `expand` from now on."""
        self.active = self._at(cin, kernel, cout, expand)
        self.active_layers = block_layout(self.active)

    def forward(self, x):
        return run_layers(self.active_layers, self._run_layer, x)

    def _run_layer(self, layer, x):
        unit = getattr(self, layer.name)
        if layer.op == 'linear':
            return unit(x, layer.cout)
        return unit(x, layer) if layer.op in DYNAMIC_UNITS else unit(x)

    def active_ops(self):
        """The quantised ops of the active layers; of a stack of depth-wise convolutions all."""
        return [op for layer in self.active_layers if layer.op in DYNAMIC_UNITS
                for op in quantised_ops(getattr(self, layer.name))]

    def last_norm(self):
        """The batch norm before the sum, None in a block that does not always have a shortcut."""
        if not any(layer.shortcut for layer in self.layers):
            return None
        last = [layer for layer in self.layers if layer.op in NORMALISED and not layer.shortcut][-1]
        return getattr(self, last.name).norm

    def get_active_block(self):
        """A StaticBlock with copies of the active slices, which computes the same numbers.

        In int8 mode that holds once the scales are initialised: they belong to the whole weight, of which a
        static copy has only its slice.
        """
        block = StaticBlock(self.active)
        source = {_static_name(name): tensor for name, tensor in self.state_dict().items()}
        block.load_state_dict({name: take(source[name], tensor.shape)
                               for name, tensor in block.state_dict().items()})
        copy_quantisation(self, block)
        return block.train(self.training).to(next(self.parameters()).device)


def _static_name(name):
    """A dynamic stack's depth_conv.dwconv.dwconv1.weight is a static one's depth_conv.dwconv.1.weight."""
    return name.replace('.dwconv.dwconv', '.dwconv.')


def copy_quantisation(source, target):
    """Give the target's quantised ops the bits and the initialised state of the source's ops of the same name."""
    ops = {_static_name(name): op for name, op in source.named_modules()}
    targets = set(quantised_ops(target))
    for name, op in target.named_modules():
        if op in targets:
            for attribute in ('nbits_w', 'nbits_a', 'zero_points', 'initial', 'scales_initialized'):
                setattr(op, attribute, getattr(ops[name], attribute))


class DynamicStage(nn.Module):
    """The blocks of one stage: `depth` DynamicBlocks of which the first active ones run.

    stage: macro_arch.Stage; cin: largest input channels; cout: largest width.
    """

    def __init__(self, stage, block_type, cin, cout):
        super().__init__()
        self.blocks = nn.ModuleList(DynamicBlock(block_type, cin if i == 0 else cout, cout,
                                                 stage.stride if i == 0 else 1)
                                    for i in range(stage.depths[-1]))
        self.active_depth = len(self.blocks)

    def set_active(self, cin, blocks):
        """Run len(blocks) blocks with [(k, w, e), …] on an input of `cin` channels."""
        self.active_depth = len(blocks)
        for block, (k, w, e) in zip(self.blocks, blocks):
            block.set_active(cin, k, w, e)
            cin = w

    @property
    def active_blocks(self):
        return self.blocks[:self.active_depth]

    def active_ops(self):
        """The quantised ops that the next forward runs."""
        return [op for block in self.active_blocks for op in block.active_ops()]

    def forward(self, x):
        for block in self.active_blocks:
            x = block(x)
        return x
