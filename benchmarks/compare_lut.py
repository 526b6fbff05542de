"""Compare trained blocks with published block-LUT rows: rank correlation of the NSR loss of the same sub-stages.

    python benchmarks/compare_lut.py --published ../shared/reference/lut --superspace onnxw \\
        --stage_list stage2 stage3 \\
        --checkpoint_path checkpoints/learn/onnxw --teacher_arch efficientnet-lite0 \\
        --teacher_checkpoint_path checkpoints/learn/teacher/efficientnet_lite0/checkpoint.pth \\
        --dataset_path dataset/crops --scale 0.5 --rows 10 --output checkpoints/learn/compare

Takes the first --rows rows of every published file of the stages, measures our int8 NSR of those sub-stages with
image resolutions multiplied by --scale and rounded to multiples of 16, and
writes <output>/rows.csv, <output>/correlation.md and a picture.
"""
import itertools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from modules.block_kd.checkpoints import build_student
from modules.block_kd.lut import lut_files, read_rows
from modules.block_kd.lut_builder import FeatureCache, Sample, measure
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import by_part, select_blocks
from modules.cli import parser, positive, run
from modules.figures import new_figure, save_figure
from modules.files import write_text
from modules.search_space.encoding import format_sub_stage, parse_block_id
from modules.search_space.superspace import check_resolutions, get_superspace
from modules.training.data import add_data_arguments, calibration_batches, eval_loader, open_data
from modules.training.distributed import Job
from modules.training.losses import NSR_SIGNALS


def get_args():
    p = parser(__doc__)
    p.add_argument('--published', required=True, help='folder of <superspace>/*.csv')
    p.add_argument('--superspace', default='onnxw', help='hyperspace')
    p.add_argument('--stage_list', nargs='+', required=True, help='block ids or whole stages')
    p.add_argument('--checkpoint_path', required=True, help='folder of <block>/lsq.pth')
    p.add_argument('--teacher_arch', default='efficientnet-lite0', help='teacher')
    p.add_argument('--teacher_checkpoint_path', required=True, help='checkpoint of the int8 teacher')
    p.add_argument('--scale', type=positive(float), default=1.0, help='our resolutions over the published ones')
    p.add_argument('--rows', type=positive(int), default=10, help='rows of each file')
    p.add_argument('--batch_size', type=positive(int), default=32, help='images')
    p.add_argument('--num_calib_batches', type=positive(int), default=3, help='batches of batch-norm calibration')
    p.add_argument('--num_eval_batches', type=positive(int), default=4, help='batches of the NSR')
    p.add_argument('--nsr_signal', choices=NSR_SIGNALS, default='teacher',
                   help="whose variance divides; the published rows': student")
    p.add_argument('--output', required=True, help='folder of the results')
    add_data_arguments(p)
    return p.parse_args()


def published_rows(lut_path, space, blocks, count, scale):
    """{block id: [(Sample at our resolution, published NSR)]} of the first `count` rows of every window's file."""
    rows = {}
    lut_ids = [lut_id for lut_id in space.lut_ids() if lut_id.rpartition('_')[0] in blocks]
    for lut_id, path in lut_files(lut_path, space, lut_ids).items():
        block_id = parse_block_id(space, lut_id)
        for row in itertools.islice(read_rows(path, space, lut_id), count):
            resolution = row.hw * space.input_stride(block_id.stage)
            sample = Sample.of(space, block_id, [block.choice for block in row.blocks], row.blocks[0].cin,
                               round(resolution * scale / 16) * 16)
            rows.setdefault(lut_id.rpartition('_')[0], []).append((sample, row.loss))
    return rows


def main(args):
    space, job = get_superspace(args.superspace), Job()
    blocks = select_blocks(space, args.stage_list)
    rows = published_rows(args.published, space, blocks, args.rows, args.scale)
    hw_list = check_resolutions(sorted({sample.resolution for pairs in rows.values() for sample, _ in pairs}),
                                space)
    teacher = build_teacher(args.teacher_arch, quant=True, checkpoint=args.teacher_checkpoint_path)
    data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, max(hw_list), labelled=False,
                     normalize=teacher.normalize)
    calibration = [images for images, *_ in calibration_batches(data.train, args.batch_size, args.num_calib_batches)]
    evaluation = [images for images, _ in eval_loader(data.valid, args.batch_size, limit=args.num_eval_batches)]
    table, results = ['| blocks | rows | Spearman of NSR |', '|---|---|---|'], []
    for stage, ids in by_part(blocks).items():
        cache = FeatureCache(teacher, stage, hw_list, calibration, evaluation, job, 8.0, args.output)
        pooled = []
        for block in ids:
            student = build_student(space, block, teacher, args.checkpoint_path, quant=True)
            pairs = [(measure(student, sample, cache, args.nsr_signal), published, sample)
                     for sample, published in tqdm(rows[block], desc=block, disable=None)]
            results += [(block, sample, ours, published) for ours, published, sample in pairs]
            table.append(f'| {block} {student.block_type.name} | {len(pairs)} | {_spearman(pairs):.3f} |')
            pooled += pairs
        table.append(f'| **{stage}, pooled** | {len(pooled)} | **{_spearman(pooled):.3f}** |')
        print('\n'.join(table), flush=True)
    write_text(os.path.join(args.output, 'correlation.md'), '\n'.join(table) + '\n')
    write_text(os.path.join(args.output, 'rows.csv'), 'block,sub-stage,cin,resolution,ours,published\n' + ''.join(
        f'{block},{format_sub_stage(b.choice for b in s.blocks)},{s.blocks[0].cin},{s.resolution},{ours:.4f},'
        f'{published:.4f}\n'
        for block, s, ours, published in results))
    draw(results, space, os.path.join(args.output, 'nsr_ours_vs_published.png'))


def _spearman(pairs):
    return spearmanr([pair[0] for pair in pairs], [pair[1] for pair in pairs]).statistic


def draw(results, space, path):
    """Scatter of our NSR over the published NSR, a panel per stage, a colour per block type."""
    stages = list(by_part(list(dict.fromkeys(block for block, *_ in results))))
    figure, panels = new_figure(1, len(stages), figsize=(5.2 * len(stages), 4.6), layout='constrained')
    for axes, stage in zip(np.atleast_1d(panels), stages):
        for block in dict.fromkeys(block for block, *_ in results if block.startswith(f'{stage}_')):
            points = [(published, ours) for b, _, ours, published in results if b == block]
            name = space.block_type(stage, int(block.split('_')[1])).name.removesuffix('Block')
            axes.scatter(*zip(*points), s=14, alpha=0.7, label=f'{block} {name}')
        pooled = [(ours, published) for b, _, ours, published in results if b.startswith(f'{stage}_')]
        axes.set(xlabel='published NSR (ImageNet, b5 teacher)', ylabel='our NSR (lite0 teacher)',
                 title=f'{stage}: Spearman {_spearman(pooled):.3f} over {len(pooled)} sub-stages')
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save_figure(figure, path)


if __name__ == '__main__':
    run(main, get_args)
