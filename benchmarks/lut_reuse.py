"""Time of a block-LUT row with the teacher run again for every row, as the original did, and with its maps reused.

    python benchmarks/lut_reuse.py --teacher_archs efficientnet-b5 efficientnet-lite0 --rows 1 --scale 0.04

The protocol is eval_block_kd.py --debug (4 calibration batches of 64, 10 evaluation batches of 50), the numbers of
images multiplied by --scale, in batches as large as they can be. For each stage and block type random rows are
measured both ways, one after the other, on one core, as each of the builder's threads does it, in CPU seconds, which
other processes disturb least. "anew": decodes the images (500 x 375 JPEGs), runs the int8 teacher and the int8
student. "reused": runs the student on the cached maps; building the cache (decoding, teacher at all resolutions) is
shown apart, and a row's share of it is part of the row's time. "all" adds the stages up: a row of each. Teachers and
students have random weights, which do not change the time.
"""
import copy
import os
import random
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from modules.block_kd.checkpoints import build_student
from modules.block_kd.lut_builder import FeatureCache, Sample, measure
from modules.block_kd.teacher import build_teacher
from modules.cli import parser, positive, run
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.modeling.ops.op import resize
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
    p.add_argument('--rows', type=positive(int), default=1, help='rows timed, of each stage and block type')
    p.add_argument('--scale', type=positive(float), default=0.04, help='share of the numbers of images')
    p.add_argument('--rows_of_a_file', type=positive(int), default=1000, help='over which the cache is shared')
    p.add_argument('--seed', type=int, default=0, help='seed of the rows')
    return p.parse_args()


def write_images(folder, count):
    rng = random.Random(0)
    for i in range(count):
        image = Image.fromarray(load_sample_images().images[i % 2])
        left, top = rng.randrange(image.width - 500), rng.randrange(image.height - 375)
        image.crop((left, top, left + 500, top + 375)).save(os.path.join(folder, f'{i:04d}.jpg'), quality=90)


class Images:
    """Batches of images, decoded whenever they are gone through."""

    def __init__(self, data, first, count, batch_size):
        self.data, self.batch_size = copy.copy(data), batch_size
        self.data.indices = data.indices[first:first + count]

    def __iter__(self):
        return (images for images, _ in eval_loader(self.data, self.batch_size))


class Anew:
    """What FeatureCache gives, computed from the pictures whenever it is asked for."""

    def __init__(self, teacher, stage, calibration, evaluation):
        self.teacher, self.stage, self.images = teacher, stage, (calibration, evaluation)

    def _maps(self, images, hw):
        images = resize(images, hw).contiguous(memory_format=torch.channels_last)
        output, stage_input = (maps.contiguous() for maps in self.teacher.forward_to_stage(images, self.stage))
        return stage_input, output

    def calibration(self, hw):
        return (self._maps(images, hw)[0] for images in self.images[0])

    def evaluation(self, hw):
        return (self._maps(images, hw) for images in self.images[1])


def main(args):
    torch.set_num_threads(1)
    space = get_superspace(args.superspace)
    counts = [max(1, round(batches * size * args.scale)) for batches, size in (CALIBRATION, EVALUATION)]
    print(f'{space.name}, rows of each stage and block type: {args.rows}, images of a row: {counts[0]} + {counts[1]}, '
          'random weights; CPU seconds a row, mean over block types\n')
    print('| teacher | stage | anew | reused | times faster | cache, once a stage |\n|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder, sum(counts))
        for arch in args.teacher_archs:
            teacher = set_quant_mode(build_teacher(arch, weights='random'))
            data = open_data(folder, valid_size=0, image_size=max(space.kd_resolutions), labelled=False,
                             normalize=teacher.normalize).train.evaluated()
            images = (Images(data, 0, counts[0], CALIBRATION[1]), Images(data, *counts, EVALUATION[1]))
            times = []
            for stage in args.stage_list:
                times.append(time_stage(space, stage, teacher, images, args))
                print_row(arch, stage, *times[-1])
            print_row(arch, 'all', *map(sum, zip(*times)))


def print_row(arch, stage, anew, reused, cache):
    print(f'| {arch} | {stage} | {anew:.2f} | {reused:.2f} | {anew / reused:.1f} | {cache:.1f} |', flush=True)


@torch.no_grad()
def time_stage(space, stage, teacher, images, args):
    """(seconds a row anew, seconds a row reused, seconds of the cache) of a stage, mean over block types."""
    rng, times = random.Random(f'{args.seed} {stage}'), ([], [])
    blocks = [block for block in space.block_ids() if block.startswith(f'{stage}_')]
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        cache = FeatureCache(teacher, stage, space.kd_resolutions, *images, Job(), 8.0, folder)
        building = time.process_time() - start
        for block in blocks:
            student = set_quant_mode(build_student(space, block, teacher))
            student.initialize_scales(next(cache.calibration(min(space.kd_resolutions)))[:2], rng)
            for _ in range(args.rows):
                row = Sample.of(space, student.block_id, *sample_sub_stage(space, block, rng))
                losses = []
                for i, source in enumerate((Anew(teacher, stage, *images), cache)):
                    start = time.process_time()
                    losses.append(measure(student, row, source))
                    times[i].append(time.process_time() - start)
                assert abs(losses[0] - losses[1]) <= 1e-3 * losses[0], 'the cache changes the result'
    rows = args.rows_of_a_file * len(blocks) * space.stage(stage).num_windows
    return sum(times[0]) / len(times[0]), sum(times[1]) / len(times[1]) + building / rows, building


if __name__ == '__main__':
    run(main, get_args)
