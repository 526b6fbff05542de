"""Starting a supernet from block KD: finds the blocks it is made of, checks that they fit, and has them assembled."""
import os

from ..errors import UserError
from ..files import file_digest
from ..modeling.transfer import assemble
from ..training.checkpoint import checkpoint_name
from ..training.log import note
from .checkpoints import checkpoint_file, load_student, teacher_of, training_command
from .targets import HEAD, STEM


def start_from_blocks(supernet, folder, quant=False):
    """Give a Supernet the weights of the blocks in `folder`; returns {block: digest of its checkpoint}.

    folder: --output_path of train_block_kd.py (of lsq_block_kd.py for `quant`), or a folder in which that has the
    superspace's name. Without a head of the supernet's classes its head stays as it is, which a line says.
    UserError: a block that is missing, unfinished, of another superspace or of another teacher than the others.
    """
    encoding = supernet.encoding
    space = encoding.superspace
    if os.path.isdir(os.path.join(folder, space.name)):
        folder = os.path.join(folder, space.name)
    stages = zip(space.searchable_stages, encoding.block_types)
    blocks = [STEM, *(f'{stage}_{block_type}' for stage, block_type in stages)]
    missing = [block for block in blocks if not os.path.isfile(checkpoint_file(folder, block, quant))]
    if missing:
        raise UserError(f'{folder}: no {checkpoint_name(quant)} of {" ".join(missing)}; train it first with '
                        + training_command(space, missing, folder, quant))
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
    assemble(supernet, [student for student, _ in loaded.values()])
    return {block: file_digest(checkpoint_file(folder, block, quant)) for block in loaded}


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
