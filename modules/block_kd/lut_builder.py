"""Building block LUTs: sampled sub-stages of trained blocks, with their int8 NSR loss and predicted latency.

The teacher's maps of the calibration and evaluation images are computed once per stage and resolution
(FeatureCache) and serve every row of every block of the stage; what a row then costs is the student alone.
Ranks share the rows; which rows there are depends on the seed only.
"""
import glob
import hashlib
import os
import random
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..modeling.complexity import sub_stage_complexity
from ..modeling.ops.op import resize
from ..search_space import sampling
from ..search_space.encoding import BlockId, format_sub_stage, parse_sub_stage
from ..training.calibrate import calibrate, kept_statistics
from ..training.distributed import barrier
from ..training.log import progress
from ..training.losses import nsr_loss
from .lut import LutRow, format_row, write_block_lut
from .trainer import build_student, by_stage, require_checkpoint


@dataclass(frozen=True)
class Sample:
    """A row to measure: sub-stage string, input channels and image resolution (pixels)."""
    sub_stage: str
    cin: int
    resolution: int


def sample_rows(superspace, lut_id, num_samples, hw_list, seed):
    """The Samples of a block LUT: a function of the arguments alone, whatever the number of ranks."""
    rng = random.Random(f'{seed} {lut_id}')
    rows = (sampling.sample_sub_stage(superspace, lut_id, rng, hw_list) for _ in range(num_samples))
    return [Sample(format_sub_stage(blocks), cin, resolution) for blocks, cin, resolution in rows]


class FeatureCache:
    """The teacher's stage inputs (calibration) and inputs and outputs (evaluation), by resolution.

    calibration, evaluation: lists of image batches (N, 3, H, W). Maps are float32, on the job's device while
    they fit `budget_gb` (GiB, of each rank), else memory-mapped files below `folder`, which have no name once
    they are mapped and go with the process, however it ends.
    """

    def __init__(self, teacher, stage, hw_list, calibration, evaluation, job, budget_gb, folder):
        self.batches = {}
        self._left, self._folder, self._job = budget_gb * 2 ** 30, folder, job
        for hw in dict.fromkeys(hw_list):
            with torch.no_grad():
                inputs = [self._keep(teacher.forward_to_stage(self._images(b, hw), stage)[1]) for b in calibration]
                pairs = []
                for batch in evaluation:
                    output, stage_input = teacher.forward_to_stage(self._images(batch, hw), stage)
                    pairs.append((self._keep(stage_input), self._keep(output)))
            self.batches[hw] = inputs, pairs

    def _images(self, batch, hw):
        return resize(batch.to(self._job.device), hw)

    def _keep(self, tensor):
        tensor = tensor.float().contiguous()
        size = tensor.numel() * tensor.element_size()
        if size <= self._left:
            self._left -= size
            return tensor
        os.makedirs(self._folder, exist_ok=True)
        path = os.path.join(self._folder, f'.features-{os.getpid()}.bin')
        mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        os.remove(path)
        mapped.copy_(tensor)
        return mapped

    def calibration(self, hw):
        """Batches of stage inputs on the device."""
        return (batch.to(self._job.device) for batch in self.batches[hw][0])

    def evaluation(self, hw):
        """Batches of (stage input, stage output) on the device."""
        return ((a.to(self._job.device), b.to(self._job.device)) for a, b in self.batches[hw][1])


@torch.no_grad()
def measure(student, sample, cache, nsr_signal='teacher'):
    """int8 NSR loss of one sub-stage: batch norm calibrated for it, mean over the evaluation images."""
    block_id = student.block_id
    student.set_active_sub_stage(sample.cin, parse_sub_stage(student.superspace, block_id, sample.sub_stage))
    total = count = 0
    with kept_statistics(student):
        calibrate(student, cache.calibration(sample.resolution))
        for stage_input, target in cache.evaluation(sample.resolution):
            total += nsr_loss(student(stage_input), target, nsr_signal).item() * len(target)
            count += len(target)
    return total / count


