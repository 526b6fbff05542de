"""A supernet from block KD against one from random weights: accuracy of its subnets after as many steps.

    python benchmarks/supernet_start.py --supernets demo-000-011 demo-121-011 --dataset_path cifar10 --steps 300 \\
        --base_lr 0.02 0.04 0.08 --init_block_kd checkpoints/block_kd --seeds 0 1
    python benchmarks/supernet_start.py --table

Trains each supernet by supernet_training_configs/demo_short.yaml (block_kd_short.yaml with --init_block_kd) and
evaluates, on held-out images, its largest and smallest subnet, random ones, and random ones of the upper half of the
predicted INT8 latencies. A line of JSON for each run goes to <output>/results.jsonl; --table prints what is there,
means over seeds with standard errors. A run that is there is not run again, one that was stopped continues.
"""
import contextlib
import itertools
import json
import os
import random
import shutil
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from modules import ROOT
from modules.block_kd.into_supernet import learn_rest, start_from_blocks
from modules.cli import SEED, parser, positive, run
from modules.errors import UserError
from modules.figures import new_figure, save_figure
from modules.latency import LatencyPredictor
from modules.search_space.encoding import parse_supernet, subnet_config
from modules.search_space.sampling import max_subnet, min_subnet, sample_subnet
from modules.settings import load_config
from modules.subnets.evaluate import complete_scales
from modules.training.data import calibration_batches, eval_loader, open_data
from modules.training.distributed import Job
from modules.training.evaluate import DecodedImages, evaluate_subnet, images_of
from modules.training.supernet_trainer import SupernetRecipe, train_supernet
from train_supernet import build

CONFIGS = os.path.join(ROOT, 'supernet_training_configs')
KINDS = ('largest', 'upper', 'random', 'smallest')


def get_args():
    p = parser(__doc__)
    p.add_argument('--supernets', nargs='+', default=[], help='such as demo-000-011')
    p.add_argument('--steps', type=positive(int), default=300, help='steps of training, 32 images each')
    p.add_argument('--base_lr', type=positive(float), nargs='+', default=[0.04], help='learning rates')
    p.add_argument('--seeds', type=SEED, nargs='+', default=[0], help='seeds of training')
    p.add_argument('--init_block_kd', metavar='FOLDER', help='blocks to start from; default: random weights')
    p.add_argument('--quant_mode', action='store_true', help='train and evaluate in INT8')
    p.add_argument('--after', metavar='FOLDER', help='--quant_mode from a copy of an fp32 run: its folder in --output')
    p.add_argument('--start', help='what the table calls the start; default: scratch or block KD')
    p.add_argument('--curve', type=positive(int), default=1, help='validations of the largest, smallest and a random '
                   'subnet, spread over the training')
    p.add_argument('--subnets', type=positive(int), default=4, help='random ones, and as many of the upper latencies')
    p.add_argument('--images', type=positive(int), default=1600, help='held-out images')
    p.add_argument('--dataset', default='imagenet', help='data set of train_supernet.py')
    p.add_argument('--dataset_path', default=os.path.join(ROOT, 'dataset'), help='folder of the data')
    p.add_argument('--name', help='what the table calls the data; default: --dataset')
    p.add_argument('--platform', default='epyc_zen3_ort1.32_1t', help='platform of the predicted latencies')
    p.add_argument('--output', default=os.path.join('checkpoints', 'benchmarks', 'supernet_start'), help='folder')
    p.add_argument('--table', action='store_true', help='print the results')
    p.add_argument('--picture', metavar='FILE', help='draw accuracy over steps of the runs with a --curve')
    return p.parse_args()


def recipe_of(from_blocks, **overrides):
    """SupernetRecipe of the short recipe for a start from blocks or from random weights, its overrides above it."""
    config = os.path.join(CONFIGS, 'block_kd_short.yaml' if from_blocks else 'demo_short.yaml')
    return load_config(SupernetRecipe, config, {'resume': True, 'align_sample': True, **overrides})


def trained(supernet, recipe, folder, dataset, dataset_path, init_block_kd=None):
    """(supernet trained into `folder`, Data); from the blocks of a folder, or as the recipe says."""
    data = open_data(dataset_path, dataset, recipe.valid_size, recipe.augment, max(supernet.superspace.resolutions),
                     seed=recipe.seed)
    model, blocks = build(supernet, data.num_classes, recipe), None
    if init_block_kd:
        students, blocks = start_from_blocks(model, init_block_kd, recipe.quant_mode)
        learn_rest(model, students, data, recipe.batch_size_per_gpu, recipe.init_steps, recipe.seed)
    train_supernet(model, data, recipe, folder, Job(), blocks)
    return model, data


def train(args, supernet, rate, seed, folder):
    """trained() in --curve parts, each an epoch for the trainer."""
    from_blocks = args.init_block_kd or args.after
    recipe = recipe_of(from_blocks, epochs=args.curve, max_steps=args.steps // args.curve, base_lr=rate, seed=seed,
                       warmup_epochs=args.curve * recipe_of(from_blocks).warmup_epochs, num_calib_batches=8,
                       num_valid_images=args.images if args.curve > 1 else 100, quant_mode=args.quant_mode,
                       from_scratch=not args.after)
    if args.after:
        os.makedirs(folder, exist_ok=True)
        shutil.copy(os.path.join(args.output, args.after, 'checkpoint.pth'), folder)
    return trained(supernet, recipe, folder, args.dataset, args.dataset_path, not args.after and args.init_block_kd)


