"""From a line of input.csv, a checkpoint or a network file to exported models: what the *_tools share."""
import os
from typing import NamedTuple

import torch

from ..cli import SEED, positive
from ..errors import UserError
from ..files import check_file, write_csv
from ..latency.profiling import add_host_arguments, run_on_one_core
from ..modeling.network import Network
from ..modeling.ops.lsq_plus import quantised_ops, set_fp32_mode, set_quant_mode
from ..modeling.ops.op import resize
from ..optional import need, version_of
from ..subnet_report import add_confusion, calibrated_network, complete_scales
from ..training.calibrate import calibrate
from ..training.checkpoint import precision
from ..training.classes import by_class, class_names, fit_classes, write_confusion
from ..training.data import add_data_arguments, calibration_batches, eval_loader, open_data, seed_of
from ..training.distributed import Job
from ..training.evaluate import DecodedImages, images_of
from ..zoo import CHECKPOINTS, find_checkpoint, load_network, load_supernet, subnet_of
from .chain import processor
from .feeding import preprocessing
from .measure import compare, describe
from .runtimes import ONNX, ONNX_RUNTIMES
from .store import Entry, append_line, fingerprint, model_path, read_entries, read_model, write_model
from .trace import observe

RANGE_BATCHES = 8           # of the calibration batches, for the ranges of tensors without an LSQ+ scale
RANDOM_IMAGES = 8           # pictures of noise for random weights


class Subject(NamedTuple):
    """What is exported: a torch Network in eval mode, calibration batches of images, what both came from, and facts for
    the model's metadata."""
    entry: Entry
    network: Network
    batches: list
    origin: str
    facts: dict = {}


def add_export_arguments(parser, runtime=ONNX):
    """Which subnets, which weights, where the models go, calibration images."""
    parser.add_argument('--input', default=runtime.input, help='csv of <superspace>,<supernet_choice>,'
                        '<subnet_choice> lines')
    parser.add_argument('--network', metavar='FILE', help='instead of --input: a network of downstream_cls.py or '
                        'eval_specific_net.py --save_network, as it is')
    parser.add_argument('--skip_weights', action='store_true', help='random weights: for latencies, no checkpoint')
    parser.add_argument('--checkpoint_path', default=CHECKPOINTS,
                        help="root of the supernets' checkpoints, or a checkpoint file")
    parser.add_argument('--align_sample', action='store_true', help='the supernets in <root>/<supernet>-align1')
    parser.add_argument('--model_path', default=runtime.models, help='folder of the models')
    parser.add_argument('--batch_size', type=positive(int), default=64, help='images a batch')
    parser.add_argument('--num_calib_batches', type=positive(int), default=20,
                        help='of training images, for batch-norm statistics and ranges')
    parser.add_argument('--seed', type=SEED, default=0, help='of the random weights and the calibration images')
    add_data_arguments(parser, trains=False)
    if runtime is ONNX:
        add_reduce_range(parser)


def add_reduce_range(parser):
    """--reduce_range of what writes INT8 ONNX models."""
    parser.add_argument('--reduce_range', action='store_true', help='INT8 weights of 7 bits: quicker on x86 without '
                        'VNNI, where ONNX Runtime sums those of 8 bits in a slow mode')


def add_runtime(parser):
    """--runtime of what runs ONNX models."""
    parser.add_argument('--runtime', choices=list(ONNX_RUNTIMES), default='onnxruntime', help='what runs the '
                        'models; each has INT8 models of its own')


def entries_of(args):
    """[Entry] that the arguments name, checked before anything is exported."""
    if args.network is None:
        return read_entries(args.input, 'stage' if args.skip_weights else 'weights')
    return [Entry(*subnet_of(args.network))]


def _check_weights(entries, args, quant_mode):
    """UserError where weights that will be needed are missing, before anything is written."""
    if args.network is not None and args.skip_weights:
        raise UserError(f'--network {args.network} --skip_weights: give one of them')
    if args.network is not None and quant_mode:
        _check_int8(load_network(args.network), args.network)
    elif args.network is None and not args.skip_weights:
        for entry in entries:
            for quant in (False, True)[:1 + quant_mode]:
                find_checkpoint(entry.supernet, quant, args.checkpoint_path, args.align_sample)


def _check_int8(network, path):
    if not any(op.is_quantised for op in quantised_ops(network)):
        raise UserError(f'{path}: an fp32 network, without LSQ+ scales')
    if not all(op.is_quantised for op in quantised_ops(network)):
        raise UserError(f'{path}: its head is in fp32 (--fp32_head), which has no INT8 model')


