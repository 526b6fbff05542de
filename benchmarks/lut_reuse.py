"""Time of a block-LUT row with the teacher run anew for every row, as the original did, and with its maps reused.

    python benchmarks/lut_reuse.py --teacher_archs efficientnet-b5 efficientnet-lite0 --rows 2 --scale 0.125

The protocol is eval_block_kd.py --debug (4 calibration batches of 64, 10 evaluation batches of 50) with batch sizes
multiplied by --scale. "anew" decodes the images (500 x 375 JPEGs), runs the int8 teacher and the int8 student;
"reused" runs the student on the cached maps. Building the cache is shown apart: it is paid once per stage, here
shared by all rows of the stage. Weights are random: they do not change the time.
"""
import os
import random
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from modules.block_kd.lut_builder import FeatureCache, Sample, measure
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import build_student
from modules.cli import parser, positive, run
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.search_space.encoding import format_sub_stage
from modules.search_space.macro_arch import SEARCHABLE_STAGES
from modules.search_space.sampling import sample_sub_stage
from modules.search_space.superspace import get_superspace
from modules.training.data import eval_loader, open_data
from modules.training.distributed import Job

CALIBRATION, EVALUATION = (4, 64), (10, 50)             # batches, images in each


def get_args():
    p = parser(__doc__)
    p.add_argument('--superspace', default='onnxw', help='hyperspace')
    p.add_argument('--teacher_archs', nargs='+', default=['efficientnet-b5', 'efficientnet-lite0'], help='teachers')
    p.add_argument('--stage_list', nargs='+', default=list(SEARCHABLE_STAGES), help='stages')
    p.add_argument('--rows', type=positive(int), default=2, help='rows timed, of each stage and block type')
    p.add_argument('--scale', type=positive(float), default=0.125, help='of the batch sizes')
    p.add_argument('--seed', type=int, default=0, help='of the rows')
    return p.parse_args()


def write_images(folder, count):
    rng = random.Random(0)
    for i in range(count):
        image = Image.fromarray(load_sample_images().images[i % 2])
        left, top = rng.randrange(image.width - 500), rng.randrange(image.height - 375)
        image.crop((left, top, left + 500, top + 375)).save(os.path.join(folder, f'{i:04d}.jpg'), quality=90)


def sample(space, block_id, rng):
    blocks, cin, resolution = sample_sub_stage(space, block_id, rng)
    return Sample(format_sub_stage(blocks), cin, resolution)


def main(args):
    space, job = get_superspace(args.superspace), Job()
    sizes = [max(1, round(size * args.scale)) for _, size in (CALIBRATION, EVALUATION)]
    images = CALIBRATION[0] * sizes[0] + EVALUATION[0] * sizes[1]
    print(f'{images} images a row, {torch.get_num_threads()} threads; seconds a row\n')
    print('| teacher | stage | anew | reused | times faster | cache, once a stage |\n|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, images)
        for arch in args.teacher_archs:
            teacher = set_quant_mode(build_teacher(arch, weights='random'))
            data = open_data(folder, valid_size=0, image_size=224, labelled=False, normalize=teacher.normalize)
            totals = [0.0, 0.0]
            for stage in args.stage_list:
                anew, reused, cache = time_stage(space, stage, teacher, data.train.evaluated(), sizes, job, args)
                totals = [totals[0] + anew, totals[1] + reused]
                print(f'| {arch} | {stage} | {anew:.2f} | {reused:.2f} | {anew / reused:.1f} | {cache:.1f} |',
                      flush=True)
            print(f'| {arch} | all | {totals[0]:.2f} | {totals[1]:.2f} | **{totals[0] / totals[1]:.1f}** | |',
                  flush=True)


def load(data, sizes):
    """(calibration, evaluation) batches of images, decoded now."""
    images = torch.cat([images for images, _ in eval_loader(data, sizes[0])])
    first = CALIBRATION[0] * sizes[0]
    return images[:first].split(sizes[0]), images[first:].split(sizes[1])


def time_stage(space, stage, teacher, data, sizes, job, args):
    """(seconds a row anew, seconds a row reused, seconds of the cache) of a stage, mean over block types."""
    rng = random.Random(f'{args.seed} {stage}')
    calibration, evaluation = load(data, sizes)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = FeatureCache(teacher, stage, space.kd_resolutions, calibration, evaluation, job, 8.0, folder)
        building, times = time.perf_counter() - start, [[], []]
        for block in (block for block in space.block_ids() if block.startswith(f'{stage}_')):
            student = set_quant_mode(build_student(space, block, teacher))
            measure(student, sample(space, block, rng), cache)                  # initialises the scales, warms up
            for _ in range(args.rows):
                row = sample(space, block, rng)
                start = time.perf_counter()
                loaded = load(data, sizes)
                anew = FeatureCache(teacher, stage, [row.resolution], *loaded, job, 8.0, folder)
                first = measure(student, row, anew)
                times[0].append(time.perf_counter() - start)
                start = time.perf_counter()
                second = measure(student, row, cache)
                times[1].append(time.perf_counter() - start)
                assert abs(first - second) <= 1e-3 * first, 'the cache changes the result'
    return sum(times[0]) / len(times[0]), sum(times[1]) / len(times[1]), building


if __name__ == '__main__':
    run(main, get_args)
