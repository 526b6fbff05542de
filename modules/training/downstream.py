"""Fine-tuning of a static network, in int8 (LSQ+) or fp32: on another data set, or on that of its supernet.

Everything random in a step is a function of (seed, epoch, step, rank), so a resumed run takes the very same steps.
"""
import contextlib
import math
import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..cli import SHARE
from ..errors import UserError
from ..modeling.ops.lsq_plus import WEIGHT_BITS, local_initialisation, quantised_ops
from ..settings import deciding, setting
from .acceleration import TrainingSettings, choose_quantisers, memory_format
from .calibrate import calibrate, kept_statistics, norm_statistics, set_norm_statistics
from .checkpoint import load_weights
from .classes import CLASS_WEIGHTS, loss_weights
from .data import calibration_batches, eval_loader, seed_of
from .distributed import average, broadcast
from .evaluate import accuracy, images_of
from .gradients import GradientAverage
from .log import note
from .losses import alpha_divergence
from .memory import keep_freed_memory
from .optim import parameter_groups, set_learning_rate, warmup_linear
from .resumable import ResumableRun, Schedule, checkpoint_to_resume, steps_per_epoch, train
from .sources import plain_name

# {data set: learning rate} of the published fine-tuning; its table of weight decays is never used there
LEARNING_RATES = {'CIFAR10': 0.0125, 'CIFAR100': 0.0125, 'Flowers102': 0.15, 'OxfordIIITPet': 0.00375, 'Food101': 0.15,
                  'StanfordCars': 0.15, 'FGVCAircraft': 0.075}
WEIGHT_DECAY = 1e-5
# flags of --recipe original; what else that means is where it is used
ORIGINAL = {'augment': 'auto_augment_tf', 'seed': 42, 'eval_freq': 1, 'fp32_head': True, 'imagenet_path': './dataset',
            'output_path': './checkpoints/downstream_cls'}
# of a network that continues with its supernet's head and data: measured on CIFAR-10 with batches of 32, where subnets
# gained 1 to 4 points in 270 steps
KEPT_HEAD = 0.02


@dataclass(frozen=True, kw_only=True)
class DownstreamRecipe(TrainingSettings):
    """How to fine-tune: SGD with Nesterov momentum, a linear decay after the warm-up."""
    only_train_head: bool = setting(False, 'the rest of the network stays as it is')
    learning_rate: float | None = setting(None, "after the warm-up; default: the data set's, with --keep_head 0.02",
                                          above=0)
    weight_decay: float = setting(WEIGHT_DECAY, 'not of norms, biases and scales')
    epochs: int = setting(200, 'passes over the training images', flags=('num_epochs',), least=1)
    warmup_epochs: float = setting(2.0, 'epochs of linear warm-up, then linear decay to 0')
    batch_size: int = setting(128, 'images a step and rank', flags=('batch_size', 'train_batch_size'), least=1)
    momentum: float = setting(0.9, 'momentum of SGD, Nesterov', below=1)
    label_smoothing: float = setting(0.1, 'smoothing of the labels', below=1)
    class_weights: str = setting('none', 'balanced: rare classes count as much as frequent ones', choices=CLASS_WEIGHTS)
    grad_clip_norm: float = setting(1.0, 'bound of the gradient norm', above=0)
    num_calib_batches: int = setting(20, 'batches of batch-norm calibration at first', least=1)
    eval_freq: int = setting(10, 'epochs between evaluations', least=1, decides=False)
    checkpoint_freq: int = setting(200, 'steps between checkpoints', least=1, decides=False)
    max_steps: int | None = setting(None, 'steps of an epoch, for short runs; default: all', least=1, decides=False)
    num_eval_images: int | None = setting(None, 'for short runs; default: all', least=1, decides=False)
    seed: int = setting(0, 'seed of the new head, dropout, order and augmentation', most=2 ** 32 - 1)
    distill: float | None = setting(None, 'share of the loss that is learned from the largest subnet, 0.5 without a '
                                    'value; implies --keep_head', const=0.5, most=1)


def add_recipe_argument(p):
    """--recipe, and --drop_rate, which the network takes."""
    p.add_argument('--recipe', choices=['ours', 'original'], default='ours', help='original: '
                   + ', '.join(f'--{name} {value}' for name, value in ORIGINAL.items()) + '; crops of 224 pixels, '
                   'Flowers102 without val, <output_path>/<subnet>_<data set>.pth')
    p.add_argument('--drop_rate', type=SHARE, default=0.0, help='dropout before the head')


def add_quantisation_arguments(p):
    """--weight_bits, --integer_zero_points and --symmetric of what trains INT8 networks for deployment."""
    p.add_argument('--weight_bits', type=int, choices=WEIGHT_BITS, default=8, help='bits of INT8 weights; 7 (-64 to '
                   '63) are quicker on x86 without VNNI')
    kinds = p.add_mutually_exclusive_group()
    for flag, kind, text in (
            ('--integer_zero_points', 'integer', '0 is a code of every activation: INT8 models need no shifts'),
            ('--symmetric', 'symmetric', 'signed activations with zero point 0, as TensorRT takes them')):
        kinds.add_argument(flag, dest='zero_points', action='store_const', const=kind, help=text)


