"""Block KD: every candidate block of a stage learns to copy a teacher stage, in fp32, then with LSQ+.

So do the ends of the network, stem and head, which no search chooses. All blocks of a stage learn from one teacher
pass. Everything random in a step is drawn from generators seeded by (seed, block, epoch, step), so that a resumed run
and any number of ranks take the very same steps.
"""
import contextlib
import math
import os
import random
from dataclasses import dataclass, field

import torch

from ..errors import UserError
from ..modeling.ops.lsq_plus import local_initialisation, set_quant_mode
from ..modeling.ops.op import resize
from ..search_space.encoding import EncodingError, parse_block_id
from ..settings import deciding, setting, with_default
from ..training.acceleration import TrainingSettings, autocast, choose_quantisers, memory_format
from ..training.calibrate import calibrate, kept_statistics, norm_statistics, set_norm_statistics
from ..training.checkpoint import load_weights
from ..training.data import calibration_batches, eval_loader
from ..training.distributed import average, broadcast, check_same, of_main
from ..training.gradients import average_gradients
from ..training.losses import NSR_SIGNALS
from ..training.memory import keep_freed_memory
from ..training.optim import cosine, parameter_groups, set_learning_rate
from ..training.resumable import ResumableRun, Schedule, checkpoint_to_resume, steps_per_epoch, train
from .checkpoints import build_student, checkpoint_file, read_block, require_checkpoint
from .student import Student
from .targets import HEAD, STEM, kd_loss, part_of, parts_of, teacher_maps

SUB_STAGES = ('max', 'min', 'random')
NUM_RANDOM = 2                              # random sub-stages of a sandwich
DIVERGED = 1e4                              # a loss (NSR) above this; a useless student is at about 1


@dataclass(frozen=True, kw_only=True)
class BlockKDSettings(TrainingSettings):
    """How to train blocks in fp32: the flags of train_block_kd.py."""
    epochs: int = setting(5, 'passes over the training images', flags=('num_epochs',), least=1)
    batch_size: int = setting(64, 'images a step and rank', flags=('train_batch_size',), least=1, decides=False)
    hw_list: tuple[int, ...] = setting((), "image resolutions; default: the superspace's", least=1)
    learning_rate_list: tuple[float, ...] = setting(
        (0.005, 0.01, 0.01, 0.01, 0.01, 0.005), 'learning rate of stage1, stage2, …: as many as the superspace has, or '
        'six', above=0, decides=False)
    stem_learning_rate: float = setting(0.01, 'learning rate of first_conv and stage0', above=0, decides=False)
    head_learning_rate: float = setting(0.001, 'learning rate of final_expand, feature_mix and logits', above=0,
                                        decides=False)
    lr_step_size: int = setting(20, 'batches between learning-rate updates', least=1)
    weight_decay: float = setting(1e-4, 'not of norms, biases and scales')
    inplace_distill_from_teacher: bool = setting(False, 'every sub-stage learns from the teacher; else max does, and '
                                                 'the others from max')
    nsr_signal: str = setting('teacher', 'whose variance divides the loss', choices=NSR_SIGNALS)
    num_calib_batches: int = setting(20, 'batches of batch-norm calibration', least=1, decides=False)
    checkpoint_freq: int = setting(200, 'steps between checkpoints', least=1, decides=False)
    max_steps: int | None = setting(None, 'steps of an epoch, for short runs', least=1, decides=False)
    num_valid_batches: int | None = setting(None, 'batches of the evaluation; default: all held-out images', least=1,
                                            decides=False)
    amp: bool = setting(False, 'bf16 autocast, for GPUs', decides=False)
    seed: int = setting(0, 'seed of weights, sub-stages and augmentation', most=2 ** 32 - 1)
    quant: bool = setting(False, 'with LSQ+', flags=(), decides=False)
    from_scratch: bool = setting(False, 'without an fp32 checkpoint', flags=(), decides=False)

    def learning_rate(self, part, superspace):
        """That of a part (targets.parts_of) of a hyperspace."""
        stages = dict(zip(superspace.searchable_stages, self.learning_rate_list))
        return {STEM: self.stem_learning_rate, HEAD: self.head_learning_rate, **stages}[part]


