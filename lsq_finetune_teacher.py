"""Make an int8 teacher: quantise a pretrained EfficientNet with LSQ+ and fine-tune it.

    python lsq_finetune_teacher.py --teacher_arch efficientnet-b5 --dataset_path ./dataset

Writes <output_path>/efficientnet_b5/checkpoint.pth, which lsq_block_kd.py and eval_block_kd.py take as
--teacher_checkpoint_path. Unlabelled pictures do with --from_teacher. Batch norm keeps the statistics of the
pretrained network: 12 images are too few for better ones. The default learning rate is for an epoch of ImageNet;
a short run moves away from the pretrained network with it: give --learning_rate 2e-5 there.
"""
import copy
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from modules.block_kd.teacher import DEFAULT_ARCH, DEFAULT_ROOT, Teacher, build_teacher, default_checkpoint
from modules.cli import SEED, SHARE, not_negative, parser, positive, run, within
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.training import distributed
from modules.training.acceleration import choose_quantisers
from modules.training.checkpoint import load_weights, save_checkpoint
from modules.training.data import add_data_arguments, eval_loader, open_data
from modules.training.gradients import GradientAverage
from modules.training.log import note
from modules.training.optim import cosine, parameter_groups, set_learning_rate
from modules.training.resumable import ResumableRun, Schedule, checkpoint_to_resume, steps_per_epoch, train


def get_args():
    p = parser(__doc__)
    p.add_argument('--teacher_arch', '--arch', default=DEFAULT_ARCH, help='efficientnet-b0..b7, -lite0..lite4')
    p.add_argument('--weights', help="file of pretrained weights; default: an installed package, or timm's hub")
    p.add_argument('--output_path', default=DEFAULT_ROOT, help='folder of the int8 teachers')
    p.add_argument('--from_teacher', action='store_true', help='learn the fp32 logits instead of labels')
    p.add_argument('--num_epochs', type=positive(int), default=1, help='passes over the training images')
    p.add_argument('--train_batch_size', type=positive(int), default=12, help='images a step and rank')
    p.add_argument('--learning_rate', type=positive(float), default=1e-3, help='the first; down to 0 by a cosine')
    p.add_argument('--momentum', type=SHARE, default=0.9, help='of SGD')
    p.add_argument('--weight_decay', type=not_negative(float), default=1e-5, help='not of norms, biases and scales')
    p.add_argument('--image_size', type=within(int, 16, 2048), default=224, help='pixels')
    p.add_argument('--max_steps', type=positive(int), help='steps in all, for short runs')
    p.add_argument('--num_eval_images', type=positive(int), default=5000, help='of the evaluation at the end')
    p.add_argument('--checkpoint_freq', type=positive(int), default=500, help='steps between unfinished.pth')
    p.add_argument('--resume', action='store_true', help='go on from unfinished.pth')
    p.add_argument('--test_only', action='store_true', help='report on the int8 teacher that is there')
    p.add_argument('--seed', type=SEED, default=0, help='of order and augmentation')
    add_data_arguments(p)
    distributed.add_distributed_arguments(p, int8_training=True)
    return p.parse_args()


def main(args):
    with distributed.distributed_job(args.local_rank, args.device, args.deterministic) as job:
        path = default_checkpoint(args.teacher_arch, args.output_path)
        unfinished = os.path.join(os.path.dirname(path), 'unfinished.pth')
        if not args.test_only and distributed.of_main(
                lambda: args.resume and os.path.isfile(path) and not os.path.isfile(unfinished), job):
            note(f'{path}: already fine-tuned')
            return
        original = build_teacher(args.teacher_arch, weights=args.weights).to(job.device)
        data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, args.image_size,
                         labelled=not args.from_teacher, seed=args.seed, normalize=original.normalize)
        classes = original.classifier.out_features
        if not args.from_teacher and data.num_classes != classes:
            raise UserError(f'{args.dataset_path}: {data.num_classes} classes, {args.teacher_arch} tells {classes} '
                            'apart; --from_teacher does without labels')
        if args.test_only:
            teacher = build_teacher(args.teacher_arch, quant=True, checkpoint=path).to(job.device)
            report(teacher, original, data.test, args, job)
            return
        teacher = set_quant_mode(copy.deepcopy(original))
        with teacher.fine_tuning():
            finetune(teacher, original, data, unfinished, args, job)
        if job.is_main:
            save_checkpoint(path, teacher.checkpoint())
            if os.path.isfile(unfinished):
                os.remove(unfinished)
            print(f'int8 teacher: {path}', flush=True)
        report(teacher, original, data.test, args, job)


