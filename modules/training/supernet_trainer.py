"""Supernet training: sandwich rule with in-place distillation, in fp32, then LSQ+ quantisation-aware training.

Each step trains the largest subnet on the labels, and random ones and the smallest on the largest's answers.
Source: AlphaNet (Wang et al., ICML 2021), BigNAS (Yu et al., ECCV 2020). Everything random in a step is a
function of (seed, epoch, step, rank), so a resumed run takes the very same steps.
"""
import contextlib
import itertools
import math
import os
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..modeling.ops.lsq_plus import WEIGHT_BITS, quantisation_of, requantise
from ..search_space import sampling
from ..settings import deciding, save_config, setting
from .acceleration import TrainingSettings, autocast, choose_quantisers, memory_format
from .calibrate import initialize_all_scales
from .checkpoint import checkpoint_name, load_checkpoint, load_weights, quantisation_in
from .classes import CLASS_WEIGHTS, loss_weights
from .data import AUGMENTATIONS, calibration_batches, eval_loader, seed_of
from .distributed import average, broadcast, of_main
from .evaluate import DecodedImages, evaluate_subnet
from .gradients import GradientAverage
from .log import note
from .losses import adaptive_alpha_loss
from .memory import keep_freed_memory
from .optim import parameter_groups, set_learning_rate, warmup_cosine
from .resumable import ResumableRun, Schedule, checkpoint_to_resume, steps_per_epoch, train

LEARNED, CHANCE = 0.9, 0.98             # of the loss of guessing: below the one it has learned, above it collapsed


@dataclass(frozen=True, kw_only=True)
class SupernetRecipe(TrainingSettings):
    """How to train a supernet: the keys of supernet_training_configs/*.yaml, and the flags of train_supernet.py."""
    SECTIONS = ('quant',)               # keys under `quant:` replace the others with --quant_mode
    epochs: int = setting(360, 'passes over the training images', least=1)
    warmup_epochs: float = setting(5.0, 'epochs of linear warm-up')
    base_lr: float = setting(0.1, 'learning rate, times max(1, images a step // 256)')
    momentum: float = setting(0.9, 'momentum of SGD, Nesterov', below=1)
    weight_decay: float = setting(1e-5, 'not of norms, biases and LSQ+ scales')
    label_smoothing: float = setting(0.1, "smoothing of the largest subnet's labels", below=1)
    class_weights: str = setting('none', 'balanced: rare classes count as much as frequent ones', choices=CLASS_WEIGHTS)
    dropout: float = setting(0.2, 'before the last layer of the largest subnet', below=1)
    grad_clip_value: float = setting(1.0, 'bound of each gradient')
    accumulate: int = setting(1, 'parts of a batch that take turns, for small GPUs; batch norm then sees parts',
                              least=1)
    num_arch_training: int = setting(4, 'subnets a step: largest, random ones, smallest', least=1)
    smallest_freq: int = setting(1, 'steps between those that train the smallest subnet; in the others another random '
                                 'one takes its place', least=1)
    alpha_min: float = setting(-1.0, 'smaller alpha of the adaptive alpha-divergence', least=-math.inf)
    alpha_max: float = setting(1.0, 'larger alpha', least=-math.inf)
    iw_clip: float = setting(5.0, 'bound of its importance weights')
    batch_size_per_gpu: int = setting(64, 'images a step and rank', least=2)
    max_batch_size_per_gpu: int = setting(0, 'larger batches are cut to this; 0: no limit')
    augment: str = setting('auto_augment_tf', 'default, auto_augment_tf or none', choices=AUGMENTATIONS)
    valid_size: int = setting(10000, 'training images held out for validation and the subnet search')
    valid_freq: int = setting(5, 'epochs between validations', least=1, decides=False)
    best_by: str = setting('mean', 'accuracy that the best checkpoint has: mean (of max, min, random) or max',
                           choices=('mean', 'max'), decides=False)
    num_calib_batches: int = setting(20, 'batches of batch-norm calibration', least=1, decides=False)
    checkpoint_freq: int = setting(500, 'steps between checkpoints', least=1, decides=False)
    max_steps: int = setting(0, 'steps of an epoch, for short runs; 0: all', decides=False)
    num_valid_images: int = setting(0, 'images of the validation, for short runs; 0: all', decides=False)
    init_steps: int = setting(100, 'steps of Adam, before the training, for what --init_block_kd cannot bring: a head '
                              'of other classes, first blocks that begin depth-wise')
    weight_bits: int = setting(8, 'bits of INT8 weights; 7 (-64 to 63) are quicker on x86 without VNNI',
                               choices=WEIGHT_BITS)
    zero_last_gamma: bool = setting(True, "start a block's last batch norm at 0 where it always has a shortcut")
    seed: int = setting(0, 'seed of weights, subnets, dropout and augmentation', most=2 ** 32 - 1)
    quant_mode: bool = setting(False, 'LSQ+, from checkpoint.pth', in_file=False, decides=False)
    from_scratch: bool = setting(False, '--quant_mode without an fp32 checkpoint', in_file=False, decides=False)
    align_sample: bool = setting(False, 'all blocks of a stage share k, w, e', in_file=False)
    amp: bool = setting(False, 'bf16 autocast, for GPUs', in_file=False, decides=False)