def subject(entry, args, quant_mode, data=None):
    """Subject of an Entry as the arguments say; data: Data of images_for(), None with --skip_weights."""
    if args.skip_weights:
        return random_subject(entry, quant_mode, args.seed)
    batches = DecodedImages(calibration_batches(data.train, args.batch_size, args.num_calib_batches, args.seed,
                                                args.num_workers))
    if args.network is not None:
        network = load_network(args.network)
        if quant_mode:
            _check_int8(network, args.network)
        else:
            set_fp32_mode(network)
        fit_classes(data, network.num_classes, args.network)
        return Subject(entry, network, batches, args.network, _feeding(entry, data))
    path = find_checkpoint(entry.supernet, quant_mode, args.checkpoint_path, args.align_sample)
    supernet = load_supernet(entry.supernet, path, quant_mode)
    fit_classes(data, supernet.num_classes, path)
    complete_scales(supernet, [entry.subnet], data, args.batch_size, Job(), args.seed)
    network = calibrated_network(supernet, entry.subnet, batches, Job()).eval()
    return Subject(entry, network, batches, path, _feeding(entry, data))


def _feeding(entry, data):
    """What whoever feeds the model has to know."""
    return {'preprocessing': preprocessing(data, data.image_size, entry.subnet.resolution),
            'classes': class_names(data)}


def images_for(entries, args):
    """Data for calibration and evaluation, None where random weights need none."""
    if args.skip_weights:
        return None
    size = max(max(entry.supernet.superspace.resolutions) for entry in entries)
    return open_data(args.dataset_path, args.dataset, args.valid_size, image_size=size)


