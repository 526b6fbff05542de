"""Starting a supernet from block KD: finds the blocks it is made of, checks that they fit, and has them assembled.

What assembling (modeling.transfer) cannot carry over is learned in some steps: a first block that begins with a
depth-wise convolution (x -> M x + b -> the student's block is what the supernet's block has to compute of x), and a
head where no student has one for the classes of the data.
"""
import itertools
import math
import os
import random

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..files import file_digest
from ..modeling.ops.lsq_plus import quantised_ops, set_fp32_mode, set_quant_mode
from ..modeling.ops.op import resize
from ..modeling.transfer import assemble, can_absorb, forget_scales
from ..search_space.macro_arch import HEAD_STAGES
from ..training.calibrate import kept_statistics
from ..training.checkpoint import checkpoint_name
from ..training.data import train_loader
from ..training.log import note
from ..training.losses import nsr_loss
from ..training.optim import cosine, parameter_groups, set_learning_rate
from .checkpoints import checkpoint_file, load_student, read_block, teacher_of, training_command
from .targets import HEAD, STEM

LEARNING_RATE = 0.005                       # of what learn_rest() trains, Adam


def start_from_blocks(supernet, folder, quant=False):
    """Give a Supernet the weights of the blocks in `folder`; returns (students in order, digests of their files).

    folder: --output_path of train_block_kd.py (of lsq_block_kd.py for `quant`), or a folder in which that has the
    hyperspace's name. Without a head of the supernet's classes its head stays as it is, which a line says.
    Both results are {block: …}. UserError: a block that is missing, unfinished, of another hyperspace or of another
    teacher than the others.
    """
    encoding = supernet.encoding
    space = encoding.superspace
    if os.path.isdir(os.path.join(folder, space.name)):
        folder = os.path.join(folder, space.name)
    stages = zip(space.searchable_stages, encoding.block_types)
    blocks = [STEM, *(f'{stage}_{block_type}' for stage, block_type in stages)]
    missing = [block for block in blocks if not os.path.isfile(checkpoint_file(folder, block, quant))]
    if missing:
        teachers = (teacher_of(read_block(checkpoint_file(folder, block, quant), space, block))[0]
                    for block in blocks if block not in missing)
        arch = next(filter(None, teachers), None)
        raise UserError(f'{folder}: no {checkpoint_name(quant)} of {" ".join(missing)}; train it first with '
                        + training_command(space, missing, folder, quant, f' --teacher_arch {arch}' if arch else ''))
    loaded = {block: load_student(space, block, folder, quant) for block in blocks}
    if not os.path.isfile(checkpoint_file(folder, HEAD, quant)):
        note(f'{folder}: no {checkpoint_name(quant)} of head: the head learns the labels first')
    else:
        head = load_student(space, HEAD, folder, quant)
        if head[0].classes == supernet.num_classes:
            loaded[HEAD] = head
        else:
            note(f'{checkpoint_file(folder, HEAD, quant)}: tells {head[0].classes} classes apart, the supernet '
                 f'{supernet.num_classes}: the head learns the labels first')
    _check_teachers(loaded, folder, quant)
    students = {block: student for block, (student, _) in loaded.items()}
    assemble(supernet, students.values())
    return students, {block: file_digest(checkpoint_file(folder, block, quant)) for block in loaded}


def _check_teachers(loaded, folder, quant):
    """UserError where neighbours copied different teachers: then nothing ties one's output to the other's input."""
    before, channels, teacher = None, None, (None, None)
    for block, (student, checkpoint) in loaded.items():
        path, own = checkpoint_file(folder, block, quant), teacher_of(checkpoint)
        if before is not None and student.in_proj.in_channels != channels:
            raise UserError(f'{path}: copied {student.in_proj.in_channels} channels of its teacher, where the teacher '
                            f'of {before} has {channels}')
        if None not in (*own, *teacher) and own != teacher:
            raise UserError(f'{path}: copied another teacher ({own[0]}, weights {own[1]}) than {before} ({teacher[0]}, '
                            f'weights {teacher[1]})')
        before, teacher = block, own if None not in own else teacher
        channels = student.out_proj and student.out_proj.out_channels


