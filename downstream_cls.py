"""Fine-tune a searched network, in int8: on another data set, or on its supernet's to finish it.

    python downstream_cls.py --subnet_name SEQnet@vnni-A0 --dataset CIFAR10 --imagenet_path ./dataset
    python downstream_cls.py --superspace demo --supernet_choice 222-111 --dataset fashion-mnist --num_epochs 1 \\
        --subnet_name checkpoints/search_subnet/demo-222-111/best_c0.9_d0.1.csv --distill --warmup_epochs 0.1

The data set lies (or is downloaded to) --dataset_path, also called --imagenet_path. The network gets a new head, which
is quantised too. Learning rate and weight decay are the published ones of CIFAR10, CIFAR100, Flowers102,
OxfordIIITPet, Food101, StanfordCars and FGVCAircraft; for any other set give both. A folder of your own with train/
and val/ class folders is --dataset imagenet.

--keep_head finishes a found network on the data of its supernet: the head stays, and lsq.pth is not needed, since int8
can start from the supernet's fp32 weights. --distill also lets it learn from the supernet's largest subnet.

Writes <output_path>/<subnet>/<data set>/lsq.pth (--fp32: checkpoint.pth) and the best state beside it;
modules.zoo.load_network reads both. --resume goes on after a kill and ends with the weights of an unbroken run.
"""
import hashlib
import os

import torch

from modules.cli import SEED, SHARE, not_negative, parser, positive, run, within
from modules.errors import UserError
from modules.files import file_digest
from modules.search_space.named import find_subnet, find_supernet, listed_subnet
from modules.search_space.superspace import SUPERSPACES
from modules.training.checkpoint import checkpoint_name, precision
from modules.training.classes import fit_classes
from modules.training.data import add_data_arguments, open_data, seed_of
from modules.training.distributed import add_distributed_arguments, distributed_job
from modules.training.downstream import DownstreamRecipe, find_recipe, finetune
from modules.training.evaluate import Accuracy
from modules.training.log import note
from modules.training.sources import plain_name
from modules.zoo import CHECKPOINTS, EXTREMES, build_network, choose_subnet, find_checkpoint, take_out


def get_args():
    p = parser(__doc__)
    p.add_argument('--subnet_name', required=True, help='SEQnet@vnni-A0, …; see --supernet_choice')
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), help='of --supernet_choice')
    p.add_argument('--supernet_choice', help='then --subnet_name is an encoding of its, max, min, or '
                   'best_*.csv of search_subnet.py (its first row), best_*.csv:3 (its third)')
    p.add_argument('--checkpoint_path', '--pretrained', dest='checkpoint_path', default=CHECKPOINTS,
                   help="root of the supernets' checkpoints, or a checkpoint file")
    p.add_argument('--align_sample', action='store_true', help='the supernet in <root>/<supernet>-align1')
    p.add_argument('--from_scratch', action='store_true', help='random weights instead of a checkpoint')
    p.add_argument('--fp32', action='store_true', help='without quantisation')
    p.add_argument('--keep_head', action='store_true', help='go on with the head of the supernet, on its data')
    p.add_argument('--distill', type=within(float, 0, 1), nargs='?', const=0.5, metavar='SHARE',
                   help='of the loss: learned from the largest subnet, 0.5 without a value; implies --keep_head')
    p.add_argument('--only_train_head', action='store_true', help='the rest of the network stays as it is')
    p.add_argument('--output_path', default='./checkpoints/downstream', help='root of the fine-tuned networks')
    p.add_argument('--learning_rate', type=positive(float), help="after the warm-up; default: the data set's, "
                   'with --keep_head 0.02')
    p.add_argument('--weight_decay', type=not_negative(float),
                   help="not of norms, biases and scales; default: the data set's, with --keep_head 1e-5")
    p.add_argument('--num_epochs', type=positive(int), default=200, help='passes over the training images')
    p.add_argument('--warmup_epochs', type=not_negative(float), default=2.0,
                   help='of linear warm-up, then linear decay to 0')
    p.add_argument('--batch_size', '--train_batch_size', type=positive(int), default=128, help='images a step and rank')
    p.add_argument('--momentum', type=SHARE, default=0.9, help='of SGD, Nesterov')
    p.add_argument('--label_smoothing', type=SHARE, default=0.1, help='of the labels')
    p.add_argument('--grad_clip_norm', type=positive(float), default=1.0, help='bound of the gradient norm')
    p.add_argument('--drop_rate', type=SHARE, default=0.0, help='dropout before the head')
    p.add_argument('--num_calib_batches', type=positive(int), default=20, help='of batch-norm calibration at first')
    p.add_argument('--eval_freq', type=positive(int), default=10, help='epochs between evaluations')
    p.add_argument('--checkpoint_freq', type=positive(int), default=200, help='steps between checkpoints')
    p.add_argument('--max_steps', type=positive(int), help='steps of an epoch, for short runs; default: all')
    p.add_argument('--num_eval_images', type=positive(int), help='for short runs; default: all')
    p.add_argument('--resume', action='store_true', help='go on from the checkpoint in output_path, if there is one')
    p.add_argument('--seed', type=SEED, default=0, help='of the new head, dropout, order and augmentation')
    add_data_arguments(p)
    p.set_defaults(valid_size=0)                # the published fine-tuning held nothing out
    add_distributed_arguments(p, int8_training=True)
    return p.parse_args()


