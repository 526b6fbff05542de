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
from typing import NamedTuple

import torch

from ..errors import UserError
from ..files import Journal, read_journal, temporary_path
from ..modeling.complexity import config_complexity
from ..modeling.ops.lsq_plus import quantise_weights_once
from ..modeling.ops.op import resize
from ..search_space import sampling
from ..search_space.block import out_size
from ..search_space.encoding import format_sub_stage, parse_block_id, stage_blocks
from ..settings import setting
from ..training.acceleration import choose_quantisers
from ..training.calibrate import calibrate, kept_statistics
from ..training.distributed import barrier, gather, of_main
from ..training.log import note, progress
from ..training.losses import NSR_SIGNALS, nsr_loss
from ..training.threads import default_workers, one_core, thread_map
from .checkpoints import build_student, require_checkpoint
from .lut import LutRow, read_block_lut, write_block_lut
from .trainer import check_map_sizes

REMOVE = 'remove it'                # what helps where the part of a LUT cannot be continued


@dataclass(frozen=True, kw_only=True)
class LutSettings:
    """How block LUTs are built: the flags of eval_block_kd.py."""
    output_path: str = setting('./checkpoints/block_kd/lut', 'folder of <superspace>/*.csv')
    checkpoint_path: str = setting('./checkpoints/block_kd', 'folder of <superspace>/<block>/lsq.pth')
    width_window_filter: tuple[int, ...] = setting((), 'width windows to do; default: all')
    hw_list: tuple[int, ...] = setting((), "image resolutions; default: the hyperspace's", least=1)
    num_samples_per_stage: int = setting(1000, 'rows of a file', least=1)
    calib_batch_size: int = setting(64, 'images of a calibration batch', least=1)
    num_calib_batches: int = setting(4, 'batches of batch-norm calibration', least=1)
    eval_batch_size: int = setting(50, 'images of an evaluation batch', least=1)
    num_eval_batches: int | None = setting(None, 'default: all held-out images', least=1)
    debug: bool = setting(False, 'evaluate on few batches')
    debug_batches: int = setting(10, 'batches of --debug', least=1)
    nsr_signal: str = setting('teacher', 'whose variance divides the loss', choices=NSR_SIGNALS)
    cache_budget_gb: float = setting(4.0, "GiB of the teacher's maps kept in memory; the rest is memory-mapped under "
                                     'output_path', above=0)
    num_threads: int | None = setting(None, 'rows measured at a time by a rank, on a CPU; default: its share of the '
                                      'cores', least=1, most=1024)
    seed: int = setting(0, 'seed of the rows and the calibration images', most=2 ** 32 - 1)


class Sample(NamedTuple):
    """A row to measure: the Blocks of a sub-stage, and the image resolution (pixels) at which they have their hw."""
    blocks: list
    resolution: int

    @classmethod
    def of(cls, superspace, block_id, choices, cin, resolution):
        """Sample of choices [(k, w, e), …] for a BlockId's stage whose input has `cin` channels."""
        stage, block_type = superspace.stage(block_id.stage), superspace.block_type(*block_id[:2])
        hw = out_size(resolution, superspace.input_stride(stage.name))
        return cls(stage_blocks(stage, block_type, choices, cin, hw), resolution)


def sample_rows(superspace, lut_id, num_samples, hw_list, seed):
    """The Samples of a block LUT: a function of the arguments alone, whatever the number of ranks."""
    rng, block_id = random.Random(f'{seed} {lut_id}'), parse_block_id(superspace, lut_id)
    return [Sample.of(superspace, block_id, *sampling.sample_sub_stage(superspace, block_id, rng, hw_list))
            for _ in range(num_samples)]


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
    """int8 NSR loss of a Sample: batch norm calibrated for it, mean over the evaluation images."""
    student.set_active_sub_stage(sample.blocks[0].cin, [block.choice for block in sample.blocks])
    total = count = 0
    with kept_statistics(student):
        calibrate(student, cache.calibration(sample.resolution))
        for stage_input, target in cache.evaluation(sample.resolution):
            total += nsr_loss(student(stage_input), target, nsr_signal).item() * len(target)
            count += len(target)
    return total / count


