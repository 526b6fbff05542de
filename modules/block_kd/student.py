"""Student stages of block KD: teacher channels -> in_proj -> dynamic stage -> out_proj -> teacher channels."""
import random

import torch
from torch import nn

from ..modeling.dynamic_blocks import DynamicStage
from ..modeling.ops.dynamic_op import DynamicConv
from ..modeling.ops.lsq_plus import local_initialisation, quantised_ops
from ..search_space import sampling
from ..search_space.encoding import EncodingError, format_sub_stage, parse_block_id, parse_sub_stage
from ..search_space.superspace import get_superspace
from ..training.calibrate import kept_statistics


class StudentStage(nn.Module):
    """One candidate block type of one stage; (N, teacher_cin, H, W) to (N, teacher_cout, H/s, W/s).

    The stage holds its whole width list on both sides (block KD trains all width windows at once).
    """

    def __init__(self, superspace, block_id, teacher_cin, teacher_cout):
        super().__init__()
        self.superspace, self.block_id = superspace, block_id
        self.spec = superspace.stage(block_id.stage)
        self.block_type = superspace.block_type(*block_id[:2])
        self.input_widths = superspace.input_widths(block_id.stage)
        cin, cout = max(self.input_widths), max(self.spec.widths)
        self.stage = DynamicStage(self.spec, self.block_type, cin, cout)
        self.in_proj = DynamicConv(teacher_cin, cin, 1)
        self.out_proj = DynamicConv(cout, teacher_cout, 1)
        self.set_max_sub_stage()

    @classmethod
    def build(cls, superspace, block_id, teacher_cin, teacher_cout):
        """StudentStage of e.g. ('mobilew', 'stage3_1') between teacher_cin and teacher_cout channels."""
        space = get_superspace(superspace)
        return cls(space, parse_block_id(space, block_id), teacher_cin, teacher_cout)

    def set_active_sub_stage(self, cin, blocks):
        """Run the stage with [(k, w, e), …] on `cin` input channels; EncodingError where it is no member."""
        declared = {e: e for e in self.block_type.expands}
        blocks = [(k, w, declared.get(e or None, e)) for k, w, e in blocks]
        blocks = parse_sub_stage(self.superspace, self.block_id, format_sub_stage(blocks))
        if cin not in self.input_widths:
            raise EncodingError(f'{self.superspace.name} {self.block_id}: input width {cin} is not one of '
                                + ' '.join(map(str, self.input_widths)))
        self.in_proj.active_out_channels, self.active_blocks = cin, blocks
        self.stage.set_active(cin, blocks)

    def _set_extreme(self, pick):
        block = pick(self.block_type.kernels), pick(self.spec.widths), pick(self.block_type.expands)
        self.set_active_sub_stage(pick(self.input_widths), [block] * pick(self.spec.depths))

    def set_max_sub_stage(self):
        """Activate the largest sub-stage and input width."""
        self._set_extreme(max)

    def set_min_sub_stage(self):
        """Activate the smallest sub-stage and input width."""
        self._set_extreme(min)

    def sample_active_sub_stage(self, width_list=None, rng=random):
        """Activate a random sub-stage (widths from `width_list` where given); returns (cin, [(k, w, e), …])."""
        blocks, cin, _ = sampling.sample_sub_stage(self.superspace, self.block_id, rng, width_list=width_list)
        self.set_active_sub_stage(cin, blocks)
        return cin, blocks

    def initialize_scales(self, x, rng, tries=1000):
        """Initialise the scales that no forward has reached yet, on stage inputs x; changes nothing else.

        Ranks that call this with the same x and rng get the same scales. The active sub-stage is then any.
        """
        with torch.no_grad(), local_initialisation(), kept_statistics(self):
            self.eval()
            self.set_max_sub_stage()
            self(x)
            for _ in range(tries):
                if all(op.scales_initialized for op in quantised_ops(self)):
                    return
                self.sample_active_sub_stage(rng=rng)
                self(x)

    def forward(self, x):
        return self.out_proj(self.stage(self.in_proj(x)))