def random_subject(entry, quant_mode, seed=0):
    """Subject with random weights, their batch norm calibrated on noise: the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed_of(seed, 'noise'))
    images = torch.randn(RANDOM_IMAGES, 3, entry.subnet.resolution, entry.subnet.resolution, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, str(entry.supernet), str(entry.subnet)))
        network = Network.build(entry.supernet, entry.subnet, None)
    calibrate(network, [images])
    if quant_mode:
        set_quant_mode(network)
    return Subject(entry, network.eval(), [(images, None)], f'random weights, seed {seed}')


def export(subject, folder, quant_mode, runtime=ONNX, **options):
    """(path, model, whether it was written now): a model of the same subnet, weights and options is used again.

    options: reduce_range=True for runtime.export_int8().
    """
    entry, network = subject.entry, subject.network
    path = model_path(folder, entry, quant_mode, runtime.ending, runtime.mark)
    options = {**runtime.options, **options} if quant_mode else {}
    calibration = [images for images, _ in zip(images_of(subject.batches), range(RANGE_BATCHES))] if quant_mode else []
    key = fingerprint(network, entry.supernet, entry.subnet, quant_mode, *map(_digest, calibration),
                      *options.items(), *subject.facts.items())
    model = read_model(path, runtime, key)
    if model is not None:
        return path, model, False
    facts = {'fingerprint': key, 'supernet': str(entry.supernet), 'subnet': str(entry.subnet),
             'weights': subject.origin, **subject.facts}
    if quant_mode:
        model = runtime.export_int8(network, observe(network, calibration), facts, **options)
    else:
        model = runtime.export_fp32(network, facts)
    write_model(path, runtime.dump(model))
    return path, model, True


def export_all(args, runtime, each=None):
    """What export_onnx.py and export_tflite.py do; each(subject, model): after every INT8 model."""
    entries = entries_of(args)
    for package in runtime.exporters:
        need(package)
    data = images_for(entries, args)
    _check_weights(entries, args, args.quant_mode)
    for entry in entries:
        for quant_mode in (False, True)[:1 + (args.quant_mode or args.skip_weights)]:
            source = subject(entry, args, quant_mode, data)
            path, model, written = export(source, args.model_path, quant_mode, runtime, **_options(args, quant_mode))
            print(f'{path}  ({source.origin}{"" if written else "; as it was"})', flush=True)
            if each is not None and quant_mode:
                each(source, model)


def add_evaluation_arguments(parser, runtime):
    """Those of the export, and which images."""
    add_export_arguments(parser, runtime)
    parser.add_argument('--quant_mode', action='store_true', help='INT8 models too')
    parser.add_argument('--only_int8', action='store_true', help='INT8 models, not those of fp32')
    parser.add_argument('--num_eval_images', type=positive(int), help='for short runs; default: all test images')
    parser.add_argument('--threads', type=positive(int), default=1, help=f'of {runtime.name}')
    parser.add_argument('--output', metavar='FILE', help='CSV of the results')
    add_confusion(parser)


def evaluate(args, runtime, open_model):
    """What eval_onnx.py and eval_tflite.py do; open_model(model) gives a function from images to logits."""
    if args.skip_weights:
        raise UserError('--skip_weights: random weights have no accuracy')
    entries, rows = entries_of(args), []
    if args.output:
        check_file(args.output)
    for package in runtime.packages:
        need(package)
    data = images_for(entries, args)
    _check_weights(entries, args, args.quant_mode or args.only_int8)
    kinds = (True,) if args.only_int8 else (False, True)[:1 + args.quant_mode]
    for entry in entries:
        print(f'{entry.supernet} {entry.subnet}')
        for quant_mode in kinds:
            source = subject(entry, args, quant_mode, data)
            path, model, _ = export(source, args.model_path, quant_mode, runtime, **_options(args, quant_mode))
            test = eval_loader(data.test, args.batch_size, workers=args.num_workers, limit_images=args.num_eval_images)
            *figures, images, table = compare(source.network, open_model(model), test, resize)
            kind = precision(quant_mode)
            print(f'  {kind}: {describe(runtime.name, *figures, images)}\n        {by_class(table, class_names(data))}'
                  f'\n        {path}', flush=True)
            if args.confusion:                  # of the last model, INT8 where there is one
                write_confusion(args.confusion, table, class_names(data))
            rows.append([entry.supernet, entry.subnet, kind, *(f'{figure:.4f}' for figure in figures), images])
            if args.output:
                write_csv(args.output, ('supernet', 'subnet', 'kind', 'torch', runtime.ending, 'agree', 'error',
                                        'images'), rows)


def add_benchmark_arguments(parser, runtime):
    """Which subnets, where models and latencies go, how many runs."""
    parser.add_argument('--input', default=runtime.input, help='csv of <superspace>,<supernet_choice>,<subnet_choice> '
                        'lines')
    parser.add_argument('--model_path', default=runtime.models, help='folder of the models')
    parser.add_argument('--output', metavar='FILE', help='csv to append to; default: <model_path>/latency.csv')
    add_host_arguments(parser, runtime.name)
    if runtime is ONNX:
        add_reduce_range(parser)
    parser.add_argument('--warmup', type=positive(int), default=100, help='untimed runs of each model')
    parser.add_argument('--runs', type=positive(int), default=100, help='timed runs of each model')


def benchmark(args, runtime, packages, measure, place=None):
    """What both benchmark.py do; measure({'fp32': path, 'int8': path}) gives {kind: Latency} and needs the packages.

    place: (device, runtime) as latency.csv names them; default: this machine and the version of the runtime.
    Missing models are exported with random weights: latency does not depend on them.
    """
    output, entries = args.output or os.path.join(args.model_path, 'latency.csv'), read_entries(args.input)
    check_file(output)
    for package in packages:
        need(package)
    if place is None:
        run_on_one_core(args)
    place = place or (processor(), f'{runtime.name} {version_of(runtime.packages[-1])}')
    print(f'on {place[0]}: {place[1]}', flush=True)
    for entry in entries:
        paths = {}
        for kind, quant_mode in (('fp32', False), ('int8', True)):
            path = paths[kind] = model_path(args.model_path, entry, quant_mode, runtime.ending, runtime.mark)
            if read_model(path, runtime) is None:
                for package in runtime.exporters:
                    need(package)
                export(random_subject(entry, quant_mode), args.model_path, quant_mode, runtime,
                       **_options(args, quant_mode))
                print(f'exported {path} with random weights', flush=True)
        times = measure(paths)
        fp32, int8 = times['fp32'].typical, times['int8'].typical
        print(f'{entry.supernet} {entry.subnet}')
        for kind, latency in times.items():
            print(f'  {kind}: {latency}')
        print(f'  speed-up {fp32 / int8:.2f}', flush=True)
        append_line(output, ','.join([
            f'{entry.supernet.superspace.name}-{entry.choice}-{entry.subnet}', f'{fp32:.4f}', f'{int8:.4f}',
            f'{fp32 / int8:.4f}', *(name.replace(',', '') for name in place)]))
    print(output)


def _options(args, quant_mode):
    """Options of export() as the arguments say."""
    return {'reduce_range': True} if quant_mode and vars(args).get('reduce_range') else {}


def _digest(images):
    """What tells calibration images apart, near enough: their sum and that of their squares."""
    return tuple(images.shape), float(images.double().sum()), float(images.double().square().sum())
