"""Building block LUTs: sampled sub-stages of trained blocks, with their int8 NSR loss and predicted latency.

The teacher's maps of the calibration and evaluation images are computed once per stage and resolution
(FeatureCache) and serve every row of every block of the stage; what a row then costs is the student alone.
Ranks share the rows. Rows depend on weights, images, settings and seed only: not on ranks, threads or order.
"""
import contextlib
import copy
import glob
import hashlib
import math
import os
import queue
import random
import tempfile
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..modeling.complexity import sub_stage_complexity
from ..modeling.ops.op import resize
from ..search_space import sampling
from ..search_space.encoding import BlockId, format_sub_stage, parse_sub_stage
from ..search_space.superspace import get_superspace
from ..training.calibrate import calibrate, kept_statistics
from ..training.distributed import barrier, gather, of_main
from ..training.log import note, progress
from ..training.losses import nsr_loss
from ..training.parallel import one_core, thread_map
from .checkpoints import build_student, require_checkpoint
from .lut import LutRow, format_row, parse_row, read_block_lut, write_block_lut
from .trainer import by_part, check_map_sizes


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

    calibration, evaluation: iterables of image batches (N, 3, H, W), each gone through once. Maps are float32, on
    the job's device while they fit `budget_gb` (GiB, of each rank), else memory-mapped files below `folder`, which
    have no name once they are mapped and go with the process, however it ends. `digest` changes with the
    images, the resolutions and the teacher's weights.
    """

    def __init__(self, teacher, stage, hw_list, calibration, evaluation, job, budget_gb, folder, workers=1):
        self._left, self._folder, self._job = budget_gb * 2 ** 30, folder, job
        self.batches = {hw: ([], []) for hw in hw_list}
        teacher.to(memory_format=torch.channels_last)           # faster; students of ResNet blocks are not, here
        digest = hashlib.sha256(repr((stage, list(self.batches))).encode())
        _hash_tensors(digest, teacher.state_dict().values())

        def run(item):
            kind, images, hw = item
            with torch.no_grad():
                images = resize(images.to(job.device), hw).contiguous(memory_format=torch.channels_last)
                return kind, hw, teacher.forward_to_stage(images, stage)

        def jobs():
            for kind, batches in (('calibration', calibration), ('evaluation', evaluation)):
                for images in batches:
                    digest.update(kind.encode())
                    _hash_tensors(digest, [images])
                    yield from ((kind, images, hw) for hw in self.batches)

        for kind, hw, (output, stage_input) in thread_map(run, jobs(), workers):
            inputs, pairs = self.batches[hw]
            if kind == 'calibration':
                inputs.append(self._keep(stage_input))
            else:
                pairs.append((self._keep(stage_input), self._keep(output)))
        self.digest = digest.hexdigest()
        if not all(inputs and pairs for inputs, pairs in self.batches.values()):
            raise UserError('no images to calibrate or to evaluate with: give more pictures, or a --valid_size')

    def _keep(self, tensor):
        tensor = tensor.float().contiguous()
        size = tensor.numel() * tensor.element_size()
        if size <= self._left:
            self._left -= size
            return tensor
        os.makedirs(self._folder, exist_ok=True)
        file, path = tempfile.mkstemp(dir=self._folder, prefix='.features-')
        try:
            os.posix_fallocate(file, 0, size)               # a full disk is an error now, not a crash later
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise UserError(f'{self._folder}: no room for the teacher\'s maps ({error.strerror}): give a larger '
                            '--cache_budget_gb or fewer --num_eval_batches') from None
        finally:
            os.close(file)
            os.remove(path)
        return mapped.view(tensor.shape).copy_(tensor)

    def calibration(self, hw):
        """Batches of stage inputs on the device."""
        return (batch.to(self._job.device) for batch in self.batches[hw][0])

    def evaluation(self, hw):
        """Batches of (stage input, stage output) on the device."""
        return ((a.to(self._job.device), b.to(self._job.device)) for a, b in self.batches[hw][1])


def _hash_tensors(digest, tensors):
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


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
               num_samples=1000, hw_list=(160, 192, 224), nsr_signal='teacher', seed=0, budget_gb=4.0, workers=1):
    """Write <output>/<block>_<window>.csv for every block id and width window; returns their paths.

    folder: of the trained blocks' lsq.pth. windows: width windows to do (those a stage has not are left out),
    None for all. calibration, evaluation: iterables of image batches that can be gone through once per stage.
    workers: rows measured at a time by this rank. A LUT that is there is kept; one that was begun goes on.
    """
    check_map_sizes(superspace, block_ids, hw_list)
    lut_ids = {stage: [BlockId(stage, int(block.split('_')[1]), window) for block in blocks
                       for window in range(superspace.stage(stage).num_windows) if windows is None or window in windows]
               for stage, blocks in by_part(block_ids).items()}
    if not any(lut_ids.values()):
        raise UserError(f'--width_window_filter {" ".join(map(str, windows))}: no stage has such a width window')
    for block in block_ids:                     # a missing checkpoint is told before the teacher runs
        require_checkpoint(folder, block, True, superspace)
    built = of_main(lambda: {lut_id for ids in lut_ids.values() for lut_id in ids
                             if _is_built(superspace, output, lut_id)}, job)
    for lut_id in (lut_id for ids in lut_ids.values() for lut_id in ids if lut_id not in built):
        for sample in sample_rows(superspace, str(lut_id), num_samples, hw_list, seed):
            _latency(superspace, lut_id, sample, predictor)     # a block that the platform lacks, too
    for stage, ids in lut_ids.items():
        todo = [lut_id for lut_id in ids if lut_id not in built]
        if len(todo) < len(ids):
            note(f'{stage}: {len(ids) - len(todo)} finished files in {output} are kept; remove them to build anew')
        if job.is_main:
            for lut_id in ids:
                if lut_id in built:             # killed between writing the LUT and removing its parts
                    _remove_parts(_path(output, lut_id))
        barrier(job)
        if not todo:
            continue
        students = {block: build_student(superspace, block, teacher, folder, quant=True)
                    for block in dict.fromkeys(f'{lut_id.stage}_{lut_id.block_type}' for lut_id in todo)}
        cache = FeatureCache(teacher, stage, hw_list, calibration, evaluation, job, budget_gb, output, workers)
        for block, student in students.items():
            student.to(job.device)
            digest = _prepare(student, cache, seed, f'{nsr_signal} {predictor.platform}')
            for lut_id in todo:
                if f'{lut_id.stage}_{lut_id.block_type}' == block:
                    samples = sample_rows(superspace, str(lut_id), num_samples, hw_list, seed)
                    _build(superspace, lut_id, samples, student, cache, predictor, output, job, nsr_signal, workers,
                           hashlib.sha256(f'{digest} {samples}'.encode()).hexdigest()[:16])
            student.cpu()
    return [_path(output, lut_id) for ids in lut_ids.values() for lut_id in ids]


def _path(output, lut_id):
    return os.path.join(output, f'{lut_id}.csv')


def _is_built(superspace, output, lut_id):
    """Whether a finished file is there; LutError where what is there is none."""
    found = [path for path in (_path(output, lut_id), _path(output, lut_id) + '.gz') if os.path.lexists(path)]
    for path in found:
        read_block_lut(path, superspace, str(lut_id))
    return bool(found)


def _prepare(student, cache, seed, settings):
    """Initialise scales that training never reached, the same on every rank; digest of all a row depends on."""
    digest = hashlib.sha256(f'{cache.digest} {settings}'.encode())
    _hash_tensors(digest, student.state_dict().values())
    stage_input = next(cache.calibration(max(cache.batches)))
    with one_core():
        student.initialize_scales(stage_input, random.Random(f'{seed} {student.block_id} scales'))
    return digest.hexdigest()


def _build(superspace, lut_id, samples, student, cache, predictor, output, job, nsr_signal, workers, digest):
    """Measure this rank's share of the rows that are not there yet; the last step puts them in order."""
    os.makedirs(output, exist_ok=True)
    path, header = _path(output, lut_id), f'{lut_id} {digest}'
    have = _read_parts(path, header, superspace, lut_id, samples)
    barrier(job)                                # every rank has read before one writes
    share = range(job.rank, len(samples), job.world_size)
    mine = [i for i in share if i not in have]
    students = queue.SimpleQueue()
    for _ in range(workers):
        students.put(copy.deepcopy(student) if workers > 1 else student)

    def row(i):
        own = students.get()
        try:
            return i, _row(superspace, lut_id, samples[i], own, cache, predictor, nsr_signal)
        finally:
            students.put(own)

    part = f'{path}.part{job.rank}'
    _begin_part(part, header)
    with open(part, 'a', encoding='ascii') as file, \
            progress(len(share), str(lut_id), len(share) - len(mine), job.is_main) as bar:
        for i, measured in thread_map(row, mine, workers):
            file.write(f'{i},{format_row(measured)}\n')
            file.flush()
            bar.update()
    barrier(job)
    parts = gather(_read_parts(path, header, superspace, lut_id, samples), job)
    if job.is_main:
        rows = {i: row for part in parts for i, row in part.items()}
        write_block_lut(path, [rows[i] for i in range(len(samples))])
    barrier(job)
    _remove_parts(path)                         # by every rank: perhaps of a disk of its own
    barrier(job)


