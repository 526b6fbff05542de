"""Build block LUTs: random sub-stages of the trained blocks with their int8 NSR loss, FLOPs, params and latency.

    python eval_block_kd.py --superspace onnxw --platform onnx_lut --output_path checkpoints/block_kd/lut \\
        --stage_list stage3_0 stage3_1 --width_window_filter 0 1 2 --hw_list 160 192 224 --dataset_path dataset \\
        --checkpoint_path checkpoints/block_kd --debug \\
        --teacher_checkpoint_path checkpoints/block_kd/teacher_checkpoint/efficientnet_b5/checkpoint.pth

Reads <checkpoint_path>/<superspace>/<block>/lsq.pth, writes <output_path>/<superspace>/<block>_<window>.csv.
A killed build continues where it stopped; a finished file is kept.
"""
import os

from modules.block_kd.checkpoints import trained_images
from modules.block_kd.lut_builder import LutBuilder, LutSettings
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import select_blocks
from modules.cli import parser, run
from modules.latency import add_platform_arguments, open_predictor
from modules.search_space.superspace import SUPERSPACES, check_resolutions, get_superspace
from modules.settings import add_settings, settings_of
from modules.training.data import VALID_SIZE, add_data_arguments, calibration_batches, eval_loader, open_data
from modules.training.distributed import add_distributed_arguments, distributed_job, of_main
from modules.training.log import note


def get_args():
    p = parser(__doc__)
    p.add_argument('--superspace', required=True, choices=sorted(SUPERSPACES), help='hyperspace')
    add_platform_arguments(p)
    p.add_argument('--teacher_arch', default='efficientnet-b5', help='efficientnet-b0..b7, -lite0..lite4')
    p.add_argument('--teacher_checkpoint_path', required=True, help='checkpoint of the int8 teacher')
    p.add_argument('--stage_list', nargs='+', help='block ids or whole stages; default: all')
    add_settings(p, LutSettings)
    add_data_arguments(p, trains=False)
    p.set_defaults(valid_size=None)             # that of block KD
    add_distributed_arguments(p)
    return p.parse_args()


class Images:
    """The images of a loader, without the labels, each time they are asked for."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return (images for images, _ in self.loader)


def open_images(args, valid_size, hw_list, teacher, seed):
    """Data of the pictures, of which valid_size are held out."""
    return open_data(args.dataset_path, args.dataset, valid_size, image_size=max(hw_list), labelled=False,
                     normalize=teacher.normalize, seed=seed)


def main(args):
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        space = get_superspace(args.superspace)
        blocks = select_blocks(space, args.stage_list or space.searchable_stages)
        hw_list = check_resolutions(args.hw_list or space.kd_resolutions, space)
        settings = settings_of(LutSettings, args, hw_list=hw_list)
        predictor = open_predictor(args, space)
        teacher = build_teacher(args.teacher_arch, quant=True, checkpoint=args.teacher_checkpoint_path)
        teacher.check_fits(space)
        folder = os.path.join(args.checkpoint_path, space.name)
        trained = of_main(lambda: trained_images(space, blocks[0], folder), job)
        wanted = VALID_SIZE if args.valid_size is None else args.valid_size
        data = open_images(args, wanted, hw_list, teacher, settings.seed)
        images = len(data.train) + len(data.valid)
        if args.valid_size is None and trained is not None and len(data.train) != trained < images:
            data = open_images(args, images - trained, hw_list, teacher, settings.seed)
        if trained is not None and len(data.train) < trained:
            note(f'{folder}: block KD was trained on {trained - len(data.train)} of the {len(data.valid)} images that '
                 f'are held out here; give --valid_size {images - trained}')
        calibration = [images for images, *_ in calibration_batches(
            data.train, settings.calib_batch_size, settings.num_calib_batches, settings.seed,
            workers=args.num_workers)]
        limit = settings.num_eval_batches or (settings.debug_batches if settings.debug else None)
        evaluation = Images(eval_loader(data.valid, settings.eval_batch_size, workers=args.num_workers,
                                        limit=limit).to(job.device))
        builder = LutBuilder(space, teacher.to(job.device), predictor, job, settings)
        paths = builder.build(blocks, calibration, evaluation)
        if job.is_main:
            print(f'{len(paths)} block LUTs:', *paths, sep='\n')


if __name__ == '__main__':
    run(main, get_args)
