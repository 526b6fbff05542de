"""Block KD in fp32: train every candidate block of the chosen stages, the stem and the head to copy the teacher.

    python -m torch.distributed.launch --nproc_per_node=4 train_block_kd.py --superspace onnxw \\
        --output_path checkpoints/block_kd/onnxw --inplace_distill_from_teacher --num_epochs 5 \\
        --stage_list stage1_0 stage1_2 --hw_list 160 192 224 --dataset_path dataset

Writes <output_path>/<block>/checkpoint.pth; lsq_block_kd.py goes on from there, and a supernet can start from these
blocks (train_supernet.py --init_block_kd).
"""
import os

from modules.block_kd.checkpoints import build_student, without_untrained_ends
from modules.block_kd.targets import HEAD, loss_name, part_of, parts_of
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import (
    Recipe,
    blocks_of_rank,
    by_part,
    check_map_sizes,
    evaluate,
    independent_ranks,
    select_blocks,
    train_blocks,
)
from modules.cli import SEED, not_negative, parser, positive, run
from modules.errors import UserError
from modules.search_space.macro_arch import SEARCHABLE_STAGES
from modules.search_space.superspace import SUPERSPACES, check_resolutions, get_superspace
from modules.training.acceleration import use_amp
from modules.training.data import add_data_arguments, open_data
from modules.training.distributed import add_distributed_arguments, distributed_job, of_main
from modules.training.log import note
from modules.training.losses import NSR_SIGNALS
from modules.training.sources import count_classes

LEARNING_RATES = (0.005, 0.01, 0.01, 0.01, 0.01, 0.005)


def get_parser(docstring=__doc__, num_epochs=5, learning_rates=LEARNING_RATES, stem_rate=0.01, head_rate=0.001):
    p = parser(docstring)
    p.add_argument('--superspace', required=True, choices=sorted(SUPERSPACES), help='hyperspace')
    p.add_argument('--output_path', required=True, help='folder of the checkpoints, <output_path>/<block>/')
    p.add_argument('--stage_list', nargs='+', help='block ids, whole stages, stem, head; default: all')
    p.add_argument('--teacher_arch', default='efficientnet-b5', help='efficientnet-b0..b7, -lite0..lite4')
    p.add_argument('--hw_list', nargs='+', type=positive(int), help="image resolutions; default: the superspace's")
    p.add_argument('--num_epochs', type=positive(int), default=num_epochs, help='passes over the training images')
    p.add_argument('--train_batch_size', type=positive(int), default=64, help='images a step and rank')
    p.add_argument('--learning_rate_list', nargs='+', type=positive(float), default=list(learning_rates),
                   help='learning rate of stage1, stage2, …: as many as the superspace has, or six')
    p.add_argument('--stem_learning_rate', type=positive(float), default=stem_rate, help='of first_conv and stage0')
    p.add_argument('--head_learning_rate', type=positive(float), default=head_rate,
                   help='of final_expand, feature_mix and logits')
    p.add_argument('--lr_step_size', type=positive(int), default=20, help='batches between learning-rate updates')
    p.add_argument('--weight_decay', type=not_negative(float), default=1e-4, help='not of norms, biases and scales')
    p.add_argument('--num_calib_batches', type=positive(int), default=20, help='of batch-norm calibration')
    p.add_argument('--inplace_distill_from_teacher', action='store_true',
                   help='every sub-stage learns from the teacher; else max does, and the others from max')
    p.add_argument('--nsr_signal', choices=NSR_SIGNALS, default='teacher', help='whose variance divides the loss')
    p.add_argument('--parallel', choices=['data', 'blocks'], default='data', help='what ranks split between them')
    p.add_argument('--checkpoint_freq', type=positive(int), default=200, help='steps between checkpoints')
    p.add_argument('--max_steps', type=positive(int), help='steps of an epoch, for short runs')
    p.add_argument('--num_valid_batches', type=positive(int), help='of the evaluation; default: all held-out images')
    p.add_argument('--amp', action='store_true', help='bf16 autocast, for GPUs')
    p.add_argument('--no_channels_last', action='store_true', help='keep NCHW memory')
    p.add_argument('--resume', action='store_true', help='go on from the checkpoints in output_path')
    p.add_argument('--test_only', action='store_true', help='evaluate the checkpoints in output_path')
    p.add_argument('--debug', action='store_true', help='few steps an epoch, evaluation on few batches')
    p.add_argument('--debug_batches', type=positive(int), default=10, help='steps and batches of --debug')
    p.add_argument('--seed', type=SEED, default=0, help='of weights, sub-stages and augmentation')
    add_data_arguments(p)
    add_distributed_arguments(p, int8_training=True)
    return p


def get_args():
    p = get_parser()
    p.add_argument('--teacher_weights', help="teacher's pretrained weights file; default: package or timm's hub")
    return p.parse_args()


def main(args):
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        train(args, job, build_teacher(args.teacher_arch, weights=args.teacher_weights))


def train(args, job, teacher, quant=False, from_scratch=False):
    """Train or, with --test_only, evaluate the chosen blocks."""
    space = get_superspace(args.superspace)
    blocks = select_blocks(space, args.stage_list or parts_of(space), ends=True)
    hw_list = check_resolutions(args.hw_list or space.kd_resolutions, space)
    check_map_sizes(space, blocks, hw_list)
    teacher.check_fits(space)
    data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, max(hw_list), labelled=False,
                     normalize=teacher.normalize, seed=args.seed)
    if HEAD in blocks:
        blocks = with_head(blocks, args, data.num_classes, teacher)
    if not args.stage_list and (args.test_only or quant and not from_scratch):
        blocks = of_main(lambda: without_untrained_ends(blocks, args.output_path, quant and args.test_only), job)
    if not len(data.valid):
        raise UserError('no held-out images to evaluate on: give a --valid_size, or more pictures')
    debug = args.debug_batches if args.debug else None
    if len(args.learning_rate_list) not in (len(space.searchable_stages), len(SEARCHABLE_STAGES)):
        raise UserError(f'--learning_rate_list: {len(args.learning_rate_list)} values, expected '
                        f'{len(space.searchable_stages)}, for {" ".join(space.searchable_stages)}')
    rates = dict(zip(parts_of(space), (args.stem_learning_rate, *args.learning_rate_list[:len(space.searchable_stages)],
                                       args.head_learning_rate)))
    recipe = Recipe(args.num_epochs, args.train_batch_size, rates, args.lr_step_size,
                    args.weight_decay, hw_list, args.inplace_distill_from_teacher, args.nsr_signal,
                    num_calib_batches=args.num_calib_batches, checkpoint_freq=args.checkpoint_freq,
                    max_steps=args.max_steps or debug,
                    num_valid_batches=args.num_valid_batches or debug,
                    amp=use_amp(args.amp, job.device), channels_last=not args.no_channels_last, quant=quant,
                    from_scratch=from_scratch, seed=args.seed, workers=args.num_workers)
    independent = args.parallel == 'blocks'
    if independent:
        blocks, job = blocks_of_rank(blocks, job), job.alone()
    teacher.to(job.device)
    with independent_ranks(independent):
        if args.test_only:
            results = {}
            for part, ids in by_part(blocks).items():
                students = of_main(lambda: [build_student(space, i, teacher, args.output_path, quant, unfinished=True)
                                            for i in ids], job)
                students = [(i, student.to(job.device)) for i, student in zip(ids, students)]
                results.update(evaluate(part, students, teacher, data, recipe, job))
        else:
            results = train_blocks(space, blocks, teacher, data, args.output_path, recipe, job, args.resume,
                                   args.compile)
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