def main(args):
    name, supernet, subnet = find_network(args.subnet_name, args.supernet_choice, args.superspace)
    keep_head = args.keep_head or args.distill is not None
    if keep_head and args.from_scratch:
        raise UserError('--from_scratch: random weights have no head for --keep_head, and no teacher for --distill')
    learning_rate, weight_decay = find_recipe(args.dataset, args.learning_rate, args.weight_decay, keep_head)
    recipe = DownstreamRecipe(learning_rate, weight_decay, args.num_epochs, args.warmup_epochs, args.batch_size,
                              args.momentum, args.label_smoothing, args.grad_clip_norm, args.only_train_head,
                              args.num_calib_batches, args.eval_freq, args.checkpoint_freq, args.max_steps,
                              args.num_eval_images, args.seed, args.distill or None)
    quant = not args.fp32
    folder = os.path.join(args.output_path, folder_name(name, supernet, subnet), plain_name(args.dataset))
    path = os.path.join(folder, checkpoint_name(quant))
    resumes, start = args.resume and os.path.isfile(path), None
    if keep_head or not (resumes or args.from_scratch):
        start = find_start(supernet, quant, args.checkpoint_path, args.align_sample, keep_head)
    # a supernet's subnets learn on images of its largest size, which they resize
    image_size = max(supernet.superspace.resolutions) if keep_head else subnet.resolution
    data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, image_size, seed=args.seed)
    torch.manual_seed(seed_of(args.seed, 'weights'))
    if keep_head:
        network, teacher = take_out(supernet, (subnet, choose_subnet(supernet, 'max')), start, quant)
        data = fit_classes(data, network.num_classes, start)
    else:
        network, teacher = build_network(supernet, subnet, data.num_classes, start, quant), None
        network.reset_classifier(data.num_classes)      # a new head, even for as many classes
    network.drop_rate = args.drop_rate
    facts = {'subnet_name': name, 'supernet': str(supernet), 'subnet': str(subnet),
             'num_classes': data.num_classes, 'quant_mode': quant, 'dataset': plain_name(args.dataset),
             'augment': args.augment, 'drop_rate': args.drop_rate, 'from_scratch': args.from_scratch,
             'kept_head_of': file_digest(start) if keep_head else None}
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        note(f'{name} in {precision(quant)} from {path if resumes else start or "random weights"}: learning rate '
             f'{learning_rate:g}, weight decay {weight_decay:g}, {data.num_classes} classes'
             + (f', {args.distill:g} of the loss from the largest subnet of {start}' if args.distill else ''))
        result = finetune(network, data, recipe, path, job, facts, args.resume, args.num_workers, teacher, args.compile)
        if job.is_main:
            print(f'{name} on {args.dataset}: {Accuracy(**result)}\n{path}', flush=True)


def find_network(name, supernet, superspace):
    """(name, encoding.Supernet, encoding.Subnet) of --subnet_name; a row of a table is named by its encoding."""
    if supernet is None:
        if '.csv' in name:
            raise UserError(f'--subnet_name {name}: of which supernet? give --supernet_choice')
        return name, *find_subnet(name)
    supernet = find_supernet(supernet, superspace)
    listed = listed_subnet(name, supernet)
    return (name, supernet, choose_subnet(supernet, name)) if listed is None else (str(listed), supernet, listed)


def find_start(supernet, quant, root, align_sample, keep_head):
    """The supernet's checkpoint, with keep_head the fp32 one where it has no other; UserError also says what to do."""
    try:
        return find_checkpoint(supernet, quant, root, align_sample)
    except UserError as error:
        if keep_head and quant:
            return find_start(supernet, False, root, align_sample, keep_head)
        more = '' if keep_head else f'{" --quant_mode" * quant}, or give --from_scratch for random weights'
        raise UserError(f'{error}; train it with train_supernet.py{more}') from None


def folder_name(name, supernet, subnet):
    """SEQnet@vnni-A0; of subnets without a name <supernet>_max, _min or _<6 hex digits>, since encodings are long."""
    if '@' in name:
        return name
    return f'{supernet}_{name if name in EXTREMES else hashlib.sha256(str(subnet).encode()).hexdigest()[:6]}'


if __name__ == '__main__':
    run(main, get_args)
