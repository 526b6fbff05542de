"""Fine-tuning of a static network, in int8 (LSQ+) or fp32: on another data set, or on that of its supernet.

Everything random in a step is a function of (seed, epoch, step, rank), so a resumed run takes the very same steps.
"""
import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ..cli import SEED, SHARE, not_negative, positive
from ..errors import UserError
from ..modeling.ops.lsq_plus import WEIGHT_BITS, local_initialisation, quantised_ops
from .acceleration import choose_quantisers, memory_format
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
# of a network that goes on with its supernet's head and data: measured on CIFAR-10 with batches of 32, where subnets
# gained 1 to 4 points in 270 steps
KEPT_HEAD = 0.02


@dataclass(frozen=True)
class DownstreamRecipe:
    """How to fine-tune: SGD with Nesterov momentum, a linear decay after the warm-up."""
    learning_rate: float
    weight_decay: float                     # not of norms, biases and scales
    epochs: int = 200
    warmup_epochs: float = 2.0
    batch_size: int = 128                   # images a step and rank
    momentum: float = 0.9
    label_smoothing: float = 0.1
    class_weights: str = 'none'             # balanced: rare classes count as much as frequent ones
    grad_clip_norm: float = 1.0
    only_train_head: bool = False
    num_calib_batches: int = 20             # of the batch-norm calibration before the first step
    eval_freq: int = 10                     # epochs
    checkpoint_freq: int = 200              # steps
    max_steps: int | None = None            # of an epoch, for short runs
    num_eval_images: int | None = None
    seed: int = 0
    channels_last: bool = True
    distill: float | None = None            # share of the loss that is learned from a teacher; None: no teacher


def add_recipe_arguments(p):
    """A flag for every field of the DownstreamRecipe but `distill`, and --recipe."""
    p.add_argument('--recipe', choices=['ours', 'original'], default='ours', help='original: '
                   + ', '.join(f'--{name} {value}' for name, value in ORIGINAL.items()) + '; crops of 224 pixels, '
                   'Flowers102 without val, <output_path>/<subnet>_<data set>.pth')
    p.add_argument('--only_train_head', action='store_true', help='the rest of the network stays as it is')
    p.add_argument('--learning_rate', type=positive(float), help="after the warm-up; default: the data set's, "
                   'with --keep_head 0.02')
    p.add_argument('--weight_decay', type=not_negative(float),
                   default=WEIGHT_DECAY, help='not of norms, biases and scales')
    p.add_argument('--num_epochs', type=positive(int), default=200, help='passes over the training images')
    p.add_argument('--warmup_epochs', type=not_negative(float), default=2.0,
                   help='of linear warm-up, then linear decay to 0')
    p.add_argument('--batch_size', '--train_batch_size', type=positive(int), default=128, help='images a step and rank')
    p.add_argument('--momentum', type=SHARE, default=0.9, help='of SGD, Nesterov')
    p.add_argument('--label_smoothing', type=SHARE, default=0.1, help='of the labels')
    p.add_argument('--class_weights', choices=CLASS_WEIGHTS, default='none',
                   help='balanced: rare classes count as much as frequent ones')
    p.add_argument('--grad_clip_norm', type=positive(float), default=1.0, help='bound of the gradient norm')
    p.add_argument('--drop_rate', type=SHARE, default=0.0, help='dropout before the head')
    p.add_argument('--num_calib_batches', type=positive(int), default=20, help='of batch-norm calibration at first')
    p.add_argument('--eval_freq', type=positive(int), default=10, help='epochs between evaluations')
    p.add_argument('--checkpoint_freq', type=positive(int), default=200, help='steps between checkpoints')
    p.add_argument('--max_steps', type=positive(int), help='steps of an epoch, for short runs; default: all')
    p.add_argument('--num_eval_images', type=positive(int), help='for short runs; default: all')
    p.add_argument('--no_channels_last', action='store_true', help='keep NCHW memory')
    p.add_argument('--seed', type=SEED, default=0, help='of the new head, dropout, order and augmentation')


def add_quantisation_arguments(p):
    """--weight_bits, --integer_zero_points and --symmetric of what trains INT8 networks for deployment."""
    p.add_argument('--weight_bits', type=int, choices=WEIGHT_BITS, default=8, help='of INT8 weights; 7 (-64 to 63) '
                   'are quicker on x86 without VNNI')
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


def recipe_of(args):
    """The DownstreamRecipe of add_recipe_arguments(), with keep_head and distill of the script."""
    learning_rate, weight_decay = find_recipe(args.dataset, args.learning_rate, args.weight_decay, args.keep_head)
    same = {field.name: getattr(args, field.name) for field in dataclasses.fields(DownstreamRecipe)
            if hasattr(args, field.name)}
    return DownstreamRecipe(**same | {'learning_rate': learning_rate, 'weight_decay': weight_decay,
                                      'epochs': args.num_epochs, 'channels_last': not args.no_channels_last,
                                      'distill': args.distill or None})


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