def build_luts(superspace, block_ids, windows, teacher, folder, output, calibration, evaluation, predictor, job,
               num_samples=1000, hw_list=(160, 192, 224), nsr_signal='teacher', seed=0, budget_gb=4.0):
    """Write <output>/<block>_<window>.csv for every block id and width window; returns their paths.

    folder: of the trained blocks' lsq.pth. windows: width windows to do (those a stage has not are left out),
    None for all. A LUT that is there is kept; one that was begun goes on.
    """
    paths = []
    for stage, blocks in by_stage(block_ids).items():
        lut_ids = [BlockId(stage, int(block.split('_')[1]), window) for block in blocks
                   for window in range(superspace.stage(stage).num_windows) if windows is None or window in windows]
        paths += [_path(output, lut_id) for lut_id in lut_ids]
        todo = [lut_id for lut_id in lut_ids if not os.path.exists(_path(output, lut_id))]
        barrier(job)
        if not todo:
            continue
        for block in blocks:                    # a missing checkpoint is told before the teacher runs
            require_checkpoint(folder, block, quant=True)
        cache = FeatureCache(teacher, stage, hw_list, calibration, evaluation, job, budget_gb, output)
        for block in blocks:
            student = build_student(superspace, block, teacher, folder, quant=True).to(job.device)
            for lut_id in todo:
                if f'{lut_id.stage}_{lut_id.block_type}' == block:
                    samples = sample_rows(superspace, str(lut_id), num_samples, hw_list, seed)
                    _build(superspace, lut_id, samples, student, cache, predictor, output, job, nsr_signal)
    return paths


def _path(output, lut_id):
    return os.path.join(output, f'{lut_id}.csv')


def _build(superspace, lut_id, samples, student, cache, predictor, output, job, nsr_signal):
    """Measure this rank's share of the rows that are not there yet; the last step puts them in order."""
    os.makedirs(output, exist_ok=True)
    path = _path(output, lut_id)
    header = f'{lut_id} {_digest(samples, student, cache, nsr_signal)}'
    have = _read_parts(path, header)
    barrier(job)                                # every rank has read before one writes
    mine = [i for i in range(job.rank, len(samples), job.world_size) if i not in have]
    part = f'{path}.part{job.rank}'
    _begin_part(part, header)
    with open(part, 'a', encoding='ascii') as file:
        share = len(range(job.rank, len(samples), job.world_size))
        with progress(share, str(lut_id), share - len(mine), job.is_main) as bar:
            for i in mine:
                row = _row(superspace, lut_id, samples[i], student, cache, predictor, nsr_signal)
                file.write(f'{i},{format_row(row)}\n')
                file.flush()
                bar.update()
    barrier(job)
    if job.is_main:
        lines = _read_parts(path, header)
        write_block_lut(path, [_parse_line(lines[i]) for i in range(len(samples))])
        for part in glob.glob(f'{glob.escape(path)}.part*'):
            os.remove(part)
    barrier(job)


def _digest(samples, student, cache, nsr_signal):
    """12 hex digits that change with anything the rows depend on but the teacher's weights and the platform."""
    digest = hashlib.sha256(repr((samples, nsr_signal)).encode())
    for key, tensor in student.state_dict().items():
        digest.update(key.encode() + tensor.cpu().numpy().tobytes())
    for hw, (inputs, pairs) in cache.batches.items():
        digest.update(repr((hw, [batch.shape for batch in inputs], [pair[1].shape for pair in pairs])).encode())
    return digest.hexdigest()[:12]


def _row(superspace, lut_id, sample, student, cache, predictor, nsr_signal):
    hw = -(-sample.resolution // superspace.input_stride(lut_id.stage))
    shape = (1, sample.cin, hw, hw)
    loss = measure(student, sample, cache, nsr_signal)
    flops, params = sub_stage_complexity(superspace, str(lut_id), sample.sub_stage, shape)
    latency = predictor.predict_sub_stage(superspace, str(lut_id), sample.sub_stage, shape)
    return LutRow(sample.sub_stage, sample.cin, hw, loss, flops, params, latency)


def _begin_part(part, header):
    """A part file that starts with its header and ends with a whole line."""
    if os.path.exists(part):
        with open(part, 'rb+') as file:
            data = file.read()
            if data.startswith(header.encode() + b'\n'):
                file.truncate(data.rfind(b'\n') + 1)
                return
    with open(part, 'w', encoding='ascii') as file:
        file.write(header + '\n')


def _read_parts(path, header):
    """{row index: line} of the whole lines in every rank's part file of a build with this header."""
    lines = {}
    for part in glob.glob(f'{glob.escape(path)}.part*'):
        with open(part, encoding='ascii') as file:
            first, *rest = file.read().split('\n')[:-1] or ['']
        if first != header:
            raise UserError(f'{part}: begun with other blocks, images or settings; use those, or remove it')
        for line in rest:
            index, _, row = line.partition(',')
            lines[int(index)] = row
    return lines


def _parse_line(line):
    sub_stage, shape, *values = line.split(',')
    _, cin, hw, _ = map(int, shape.split('x'))
    return LutRow(sub_stage, cin, hw, *map(float, values))
