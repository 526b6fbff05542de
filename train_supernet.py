"""Train a supernet (sandwich rule, in-place distillation), in fp32, then with LSQ+ (--quant_mode).

    python -m torch.distributed.launch --nproc_per_node=4 train_supernet.py \\
        --config-file supernet_training_configs/train.yaml --superspace mobilew --supernet_choice 123214-012321 \\
        --batch_size_per_gpu 64 --resume

Writes <output_path>/<supernet>-align0/checkpoint.pth, with --quant_mode lsq.pth from it, and beside them the best
state so far, the effective configuration and TensorBoard's curves. With --init_block_kd, and a recipe of
supernet_training_configs/block_kd*.yaml, it starts from the blocks of train_block_kd.py instead of random weights.
"""
import dataclasses
import os

import torch

from modules.block_kd.into_supernet import learn_rest, start_from_blocks
from modules.cli import parser, run
from modules.errors import UserError
from modules.modeling.ops.lsq_plus import requantise, set_quant_mode
from modules.modeling.supernet import Supernet
from modules.search_space.named import find_supernet
from modules.search_space.superspace import SUPERSPACES
from modules.settings import add_settings, load_config
from modules.training.acceleration import use_amp
from modules.training.checkpoint import checkpoint_folder, checkpoint_name
from modules.training.data import add_data_arguments, open_data, seed_of
from modules.training.distributed import add_distributed_arguments, distributed_job, of_main
from modules.training.evaluate import Accuracy
from modules.training.log import note
from modules.training.supernet_trainer import SupernetRecipe, train_supernet, validate_checkpoint


def get_args():
    p = parser(__doc__)
    p.add_argument('--config-file', '--config_file', dest='config_file',
                   default='supernet_training_configs/train.yaml', help='YAML file of the recipe')
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), help='not needed with a full supernet name')
    p.add_argument('--supernet_choice', required=True, help='supernet, such as 121122-133333 or spaceevo@vnni')
    p.add_argument('--output_path', default='./checkpoints/supernet_training', help='root of the checkpoints')
    p.add_argument('--test_only', action='store_true', help='validate the checkpoint of this stage')
    p.add_argument('--init_block_kd', metavar='FOLDER', help='start from the blocks that block KD has trained there, '
                   '--quant_mode from their lsq.pth; default: from random weights')
    add_data_arguments(p)
    p.set_defaults(augment=None, valid_size=None)           # keys of the configuration
    add_settings(p, SupernetRecipe, skip=('augment', 'valid_size'), from_file=True)
    add_distributed_arguments(p)
    return p.parse_args()


def main(args):
    if args.from_scratch and args.init_block_kd:
        raise UserError('--from_scratch and --init_block_kd: give one of them')
    supernet = find_supernet(args.supernet_choice, args.superspace)
    recipe = load_config(SupernetRecipe, args.config_file, vars(args), 'quant' if args.quant_mode else None)
    if 0 < recipe.max_batch_size_per_gpu < recipe.batch_size_per_gpu:
        note(f'--batch_size_per_gpu {recipe.batch_size_per_gpu} is cut to {recipe.max_batch_size_per_gpu}')
        recipe = dataclasses.replace(recipe, batch_size_per_gpu=recipe.max_batch_size_per_gpu)
    data = open_data(args.dataset_path, args.dataset, recipe.valid_size, recipe.augment,
                     max(supernet.superspace.resolutions), seed=recipe.seed)
    if not len(data.valid):
        raise UserError(f'--valid_size {recipe.valid_size}: no held-out images to validate on')
    folder = checkpoint_folder(args.output_path, supernet, recipe.align_sample)
    name = checkpoint_name(recipe.quant_mode)
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        recipe = dataclasses.replace(recipe, amp=use_amp(recipe.amp, job.device))
        model = build(supernet, data.num_classes, recipe)
        blocks = None
        if args.init_block_kd and not args.test_only:
            students, blocks, state = of_main(lambda: (*start_from_blocks(model, args.init_block_kd, recipe.quant_mode),
                                                       model.state_dict()), job)
            model.load_state_dict(state)
            if not of_main(lambda: recipe.resume and os.path.isfile(os.path.join(folder, name)), job):
                learn_rest(model, students, data, recipe.batch_size_per_gpu, recipe.init_steps, recipe.seed, job.device,
                           recipe.num_workers)
        requantise(model, recipe.weight_bits)
        if args.test_only:
            results = validate_checkpoint(model, data, recipe, folder, job)
        else:
            results = train_supernet(model, data, recipe, folder, job, blocks)
    if job.is_main:
        for subnet, result in results.items():
            print(f'{supernet} {subnet}: {Accuracy(**result)}')
        print(os.path.join(folder, name))


def build(supernet, num_classes, recipe):
    """The Supernet with seeded random weights, the same on every rank."""
    torch.manual_seed(seed_of(recipe.seed, 'weights'))
    model = Supernet(supernet, num_classes)
    model.initialize_weights(recipe.zero_last_gamma)
    return set_quant_mode(model) if recipe.quant_mode else model


if __name__ == '__main__':
    run(main, get_args)
