"""Evaluate a published network: test accuracy, FLOPs, params and predicted int8 latency.

    python eval_specific_net.py --model_name SEQnet@vnni-A0 --dataset_dir ./dataset --quant_mode
    python eval_specific_net.py --model_name spaceevo@vnni --dataset_dir ./dataset

A network (SEQnet@…) is taken out of its supernet's checkpoint after batch-norm calibration and runs as what is
deployed; of a supernet (spaceevo@…) the largest and the smallest subnet are evaluated. Checkpoints:
<checkpoint_path>/<supernet>/checkpoint.pth, with --quant_mode lsq.pth; <supernet> is spaceevo@vnni or its encoding
with -align0. Writes a CSV below --output_path.
"""
import os

from modules.cli import parser, run
from modules.errors import UserError
from modules.files import check_file
from modules.latency import open_predictor
from modules.search_space.encoding import subnet_config
from modules.search_space.named import EXTREMES, find_subnet, find_supernet, named_subnets, named_supernets
from modules.settings import settings_of
from modules.subnets.evaluate import (
    EvaluationSettings,
    add_confusion,
    add_evaluation_arguments,
    calibrated_network,
    evaluate_all,
    evaluate_static,
    evaluate_subnet,
    open_supernet,
    prepare,
)
from modules.training.checkpoint import precision
from modules.training.classes import class_names
from modules.training.distributed import distributed_job
from modules.zoo import CHECKPOINTS, find_checkpoint, save_network


def get_args():
    p = parser(__doc__)
    p.add_argument('--model_name', required=True, help='spaceevo@vnni, SEQnet@vnni-A0, … (data/search_results.yaml)')
    p.add_argument('--checkpoint_path', '--resume', dest='checkpoint_path', default=CHECKPOINTS,
                   help='root of the supernets\' checkpoints, or a checkpoint file')
    p.add_argument('--save_network', metavar='FILE', help='write the calibrated SEQnet, for modules.zoo.load_network')
    p.add_argument('--output_path', default='./checkpoints/eval_specific_net', help='folder of the CSV')
    add_evaluation_arguments(p)
    add_confusion(p)
    return p.parse_args()


def main(args):
    supernet, subnets, published = find_model(args.model_name)
    if args.save_network and len(subnets) > 1:
        raise UserError(f'--save_network {args.save_network}: {args.model_name} is a supernet; give a SEQnet@…')
    if args.save_network:
        check_file(args.save_network)
    predictor = open_predictor(args, supernet.superspace)
    latencies = {name: predictor.predict_subnet(subnet_config(supernet, s)) for name, s in subnets.items()}
    path = find_checkpoint(supernet, args.quant_mode, args.checkpoint_path, name=published)
    model, data = open_supernet(supernet, path, args.quant_mode, args.dataset_path, args.dataset, args.valid_size)
    kind = precision(args.quant_mode)
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        images = prepare(f'{args.model_name} in {kind} from {path}', model, data, subnets,
                         settings_of(EvaluationSettings, args), job)
        evaluate_all(model, subnets, images, job, latencies,
                     os.path.join(args.output_path, f'{args.model_name}_{kind}.csv'), class_names(data),
                     evaluate_static if args.model_name in named_subnets() else evaluate_subnet, args.confusion)
        if args.save_network:
            subnet, = subnets.values()
            network = calibrated_network(model, subnet, images[0], job)
            if job.is_main:
                save_network(args.save_network, network, supernet, subnet, args.quant_mode)
                print(args.save_network)


def find_model(name):
    """(encoding.Supernet, {name: Subnet}, published supernet name) of a published supernet or network."""
    if name in named_supernets():
        supernet = find_supernet(name)
        return supernet, {f'{name} {extreme}': pick(supernet) for extreme, pick in EXTREMES.items()}, name
    if name in named_subnets():
        supernet, subnet = find_subnet(name)
        return supernet, {name: subnet}, named_subnets()[name][0]
    raise UserError(f'--model_name {name}: published are {" ".join([*named_supernets(), *named_subnets()])}; '
                    'other supernets and subnets: eval_supernet.py --mode acc')


if __name__ == '__main__':
    run(main, get_args)