def quantisation_for(args):
    """{'weight_bits': …, 'zero_points': …} of add_quantisation_arguments(); UserError where --fp32 contradicts it."""
    chosen = {'weight_bits': args.weight_bits, 'zero_points': args.zero_points or 'real'}
    if args.fp32 and chosen != {'weight_bits': 8, 'zero_points': 'real'}:
        raise UserError('--fp32: without --weight_bits, --integer_zero_points and --symmetric, which are of int8')
    return chosen


@dataclass(kw_only=True)
class FineTuning(ResumableRun):
    """A network in fine-tuning; best is the best top-1 so far."""
    PROGRESS = ResumableRun.PROGRESS | {'best': float, 'results': dict}
    ADVICE = 'a smaller --learning_rate'
    network: nn.Module
    identity: dict                          # what the network is; see finetune()
    teacher: nn.Module | None = None
    weights: torch.Tensor | None = None     # of the loss, by class
    best: float = -1.0
    results: dict = field(default_factory=dict)         # Accuracy as a dict: 'valid' of the last one, 'test'

    def content(self):
        return {**self.identity, 'state_dict': self.network.state_dict()}


def learning_rate_of(dataset, keep_head=False):
    """The learning rate for a data set; UserError where there is none.

    keep_head: of a network that continues with its supernet's head and data, whichever they are.
    """
    rates = {plain_name(name): rate for name, rate in LEARNING_RATES.items()}
    rate = KEPT_HEAD if keep_head else rates.get(plain_name(dataset))
    if rate is None:
        raise UserError(f'--dataset {dataset}: no published recipe (there are {" ".join(LEARNING_RATES)}); give '
                        '--learning_rate')
    return rate


def finetune(network, data, recipe, path, job, identity, teacher=None, calibration=None):
    """Fine-tune `network` (modeling.Network with a head for the data) into `path`; returns its test Accuracy dict.

    teacher: Network of the same classes for recipe.distill, calibrated here; it must be the same when resumed.
    calibration: Data on which batch norm is calibrated before the first step; default: `data`.
    identity: plain values that are stored with the weights and from which the network can be built again. The best
    state by the held-out images (by the test images where none are held out) is beside `path` as …_best.pth.
    UserError: a loss that is not finite, or a run that was begun with other settings.
    """
    keep_freed_memory()
    steps = steps_per_epoch(data, recipe.batch_size, recipe.seed, job, recipe.max_steps)
    quant = any(op.is_quantised for op in quantised_ops(network))
    choose_quantisers(recipe.compile, quant, job.device)
    tuning = _start(network, data, recipe, path, job, identity, steps, calibration or data)
    if tuning.done:
        note(f'{path}: already fine-tuned')
        return tuning.results['test']
    tuning.weights = loss_weights(recipe.class_weights, data.train, data.num_classes, job.device)
    tuning.teacher = _teacher(teacher, data, recipe, job)
    valid = eval_loader(data.valid if len(data.valid) else data.test, recipe.batch_size, job.rank, job.world_size,
                        recipe.num_workers, limit_images=recipe.num_eval_images).to(job.device)

    def take_step(_, images, labels, epoch, writer):
        loss = _take_step(tuning, images, labels, recipe, epoch, steps, job, writer)
        return {'epoch': epoch, 'loss': f'{loss:.3f}'}

    def end_epoch(epoch, writer):
        last = epoch + 1 == recipe.epochs
        if last or (epoch + 1) % recipe.eval_freq == 0:
            _evaluate(tuning, valid, job, epoch, writer)
        if last:
            _finish(tuning, data, recipe, job)

    schedule = Schedule(data, recipe.batch_size, recipe.seed, steps, steps * recipe.epochs, recipe.checkpoint_freq,
                        recipe.num_workers)
    folder, kind = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]
    train([tuning], schedule, job, f'fine-tuning {identity.get("subnet_name", "")}',
          os.path.join(folder, 'tensorboard', kind), take_step, end_epoch)
    return tuning.results['test']


