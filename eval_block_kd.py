"""Build block LUTs: random sub-stages of the trained blocks with their int8 NSR loss, FLOPs, params and latency.

    python eval_block_kd.py --superspace onnxw --platform onnx_lut --output_path checkpoints/block_kd/lut \\
        --stage_list stage3_0 stage3_1 --width_window_filter 0 1 2 --hw_list 160 192 224 --dataset_path dataset \\
        --checkpoint_path checkpoints/block_kd --debug \\
        --teacher_checkpoint_path checkpoints/block_kd/teacher_checkpoint/efficientnet_b5/checkpoint.pth

Reads <checkpoint_path>/<superspace>/<block>/lsq.pth, writes <output_path>/<superspace>/<block>_<window>.csv.
A killed build goes on where it stopped; a finished file is kept.
"""
import os

from modules.block_kd.lut_builder import build_luts
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import select_blocks
from modules.cli import SEED, not_negative, parser, positive, run, within
from modules.latency import add_platform_arguments, open_predictor
from modules.search_space.superspace import SUPERSPACES, check_resolutions, get_superspace
from modules.training.data import add_data_arguments, calibration_batches, eval_loader, open_data
from modules.training.distributed import add_distributed_arguments, distributed_job
from modules.training.losses import NSR_SIGNALS
from modules.training.parallel import default_workers


def get_args():
    p = parser(__doc__)
    p.add_argument('--superspace', required=True, choices=sorted(SUPERSPACES), help='hyperspace')
    add_platform_arguments(p)
    p.add_argument('--output_path', default='./checkpoints/block_kd/lut', help='folder of <superspace>/*.csv')
    p.add_argument('--checkpoint_path', default='./checkpoints/block_kd', help='folder of <superspace>/<block>/lsq.pth')
    p.add_argument('--teacher_arch', default='efficientnet-b5', help='efficientnet-b0..b7, -lite0..lite4')
    p.add_argument('--teacher_checkpoint_path', required=True, help='checkpoint of the int8 teacher')
    p.add_argument('--stage_list', nargs='+', help='block ids or whole stages; default: all')
    p.add_argument('--width_window_filter', nargs='+', type=not_negative(int), help='width windows to do; default: all')
    p.add_argument('--hw_list', nargs='+', type=positive(int), help="image resolutions; default: the superspace's")
    p.add_argument('--num_samples_per_stage', type=positive(int), default=1000, help='rows of a file')
    p.add_argument('--calib_batch_size', type=positive(int), default=64, help='images of a calibration batch')
    p.add_argument('--num_calib_batches', type=positive(int), default=4, help='of batch-norm calibration')
    p.add_argument('--eval_batch_size', type=positive(int), default=50, help='images of an evaluation batch')
    p.add_argument('--num_eval_batches', type=positive(int), help='default: all held-out images')
    p.add_argument('--debug', action='store_true', help='evaluate on few batches')
    p.add_argument('--debug_batches', type=positive(int), default=10, help='of --debug')
    p.add_argument('--nsr_signal', choices=NSR_SIGNALS, default='teacher', help='whose variance divides the loss')
    p.add_argument('--cache_budget_gb', type=positive(float), default=4.0,
                   help="GiB of the teacher's maps kept in memory; the rest is memory-mapped under output_path")
    p.add_argument('--num_threads', type=within(int, 1, 1024),
                   help='rows measured at a time by a rank, on a CPU; default: its share of the cores')
    p.add_argument('--seed', type=SEED, default=0, help='of the rows and the calibration images')
    add_data_arguments(p, trains=False)
    add_distributed_arguments(p)
    return p.parse_args()


class Images:
    """The images of a loader, without the labels, each time they are asked for."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return (images for images, _ in self.loader)


def main(args):
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        space = get_superspace(args.superspace)
        blocks = select_blocks(space, args.stage_list or space.searchable_stages)
        hw_list = check_resolutions(args.hw_list or space.kd_resolutions, space)
        predictor = open_predictor(args, space)
        teacher = build_teacher(args.teacher_arch, quant=True, checkpoint=args.teacher_checkpoint_path)
        teacher.check_fits(space)
        data = open_data(args.dataset_path, args.dataset, args.valid_size, image_size=max(hw_list), labelled=False,
                         normalize=teacher.normalize, seed=args.seed)
        calibration = [images for images, *_ in calibration_batches(
            data.train, args.calib_batch_size, args.num_calib_batches, args.seed, workers=args.num_workers)]
        evaluation = Images(eval_loader(data.valid, args.eval_batch_size, workers=args.num_workers,
                                        limit=args.num_eval_batches
                                        or (args.debug_batches if args.debug else None)).to(job.device))
        paths = build_luts(space, blocks, args.width_window_filter, teacher.to(job.device),
                           os.path.join(args.checkpoint_path, space.name), os.path.join(args.output_path, space.name),
                           calibration, evaluation, predictor, job, args.num_samples_per_stage, hw_list,
                           args.nsr_signal, args.seed, args.cache_budget_gb,
                           1 if job.device.type == 'cuda' else args.num_threads or default_workers())
        if job.is_main:
            print(f'{len(paths)} block LUTs:', *paths, sep='\n')


if __name__ == '__main__':
    run(main, get_args)
