"""Search a trained LSQ+ supernet for the most accurate subnets of a predicted int8 latency.

    python -m torch.distributed.launch --nproc_per_node=4 search_subnet.py --superspace onnxw \\
        --supernet_choice 121122-133333 --dataset_path ./dataset --output_path checkpoints/search_subnet \\
        --checkpoint_path checkpoints/supernet_training --latency_constraint 15 --latency_delta 2 --batch_size 32 \\
        --num_calib_batches 20

Evolution over the subnets of c - d to c ms by their int8 accuracy on held-out training images; the ten best are
tested on the test set. Writes to <output_path>/<supernet>/: history.csv (every score as it comes), scored.csv,
best_c15_d2.csv, search.png and search.log. A killed search continues with --resume. docs/subnet_search.md has more.
"""
import os
import random

from modules.cli import parser, positive, run, within
from modules.errors import UserError
from modules.files import file_digest
from modules.latency import open_predictor
from modules.search_space.named import find_supernet
from modules.search_space.sampling import sample_subnet
from modules.search_space.superspace import SUPERSPACES
from modules.settings import add_settings, settings_of
from modules.subnets.evaluate import (
    EvaluationSettings,
    add_evaluation_arguments,
    complete_scales,
    images_to_test,
    open_supernet,
)
from modules.subnets.results import all_members, evaluate_best, write_results
from modules.subnets.search import (
    BEST,
    SearchRecipe,
    SharedHistory,
    SubnetSpace,
    best_members,
    initial_population,
    measure_with,
    note_trained_images,
    score_subnets,
    search_windows,
    trained_valid_size,
    window_below,
)
from modules.training.acceleration import choose_quantisers
from modules.training.checkpoint import precision
from modules.training.data import calibration_batches, eval_loader
from modules.training.distributed import check_same, distributed_job, share
from modules.training.evaluate import DecodedImages, images_of
from modules.training.log import run_log
from modules.training.threads import default_workers
from modules.zoo import CHECKPOINTS, find_checkpoint

SCALE_SUBNETS = 50              # random ones, whose LSQ+ scales have values before the first subnet is scored


def get_args():
    p = parser(__doc__)
    p.add_argument('--superspace', choices=sorted(SUPERSPACES), help='not needed with a full supernet name')
    p.add_argument('--supernet_choice', required=True, help='supernet, such as 121122-133333 or spaceevo@vnni')
    p.add_argument('--latency_constraint', type=positive(float), nargs='+', required=True,
                   help='c in ms: largest latency, one search each; they share what is scored')
    p.add_argument('--latency_delta', type=positive(float), default=5.0,
                   help='d in ms: smallest latency is c - d; where that is negative, two thirds of c')
    p.add_argument('--checkpoint_path', default=CHECKPOINTS,
                   help='root of the checkpoints, <root>/<supernet>-align0/lsq.pth, or a checkpoint file')
    p.add_argument('--output_path', default='./checkpoints/search_subnet', help='folder of the results')
    add_settings(p, SearchRecipe)
    p.add_argument('--arch_mutate_prob', type=within(float, 0, 1), default=0.3,
                   help='probability of each depth, k, w, e')
    p.add_argument('--resolution_mutate_prob', type=within(float, 0, 1), default=0.5,
                   help='probability of the resolution')
    p.add_argument('--align_sample', action='store_true', help='all blocks of a stage share k, w, e; -align1')
    p.add_argument('--num_valid_images', type=positive(int), help='held-out images that score a subnet; default: all')
    p.add_argument('--num_threads', type=within(int, 1, 1024),
                   help='subnets measured at a time by a rank, on a CPU; default: its share of the cores')
    p.add_argument('--resume', action='store_true', help='continue with the history in the output directory')
    add_evaluation_arguments(p)
    p.add_argument('--fp32', action='store_true', help='search by fp32 accuracy, of checkpoint.pth')
    p.set_defaults(quant_mode=True, valid_size=None)        # the supernet's, published: 10000
    args = p.parse_args()
    args.quant_mode = not args.fp32
    return args


def main(args):
    supernet = find_supernet(args.supernet_choice, args.superspace)
    predictor = open_predictor(args, supernet.superspace)
    path = find_checkpoint(supernet, args.quant_mode, args.checkpoint_path, args.align_sample)
    space = SubnetSpace(supernet, predictor, args.arch_mutate_prob, args.resolution_mutate_prob, args.align_sample)
    recipe = settings_of(SearchRecipe, args)
    windows = [window_below(c, args.latency_delta) for c in sorted(set(args.latency_constraint))]
    starts = {window: initial_population(space, window, recipe.population_size,
                                         random.Random(f'{args.seed} start {window}')) for window in windows}
    if args.valid_size is None:
        args.valid_size = trained_valid_size(path) or 10000
    model, data = open_supernet(supernet, path, args.quant_mode, args.dataset_path, args.dataset, args.valid_size)
    if not len(data.valid):
        raise UserError(f'--valid_size {args.valid_size}: no held-out images to search with')
    note_trained_images(path, len(data.valid))
    kind = precision(args.quant_mode)
    settings = {'supernet': str(supernet), 'checkpoint': file_digest(path), 'numbers': kind, 'seed': args.seed,
                'data set': args.dataset, 'training images': len(data.train), 'align_sample': args.align_sample,
                'valid images': min(len(data.valid), args.num_valid_images or len(data.valid)),
                'calibration images': args.batch_size * args.num_calib_batches, 'batch_size': args.batch_size}
    folder = os.path.join(args.output_path, str(supernet) + ('-align1' if args.align_sample else '')
                          + ('' if args.quant_mode else '-fp32'))
    with distributed_job(args.local_rank, args.device, args.deterministic) as job, \
            SharedHistory(folder, settings, job, args.resume) as history, \
            run_log(os.path.join(folder, 'search.log'), args.resume, job.is_main) as say:
        check_same("the supernet's checkpoint", settings['checkpoint'], job)
        say(f'{supernet} in {kind} from {path}; {recipe}; {len(history.entries)} subnets scored before; {settings}')
        model.to(job.device)
        choose_quantisers('auto', args.quant_mode, job.device)
        calibration = DecodedImages(calibration_batches(data.train, args.batch_size, args.num_calib_batches, args.seed,
                                                        args.num_workers)).to(job.device)
        valid = DecodedImages(eval_loader(data.valid, args.batch_size, workers=args.num_workers,
                                          limit_images=args.num_valid_images)).to(job.device)
        rng = random.Random(f'{args.seed} scales')
        some = [sample_subnet(supernet, rng, args.align_sample) for _ in range(SCALE_SUBNETS)]
        complete_scales(model, some, lambda: next(images_of(calibration))[:args.batch_size], job)
        threads = share(1 if job.device.type == 'cuda' else args.num_threads or default_workers(), job)
        measure = measure_with(model, calibration, valid, job, threads)
        found = search_windows(space, starts, lambda subnets, tick: score_subnets(subnets, measure, history, job,
                                                                                  threads, tick),
                               recipe, args.seed, job, say)
        members = all_members(space, history, found)
        best = {window: best_members(members, window) for window in windows}
        say(f'testing the best {BEST} of each window')
        test = images_to_test(data, job, settings_of(EvaluationSettings, args), BEST * len(best))
        tested = evaluate_best(model, best, calibration, test, job)
        if job.is_main:
            write_results(folder, space, members, best, tested, kind, say)


if __name__ == '__main__':
    run(main, get_args)