@dataclass(frozen=True, kw_only=True)
class LsqBlockKDSettings(BlockKDSettings):
    """The same with LSQ+: the flags of lsq_block_kd.py."""
    epochs: int = with_default(BlockKDSettings, 'epochs', 1)
    learning_rate_list: tuple[float, ...] = with_default(BlockKDSettings, 'learning_rate_list',
                                                         (0.0025, 0.00025, 0.00025, 0.00025, 0.00025, 0.00025))
    stem_learning_rate: float = with_default(BlockKDSettings, 'stem_learning_rate', 0.001)
    head_learning_rate: float = with_default(BlockKDSettings, 'head_learning_rate', 0.0001)
    quant: bool = with_default(BlockKDSettings, 'quant', True)
    from_scratch: bool = with_default(BlockKDSettings, 'from_scratch', False, flags=None)


@dataclass(kw_only=True)
class BlockTraining(ResumableRun):
    """One block in training."""
    block_id: str
    student: Student
    learning_rate: float
    losses: dict = field(default_factory=dict)      # of the last step, plain numbers once it is over

    def content(self):
        return {'superspace': self.student.superspace.name, 'block': self.block_id, 'model': self.student.state_dict()}


def select_blocks(superspace, stage_list, ends=False):
    """Block ids of a list of block ids and whole stages ('stage1_0', 'stage3'), in order, each once.

    ends: also of the stem and the head, which block KD trains, but which are in no block LUT.
    """
    known = [STEM, *superspace.block_ids(), HEAD]
    chosen = []
    for name in stage_list:
        if name in superspace.searchable_stages:
            chosen += [block for block in known if block.startswith(f'{name}_')]
        elif name in (STEM, HEAD):
            if not ends:
                raise EncodingError(f'{name}: no search chooses it, so it is in no block LUT')
            chosen.append(name)
        else:
            block = parse_block_id(superspace, name)
            if block.window is not None:
                raise EncodingError(f'{name}: block KD trains all widths at once: give {block[0]}_{block[1]}')
            chosen.append(str(block))
    return sorted(dict.fromkeys(chosen), key=known.index)


def check_map_sizes(superspace, block_ids, hw_list):
    """UserError where a resolution leaves a part's output a single pixel, which has no variance over space."""
    for part in by_part(block_ids):
        if part == HEAD:
            continue
        following = parts_of(superspace)[parts_of(superspace).index(part) + 1]
        stride = superspace.input_stride('final_expand' if following == HEAD else following)
        if min(hw_list) <= stride:
            raise UserError(f'resolution {min(hw_list)} leaves a single pixel at {part}, which NSR cannot measure')


def by_part(block_ids):
    """{stage, stem or head: [block id, …]} in order."""
    parts = {}
    for block_id in block_ids:
        parts.setdefault(part_of(block_id), []).append(block_id)
    return parts


def train_blocks(superspace, block_ids, teacher, data, folder, recipe, job):
    """Train blocks part by part into `folder`; returns {block id: {'max': loss, 'min': loss, 'random': loss}}.

    recipe: BlockKDSettings.
    """
    keep_freed_memory()
    results = {}
    teacher.to(memory_format=memory_format(recipe))
    if recipe.quant and not recipe.from_scratch:
        of_main(lambda: [require_checkpoint(folder, block, False, superspace) for block in block_ids], job)
    steps = steps_per_epoch(data, recipe.batch_size, recipe.seed, job, recipe.max_steps)
    choose_quantisers(recipe.compile, recipe.quant, job.device)
    digest = teacher.weights_digest()
    check_same("the teacher's weights", digest, job)
    decided_by = deciding(recipe) | {
        'steps an epoch': steps, 'training images': len(data.train), 'teacher': teacher.arch, 'teacher weights': digest,
        'images a step': recipe.batch_size * job.world_size, 'ranks': job.world_size}
    for part, blocks in by_part(block_ids).items():
        trainees = [_trainee(superspace, block, teacher, folder, recipe, job, steps, decided_by) for block in blocks]
        _train_part(part, trainees, teacher, data, recipe, job, steps)
        results.update(_finish(part, trainees, teacher, data, recipe, job))
    return results


def _finish(part, trainees, teacher, data, recipe, job):
    """Complete the scales, evaluate, and write the final checkpoints if the losses are good ones."""
    if recipe.quant:
        images, *_ = next(iter(calibration_batches(data.train, recipe.batch_size, 1, recipe.seed)))
        part_input, _ = _part_maps(teacher, trainees[0].student.superspace, part, images, max(recipe.hw_list), recipe,
                                   job)
        for trainee in trainees:
            trainee.student.initialize_scales(part_input, random.Random(f'{recipe.seed} {trainee.block_id} scales'))
    results = evaluate(part, [(t.block_id, t.student) for t in trainees], teacher, data, recipe, job)
    for trainee in trainees:
        _check_losses(trainee, results[trainee.block_id], trainee.step)
        trainee.done = True
        trainee.save(job)
    return results