@dataclass(kw_only=True)
class TeacherTraining(ResumableRun):
    """An int8 teacher in training."""
    ADVICE = 'a smaller --learning_rate'
    teacher: Teacher

    def content(self):
        return self.teacher.checkpoint()


def finetune(teacher, original, data, path, args, job):
    """SGD on labels, or on the original's logits; its state is written to `path` now and then."""
    steps = steps_per_epoch(data, args.train_batch_size, args.seed, job)
    total = min(args.num_epochs * steps, args.max_steps or math.inf)
    choose_quantisers(args.compile, True, total, job.device)
    names = ('learning_rate', 'momentum', 'weight_decay', 'image_size', 'from_teacher', 'augment', 'seed')
    settings = {name: getattr(args, name) for name in names} | {
        'images': len(data.train), 'images a step': args.train_batch_size * job.world_size, 'steps': total,
        'steps an epoch': steps}
    resumed = checkpoint_to_resume(path, args.resume, job)
    if resumed is not None:
        load_weights(teacher, resumed, f'{path}: not the weights of the teacher')
    training = TeacherTraining(path=path, teacher=teacher, settings=settings, optimizer=torch.optim.SGD(
        parameter_groups(teacher, args.weight_decay), args.learning_rate, args.momentum))
    if resumed is not None:
        training.resume(resumed, total, job)
    training.check_ranks(job)

    def take_step(_, images, labels, epoch, writer):
        target = original(images).softmax(1) if args.from_teacher else labels
        loss = F.cross_entropy(teacher(images), target)
        mean_loss, = distributed.average(loss.detach()[None], job)
        if not math.isfinite(mean_loss):
            raise training.failure(f'step {training.step}: the loss is not finite')
        training.prove(job)
        set_learning_rate(training.optimizer, cosine(args.learning_rate, training.step, total))
        training.optimizer.zero_grad()
        gradients = GradientAverage(teacher.parameters(), job)
        gradients.backward(loss)
        gradients.finish()
        training.optimizer.step()
        if writer and training.step % 20 == 0:
            writer.add_scalar('loss', mean_loss, training.step)
        return {'loss': f'{mean_loss:.3f}'}

    schedule = Schedule(data, args.train_batch_size, args.seed, steps, total, args.checkpoint_freq, args.num_workers)
    train([training], schedule, job, f'int8 {teacher.arch}', os.path.join(os.path.dirname(path), 'tensorboard'),
          take_step)


@torch.no_grad()
def report(teacher, original, images, args, job):
    """Print how often int8 and fp32 give the same answer and, with labels, how often each is right."""
    counts = [0, 0, 0, 0]
    for batch, labels in eval_loader(images, args.train_batch_size, job.rank, job.world_size, args.num_workers,
                                     limit_images=args.num_eval_images).to(job.device):
        ours, theirs = (network(batch).argmax(1).cpu() for network in (teacher, original))
        agreed = [ours == theirs, ours == labels, theirs == labels]
        counts = [c + new for c, new in zip(counts, [len(batch), *(int(a.sum()) for a in agreed)])]
    total, same, int8, fp32 = (count * job.world_size for count in distributed.average(counts, job))
    if job.is_main and total:
        accuracy = '' if args.from_teacher else f'; right: int8 {int8 / total:.2%}, fp32 {fp32 / total:.2%}'
        print(f'{total:.0f} held-out images: int8 answers as fp32 on {same / total:.2%}{accuracy}')


if __name__ == '__main__':
    run(main, get_args)
