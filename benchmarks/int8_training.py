"""Time of an int8 training step over the same one in fp32: block KD with its teacher, and downstream fine-tuning.

    OMP_NUM_THREADS=1 python benchmarks/int8_training.py --superspace onnxw --stage stage3 --subnet SEQnet@vnni-A0

A step is the whole one: of block KD the teacher's maps, a sandwich of every block type of the stage and Adam; of
fine-tuning one pass and SGD. "compiled" is --compile on. Variants take turns in one process; shown is the median of
the ratios of neighbouring steps. supernet_step.py measures supernets.
"""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

from modules.block_kd import trainer
from modules.block_kd.checkpoints import build_student
from modules.block_kd.teacher import build_teacher
from modules.cli import parser, positive, run
from modules.modeling.ops.fake_quantise import compile_quantisers
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.search_space.superspace import SUPERSPACES, get_superspace
from modules.training import downstream
from modules.training.calibrate import calibrate
from modules.training.distributed import Job
from modules.training.memory import keep_freed_memory
from modules.training.optim import parameter_groups
from modules.zoo import get_subnet

VARIANTS = ('fp32', 'int8', 'compiled int8')


def get_args():
    p = parser(__doc__)
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), default='onnxw', help='hyperspace of the blocks')
    p.add_argument('--stage', default='stage3', help='stage whose blocks are trained')
    p.add_argument('--teacher_arch', default='efficientnet-b5', help='teacher, with random weights')
    p.add_argument('--subnet', default='SEQnet@vnni-A0', help='network that is fine-tuned')
    p.add_argument('--batch_size', type=positive(int), default=4, help='images')
    p.add_argument('--repeats', type=positive(int), default=5, help='steps of each variant')
    return p.parse_args()


def block_kd(args, quant):
    """step(number) of block KD of all block types of the stage."""
    torch.manual_seed(0)
    space, recipe = get_superspace(args.superspace), trainer.BlockKDSettings(hw_list=(160, 192, 224), quant=quant,
                                                                                inplace_distill_from_teacher=True)
    teacher = build_teacher(args.teacher_arch, quant=quant, weights='random').to(memory_format=torch.channels_last)
    trainees = []
    for block in trainer.select_blocks(space, [args.stage]):
        student = build_student(space, block, teacher)
        student = (set_quant_mode(student) if quant else student).to(memory_format=torch.channels_last)
        trainees.append(trainer.BlockTraining(
            path='', block_id=block, student=student, learning_rate=1e-4, settings={},
            optimizer=torch.optim.Adam(parameter_groups(student, 1e-4), lr=1e-4)))
    images = torch.randn(args.batch_size, 3, 224, 224)
    calibrate(teacher, [images])                            # maps of about unit variance, as of trained weights
    return lambda number: trainer._step(args.stage, trainees, images, teacher, recipe, 0, number, 1000, Job())


def fine_tuning(args, quant):
    """step(number) of fine-tuning."""
    torch.manual_seed(0)
    network = get_subnet(args.subnet)
    network = (set_quant_mode(network) if quant else network).to(memory_format=torch.channels_last)
    recipe = downstream.DownstreamRecipe(learning_rate=1e-3)
    tuning = downstream.FineTuning(path='', settings={}, network=network, identity={},
                                   optimizer=torch.optim.SGD(parameter_groups(network, 1e-5), lr=1e-3))
    images, labels = torch.randn(args.batch_size, 3, 224, 224), torch.randint(1000, (args.batch_size,))
    return lambda number: downstream._take_step(tuning, images, labels, recipe, 0, 1000, Job(), None)


def measure(steps, repeats):
    """{variant: seconds of each step} of {variant: step(number)}, in turns, after a step that warms up."""
    seconds = {kind: [] for kind in steps}
    for number in range(repeats + 1):
        for kind, step in steps.items():
            compile_quantisers(kind == 'compiled int8')
            start = time.perf_counter()
            step(number)
            seconds[kind].append(time.perf_counter() - start)
    return {kind: np.array(values[1:]) for kind, values in seconds.items()}


def main(args):
    keep_freed_memory()
    print(f'batch {args.batch_size}, 224 px, {torch.get_num_threads()} threads\n')
    print('| step | ' + ' | '.join(f'{kind} s' for kind in VARIANTS) + ' | int8 / fp32 | compiled int8 / fp32 |')
    print('|---' * 6 + '|')
    for name, build in ((f'block KD, {args.superspace} {args.stage}', block_kd),
                        (f'fine-tuning, {args.subnet}', fine_tuning)):
        seconds = measure({kind: build(args, kind != 'fp32') for kind in VARIANTS}, args.repeats)
        print(f'| {name} | ' + ' | '.join(f'{np.median(values):.2f}' for values in seconds.values()) + ' | '
              + ' | '.join(f'**{np.median(seconds[kind] / seconds["fp32"]):.2f}**' for kind in VARIANTS[1:]) + ' |',
              flush=True)


if __name__ == '__main__':
    run(main, get_args)
