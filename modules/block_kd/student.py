"""Students of block KD: teacher channels -> in_proj -> dynamic stages -> out_proj -> teacher channels.

A StudentStage is a candidate block type of a searchable stage. The two ends of the network are an EndStudent each: the
stem has images for its input and no in_proj, the head ends in logits and has no out_proj.
"""
import itertools
import random

from torch import nn

from ..modeling.dynamic_blocks import DynamicStage
from ..modeling.ops.dynamic_op import DynamicConv
from ..modeling.ops.lsq_plus import quantised_ops
from ..search_space import sampling
from ..search_space.encoding import check_input_width, check_sub_stage, parse_block_id
from ..search_space.macro_arch import ENDS
from ..search_space.superspace import get_superspace
from ..training.calibrate import initialize_all_scales


class Student(nn.Module):
    """What all students share: stages between two 1x1 convolutions, of which the ends of the network have one.

    Subclasses have named_stages(), _set_extreme(pick) and sample_active_sub_stage(rng).
    """

    def set_max_sub_stage(self):
        """Activate the largest sub-stage and input width."""
        self._set_extreme(max)

    def set_min_sub_stage(self):
        """Activate the smallest sub-stage and input width."""
        self._set_extreme(min)

    def initialize_scales(self, x, rng):
        """Initialise the scales that no forward has reached yet, on inputs x; changes nothing else.

        Ranks that call this with the same x and rng get the same scales. The active sub-stage is then any.
        """
        others = itertools.repeat(lambda: self.sample_active_sub_stage(rng=rng))
        initialize_all_scales(self, x, self.set_max_sub_stage, others, patience=100)

    def active_ops(self):
        """The quantised ops that the next forward runs."""
        projections = [part for part in (self.in_proj, self.out_proj) if part is not None]
        return [op for part in projections for op in quantised_ops(part)] + [
            op for stage in self.named_stages().values() for op in stage.active_ops()]

    def forward(self, x):
        for part in (self.in_proj, *self.named_stages().values(), self.out_proj):
            x = x if part is None else part(x)
        return x


class StudentStage(Student):
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
        blocks = check_sub_stage(self.superspace, self.block_id, blocks)
        cin = check_input_width(self.superspace, self.block_id, cin)
        self.in_proj.active_out_channels, self.active_blocks = cin, blocks
        self.stage.set_active(cin, blocks)

    def _set_extreme(self, pick):
        block = pick(self.block_type.kernels), pick(self.spec.widths), pick(self.block_type.expands)
        self.set_active_sub_stage(pick(self.input_widths), [block] * pick(self.spec.depths))

    def sample_active_sub_stage(self, width_list=None, rng=random):
        """Activate a random sub-stage (widths from `width_list` where given); returns (cin, [(k, w, e), …])."""
        blocks, cin, _ = sampling.sample_sub_stage(self.superspace, self.block_id, rng, width_list=width_list)
        self.set_active_sub_stage(cin, blocks)
        return cin, blocks

    def named_stages(self):
        """{'stage3': DynamicStage}: what a supernet has of it, by the name it has there."""
        return {self.block_id.stage: self.stage}


class EndStudent(Student):
    """The stem or the head (macro_arch.ENDS) as a supernet has it, at all its widths and depths.

    stem: images (N, 3, H, W) to (N, teacher_cout, H/2, W/2), the teacher's input of stage1. head: the
    teacher's output (N, teacher_cin, h, w) of the last searched stage, to logits (N, teacher_cout).
    """

    def __init__(self, superspace, block_id, teacher_cin, teacher_cout):
        super().__init__()
        self.superspace, self.block_id = superspace, block_id
        self.stages = nn.ModuleDict()
        for name in ENDS[block_id]:
            stage = superspace.stage(name)
            cout = teacher_cout if name == 'logits' else max(stage.widths)
            cin = max(superspace.input_widths(name))
            self.stages[name] = DynamicStage(stage, superspace.block_type(name), cin, cout)
        self.input_widths = superspace.input_widths(ENDS[block_id][0])
        is_head = block_id == 'head'
        self.classes = teacher_cout if is_head else None
        self.in_proj = DynamicConv(teacher_cin, max(self.input_widths), 1) if is_head else None
        self.out_proj = None if is_head else DynamicConv(cout, teacher_cout, 1)
        self.set_max_sub_stage()

    def _set_active(self, cin, blocks):
        if self.in_proj is not None:
            self.in_proj.active_out_channels = cin
        for name, stage in self.stages.items():
            widths = [self.classes if name == 'logits' else w for _, w, _ in blocks[name]]
            stage.set_active(cin, [(k, w, e) for (k, _, e), w in zip(blocks[name], widths)])
            cin = widths[-1]

    def _set_extreme(self, pick):
        blocks = {}
        for name in self.stages:
            stage, block_type = self.superspace.stage(name), self.superspace.block_type(name)
            block = pick(block_type.kernels), pick(stage.widths), pick(block_type.expands)
            blocks[name] = [block] * pick(stage.depths)
        self._set_active(pick(self.input_widths), blocks)

    def sample_active_sub_stage(self, rng=random):
        """Activate random widths and depths."""
        blocks, cin = sampling.sample_end(self.superspace, self.block_id, rng)
        self._set_active(cin, blocks)

    def named_stages(self):
        """{stage name: DynamicStage}: what a supernet has of it."""
        return dict(self.stages.items())


def new_student(superspace, block_id, teacher_cin, teacher_cout):
    """The Student of a block id, stem and head included, between teacher_cin and teacher_cout channels."""
    if block_id in ENDS:
        return EndStudent(get_superspace(superspace), block_id, teacher_cin, teacher_cout)
    return StudentStage.build(superspace, block_id, teacher_cin, teacher_cout)
