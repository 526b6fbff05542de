"""Block KD in fp32: train every candidate block of the chosen stages, the stem and the head to copy the teacher.

    python -m torch.distributed.launch --nproc_per_node=4 train_block_kd.py --superspace onnxw \\
        --output_path checkpoints/block_kd/onnxw --inplace_distill_from_teacher --num_epochs 5 \\
        --stage_list stage1_0 stage1_2 --hw_list 160 192 224 --dataset_path dataset

Writes <output_path>/<block>/checkpoint.pth; lsq_block_kd.py continues from there, and a supernet can start from these
blocks (train_supernet.py --init_block_kd).
"""
import os

from modules.block_kd.checkpoints import build_student, without_untrained_ends
from modules.block_kd.targets import HEAD, loss_name, part_of, parts_of
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import (
    BlockKDSettings,
    blocks_of_rank,
    by_part,
    check_map_sizes,
    evaluate,
    independent_ranks,
    select_blocks,
    train_blocks,
)
from modules.cli import parser, positive, run
from modules.errors import UserError
from modules.search_space.macro_arch import SEARCHABLE_STAGES
from modules.search_space.superspace import SUPERSPACES, check_resolutions, get_superspace
from modules.settings import add_settings, settings_of
from modules.training.acceleration import use_amp
from modules.training.data import add_data_arguments, open_data
from modules.training.distributed import add_distributed_arguments, distributed_job, of_main
from modules.training.log import note
from modules.training.sources import count_classes


def get_parser(docstring=__doc__, settings=BlockKDSettings):
    p = parser(docstring)
    p.add_argument('--superspace', required=True, choices=sorted(SUPERSPACES), help='hyperspace')
    p.add_argument('--output_path', required=True, help='folder of the checkpoints, <output_path>/<block>/')
    p.add_argument('--stage_list', nargs='+', help='block ids, whole stages, stem, head; default: all')
    p.add_argument('--teacher_arch', default='efficientnet-b5', help='efficientnet-b0..b7, -lite0..lite4')
    add_settings(p, settings)
    p.add_argument('--parallel', choices=['data', 'blocks'], default='data', help='what ranks split between them')
    p.add_argument('--test_only', action='store_true', help='evaluate the checkpoints in output_path')
    p.add_argument('--debug', action='store_true', help='few steps an epoch, evaluation on few batches')
    p.add_argument('--debug_batches', type=positive(int), default=10, help='steps and batches of --debug')
    add_data_arguments(p)
    add_distributed_arguments(p)
    return p


def get_args():
    p = get_parser()
    p.add_argument('--teacher_weights', help="teacher's pretrained weights file; default: package or timm's hub")
    return p.parse_args()


def main(args):
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        train(args, job, build_teacher(args.teacher_arch, weights=args.teacher_weights))


def train(args, job, teacher, settings=BlockKDSettings):
    """Train or, with --test_only, evaluate the chosen blocks."""
    space = get_superspace(args.superspace)
    debug = args.debug_batches if args.debug else None
    recipe = settings_of(settings, args, hw_list=check_resolutions(args.hw_list or space.kd_resolutions, space),
                         amp=use_amp(args.amp, job.device), max_steps=args.max_steps or debug,
                         num_valid_batches=args.num_valid_batches or debug)
    blocks = select_blocks(space, args.stage_list or parts_of(space), ends=True)
    check_map_sizes(space, blocks, recipe.hw_list)
    teacher.check_fits(space)
    data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, max(recipe.hw_list),
                     labelled=False, normalize=teacher.normalize, seed=args.seed)
    if HEAD in blocks:
        blocks = with_head(blocks, args, data.num_classes, teacher)
    if not args.stage_list and (args.test_only or recipe.quant and not recipe.from_scratch):
        blocks = of_main(lambda: without_untrained_ends(blocks, args.output_path, recipe.quant and args.test_only), job)
    if not len(data.valid):
        raise UserError('no held-out images to evaluate on: give a --valid_size, or more pictures')
    if len(recipe.learning_rate_list) not in (len(space.searchable_stages), len(SEARCHABLE_STAGES)):
        raise UserError(f'--learning_rate_list: {len(recipe.learning_rate_list)} values, expected '
                        f'{len(space.searchable_stages)}, for {" ".join(space.searchable_stages)}')
    independent = args.parallel == 'blocks'
    if independent:
        blocks, job = blocks_of_rank(blocks, job), job.alone()
    teacher.to(job.device)
    with independent_ranks(independent):
        if args.test_only:
            results = {}
            for part, ids in by_part(blocks).items():
                students = of_main(lambda: [build_student(space, i, teacher, args.output_path, recipe.quant,
                                                          unfinished=True) for i in ids], job)
                students = [(i, student.to(job.device)) for i, student in zip(ids, students)]
                results.update(evaluate(part, students, teacher, data, recipe, job))
        else:
            results = train_blocks(space, blocks, teacher, data, args.output_path, recipe, job)
    if job.is_main:
        for block, losses in results.items():
            shown = '  '.join(f'{name} {loss:.4f}' for name, loss in losses.items())
            folder = os.path.join(args.output_path, block)
            print(f'{block}: {loss_name(part_of(block))} loss {shown} {folder}', flush=True)


def with_head(blocks, args, num_classes, teacher):
    """The blocks, without the head where the pictures do not have the teacher's classes."""
    classes = teacher.classifier.out_features
    num_classes = num_classes or count_classes(args.dataset_path)
    if num_classes == classes:
        if args.train_batch_size < 2:
            raise UserError('--train_batch_size 1: the head averages over the map, and batch norm needs two values')
        return blocks
    reason = (f'{args.dataset_path}: {num_classes or "no"} classes, {teacher.arch} tells {classes} apart: the head is '
              'not trained')
    if args.stage_list:
        raise UserError(f'{reason}; leave it out of --stage_list')
    note(f'{reason}; in a supernet it starts with random weights')
    return [block for block in blocks if block != HEAD]


if __name__ == '__main__':
    run(main, get_args)
