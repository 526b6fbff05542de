"""Fine-tune a searched network, in int8: on another data set, or on its supernet's to finish it.

    python downstream_cls.py --subnet_name SEQnet@vnni-A0 --dataset CIFAR10 --dataset_path ./dataset
    python downstream_cls.py --superspace demo --supernet_choice 222-111 --dataset fashion-mnist --num_epochs 1 \\
        --subnet_name checkpoints/search_subnet/demo-222-111/best_c0.9_d0.1.csv --distill --warmup_epochs 0.1

The data set lies in (or is downloaded to) --dataset_path. The network gets a new head, which is quantised too. The
learning rate is the published one of CIFAR10, CIFAR100, Flowers102, OxfordIIITPet, Food101, StanfordCars and
FGVCAircraft; for any other set give one. A folder of your own with train/ and val/ class folders is --dataset imagenet.
--imagenet_path: ImageNet, on which batch norm is calibrated at first. --recipe original: all as the original had it.

--keep_head finishes a found network on the data of its supernet: the head stays, and lsq.pth is not needed, since int8
can start from the supernet's fp32 weights. --distill also lets it learn from the supernet's largest subnet.

Writes <output_path>/<subnet>/<data set>/lsq.pth (--fp32: checkpoint.pth) and the best state beside it;
modules.zoo.load_network reads both. --resume continues after a kill and ends with the weights of an unbroken run.
"""
import os

import torch

from modules.cli import early_value, parser, run
from modules.errors import UserError
from modules.files import file_digest
from modules.modeling.ops.lsq_plus import quantisation_of, requantise
from modules.search_space.named import choose_subnet, folder_name, network_of
from modules.search_space.superspace import SUPERSPACES
from modules.settings import add_settings, settings_of
from modules.training.checkpoint import checkpoint_name, precision
from modules.training.classes import fit_classes
from modules.training.data import add_data_arguments, eval_loader, open_data, seed_of
from modules.training.distributed import add_distributed_arguments, distributed_job, of_main
from modules.training.downstream import (
    ORIGINAL,
    DownstreamRecipe,
    add_quantisation_arguments,
    add_recipe_argument,
    finetune,
    learning_rate_of,
    quantisation_for,
)
from modules.training.evaluate import Accuracy, accuracy
from modules.training.log import note
from modules.training.sources import plain_name
from modules.zoo import CHECKPOINTS, build_network, find_checkpoint, load_network, take_out


def get_args():
    p = parser(__doc__)
    p.add_argument('--subnet_name', default='SEQnet@vnni-A0', help='SEQnet@vnni-A0, …; see --supernet_choice')
    p.add_argument('--imagenet_path', help='ImageNet, for the first batch-norm calibration; default: the data set')
    p.add_argument('--fp32_head', action='store_true', help='the new head is not quantised')
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), help='hyperspace of --supernet_choice')
    p.add_argument('--supernet_choice', help='then --subnet_name is an encoding of its, max, min, or '
                   'best_*.csv of search_subnet.py (its first row), best_*.csv:3 (its third)')
    p.add_argument('--checkpoint_path', '--pretrained', dest='checkpoint_path', default=CHECKPOINTS,
                   help="root of the supernets' checkpoints, or a checkpoint file")
    p.add_argument('--align_sample', action='store_true', help='the supernet in <root>/<supernet>-align1')
    p.add_argument('--from_scratch', action='store_true', help='random weights instead of a checkpoint')
    p.add_argument('--fp32', action='store_true', help='without quantisation')
    add_quantisation_arguments(p)
    p.add_argument('--keep_head', action='store_true', help='continue with the head of the supernet, on its data')
    add_settings(p, DownstreamRecipe)
    add_recipe_argument(p)
    p.add_argument('--output_path', default='./checkpoints/downstream', help='root of the fine-tuned networks')
    p.add_argument('--test_only', action='store_true', help='evaluate the file of a fine-tuning before')
    add_data_arguments(p, more_paths=())
    p.set_defaults(valid_size=0, dataset=None, dataset_path=None, augment=None)     # nothing held out, as published
    add_distributed_arguments(p)
    if early_value('--recipe') == 'original':
        p.set_defaults(**ORIGINAL)
    args = p.parse_args()
    args.keep_head = args.keep_head or args.distill is not None
    args.augment = args.augment or ('default' if args.keep_head else 'auto_augment_tf')
    args.dataset = args.dataset or ('imagenet' if args.keep_head else 'CIFAR10')
    if plain_name(args.dataset) == 'imagenet' and args.dataset_path is None:
        args.dataset_path, args.imagenet_path = args.imagenet_path, None
    args.dataset_path = args.dataset_path or './dataset'
    return args