def curve(folder, quant):
    """{kind: [(step, top-1), …]} of the validations of training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(os.path.join(folder, 'tensorboard', 'lsq' if quant else 'fp32')).Reload()
    return {kind: [(event.step, event.value) for event in events.Scalars(f'validation top-1/{name}')]
            for kind, name in (('largest', 'max'), ('smallest', 'min'), ('random', 'random'))}


def evaluated_subnets(supernet, predictor, count):
    """{kind: [Subnet, …]}: the same ones for every run of a supernet."""
    rng = random.Random(f'{supernet}')

    def draw(low=0.0):
        for _ in range(10000):
            subnet = sample_subnet(supernet, rng, align=True)
            if predictor.predict_subnet(subnet_config(supernet, subnet)) >= low:
                return subnet
        raise UserError(f'{supernet}: no random subnet of {low:.3f} ms')
    extremes = [min_subnet(supernet), max_subnet(supernet)]
    ms = [predictor.predict_subnet(subnet_config(supernet, subnet)) for subnet in extremes]
    return {'largest': extremes[1:], 'upper': [draw(sum(ms) / 2) for _ in range(count)],
            'random': [draw() for _ in range(count)], 'smallest': extremes[:1]}


def evaluate(args, model, data):
    """{kind: [top-1, …]} of a trained supernet on held-out images."""
    supernet, job = model.encoding, Job()
    calibration = DecodedImages(calibration_batches(data.train, 32, 8))
    valid = DecodedImages(eval_loader(data.valid, 64, limit_images=args.images))
    subnets = evaluated_subnets(supernet, LatencyPredictor(args.platform), args.subnets)
    complete_scales(model, [subnet for members in subnets.values() for subnet in members],
                    lambda: next(images_of(calibration)), job)
    return {kind: [evaluate_subnet(model, subnet, calibration, valid, job).top1 for subnet in members]
            for kind, members in subnets.items()}


def read(path):
    """All results, [{…}, …]."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]
    return []


def print_table(results):
    """A row for each setting: means over seeds, with standard errors where there are several."""
    groups = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in ('data', 'supernet', 'precision', 'start', 'steps', 'base_lr')),
                          []).append(result['top1'])
    print('| data | supernet | precision | start | steps | learning rate | seeds | ' + ' | '.join(KINDS) + ' |')
    print('|---' * (7 + len(KINDS)) + '|')
    for key, runs in sorted(groups.items()):
        cells = []
        for kind in KINDS:
            means = [statistics.fmean(run[kind]) for run in runs]
            error = f' ± {statistics.stdev(means) / len(means) ** 0.5:.1f}' if len(means) > 1 else ''
            cells.append(f'{statistics.fmean(means):.1f}{error}')
        print(f'| {" | ".join(map(str, key))} | {len(runs)} | {" | ".join(cells)} |')


def draw(results, path):
    """Picture of the validations of every run that has several: accuracy over steps, a panel for each supernet."""
    results = [result for result in results if len(result['curve']['random']) > 1]
    panels = sorted({(result['data'], result['supernet']) for result in results})
    colours = {start: f'C{i}' for i, start in enumerate(sorted({result['start'] for result in results}))}
    figure, axes = new_figure(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        for result in results:
            if (result['data'], result['supernet']) == panel:
                for kind, line in (('largest', '-'), ('random', '--'), ('smallest', ':')):
                    axis.plot(*zip(*result['curve'][kind]), line, color=colours[result['start']],
                              label=f'{result["start"]}, {kind}' if result['seed'] == 0 else None)
        axis.set(title=f'{panel[1]}, {panel[0]}', xlabel='steps of 32 images', ylabel='top-1 of held-out images, %')
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)


def main(args):
    path = os.path.join(args.output, 'results.jsonl')
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    start = args.start or ('block KD' if args.init_block_kd else 'scratch')
    for supernet, rate, seed in itertools.product(args.supernets, args.base_lr, args.seeds):
        key = {'data': args.name or args.dataset, 'supernet': supernet, 'start': start, 'steps': args.steps,
               'precision': 'int8' if args.quant_mode else 'fp32', 'base_lr': rate, 'seed': seed}
        if not any(all(result[name] == value for name, value in key.items()) for result in read(path)):
            folder = os.path.join(args.output, '-'.join(str(value).replace(' ', '_') for value in key.values()))
            model, data = train(args, parse_supernet(supernet), rate, seed, folder)
            line = json.dumps({**key, 'top1': evaluate(args, model, data), 'curve': curve(folder, args.quant_mode)})
            with open(path, 'a', encoding='utf-8') as file:
                file.write(line + '\n')
            print(line, flush=True)
    if args.table:
        print_table(read(path))
    if args.picture:
        draw(read(path), args.picture)


if __name__ == '__main__':
    run(main, get_args)