@dataclass(kw_only=True)
class Training(ResumableRun):
    """A supernet in training; best is the best validation so far."""
    PROGRESS = ResumableRun.PROGRESS | {'best': float, 'learned': bool, 'loss_sum': float, 'loss_count': int,
                                        'results': dict}
    ADVICE = 'a smaller --base_lr'
    supernet: nn.Module
    best: float = 0.0
    learned: bool = False               # whether an epoch's loss was clearly below chance
    loss_sum: float = 0.0               # of the largest subnet, this epoch
    loss_count: int = 0
    results: dict = field(default_factory=dict)     # {'max': Accuracy as a dict, …} of the last validation
    weights: torch.Tensor | None = None             # of the labels' loss, by class

    def content(self):
        return {'state_dict': self.supernet.state_dict(), **quantisation_of(self.supernet)}

    @property
    def loss(self):
        """Mean loss of the largest subnet over this epoch so far."""
        return self.loss_sum / max(1, self.loss_count)


def train_supernet(supernet, data, recipe, folder, job, blocks=None):
    """Train into <folder>/checkpoint.pth or, recipe.quant_mode, lsq.pth; {'max': {'top1': …}, 'min': …, 'random': …}.

    supernet: modeling.Supernet, in int8 mode for quant_mode; data: training.data.Data at its largest
    resolution; blocks: {block: digest} of the block-KD checkpoints whose weights it has, None for random ones. Beside
    it: the best validated state as checkpoint_best.pth or lsq_best.pth, and the recipe as *.yaml.
    """
    keep_freed_memory()
    if recipe.batch_size_per_gpu < 2 * recipe.accumulate:
        raise UserError(f'--accumulate {recipe.accumulate}: less than two images in a part of '
                        f'{recipe.batch_size_per_gpu}')
    steps = steps_per_epoch(data, recipe.batch_size_per_gpu, recipe.seed, job, recipe.max_steps)
    choose_quantisers(recipe.compile, recipe.quant_mode, job.device)
    training = _start(supernet, data, recipe, folder, job, steps, blocks)
    if training.done:
        note(f'{training.path}: already trained')
        return training.results
    calibration, valid = _images(data, recipe, job)
    training.weights = loss_weights(recipe.class_weights, data.train, supernet.num_classes, job.device)
    if job.is_main:
        save_config(recipe, folder, 'lsq.yaml' if recipe.quant_mode else 'checkpoint.yaml')

    def take_step(_, images, labels, epoch, writer):
        _take_step(training, images, labels, recipe, epoch, steps, job, writer)
        return {'epoch': epoch, 'loss': f'{training.loss:.3f}'}

    def end_epoch(epoch, writer):
        _end_epoch(training, epoch)
        training.done = epoch + 1 == recipe.epochs
        if training.done or (epoch + 1) % recipe.valid_freq == 0:
            _validate(training, calibration, valid, job, epoch, writer, recipe)

    schedule = Schedule(data, recipe.batch_size_per_gpu, recipe.seed, steps, steps * recipe.epochs,
                        recipe.checkpoint_freq, recipe.num_workers)
    kind = 'lsq' if recipe.quant_mode else 'fp32'
    train([training], schedule, job, f'{supernet.encoding} {kind}', os.path.join(folder, 'tensorboard', kind),
          take_step, end_epoch)
    return training.results