def learn_rest(supernet, students, data, batch_size, steps, seed=0, device='cpu', workers=0):
    """Train what assembling cannot carry over, everything else held fixed: first blocks that begin depth-wise, a head.

    students: of start_from_blocks(). Such a block learns to compute what the students with their projections do; a head
    that no student brought learns the labels first, so that its random weights do not spoil the trained stages
    (Kumar et al., ICLR 2022). In fp32, of a supernet in int8 mode too; the scales of what was trained are left to be
    initialised. A function of the weights, the images and the seed, so equal on all ranks.
    """
    ordered = list(students.values())
    pairs = {next(iter(student.named_stages())): (before, student) for before, student in zip(ordered, ordered[1:])}
    parts = {name: supernet.stages[name].blocks[0] for name in pairs if not can_absorb(
        supernet.stages[name].blocks[0], supernet.encoding.block_type(name))}
    if HEAD not in students:
        parts[HEAD_STAGES[0]] = nn.ModuleList(supernet.stages[name] for name in HEAD_STAGES)
    quant = any(op.is_quantised for op in quantised_ops(supernet))
    set_fp32_mode(supernet).to(device)
    with kept_statistics(supernet):
        supernet.train()
        for name, part in parts.items():
            rng = random.Random(f'{seed} {name}')
            batches = ((images.to(device), labels.to(device)) for epoch in range(steps)
                       for images, labels in train_loader(data.train, batch_size, epoch, seed, workers=workers))
            losses = (_block_losses(supernet, name, *pairs[name], rng, device) if name in pairs
                      else _head_losses(supernet, rng))
            _learn(f'{supernet.encoding} {name}', part, itertools.islice(batches, steps), losses, steps)
            forget_scales(part)
    supernet.set_max_subnet()
    if quant:
        set_quant_mode(supernet)


def _learn(name, part, batches, losses, steps):
    """Train a module by Adam; losses(images, labels) yields the losses of a step."""
    optimizer = torch.optim.Adam(parameter_groups(part, 0.0), lr=LEARNING_RATE)
    for step, batch in enumerate(batches):
        optimizer.zero_grad(set_to_none=True)
        for loss in losses(*batch):
            loss.backward()
        if not math.isfinite(loss.item()):
            raise UserError(f'{name}: does not learn to follow the trained blocks (loss {loss.item()} at step {step})')
        torch.nn.utils.clip_grad_value_(part.parameters(), 1.0)
        set_learning_rate(optimizer, cosine(LEARNING_RATE, step, steps))
        optimizer.step()


@torch.no_grad()
def _before(supernet, name, images):
    """What stage `name` reads in the active subnet."""
    for earlier in itertools.takewhile(lambda earlier: earlier != name, supernet.stages):
        images = supernet.stages[earlier](images)
    return images


def _block_losses(supernet, name, before, student, rng, device):
    """Losses of a stage's first block, the largest and a random one: for x, what the student gives for M x + b."""
    _, block_type, widths = supernet.encoding.choices[name]
    block, target = supernet.stages[name].blocks[0], set_fp32_mode(student.stage.blocks[0]).to(device).train()
    student.in_proj.active_out_channels = block.active.cin
    project = set_fp32_mode(nn.Sequential(before.out_proj, student.in_proj)).to(device)

    def losses(images, labels):
        supernet.set_max_subnet()
        x = _before(supernet, name, resize(images, rng.choice(supernet.encoding.superspace.resolutions)))
        with torch.no_grad():
            projected = project(x)
        for pick in (max, rng.choice):
            choice = pick(block_type.kernels), pick(widths), pick(block_type.expands)
            block.set_active(x.shape[1], *choice)
            target.set_active(projected.shape[1], *choice)
            with torch.no_grad():
                wanted = target(projected)
            yield nsr_loss(block(x), wanted)
    return losses


def _head_losses(supernet, rng):
    """Losses of the head on the labels, behind the largest, a random and the smallest subnet."""
    def losses(images, labels):
        for activate in (supernet.set_max_subnet, lambda: supernet.sample_active_subnet(rng), supernet.set_min_subnet):
            activate()
            x = _before(supernet, HEAD_STAGES[0], resize(images, supernet.active_resolution))
            for name in HEAD_STAGES:
                x = supernet.stages[name](x)
            yield F.cross_entropy(x, labels)
    return losses
