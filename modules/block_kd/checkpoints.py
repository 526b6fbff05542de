"""Checkpoints of trained blocks: <folder>/<block>/checkpoint.pth in fp32, lsq.pth in int8; the students in them."""
import os
from collections.abc import Mapping

from ..errors import UserError
from ..modeling.ops.lsq_plus import set_quant_mode
from ..search_space.macro_arch import ENDS
from ..search_space.superspace import get_superspace
from ..training.checkpoint import checkpoint_name, load_checkpoint, load_weights, model_state
from ..training.log import note
from .student import new_student
from .targets import HEAD, STEM, part_of, teacher_channels


def checkpoint_file(folder, block_id, quant):
    """<folder>/stage3_1/checkpoint.pth, or lsq.pth."""
    return os.path.join(folder, block_id, checkpoint_name(quant))


def training_command(superspace, blocks, folder, quant, more=''):
    """The command that trains blocks, for an error line."""
    script = 'lsq_block_kd.py --teacher_checkpoint_path …' if quant else 'train_block_kd.py'
    return (f'{script} --superspace {get_superspace(superspace).name} --output_path {folder} '
            f'--stage_list {" ".join(blocks)}{more}')


def require_checkpoint(folder, block_id, quant, superspace):
    """The block's checkpoint file; UserError where it is missing."""
    path = checkpoint_file(folder, block_id, quant)
    if not os.path.isfile(path):
        raise UserError(f'{path}: no checkpoint of block {block_id}; train it first with '
                        + training_command(superspace, [block_id], folder, quant))
    return path


def read_block(path, superspace, block_id):
    """A block's checkpoint; UserError where it is another block's, which old and published files do not say."""
    checkpoint, wanted = load_checkpoint(path), get_superspace(superspace).name
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path}: not the checkpoint of a block, but a {type(checkpoint).__name__}')
    if checkpoint.get('superspace', wanted) != wanted:
        raise UserError(f'{path}: a block of superspace {checkpoint["superspace"]}, not of {wanted}')
    if checkpoint.get('block', block_id) != block_id:
        raise UserError(f'{path}: the checkpoint of block {checkpoint["block"]}, not of {block_id}')
    return checkpoint


def build_student(superspace, block_id, teacher, folder=None, quant=False, unfinished=False):
    """Student between the teacher's channels; with `folder`, with the weights of its checkpoint there.

    A checkpoint of training that has not ended is refused unless `unfinished`.
    """
    student = new_student(superspace, block_id, *teacher_channels(teacher, get_superspace(superspace),
                                                                  part_of(block_id)))
    if folder is not None:
        checkpoint = _finished(superspace, block_id, folder, quant, unfinished)
        load_weights(student, checkpoint, checkpoint_file(folder, block_id, quant))
    return set_quant_mode(student) if quant else student


def load_student(superspace, block_id, folder, quant=False):
    """(Student, its checkpoint) of finished block KD; the teacher's channels are those of the weights."""
    path = require_checkpoint(folder, block_id, quant, superspace)
    checkpoint = _finished(superspace, block_id, folder, quant)
    try:
        weights = model_state(checkpoint)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    first, last = ('in_proj.weight', 1), ('out_proj.weight', 0)
    if block_id == HEAD:
        last = 'stages.logits.blocks.0.linear.weight', 0
    channels = [3 if (block_id == STEM and end is first) else _size(weights, path, block_id, *end)
                for end in (first, last)]
    student = new_student(superspace, block_id, *channels)
    load_weights(student, checkpoint, path)
    return set_quant_mode(student) if quant else student, checkpoint


def _size(weights, path, block_id, name, dim):
    if name not in weights or weights[name].ndim < 2:
        raise UserError(f'{path}: not the checkpoint of block {block_id}: no {name}')
    return weights[name].shape[dim]


def _finished(superspace, block_id, folder, quant, unfinished=False):
    """The block's checkpoint; UserError where its training has not ended, unless `unfinished`."""
    path = require_checkpoint(folder, block_id, quant, superspace)
    checkpoint = read_block(path, superspace, block_id)
    if not checkpoint.get('done', True) and not unfinished:
        raise UserError(f'{path}: training is not finished (step {checkpoint.get("step")}); finish it with '
                        + training_command(superspace, [block_id], folder, quant, ' --resume'))
    return checkpoint


def trained_images(superspace, block_id, folder):
    """On how many training images a block's lsq.pth was trained, None where it does not say."""
    path = checkpoint_file(folder, block_id, True)
    settings = read_block(path, superspace, block_id).get('settings') if os.path.isfile(path) else None
    count = settings.get('training images') if isinstance(settings, Mapping) else None
    return count if isinstance(count, int) else None


def teacher_of(checkpoint):
    """(architecture, digest of its weights) of a block's teacher, None where its checkpoint does not say."""
    settings = checkpoint.get('settings')
    settings = settings if isinstance(settings, Mapping) else {}
    return tuple(value if isinstance(value, str) else None
                 for value in (settings.get('teacher'), settings.get('teacher weights')))


def without_untrained_ends(blocks, folder, quant):
    """The blocks, without a stem or head that has no checkpoint: of before they were trained, or a published folder."""
    for end in ENDS:
        if end in blocks and not os.path.isfile(checkpoint_file(folder, end, quant)):
            note(f'{checkpoint_file(folder, end, quant)}: not there; {end} is left out')
            blocks = [block for block in blocks if block != end]
    return blocks