class LutBuilder:
    """Builds block LUTs of a hyperspace from trained blocks (lsq.pth).

    teacher: the int8 one, on the job's device; predictor: LatencyPredictor; job: this process's place among others;
    settings: LutSettings, its hw_list given.
    """

    def __init__(self, superspace, teacher, predictor, job, settings):
        self.superspace, self.teacher, self.predictor = superspace, teacher, predictor
        self.job, self.settings = job, settings
        self.folder = os.path.join(settings.checkpoint_path, superspace.name)
        self.output = os.path.join(settings.output_path, superspace.name)
        self.workers = 1 if job.device.type == 'cuda' else settings.num_threads or default_workers()

    def build(self, block_ids, calibration, evaluation):
        """Write <output>/<block>_<window>.csv for every block id and width window; returns their paths.

        calibration, evaluation: iterables of image batches that can be gone through once per stage. A LUT that is
        there is kept; one that was begun is gone on with.
        """
        check_map_sizes(self.superspace, block_ids, self.settings.hw_list)
        lut_ids = [parse_block_id(self.superspace, f'{block}_{window}') for block in block_ids
                   for window in self._windows(block)]
        if not lut_ids:
            raise UserError(f'--width_window_filter {" ".join(map(str, self.settings.width_window_filter))}: no stage '
                            'has such a width window')
        for block in block_ids:                     # a missing checkpoint is told before the teacher runs
            require_checkpoint(self.folder, block, True, self.superspace)
        built = of_main(lambda: set(filter(self._is_built, lut_ids)), self.job)
        for lut_id in (lut_id for lut_id in lut_ids if lut_id not in built):
            for sample in self._samples(lut_id):
                self._latency(sample)               # and a block that the platform lacks
        choose_quantisers('auto', True, self.job.device)
        for stage in dict.fromkeys(lut_id.stage for lut_id in lut_ids):
            ids = [lut_id for lut_id in lut_ids if lut_id.stage == stage]
            self._build_stage(stage, ids, built.intersection(ids), calibration, evaluation)
        return list(map(self._path, lut_ids))

    def _windows(self, block):
        """Width windows to do of a block id."""
        wanted, count = self.settings.width_window_filter, self.superspace.stage(block.split('_')[0]).num_windows
        return [window for window in range(count) if not wanted or window in wanted]

    def _path(self, lut_id):
        return os.path.join(self.output, f'{lut_id}.csv')

    def _is_built(self, lut_id):
        """Whether a finished file is there; LutError where what is there is none."""
        path = self._path(lut_id)
        found = [file for file in (path, path + '.gz') if os.path.lexists(file)]
        for file in found:
            read_block_lut(file, self.superspace, str(lut_id))
        return bool(found)

    def _samples(self, lut_id):
        settings = self.settings
        return sample_rows(self.superspace, lut_id, settings.num_samples_per_stage, settings.hw_list, settings.seed)

    def _latency(self, sample):
        """Predicted ms of a Sample."""
        return sum(self.predictor.predict_blocks(sample.blocks))

    def _build_stage(self, stage, lut_ids, built, calibration, evaluation):
        """The LUTs of a stage that are not built."""
        if built:
            note(f'{stage}: {len(built)} finished files in {self.output} are kept; remove them to rebuild them')
        if self.job.is_main:
            for lut_id in built:                    # killed between writing the LUT and removing its parts
                _remove_parts(self._path(lut_id))
        barrier(self.job)
        todo = {}
        for lut_id in (lut_id for lut_id in lut_ids if lut_id not in built):
            todo.setdefault(str(lut_id._replace(window=None)), []).append(lut_id)
        if not todo:
            return
        students = {block: build_student(self.superspace, block, self.teacher, self.folder, quant=True)
                    for block in todo}
        cache = FeatureCache(self.teacher, stage, self.settings.hw_list, calibration, evaluation, self.job,
                             self.settings.cache_budget_gb, self.output, self.workers)
        for block, student in students.items():
            student.to(self.job.device)
            digest = self._prepare(student, cache)
            for lut_id in todo[block]:
                self._build(lut_id, student, cache, digest)
            student.cpu()

    def _prepare(self, student, cache):
        """Initialise scales that training never reached, the same on every rank, and quantise the weights, of which
        each row takes slices; returns a digest of all a row depends on."""
        digest = hashlib.sha256(f'{cache.digest} {self.settings.nsr_signal} {self.predictor.platform}'.encode())
        _hash_tensors(digest, student.state_dict().values())
        stage_input = next(cache.calibration(max(cache.batches)))
        with one_core():
            student.initialize_scales(stage_input, random.Random(f'{self.settings.seed} {student.block_id} scales'))
        quantise_weights_once(student)
        return digest.hexdigest()

    def _build(self, lut_id, student, cache, digest):
        """Measure this rank's share of the rows that are not there yet; the last step puts them in order.

        Rows of one sub-stage and resolution are measured once: a stage of few blocks is drawn many times.
        """
        path, samples, job = self._path(lut_id), self._samples(lut_id), self.job
        first = {}
        for i, sample in enumerate(samples):
            first.setdefault(str(sample), i)
        digest = hashlib.sha256(f'{digest} {samples}'.encode()).hexdigest()[:16]
        settings = {'block LUT': str(lut_id), 'blocks, images and settings': digest}
        have = _read_parts(path, settings, len(samples))
        barrier(job)                                # every rank has read before one writes
        share = list(first.values())[job.rank::job.world_size]
        mine = [i for i in share if i not in have]
        with Journal(f'{path}.part{job.rank}', settings, str, resume=True, otherwise=REMOVE) as part, \
                progress(len(share), str(lut_id), len(share) - len(mine), job.is_main) as bar:
            for i, loss in self._losses(lut_id, student, cache, {i: samples[i] for i in mine}):
                part.append(i, loss)
                bar.update()
        barrier(job)
        parts = gather(_read_parts(path, settings, len(samples)), job)
        if job.is_main:
            losses = {i: loss for part in parts for i, loss in part.items()}
            write_block_lut(path, [LutRow(sample.blocks, losses[first[str(sample)]],
                                          *config_complexity(sample.blocks), self._latency(sample))
                                   for sample in samples])
        barrier(job)
        _remove_parts(path)                         # by every rank: perhaps of a disk of its own
        barrier(job)

    def _losses(self, lut_id, student, cache, samples):
        """(i, int8 NSR loss) of {i: Sample}, measured `workers` at a time."""
        students = queue.SimpleQueue()
        for _ in range(self.workers):
            students.put(copy.deepcopy(student) if self.workers > 1 else student)

        def run(item):
            i, sample = item
            own = students.get()
            try:
                loss = measure(own, sample, cache, self.settings.nsr_signal)
            finally:
                students.put(own)
            if not 5e-5 <= loss < math.inf:
                raise UserError(f'{lut_id}: {format_sub_stage(block.choice for block in sample.blocks)} at '
                                f'{sample.resolution} pixels has an NSR of {loss}: is its lsq.pth sound?')
            return i, loss
        return thread_map(run, samples.items(), self.workers)


def _remove_parts(path):
    """Remove the ranks' journals of a LUT that is written, and what was left of them by a kill in their first line."""
    parts = f'{glob.escape(path)}.part*'
    for part in glob.glob(parts) + glob.glob(temporary_path(parts, '*')):
        with contextlib.suppress(FileNotFoundError):        # another rank was quicker
            os.remove(part)


def _read_parts(path, settings, count):
    """{row number: int8 NSR loss} of what every rank has in its journal of a LUT of `count` rows."""
    losses = {}

    def read(line):
        i, loss = line.split(',')
        if not 0 <= int(i) < count or int(i) in losses or not 0 < float(loss) < math.inf:
            raise ValueError
        losses[int(i)] = float(loss)
    for part in glob.glob(f'{glob.escape(path)}.part*'):
        read_journal(part, read, settings, REMOVE)
    return losses