def blocks_of_rank(block_ids, job):
    """This rank's share of independent blocks (--parallel blocks)."""
    return block_ids[job.rank::job.world_size]


@contextlib.contextmanager
def independent_ranks(independent):
    """Inside, ranks train different blocks: nothing is synchronised between them."""
    with local_initialisation() if independent else contextlib.nullcontext():
        yield


def _trainee(superspace, block_id, teacher, folder, recipe, job, steps, decided_by):
    """A block to train: from its own unfinished checkpoint, its fp32 checkpoint (LSQ+), or from scratch.

    decided_by: {name: plain value} on which its weights depend, beside its learning rate.
    """
    torch.manual_seed(recipe.seed + sum(map(ord, block_id)))
    path = checkpoint_file(folder, block_id, recipe.quant)
    resumed = checkpoint_to_resume(path, recipe.resume, job, lambda path: read_block(path, superspace, block_id))
    if recipe.quant and resumed is None and not recipe.from_scratch:
        student = of_main(lambda: build_student(superspace, block_id, teacher, folder), job)
    else:
        student = build_student(superspace, block_id, teacher)
    if recipe.quant:
        set_quant_mode(student)
    if resumed is not None:
        load_weights(student, resumed, path)
    student.to(job.device)
    student.to(memory_format=memory_format(recipe))
    broadcast(student, job)
    learning_rate = recipe.learning_rate(part_of(block_id), superspace)
    trainee = BlockTraining(path=path, block_id=block_id, student=student, learning_rate=learning_rate,
                      optimizer=torch.optim.Adam(parameter_groups(student, recipe.weight_decay), lr=learning_rate),
                      settings={**decided_by, 'learning rate': learning_rate})
    if resumed is not None:
        if isinstance(resumed.get('settings'), dict):
            resumed['settings'].setdefault('teacher weights', decided_by['teacher weights'])  # older ones do not say
        trainee.resume({'done': False, **resumed}, steps * recipe.epochs, job)
    trainee.check_ranks(job)
    return trainee


def _train_part(part, trainees, teacher, data, recipe, job, steps):
    kind, total = 'lsq' if recipe.quant else 'fp32', steps * recipe.epochs

    def take_step(active, images, labels, epoch, writer):
        step = active[0].step
        _step(part, active, images, teacher, recipe, epoch, step, total, job)
        if step % recipe.lr_step_size == 0:
            _report(active, step, writer, kind)
        return {t.block_id: f'{sum(t.losses.values()) / len(t.losses):.3f}' for t in active}

    schedule = Schedule(data, recipe.batch_size, recipe.seed, steps, total, recipe.checkpoint_freq, recipe.num_workers)
    folder = os.path.dirname(os.path.dirname(trainees[0].path))
    train(trainees, schedule, job, f'{part} {kind}', os.path.join(folder, 'tensorboard', kind, part), take_step)


def _step(part, trainees, images, teacher, recipe, epoch, step, total, job):
    """One optimiser step of every trainee on one batch of images."""
    hws = _resolutions(recipe, part, epoch, step)
    with torch.no_grad(), autocast(job.device, recipe.amp):
        features = {hw: _part_maps(teacher, trainees[0].student.superspace, part, images, hw, recipe, job)
                    for hw in dict.fromkeys(hws)}
    for trainee in trainees:
        rng = random.Random(f'{recipe.seed} {trainee.block_id} {epoch} {step}')
        trainee.optimizer.zero_grad(set_to_none=True)
        trainee.student.train()
        trainee.losses = _sandwich(part, trainee.student, hws, features, rng, recipe, job)
    losses = [loss for t in trainees for loss in t.losses.values()]
    averages = average(torch.stack(losses) if losses else [], job)      # the one wait for the device
    for i, trainee in enumerate(trainees):
        losses = averages[i * len(hws):(i + 1) * len(hws)]
        trainee.losses = dict(zip(trainee.losses, losses))
        _check_losses(trainee, trainee.losses, step)
        trainee.write_pending(job)
    parameters = [p for t in trainees for group in t.optimizer.param_groups for p in group['params']]
    average_gradients(parameters, job)
    torch.nn.utils.clip_grad_value_(parameters, 1.0)
    for trainee in trainees:
        update = step // recipe.lr_step_size * recipe.lr_step_size
        set_learning_rate(trainee.optimizer, cosine(trainee.learning_rate, update, total))
        trainee.optimizer.step()


