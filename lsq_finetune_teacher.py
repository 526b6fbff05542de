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
from modules.cli import parser, run
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import set_quant_mode
from modules.settings import add_settings, deciding, setting, settings_of
from modules.training import distributed
from modules.training.acceleration import TrainingSettings, choose_quantisers
from modules.training.checkpoint import load_weights, save_checkpoint
from modules.training.data import add_data_arguments, eval_loader, open_data
from modules.training.gradients import GradientAverage
from modules.training.log import note
from modules.training.optim import cosine, parameter_groups, set_learning_rate
from modules.training.resumable import ResumableRun, Schedule, checkpoint_to_resume, steps_per_epoch, train


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(TrainingSettings):
    """How to fine-tune a teacher: SGD, down to 0 by a cosine."""
    from_teacher: bool = setting(False, 'learn the fp32 logits instead of labels')
    epochs: int = setting(1, 'passes over the training images', flags=('num_epochs',), least=1, decides=False)
    batch_size: int = setting(12, 'images a step and rank', flags=('train_batch_size',), least=1, decides=False)
    learning_rate: float = setting(1e-3, 'the first; down to 0 by a cosine', above=0)
    momentum: float = setting(0.9, 'momentum of SGD', below=1)
    weight_decay: float = setting(1e-5, 'not of norms, biases and scales')
    image_size: int = setting(224, 'pixels', least=16, most=2048)
    max_steps: int | None = setting(None, 'steps in all, for short runs', least=1, decides=False)
    num_eval_images: int = setting(5000, 'images of the evaluation at the end', least=1, decides=False)
    checkpoint_freq: int = setting(500, 'steps between unfinished.pth', least=1, decides=False)
    seed: int = setting(0, 'seed of order and augmentation', most=2 ** 32 - 1)
    augment: str = setting('default', 'of the training images', flags=())


def get_args():
    p = parser(__doc__)
    p.add_argument('--teacher_arch', '--arch', default=DEFAULT_ARCH, help='efficientnet-b0..b7, -lite0..lite4')
    p.add_argument('--weights', help="file of pretrained weights; default: an installed package, or timm's hub")
    p.add_argument('--output_path', default=DEFAULT_ROOT, help='folder of the int8 teachers')
    add_settings(p, TeacherSettings, skip=('channels_last',))
    p.add_argument('--test_only', action='store_true', help='report on the int8 teacher that is there')
    add_data_arguments(p)
    distributed.add_distributed_arguments(p)
    return p.parse_args()


def main(args):
    with distributed.distributed_job(args.local_rank, args.device, args.deterministic) as job:
        path = default_checkpoint(args.teacher_arch, args.output_path)
        unfinished = os.path.join(os.path.dirname(path), 'unfinished.pth')
        if not args.test_only and distributed.of_main(
                lambda: args.resume and os.path.isfile(path) and not os.path.isfile(unfinished), job):
            note(f'{path}: already fine-tuned')
            return
        settings = settings_of(TeacherSettings, args)
        original = build_teacher(args.teacher_arch, weights=args.weights).to(job.device)
        data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, args.image_size,
                         labelled=not args.from_teacher, seed=args.seed, normalize=original.normalize)
        classes = original.classifier.out_features
        if not args.from_teacher and data.num_classes != classes:
            raise UserError(f'{args.dataset_path}: {data.num_classes} classes, {args.teacher_arch} tells {classes} '
                            'apart; --from_teacher does without labels')
        if args.test_only:
            teacher = build_teacher(args.teacher_arch, quant=True, checkpoint=path).to(job.device)
            report(teacher, original, data.test, settings, job)
            return
        teacher = set_quant_mode(copy.deepcopy(original))
        with teacher.fine_tuning():
            finetune(teacher, original, data, unfinished, settings, job)
        if job.is_main:
            save_checkpoint(path, teacher.checkpoint())
            if os.path.isfile(unfinished):
                os.remove(unfinished)
            print(f'int8 teacher: {path}', flush=True)
        report(teacher, original, data.test, settings, job)


@dataclass(kw_only=True)
class TeacherTraining(ResumableRun):
    """An int8 teacher in training."""
    ADVICE = 'a smaller --learning_rate'
    teacher: Teacher

    def content(self):
        return self.teacher.checkpoint()


def finetune(teacher, original, data, path, settings, job):
    """SGD on labels, or on the original's logits; its state is written to `path` now and then."""
    steps = steps_per_epoch(data, settings.batch_size, settings.seed, job)
    total = min(settings.epochs * steps, settings.max_steps or math.inf)
    choose_quantisers(settings.compile, True, job.device)
    decided_by = deciding(settings) | {
        'images': len(data.train), 'images a step': settings.batch_size * job.world_size, 'steps': total,
        'steps an epoch': steps}
    resumed = checkpoint_to_resume(path, settings.resume, job)
    if resumed is not None:
        load_weights(teacher, resumed, f'{path}: not the weights of the teacher')
    training = TeacherTraining(path=path, teacher=teacher, settings=decided_by, optimizer=torch.optim.SGD(
        parameter_groups(teacher, settings.weight_decay), settings.learning_rate, settings.momentum))
    if resumed is not None:
        training.resume(resumed, total, job)
    training.check_ranks(job)

    def take_step(_, images, labels, epoch, writer):
        target = original(images).softmax(1) if settings.from_teacher else labels
        loss = F.cross_entropy(teacher(images), target)
        mean_loss, = distributed.average(loss.detach()[None], job)
        if not math.isfinite(mean_loss):
            raise training.failure(f'step {training.step}: the loss is not finite')
        training.write_pending(job)
        set_learning_rate(training.optimizer, cosine(settings.learning_rate, training.step, total))
        training.optimizer.zero_grad()
        gradients = GradientAverage(teacher.parameters(), job)
        gradients.backward(loss)
        gradients.finish()
        training.optimizer.step()
        if writer and training.step % 20 == 0:
            writer.add_scalar('loss', mean_loss, training.step)
        return {'loss': f'{mean_loss:.3f}'}

    schedule = Schedule(data, settings.batch_size, settings.seed, steps, total, settings.checkpoint_freq,
                        settings.num_workers)
    train([training], schedule, job, f'int8 {teacher.arch}', os.path.join(os.path.dirname(path), 'tensorboard'),
          take_step)


@torch.no_grad()
def report(teacher, original, images, settings, job):
    """Print how often int8 and fp32 give the same answer and, with labels, how often each is right."""
    counts = [0, 0, 0, 0]
    for batch, labels in eval_loader(images, settings.batch_size, job.rank, job.world_size, settings.num_workers,
                                     limit_images=settings.num_eval_images).to(job.device):
        ours, theirs = (network(batch).argmax(1).cpu() for network in (teacher, original))
        agreed = [ours == theirs, ours == labels, theirs == labels]
        counts = [c + new for c, new in zip(counts, [len(batch), *(int(a.sum()) for a in agreed)])]
    total, same, int8, fp32 = (count * job.world_size for count in distributed.average(counts, job))
    if job.is_main and total:
        accuracy = '' if settings.from_teacher else f'; right: int8 {int8 / total:.2%}, fp32 {fp32 / total:.2%}'
        print(f'{total:.0f} held-out images: int8 answers as fp32 on {same / total:.2%}{accuracy}')


if __name__ == '__main__':
    run(main, get_args)