def validate_checkpoint(supernet, data, recipe, folder, job):
    """What train_supernet() returns, of the checkpoint in `folder` as it is."""
    path = os.path.join(folder, checkpoint_name(recipe.quant_mode))
    checkpoint = load_checkpoint(path)
    requantise(supernet, **quantisation_in(checkpoint, path))
    load_weights(supernet, checkpoint, f'{path}: not the weights of {supernet.encoding}')
    supernet.to(job.device, memory_format=memory_format(recipe))
    calibration, valid = _images(data, recipe, job)
    return {name: evaluate_subnet(supernet, subnet, calibration, valid, job)._asdict()
            for name, subnet in _validated(supernet, recipe).items()}


def _images(data, recipe, job):
    """This rank's share of the batches that calibrate batch norm, and of those that are held out."""
    calibration = calibration_batches(data.train, recipe.batch_size_per_gpu, recipe.num_calib_batches, recipe.seed,
                                      recipe.num_workers, job.rank, job.world_size)
    valid = eval_loader(data.valid, recipe.batch_size_per_gpu, job.rank, job.world_size, recipe.num_workers,
                        limit_images=recipe.num_valid_images or None)
    return DecodedImages(calibration.to(job.device)), DecodedImages(valid.to(job.device))


def _validated(supernet, recipe):
    """{name: Subnet} of those that are validated."""
    return {'max': sampling.max_subnet(supernet.encoding), 'min': sampling.min_subnet(supernet.encoding),
            'random': sampling.sample_subnet(supernet.encoding, random.Random(recipe.seed), recipe.align_sample)}