def _start(network, data, recipe, path, job, identity, steps, calibration):
    """The FineTuning, from its unfinished checkpoint or from the network as it is, calibrated on other images."""
    resumed = checkpoint_to_resume(path, recipe.resume, job)
    settings = {**deciding(recipe), **identity, 'steps an epoch': steps, 'ranks': job.world_size,
                'training images': len(data.train)}
    if resumed is not None:
        load_weights(network, resumed, path)
    network.to(job.device, memory_format=memory_format(recipe))
    if resumed is None:
        _prepare(network, calibration, recipe, job)
    broadcast(network, job)
    part = network.get_classifier() if recipe.only_train_head else network
    network.requires_grad_(not recipe.only_train_head)
    part.requires_grad_(True)
    optimizer = torch.optim.SGD(parameter_groups(part, recipe.weight_decay), lr=recipe.learning_rate,
                                momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    tuning = FineTuning(path=path, optimizer=optimizer, settings=settings, network=network, identity=identity)
    if resumed is not None:
        tuning.resume(resumed, steps * recipe.epochs, job)
    tuning.check_ranks(job)
    return tuning


def _prepare(network, data, recipe, job):
    """Batch-norm statistics of the new images, and LSQ+ scales that have none yet: the head's, or from scratch all.

    A subnet of a supernet has no statistics of its own. Every rank takes the same images.
    """
    batches = calibration_batches(data.train, recipe.batch_size, recipe.num_calib_batches, recipe.seed,
                                  recipe.num_workers)
    batches = batches.to(job.device)
    with local_initialisation(), kept_statistics(network):
        calibrate(network, images_of(batches, job.device))
        statistics = norm_statistics(network)
    set_norm_statistics(network, statistics)


def _teacher(network, data, recipe, job):
    """The network as a teacher: calibrated on the same images as the one that learns, and then fixed."""
    if not recipe.distill:
        return None
    network.to(job.device, memory_format=memory_format(recipe))
    _prepare(network, data, recipe, job)
    broadcast(network, job)
    return network.eval().requires_grad_(False)


def mixed_loss(logits, labels, answers=None, distill=None, label_smoothing=0.0, weights=None):
    """Mean loss of a batch, scalar: cross-entropy with the labels (N,), and a share of KL(teacher || student) for it.

    logits: the student's (N, classes); distill: the share, of the teacher's logits `answers` (N, classes), at
    temperature 1; no gradient reaches them; weights: of the cross-entropy by class, (classes,).
    """
    loss = F.cross_entropy(logits.float(), labels, weights, label_smoothing=label_smoothing)
    if not distill:
        return loss
    return (1 - distill) * loss + distill * alpha_divergence(logits, answers, alpha=1).mean()


def _take_step(tuning, images, labels, recipe, epoch, steps, job, writer):
    """One optimiser step; returns the loss."""
    step, network = tuning.step, tuning.network
    torch.manual_seed(seed_of(recipe.seed, epoch, step, job.rank))
    network.train(not recipe.only_train_head)           # a frozen body keeps its statistics too
    tuning.optimizer.zero_grad(set_to_none=True)
    with _training_scales(network) if recipe.only_train_head else contextlib.nullcontext():
        logits = network(images)
    with torch.no_grad():
        answers = None if tuning.teacher is None else tuning.teacher(images)
    loss = mixed_loss(logits, labels, answers, recipe.distill, recipe.label_smoothing, tuning.weights)
    parameters = [p for group in tuning.optimizer.param_groups for p in group['params']]
    gradients = GradientAverage(parameters, job)
    gradients.backward(loss)
    gradients.finish()
    norm = nn.utils.clip_grad_norm_(parameters, recipe.grad_clip_norm)
    loss, norm = average(torch.stack([loss.detach(), norm]), job)       # the one wait for the device
    if math.isfinite(loss):
        tuning.write_pending(job)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise tuning.failure(f'step {step} (epoch {epoch}): the loss is not finite')
    learning_rate = warmup_linear(recipe.learning_rate, step, steps * recipe.epochs,
                                  round(recipe.warmup_epochs * steps))
    set_learning_rate(tuning.optimizer, learning_rate)
    tuning.optimizer.step()
    if writer and step % 20 == 0:
        for name, value in (('loss', loss), ('gradient norm', norm), ('learning rate', learning_rate)):
            writer.add_scalar(f'train/{name}', value, step)
    return loss


@contextlib.contextmanager
def _training_scales(network):
    """Inside, the head is in training mode, in which its LSQ+ scales and its dropout learn and drop."""
    head = network.stages['logits']
    head.train()
    try:
        yield
    finally:
        head.eval()


def _evaluate(tuning, images, job, epoch, writer):
    """Accuracy after an epoch; the best state so far is written."""
    broadcast(tuning.network, job)                      # batch-norm statistics are each rank's own
    result = accuracy(tuning.network, images, job)
    if not math.isfinite(result.loss):
        raise tuning.failure(f'evaluation of epoch {epoch}: the loss is not finite')
    tuning.results['valid'] = result._asdict()
    note(f'epoch {epoch}: {result}')
    if writer:
        writer.add_scalar('evaluation/top-1', result.top1, tuning.step)
    if result.top1 > tuning.best:
        tuning.best = result.top1
        tuning.save(job, tuning.best_path)


def _finish(tuning, data, recipe, job):
    """The test accuracy of the last state."""
    tuning.done = True
    if not len(data.valid):
        tuning.results['test'] = tuning.results['valid']
        return
    test = eval_loader(data.test, recipe.batch_size, job.rank, job.world_size, recipe.num_workers,
                       limit_images=recipe.num_eval_images).to(job.device)
    tuning.results['test'] = accuracy(tuning.network, test, job)._asdict()