def _check_losses(trainee, losses, step):
    if not all(math.isfinite(loss) and loss < DIVERGED for loss in losses.values()):
        shown = ', '.join(f'{name} {loss:.4g}' for name, loss in losses.items())
        raise trainee.failure(f'{trainee.block_id}: step {step}: the loss diverged ({shown})')


def _resolutions(recipe, part, epoch, step):
    """Image resolutions of the sandwich: max, min, then random ones, the same for all blocks of a stage."""
    rng = random.Random(f'{recipe.seed} {part} hw {epoch} {step}')
    return [max(recipe.hw_list), min(recipe.hw_list)] + [rng.choice(recipe.hw_list)
                                                         for _ in range(NUM_RANDOM)]


def _part_maps(teacher, superspace, part, images, hw, recipe, job):
    """(input, target) of a part from the teacher, for images (N, 3, H, W) resized to hw."""
    images = resize(images.to(job.device), hw).contiguous(memory_format=memory_format(recipe))
    part_input, target = teacher_maps(teacher, superspace, part, images)
    return part_input.contiguous(memory_format=memory_format(recipe)), target


def _sandwich(part, student, hws, features, rng, recipe, job):
    """Backward of max, min and random sub-stages, gradients summed; returns their losses (tensors) by name."""
    losses, of_max = {}, {}
    for i, hw in enumerate(hws):
        name = _activate(student, i, rng)
        part_input, target = features[hw]
        if i > 0 and not recipe.inplace_distill_from_teacher:
            target = of_max[hw]
        with autocast(job.device, recipe.amp):
            output = student(part_input)
        loss = kd_loss(part, output, target, recipe.nsr_signal)
        loss.backward()
        losses[name] = loss.detach()
        if i == 0 and not recipe.inplace_distill_from_teacher:
            with torch.no_grad(), autocast(job.device, recipe.amp):
                of_max = {other: output.detach() if other == hw else student(features[other][0])
                          for other in features}
    return losses


def _activate(student, i, rng):
    """Activate the i-th sub-stage of a sandwich; returns its name."""
    if i == 0:
        student.set_max_sub_stage()
    elif i == 1:
        student.set_min_sub_stage()
    else:
        student.sample_active_sub_stage(rng=rng)
    return SUB_STAGES[i] if i < 2 else f'random{i - 1}'


def _report(trainees, step, writer, kind):
    for trainee in trainees if writer else ():
        for name, loss in trainee.losses.items():
            writer.add_scalar(f'{trainee.block_id}/{kind} {name}', loss, step)
        writer.add_scalar(f'{trainee.block_id}/{kind} learning rate', trainee.optimizer.param_groups[0]['lr'], step)


@torch.no_grad()
def evaluate(part, students, teacher, data, recipe, job):
    """{block id: {'max': loss, 'min': loss, 'random': loss}} on the held-out images, after batch-norm calibration.

    students: [(block id, Student)]. The teacher runs once per image for all of them. Images are at the
    largest resolution. The students' training state is put back.
    """
    results = {}

    def features(images):
        return _part_maps(teacher, students[0][1].superspace, part, images, max(recipe.hw_list), recipe, job)

    calibration = [features(images)[0].cpu() for images, *_ in calibration_batches(
        data.train, recipe.batch_size, recipe.num_calib_batches, recipe.seed).to(job.device)]      # of GiB
    with contextlib.ExitStack() as stack:
        candidates = []
        for block_id, student in students:
            stack.enter_context(kept_statistics(student))
            for i, name in enumerate(SUB_STAGES):
                _activate(student, i, random.Random(f'{recipe.seed} {block_id} evaluation'))
                calibrate(student, (maps.to(job.device) for maps in calibration))
                candidates.append((block_id, name, i, student, norm_statistics(student)))
        sums = {(block_id, name): [0.0, 0] for block_id, name, *_ in candidates}
        for images, _ in eval_loader(data.valid, recipe.batch_size, job.rank, job.world_size, recipe.num_workers,
                                     limit=recipe.num_valid_batches).to(job.device):
            part_input, target = features(images)
            for block_id, name, i, student, statistics in candidates:
                _activate(student, i, random.Random(f'{recipe.seed} {block_id} evaluation'))
                set_norm_statistics(student, statistics)
                total = sums[block_id, name]
                total[0] += kd_loss(part, student(part_input), target, recipe.nsr_signal).item() * len(images)
                total[1] += len(images)
    for (block_id, name), (loss, count) in sums.items():
        loss, count = average([loss, count], job)
        if count == 0:
            raise UserError('no held-out images to evaluate on: give a --valid_size')
        results.setdefault(block_id, {})[name] = loss / count
    return results