def _start(supernet, data, recipe, folder, job, steps, blocks):
    """The Training: from its unfinished checkpoint, the fp32 checkpoint (quant_mode), or the weights that it has."""
    path, fp32 = (os.path.join(folder, checkpoint_name(kind)) for kind in (recipe.quant_mode, False))
    resumed = checkpoint_to_resume(path, recipe.resume, job)
    if resumed is not None:
        load_weights(supernet, resumed, path)
    elif recipe.quant_mode and not (recipe.from_scratch or blocks):
        begun = of_main(lambda: _fp32_checkpoint(fp32), job)
        load_weights(supernet, begun, f'{fp32}: not the weights of {supernet.encoding}')
        if isinstance(begun, dict) and not begun.get('done', True):
            note(f'{fp32}: its training is not finished (epoch {begun.get("epoch")})')
    supernet.to(job.device, memory_format=memory_format(recipe))
    if recipe.quant_mode and resumed is None:
        images, *_ = next(iter(calibration_batches(data.train, recipe.batch_size_per_gpu, 1, recipe.seed)))
        rng = random.Random(f'{recipe.seed} scales')
        others = itertools.repeat(lambda: supernet.sample_active_subnet(rng))
        initialize_all_scales(supernet, images.to(job.device), supernet.set_max_subnet, others, patience=20)
    broadcast(supernet, job)
    optimizer = torch.optim.SGD(parameter_groups(supernet, recipe.weight_decay), lr=recipe.base_lr,
                                momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    settings = deciding(recipe) | {
        'supernet': str(supernet.encoding), 'steps an epoch': steps, 'ranks': job.world_size,
        'training images': len(data.train), 'classes': supernet.num_classes, 'init_block_kd': blocks}
    training = Training(path=path, optimizer=optimizer, settings=settings, supernet=supernet)
    if resumed is not None:
        training.resume(resumed, steps * recipe.epochs, job)
    training.check_ranks(job)
    return training


def _fp32_checkpoint(path):
    """What LSQ+ starts from; UserError without it."""
    if not os.path.isfile(path):
        raise UserError(f'{path}: no fp32 checkpoint to start from; train it first without --quant_mode')
    return load_checkpoint(path)


def _take_step(training, images, labels, recipe, epoch, steps, job, writer):
    """One sandwich and one optimiser step."""
    step, supernet = training.step, training.supernet
    torch.manual_seed(seed_of(recipe.seed, epoch, step, job.rank))
    scale = max(1, recipe.batch_size_per_gpu * job.world_size // 256)
    learning_rate = warmup_cosine(recipe.base_lr * scale, step, steps * recipe.epochs,
                                  round(recipe.warmup_epochs * steps))
    training.optimizer.zero_grad(set_to_none=True)
    losses = 0
    parameters = [p for group in training.optimizer.param_groups for p in group['params']]
    gradients = GradientAverage(parameters, job)
    parts = list(zip(images.tensor_split(recipe.accumulate), labels.tensor_split(recipe.accumulate)))
    for i, (part, of_part) in enumerate(parts):
        share, rng = len(part) / len(images), random.Random(f'{recipe.seed} {epoch} {step}')
        losses = losses + share * torch.stack(sandwich(supernet, part, of_part, recipe, rng, share=share,
                                                       smallest=step % recipe.smallest_freq == 0,
                                                       weights=training.weights,
                                                       last=gradients.backward if i + 1 == len(parts) else None))
    losses = average(losses, job)
    if not all(map(math.isfinite, losses)):
        raise training.failure(f'{supernet.encoding}: step {step} (epoch {epoch}): the loss is not finite')
    training.loss_sum, training.loss_count = training.loss_sum + losses[0], training.loss_count + 1
    if not _is_collapsed(training):
        training.write_pending(job)
    gradients.finish()
    torch.nn.utils.clip_grad_value_(parameters, recipe.grad_clip_value)
    set_learning_rate(training.optimizer, learning_rate)
    training.optimizer.step()
    if writer and step % 20 == 0:
        writer.add_scalar('loss/max', losses[0], step)
        if step % recipe.smallest_freq == 0:
            writer.add_scalar('loss/min', losses[-1], step)
        writer.add_scalar('learning rate', learning_rate, step)


def sandwich(supernet, images, labels, recipe, rng, smallest=True, share=1.0, last=None, weights=None):
    """Backward of the largest, random and the smallest subnet, gradients summed; returns their losses (tensors).

    share: the part of the losses whose gradients are taken, where these images are a part of a step's; last(loss) is
    called instead of loss.backward() for the last subnet; weights: of the labels' loss by class, (classes,).

    The largest learns from the labels, with dropout; the others from its answers. rng: random.Random that draws
    the random subnets, the same on every rank; smallest: whether the last is the smallest, else it is random too.
    """
    supernet.train()
    losses = []
    for i in range(recipe.num_arch_training):
        if i == 0:
            supernet.set_max_subnet()
        elif smallest and i == recipe.num_arch_training - 1:
            supernet.set_min_subnet()
        else:
            supernet.sample_active_subnet(rng, recipe.align_sample)
        dropout = _dropout(supernet, recipe.dropout) if i == 0 else contextlib.nullcontext()
        with autocast(images.device, recipe.amp), dropout:
            logits = supernet(images)
        if i == 0:
            answers = logits.detach()
            loss = F.cross_entropy(logits.float(), labels, weights, label_smoothing=recipe.label_smoothing)
        else:
            loss = adaptive_alpha_loss(logits, answers, recipe.alpha_min, recipe.alpha_max, recipe.iw_clip)
        backward = last if last and i + 1 == recipe.num_arch_training else torch.Tensor.backward
        backward(loss if share == 1 else share * loss)
        losses.append(loss.detach())
    return losses


@contextlib.contextmanager
def _dropout(model, probability):
    """Inside, the model's dropout layers drop with this probability."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = probability
    try:
        yield
    finally:
        for layer, p in zip(layers, before):
            layer.p = p


def _is_collapsed(training):
    """Whether a supernet that had learned is back at the loss of guessing, over this epoch so far."""
    return training.learned and training.loss > CHANCE * math.log(training.supernet.num_classes)


def _end_epoch(training, epoch):
    if _is_collapsed(training):
        raise training.failure(f'{training.supernet.encoding}: epoch {epoch}: collapsed, the loss is back at guessing '
                               f'({training.loss:.3f})')
    chance = math.log(training.supernet.num_classes)
    training.learned = training.learned or 0 < training.loss < LEARNED * chance
    training.loss_sum, training.loss_count = 0.0, 0


def _validate(training, calibration, valid, job, epoch, writer, recipe):
    """Validate max, min and a random subnet; writes the best state so far beside the last one."""
    supernet = training.supernet
    for name, subnet in _validated(supernet, recipe).items():
        result = evaluate_subnet(supernet, subnet, calibration, valid, job)
        if not math.isfinite(result.loss):
            raise training.failure(f'{supernet.encoding}: epoch {epoch}: the validation loss of {name} is not finite')
        training.results[name] = result._asdict()
        note(f'epoch {epoch}: {name:6} {result}')
        if writer:
            writer.add_scalar(f'validation top-1/{name}', result.top1, training.step)
    chosen = training.results.values() if recipe.best_by == 'mean' else [training.results['max']]
    top1 = sum(result['top1'] for result in chosen) / len(chosen)
    if top1 > training.best:
        training.best = top1
        training.save(job, training.best_path)