def _remove_parts(path):
    for part in glob.glob(f'{glob.escape(path)}.part*'):
        with contextlib.suppress(FileNotFoundError):        # another rank was quicker
            os.remove(part)


def _input_shape(superspace, lut_id, sample):
    hw = -(-sample.resolution // superspace.input_stride(lut_id.stage))
    return 1, sample.cin, hw, hw


def _latency(superspace, lut_id, sample, predictor):
    """Predicted ms of a Sample."""
    shape = _input_shape(superspace, lut_id, sample)
    return predictor.predict_sub_stage(superspace, str(lut_id), sample.sub_stage, shape)


def _row(superspace, lut_id, sample, student, cache, predictor, nsr_signal):
    *_, hw = shape = _input_shape(superspace, lut_id, sample)
    loss = measure(student, sample, cache, nsr_signal)
    if not 5e-5 <= loss < math.inf:
        raise UserError(f'{lut_id}: {sample.sub_stage} at {sample.resolution} pixels has an NSR of {loss}: '
                        'is its lsq.pth sound?')
    flops, params = sub_stage_complexity(superspace, str(lut_id), sample.sub_stage, shape)
    latency = _latency(superspace, lut_id, sample, predictor)
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


def _read_parts(path, header, superspace, lut_id, samples):
    """{row index: LutRow} of the whole lines in every rank's part file of a build with this header."""
    rows, space = {}, get_superspace(superspace)
    for part in glob.glob(f'{glob.escape(path)}.part*'):
        with open(part, encoding='ascii', errors='replace') as file:
            first, *rest = file.read().split('\n')[:-1] or [header]     # killed before the header was whole
        if first != header:
            raise UserError(f'{part}: begun with other blocks, images or settings; use those, or remove it')
        for number, line in enumerate(rest, 2):
            index, _, text = line.partition(',')
            try:
                row, sample = parse_row(space, lut_id, text), samples[int(index)]
                expected = sample.sub_stage, *_input_shape(space, lut_id, sample)[1:3]
                if int(index) < 0 or int(index) in rows or row[:3] != expected:
                    raise ValueError
                rows[int(index)] = row
            except (ValueError, IndexError):
                raise UserError(f'{part}:{number}: not a row of this block LUT: {line[:80]!r}; remove it') from None
    return rows
