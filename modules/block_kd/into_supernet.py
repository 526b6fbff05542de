"""Starting a supernet from block KD: finds the blocks it is made of, checks that they fit, and has them assembled.

What assembling (modeling.transfer) cannot carry over, a first block that begins with a depth-wise convolution, is
learned from the student in some steps: x -> M x + b -> its block is what the supernet's block has to compute of x.
"""
import itertools
import math
import os
import random

import torch
from torch import nn

from ..errors import UserError
from ..files import file_digest
from ..modeling.ops.lsq_plus import quantised_ops, set_fp32_mode, set_quant_mode
from ..modeling.ops.op import resize
from ..modeling.transfer import assemble, can_absorb, forget_scales
from ..training.calibrate import kept_statistics
from ..training.checkpoint import checkpoint_name
from ..training.data import train_loader
from ..training.log import note
from ..training.losses import nsr_loss
from ..training.optim import cosine, parameter_groups, set_learning_rate
from .checkpoints import checkpoint_file, load_student, read_block, teacher_of, training_command
from .targets import HEAD, STEM

STEPS, LEARNING_RATE = 60, 0.005            # of a block that learns to do without M, Adam


def start_from_blocks(supernet, folder, quant=False):
    """Give a Supernet the weights of the blocks in `folder`; returns (students in order, digests of their files).

    folder: --output_path of train_block_kd.py (of lsq_block_kd.py for `quant`), or a folder in which that has the
    superspace's name. Without a head of the supernet's classes its head stays as it is, which a line says.
    Both results are {block: …}. UserError: a block that is missing, unfinished, of another superspace or of another
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
        note(f'{folder}: no {checkpoint_name(quant)} of head: the head starts with random weights')
    else:
        head = load_student(space, HEAD, folder, quant)
        if head[0].classes == supernet.num_classes:
            loaded[HEAD] = head
        else:
            note(f'{checkpoint_file(folder, HEAD, quant)}: tells {head[0].classes} classes apart, the supernet '
                 f'{supernet.num_classes}: the head starts with random weights')
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


def learn_first_blocks(supernet, students, data, batch_size, seed=0, device='cpu', steps=STEPS, workers=0):
    """Train the first blocks that begin depth-wise to compute what the students with their projections do.

    students: of start_from_blocks(). The training is in fp32, of a supernet in int8 mode too; the scales of such blocks
    are left to be initialised. A function of the weights, the images and the seed, so equal on all ranks.
    """
    ordered = list(students.values())
    pairs = [(next(iter(student.named_stages())), before, student) for before, student in zip(ordered, ordered[1:])]
    pairs = [(name, before, student) for name, before, student in pairs
             if not can_absorb(supernet.stages[name].blocks[0], supernet.encoding.block_type(name))]
    if not pairs:
        return
    quant = any(op.is_quantised for op in quantised_ops(supernet))
    set_fp32_mode(supernet).to(device)
    with kept_statistics(supernet):
        for name, before, student in pairs:
            supernet.set_max_subnet()
            student.in_proj.active_out_channels = supernet.stages[name].blocks[0].active.cin
            project = set_fp32_mode(nn.Sequential(before.out_proj, student.in_proj)).to(device)
            target = set_fp32_mode(student.stage.blocks[0]).to(device)
            batches = (images.to(device) for epoch in range(steps)
                       for images, _ in train_loader(data.train, batch_size, epoch, seed, workers=workers))
            _learn_block(supernet, name, project, target, batches, random.Random(f'{seed} {name} first block'), steps)
            forget_scales(supernet.stages[name].blocks[0])
    supernet.set_max_subnet()
    if quant:
        set_quant_mode(supernet)


def _learn_block(supernet, name, project, target, batches, rng, steps):
    """Train the first block of stage `name` to give for x what `target` gives for project(x); x: the stage's input.

    Each step takes the largest block and a random one, on images of a random resolution of the supernet's.
    """
    _, block_type, widths = supernet.encoding.choices[name]
    block = supernet.stages[name].blocks[0]
    optimizer = torch.optim.Adam(parameter_groups(block, 0.0), lr=LEARNING_RATE)
    for module in (supernet, target):
        module.train()
    for step, images in zip(range(steps), batches):
        with torch.no_grad():
            x = resize(images, rng.choice(supernet.encoding.superspace.resolutions))
            for earlier in itertools.takewhile(lambda earlier: earlier != name, supernet.stages):
                x = supernet.stages[earlier](x)
            projected = project(x)
        optimizer.zero_grad(set_to_none=True)
        for pick in (max, rng.choice):
            choice = pick(block_type.kernels), pick(widths), pick(block_type.expands)
            block.set_active(x.shape[1], *choice)
            target.set_active(projected.shape[1], *choice)
            with torch.no_grad():
                wanted = target(projected)
            loss = nsr_loss(block(x), wanted)
            loss.backward()
        torch.nn.utils.clip_grad_value_(block.parameters(), 1.0)
        set_learning_rate(optimizer, cosine(LEARNING_RATE, step, steps))
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise UserError(f'{supernet.encoding} {name}: the first block does not learn to do without its projection '
                            f'(loss {loss.item()} at step {step})')
