"""From block KD to a supernet: the students' stages, joined without the projections that stood between them.

Student s of block KD is  T_in -> in_proj_s -> stage_s -> out_proj_s -> T_out  with T the teacher's maps. Joined at
the teacher's maps, students compute

    stage_s(M x + b),   x = stage_(s-1)(…),   M = in_proj_s . out_proj_(s-1)

in which a supernet has no place for M (a matrix, channels x channels) and b. Both are linear, so a convolution W that
reads M x + b can read x instead:

    W (M x + b) = W' x + W b,   W'[o, j] = sum_i W[o, i] M[i, j]

and its batch norm takes the constant W b out: its running mean falls by it. That is exact where stage s - 1 ends at the
largest width c of its window (i runs to c, as in a student with c input channels), but for the border of a k x k
convolution with b, where the zeros of the padding stand in the place of b.

A depth-wise convolution cannot take M, since it does not mix channels; a block that begins with one learns to do
without it (block_kd.into_supernet). An identity shortcut cannot take M either; it is used where a block of stride 1 has
as many input as output channels.

Beside this there is DNA (Li et al., CVPR 2020) and DONNA (Moons et al., ICCV 2021), which train blocks in this way to
rank networks, and give one network its blocks' weights.
"""
import torch

from .layout import block_layout
from .ops.lsq_plus import quantised_ops
from .ops.op import take


@torch.no_grad()
def assemble(supernet, students):
    """Give a Supernet the weights of students (block_kd.Student) in the order of its stages, the head perhaps left out.

    In int8 mode the students' trained scales too; those of ops that read or hold something else now are left to be
    initialised by images (training.calibrate.initialize_all_scales).
    """
    out_proj = width = None
    for student in students:
        stages = student.named_stages()
        for name, stage in stages.items():
            copy_stage(stage, supernet.stages[name])
        if out_proj is not None:
            absorb(supernet.stages[next(iter(stages))].blocks[0], *between(out_proj, student.in_proj, width))
        out_proj, width = student.out_proj, max(supernet.encoding.widths(name))


def copy_stage(source, target):
    """Copy a DynamicStage into one that is not larger: channels from the front, kernels from the centre."""
    for larger, block in zip(source.blocks, target.blocks):
        weights = larger.state_dict()
        for name, tensor in block.state_dict().items():
            tensor.copy_(take(weights[name], tensor.shape))
        for op, trained in zip(quantised_ops(block), quantised_ops(larger)):
            op.scales_initialized = trained.scales_initialized


def between(out_proj, in_proj, width):
    """(M, b) of two 1x1 convolutions in a row: in_proj(out_proj(x)) = M x + b, its first `width` channels.

    M has a column for each channel of x.
    """
    second = in_proj.weight.flatten(1)[:width]
    return second @ out_proj.weight.flatten(1), second @ out_proj.bias + in_proj.bias[:width]


def absorb(block, matrix, offset):
    """Change a DynamicBlock that reads `matrix` x + `offset` into one that reads x, as far as its layers can."""
    for layer in (layer for layer in block.layers if layer is block.layers[0] or layer.shortcut):
        unit = getattr(block, layer.name)
        if layer.op == 'conv':
            weight = unit.conv.weight[:, :len(matrix)]
            unit.norm.running_mean -= weight.sum((2, 3)) @ offset
            unit.conv.weight.copy_(torch.einsum('oikl,ij->ojkl', weight, matrix))
        forget_scales(unit)


def can_absorb(block, block_type):
    """Whether the main path of a DynamicBlock begins with a convolution that mixes channels, at every expand ratio."""
    return all(block_layout(block.active._replace(expand=e))[0].op == 'conv' for e in block_type.expands)


@torch.no_grad()
def forget_scales(module):
    """Leave the LSQ+ scales of a module's ops to be initialised, as in new ops."""
    for op in quantised_ops(module):
        op.sw.fill_(1)
        op.sa.fill_(1)
        op.beta.zero_()
        op.scales_initialized = False


__all__ = ['absorb', 'assemble', 'between', 'can_absorb', 'copy_stage', 'forget_scales']