def find_recipe(dataset, learning_rate=None, weight_decay=None, keep_head=False):
    """(learning rate, weight decay) of a data set, given ones first; UserError where there is none.

    keep_head: of a network that goes on with its supernet's head and data, whichever they are.
    """
    if learning_rate is None:
        learning_rate = KEPT_HEAD if keep_head else {
            plain_name(name): rate for name, rate in LEARNING_RATES.items()}.get(plain_name(dataset))
    if learning_rate is None:
        raise UserError(f'--dataset {dataset}: no published recipe (there are {" ".join(LEARNING_RATES)}); give '
                        '--learning_rate')
    return learning_rate, WEIGHT_DECAY if weight_decay is None else weight_decay


def finetune(network, data, recipe, path, job, identity, resume=False, workers=0, teacher=None, calibration=None,
             compiled='auto'):
    """Fine-tune `network` (modeling.Network with a head for the data) into `path`; returns its test Accuracy dict.

    teacher: Network of the same classes for recipe.distill, calibrated here; it must be the same when resumed.
    calibration: Data on which batch norm is calibrated before the first step; default: `data`.
    compiled: see acceleration.choose_quantisers().
    identity: plain values that are stored with the weights and from which the network can be built again. The best
    state by the held-out images (by the test images where none are held out) is beside `path` as …_best.pth.
    UserError: a loss that is not finite, or a run that was begun with other settings.
    """
    keep_freed_memory()
    steps = steps_per_epoch(data, recipe.batch_size, recipe.seed, job, recipe.max_steps)
    quant = any(op.is_quantised for op in quantised_ops(network))
    choose_quantisers(compiled, quant, steps * recipe.epochs, job.device)
    tuning = _start(network, data, recipe, path, job, identity, resume, steps, workers, calibration or data)
    if tuning.done:
        note(f'{path}: already fine-tuned')
        return tuning.results['test']
    tuning.weights = loss_weights(recipe.class_weights, data.train, data.num_classes, job.device)
    tuning.teacher = _teacher(teacher, data, recipe, workers, job)
    valid = eval_loader(data.valid if len(data.valid) else data.test, recipe.batch_size, job.rank, job.world_size,
                        workers, limit_images=recipe.num_eval_images).to(job.device)

    def take_step(_, images, labels, epoch, writer):
        loss = _take_step(tuning, images, labels, recipe, epoch, steps, job, writer)
        return {'epoch': epoch, 'loss': f'{loss:.3f}'}

    def end_epoch(epoch, writer):
        last = epoch + 1 == recipe.epochs
        if last or (epoch + 1) % recipe.eval_freq == 0:
            _evaluate(tuning, valid, job, epoch, writer)
        if last:
            _finish(tuning, data, valid, recipe, job, workers)

    schedule = Schedule(data, recipe.batch_size, recipe.seed, steps, steps * recipe.epochs, recipe.checkpoint_freq,
                        workers)
    folder, kind = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]
    train([tuning], schedule, job, f'fine-tuning {identity.get("subnet_name", "")}',
          os.path.join(folder, 'tensorboard', kind), take_step, end_epoch)
    return tuning.results['test']


def _start(network, data, recipe, path, job, identity, resume, steps, workers, calibration):
    """The FineTuning, from its unfinished checkpoint or from the network as it is, calibrated on other images."""
    resumed = checkpoint_to_resume(path, resume, job)
    settings = _settings(data, recipe, job, identity, steps)
    if resumed is not None:
        load_weights(network, resumed, path)
    network.to(job.device, memory_format=memory_format(recipe))
    if resumed is None:
        _prepare(network, calibration, recipe, workers, job)
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


def _settings(data, recipe, job, identity, steps):
    """What decides the weights, as plain values: a run is resumed with the same or not at all."""
    ignored = ('channels_last', 'checkpoint_freq', 'eval_freq', 'num_eval_images', 'max_steps')
    values = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in ignored}
    return {**values, **identity, 'steps an epoch': steps, 'ranks': job.world_size, 'training images': len(data.train)}


def _prepare(network, data, recipe, workers, job):
    """Batch-norm statistics of the new images, and LSQ+ scales that have none yet: the head's, or from scratch all.

    A subnet of a supernet has no statistics of its own. Every rank takes the same images.
    """
    batches = calibration_batches(data.train, recipe.batch_size, recipe.num_calib_batches, recipe.seed, workers)
    batches = batches.to(job.device)
    with local_initialisation(), kept_statistics(network):
        calibrate(network, images_of(batches, job.device))
        statistics = norm_statistics(network)
    set_norm_statistics(network, statistics)


def _teacher(network, data, recipe, workers, job):
    """The network as a teacher: calibrated on the same images as the one that learns, and then fixed."""
    if not recipe.distill:
        return None
    network.to(job.device, memory_format=memory_format(recipe))
    _prepare(network, data, recipe, workers, job)
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
        tuning.prove(job)
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


def _finish(tuning, data, valid, recipe, job, workers):
    """The test accuracy of the last state."""
    tuning.done = True
    if not len(data.valid):
        tuning.results['test'] = tuning.results['valid']
        return
    test = eval_loader(data.test, recipe.batch_size, job.rank, job.world_size, workers,
                       limit_images=recipe.num_eval_images).to(job.device)
    tuning.results['test'] = accuracy(tuning.network, test, job)._asdict()
