"""Fine-tune a searched network on another data set, in int8.

    python downstream_cls.py --subnet_name SEQnet@vnni-A0 --dataset CIFAR10 --imagenet_path ./dataset

The data set lies (or is downloaded to) --dataset_path, also called --imagenet_path. The network gets a new head, which
is quantised too. Learning rate and weight decay are the published ones of CIFAR10, CIFAR100, Flowers102,
OxfordIIITPet, Food101, StanfordCars and FGVCAircraft; for any other set give both. A folder of your own with train/
and val/ class folders is --dataset imagenet.

Writes <output_path>/<subnet>/<data set>/lsq.pth (--fp32: checkpoint.pth) and the best state beside it;
modules.zoo.load_network reads both. --resume goes on after a kill and ends with the weights of an unbroken run.
"""
import hashlib
import os

import torch

from modules.cli import SEED, SHARE, not_negative, parser, positive, run
from modules.errors import UserError
from modules.search_space.named import find_subnet, find_supernet
from modules.search_space.superspace import SUPERSPACES
from modules.training.checkpoint import checkpoint_name, precision
from modules.training.data import add_data_arguments, open_data, seed_of
from modules.training.distributed import add_distributed_arguments, distributed_job
from modules.training.downstream import DownstreamRecipe, find_recipe, finetune
from modules.training.evaluate import Accuracy
from modules.training.log import note
from modules.training.sources import plain_name
from modules.zoo import CHECKPOINTS, EXTREMES, build_network, choose_subnet, find_checkpoint


def get_args():
    p = parser(__doc__)
    p.add_argument('--subnet_name', required=True, help='SEQnet@vnni-A0, …; see --supernet_choice')
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), help='of --supernet_choice')
    p.add_argument('--supernet_choice', help='then --subnet_name is an encoding of its, max or min')
    p.add_argument('--checkpoint_path', '--pretrained', dest='checkpoint_path', default=CHECKPOINTS,
                   help="root of the supernets' checkpoints, or a checkpoint file")
    p.add_argument('--align_sample', action='store_true', help='the supernet in <root>/<supernet>-align1')
    p.add_argument('--from_scratch', action='store_true', help='random weights instead of a checkpoint')
    p.add_argument('--fp32', action='store_true', help='without quantisation')
    p.add_argument('--only_train_head', action='store_true', help='the rest of the network stays as it is')
    p.add_argument('--output_path', default='./checkpoints/downstream', help='root of the fine-tuned networks')
    p.add_argument('--learning_rate', type=positive(float), help="after the warm-up; default: the data set's")
    p.add_argument('--weight_decay', type=not_negative(float),
                   help="not of norms, biases and scales; default: the data set's")
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
    add_distributed_arguments(p)
    return p.parse_args()


def main(args):
    supernet, subnet = find_network(args.subnet_name, args.supernet_choice, args.superspace)
    learning_rate, weight_decay = find_recipe(args.dataset, args.learning_rate, args.weight_decay)
    recipe = DownstreamRecipe(learning_rate, weight_decay, args.num_epochs, args.warmup_epochs, args.batch_size,
                              args.momentum, args.label_smoothing, args.grad_clip_norm, args.only_train_head,
                              args.num_calib_batches, args.eval_freq, args.checkpoint_freq, args.max_steps,
                              args.num_eval_images, args.seed)
    quant = not args.fp32
    folder = os.path.join(args.output_path, folder_name(args.subnet_name, supernet, subnet), plain_name(args.dataset))
    path = os.path.join(folder, checkpoint_name(quant))
    start, origin = None, 'random weights'
    if args.resume and os.path.isfile(path):
        origin = path
    elif not args.from_scratch:
        start = origin = find_start(supernet, quant, args.checkpoint_path, args.align_sample)
    data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, subnet.resolution, seed=args.seed)
    torch.manual_seed(seed_of(args.seed, 'weights'))
    network = build_network(supernet, subnet, data.num_classes, start, quant)
    network.reset_classifier(data.num_classes)          # a new head, even for as many classes
    network.drop_rate = args.drop_rate
    identity = {'subnet_name': args.subnet_name, 'supernet': str(supernet), 'subnet': str(subnet),
                'num_classes': data.num_classes, 'quant_mode': quant, 'dataset': plain_name(args.dataset),
                'augment': args.augment, 'drop_rate': args.drop_rate, 'from_scratch': args.from_scratch}
    with distributed_job(args.local_rank, args.device) as job:
        note(f'{args.subnet_name} in {precision(quant)} from {origin}: learning rate {learning_rate:g}, '
             f'weight decay {weight_decay:g}, {data.num_classes} classes')
        result = finetune(network, data, recipe, path, job, identity, args.resume, args.num_workers)
        if job.is_main:
            print(f'{args.subnet_name} on {args.dataset}: {Accuracy(**result)}\n{path}', flush=True)


def find_network(name, supernet, superspace):
    """(encoding.Supernet, encoding.Subnet) of --subnet_name, a published one or a subnet of --supernet_choice."""
    if supernet is None:
        return find_subnet(name)
    supernet = find_supernet(supernet, superspace)
    return supernet, choose_subnet(supernet, name)


def find_start(supernet, quant, root, align_sample):
    """The supernet's checkpoint; UserError that also says what to do without one."""
    try:
        return find_checkpoint(supernet, quant, root, align_sample)
    except UserError as error:
        raise UserError(f'{error}; train it with train_supernet.py{" --quant_mode" * quant}, or give '
                        '--from_scratch for random weights') from None


def folder_name(name, supernet, subnet):
    """SEQnet@vnni-A0; of subnets without a name <supernet>_max, _min or _<6 hex digits>, since encodings are long."""
    if '@' in name:
        return name
    return f'{supernet}_{name if name in EXTREMES else hashlib.sha256(str(subnet).encode()).hexdigest()[:6]}'


if __name__ == '__main__':
    run(main, get_args)