def main(args):
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        fine_tune(args, job)


def fine_tune(args, job):
    """Fine-tune a subnet, or evaluate the file of a fine-tuning, as the arguments say."""
    name, supernet, subnet = network_of(args.subnet_name, args.supernet_choice, args.superspace)
    keep_head, original = args.keep_head, args.recipe == 'original'
    if keep_head and args.from_scratch:
        raise UserError('--from_scratch: random weights have no head for --keep_head, and no teacher for --distill')
    rate = args.learning_rate or learning_rate_of(args.dataset, keep_head)
    recipe = settings_of(DownstreamRecipe, args, learning_rate=rate, distill=args.distill or None)
    quant, quantisation = not args.fp32, quantisation_for(args)
    shown = folder_name(name, supernet, subnet)
    path = (os.path.join(args.output_path, f'{shown}_{args.dataset}.pth') if original else
            os.path.join(args.output_path, shown, plain_name(args.dataset), checkpoint_name(quant)))
    resumes, start = of_main(lambda: args.resume and os.path.isfile(path), job), None
    if not args.test_only and (keep_head or not (resumes or args.from_scratch)):
        start = find_start(supernet, quant, args.checkpoint_path, args.align_sample, keep_head)
    # a supernet's subnets learn on images of its largest size, which they resize
    image_size = 224 if original else max(supernet.superspace.resolutions) if keep_head else subnet.resolution
    data = open_data(args.dataset_path, args.dataset, args.valid_size, args.augment, image_size, seed=args.seed,
                     original=original)
    if args.test_only:
        evaluate(name, path, data, args, job)
        return
    calibration = None if resumes or not args.imagenet_path else open_imagenet(args.imagenet_path, image_size)
    torch.manual_seed(seed_of(args.seed, 'weights'))
    if keep_head:
        network, teacher = take_out(supernet, (subnet, choose_subnet(supernet, 'max')), start, quant)
        data = fit_classes(data, network.num_classes, start)
    else:
        network, teacher = build_network(supernet, subnet, data.num_classes, start, quant), None
        network.reset_classifier(data.num_classes)      # a new head, even for as many classes
    if args.fp32_head:
        network.get_classifier().set_fp32_mode()
    requantise(network, **quantisation)
    network.drop_rate = args.drop_rate
    identity = {'subnet_name': name, 'supernet': str(supernet), 'subnet': str(subnet),
                'num_classes': data.num_classes, 'quant_mode': quant, **quantisation_of(network),
                'dataset': plain_name(args.dataset), 'augment': args.augment, 'drop_rate': args.drop_rate,
                'from_scratch': args.from_scratch, 'kept_head_of': file_digest(start) if keep_head else None}
    if args.fp32_head:
        identity['fp32_head'] = True
    note(f'{name} in {precision(quant)} from {path if resumes else start or "random weights"}: learning rate '
         f'{recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, {data.num_classes} classes'
         + (f', {args.distill:g} of the loss from the largest subnet of {start}' if args.distill else ''))
    result = finetune(network, data, recipe, path, job, identity, teacher, calibration)
    if job.is_main:
        print(f'{name} on {args.dataset}: {Accuracy(**result)}\n{path}', flush=True)


def find_start(supernet, quant, root, align_sample, keep_head):
    """The supernet's checkpoint, with keep_head the fp32 one where it has no other; UserError also says what to do."""
    try:
        return find_checkpoint(supernet, quant, root, align_sample)
    except UserError as error:
        if keep_head and quant:
            return find_start(supernet, False, root, align_sample, keep_head)
        more = '' if keep_head else f'{" --quant_mode" if quant else ""}, or give --from_scratch for random weights'
        raise UserError(f'{error}; train it with train_supernet.py{more}') from None


def open_imagenet(path, image_size):
    """Data of pictures for the calibration alone."""
    try:
        return open_data(path, image_size=image_size, labelled=False)
    except UserError as error:
        raise UserError(f'--imagenet_path: {error} (the data set itself has --dataset_path)') from None


def evaluate(name, path, data, args, job):
    """Print the test accuracy of a file of a fine-tuning."""
    test = eval_loader(data.test, args.batch_size, job.rank, job.world_size, args.num_workers,
                       limit_images=args.num_eval_images).to(job.device)
    result = accuracy(of_main(lambda: load_network(path), job).to(job.device), test, job)
    if job.is_main:
        print(f'{name} on {args.dataset}: {result}\n{path}', flush=True)


if __name__ == '__main__':
    run(main, get_args)
