"""From a line of input.csv, a checkpoint or a network file to exported models: what export_*.py and eval_*.py do."""
import codecs
import csv
import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from ..errors import UserError
from ..modeling.network import Network
from ..modeling.ops.lsq_plus import quantisation_of, quantised_ops, set_fp32_mode, set_quant_mode
from ..optional import need
from ..search_space.encoding import Subnet, Supernet, parse_subnet, parse_supernet
from ..search_space.superspace import SearchSpaceError
from ..settings import add_settings, setting
from ..subnets.evaluate import EvaluationSettings, calibrated_network, complete_scales, images_to_test
from ..training.calibrate import calibrate
from ..training.classes import class_names, fit_classes
from ..training.data import add_data_arguments, calibration_batches, open_data, seed_of
from ..training.distributed import Job
from ..training.evaluate import DecodedImages, images_of
from ..zoo import CHECKPOINTS, find_checkpoint, load_network, load_supernet, subnet_of
from .predict import preprocessing
from .quantisation import observe
from .runtimes import ONNX, ONNX_RUNTIMES

VERSION = 4                     # of the exporters: another number makes every model be written again
RANGE_BATCHES = 8               # of the calibration batches, for the ranges of tensors without an LSQ+ scale
RANDOM_IMAGES = 8               # pictures of noise for random weights


# -- which subnets ----------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    """One line of input.csv; written: its supernet's choice as it stands there, None for 151122_023231."""
    supernet: Supernet
    subnet: Subnet
    written: str | None = None

    @property
    def choice(self):
        return self.written or self.supernet.choice

    @property
    def name(self):
        """onnxw_151122_023231_1a2b3c: superspace, choice, the beginning of sha256(subnet)."""
        return self.named(self.choice)

    def named(self, choice):
        """The name with the choice in another spelling."""
        digest = hashlib.sha256(str(self.subnet).encode()).hexdigest()[:6]
        return f'{self.supernet.superspace.name}_{choice}_{digest}'


def read_entries(path, allow='stage'):
    """[Entry] of a csv of `<superspace>,<supernet_choice>,<subnet_choice>` lines; # begins a comment.

    allow: as for encoding.check_subnet().
    UserError names the number of a wrong line; the same subnet twice is wrong too.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file; a line of it is <superspace>,<supernet_choice>,<subnet_choice>')
    entries = {}
    with open(path, 'rb') as f:
        lines = f.read().removeprefix(codecs.BOM_UTF8).splitlines()
    for number, line in enumerate(lines, 1):
        where = f'{path} line {number}'
        try:
            row = [cell.strip() for cell in next(csv.reader([line.decode()], strict=True), [])]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f'{where}: not a line of values ({error})') from None
        if not any(row) or row[0].startswith('#'):
            continue
        entry, written = _parse_entry(row, where, allow)
        if entry in entries:
            raise UserError(f'{where}: the same subnet as in line {entries[entry][0]}')
        entries[entry] = number, entry._replace(written=written)
    if not entries:
        raise UserError(f'{path}: no subnet in it; a line is <superspace>,<supernet_choice>,<subnet_choice>')
    return [entry for _, entry in entries.values()]


def _parse_entry(row, where, allow):
    """(Entry, the supernet's choice as it is written) of a line's cells."""
    if len(row) != 3:
        raise UserError(f'{where}: {len(row)} values, expected <superspace>,<supernet_choice>,<subnet_choice>')
    space, choice, subnet = row
    try:
        supernet = parse_supernet(choice, space)
        return Entry(supernet, parse_subnet(subnet, supernet, allow)), choice.removeprefix(f'{space}-')
    except SearchSpaceError as error:
        raise UserError(f'{where}: {error}') from None


# -- flags ------------------------------------------------------------------------------------------------------

SUBNETS = 'csv of <superspace>,<supernet_choice>,<subnet_choice> lines'
REDUCE_RANGE = ('INT8 weights of 7 bits: quicker on x86 without VNNI, where ONNX Runtime sums those of 8 bits in a '
                'slow mode')


@dataclass(kw_only=True)
class ExportSettings:
    """Which subnets, which weights, where the models go, calibration images."""
    input: str = setting('', SUBNETS)
    network: str | None = setting(None, 'instead of --input: a network of downstream_cls.py or eval_specific_net.py '
                                  '--save_network, as it is')
    skip_weights: bool = setting(False, 'random weights: for latencies, no checkpoint')
    checkpoint_path: str = setting(CHECKPOINTS, "root of the supernets' checkpoints, or a checkpoint file")
    align_sample: bool = setting(False, 'the supernets in <root>/<supernet>-align1')
    model_path: str = setting('', 'folder of the models')
    batch_size: int = setting(64, 'images a batch', least=1)
    num_calib_batches: int = setting(20, 'batches of training images, for batch-norm statistics and ranges', least=1)
    seed: int = setting(0, 'seed of the random weights and the calibration images', most=2 ** 32 - 1)
    quant_mode: bool = setting(False, 'INT8 models too (always with --skip_weights)')
    reduce_range: bool = setting(False, REDUCE_RANGE)
    dataset_path: str = setting('', 'of the images', flags=())          # these four: of add_data_arguments()
    dataset: str = setting('', 'of the images', flags=())
    valid_size: int = setting(0, 'training images held out', flags=())
    num_workers: int = setting(0, 'loader processes', flags=())

    def kinds(self):
        """Whether to quantise, for each model of a network in turn; random weights are for latencies, of both."""
        return [False, True] if self.quant_mode or self.skip_weights else [False]


def add_export_arguments(parser, runtime=ONNX, kind=ExportSettings):
    """The flags of ExportSettings, or of a class of it, with the defaults of a Runtime."""
    add_settings(parser, kind, skip=() if runtime is ONNX else ('reduce_range',))
    add_data_arguments(parser, trains=False)
    parser.set_defaults(input=runtime.input, model_path=runtime.models)


def add_reduce_range(parser):
    """--reduce_range of what writes INT8 ONNX models."""
    parser.add_argument('--reduce_range', action='store_true', help=REDUCE_RANGE)


def add_runtime(parser):
    """--runtime of what runs ONNX models."""
    parser.add_argument('--runtime', choices=list(ONNX_RUNTIMES), default='onnxruntime', help='what runs the '
                        'models; each has INT8 models of its own')


# -- networks and images ----------------------------------------------------------------------------------------

@dataclass
class ExportSource:
    """What is exported: a torch Network in eval mode, calibration batches (images, labels), what both came from, and
    what else the model's metadata says."""
    entry: Entry
    network: Network
    batches: list
    origin: str
    metadata: dict = field(default_factory=dict)


class RunImages:
    """The pictures of a run, decoded once for all of its models, at the largest resolution of its supernets.

    data: Data of that resolution; passes: how often the test images are gone through. Those are kept where they fit
    into cache_gb (GiB).
    """

    def __init__(self, data, settings, passes=1, num_images=None, cache_gb=8.0):
        self.data, self._opened, self.settings, self._passes = data, data, settings, passes
        self._testing = EvaluationSettings(batch_size=settings.batch_size, num_workers=settings.num_workers,
                                           num_eval_images=num_images, cache_gb=cache_gb)

    @cached_property
    def calibration(self):
        """Batches of training images."""
        s = self.settings
        return DecodedImages(calibration_batches(self.data.train, s.batch_size, s.num_calib_batches, s.seed,
                                                 s.num_workers))

    @cached_property
    def test(self):
        """Batches of test images."""
        return images_to_test(self.data, Job(), self._testing, self._passes)

    def fit_classes(self, num_classes, what):
        """Number the labels as a network of `num_classes` (named `what`) does; UserError where that cannot be."""
        if num_classes != self.data.num_classes:
            self.data = fit_classes(self._opened, num_classes, what)
            self.__dict__.pop('test', None)             # its labels are others

    def metadata(self, entry):
        """What whoever feeds a model has to know."""
        return {'preprocessing': preprocessing(self.data, self.data.image_size, entry.subnet.resolution),
                'classes': class_names(self.data)}


def open_entries(settings):
    """[Entry] that the settings name, checked before anything is exported."""
    if settings.network is None:
        return read_entries(settings.input, 'stage' if settings.skip_weights else 'weights')
    return [Entry(*subnet_of(settings.network))]


def open_images(entries, settings, **test):
    """RunImages for calibration and evaluation, None where random weights need none; test: of RunImages."""
    if settings.skip_weights:
        return None
    size = max(max(entry.supernet.superspace.resolutions) for entry in entries)
    data = open_data(settings.dataset_path, settings.dataset, settings.valid_size, image_size=size)
    return RunImages(data, settings, **test)


def check_weights(entries, settings, kinds):
    """UserError where weights that will be needed are missing, before anything is written; kinds: as of
    ExportSettings."""
    if settings.network is not None and settings.skip_weights:
        raise UserError(f'--network {settings.network} --skip_weights: give one of them')
    if settings.network is not None:
        if True in kinds:
            _check_int8(load_network(settings.network), settings.network)
    elif not settings.skip_weights:
        for entry in entries:
            for quant_mode in kinds:
                find_checkpoint(entry.supernet, quant_mode, settings.checkpoint_path, settings.align_sample)


def _check_int8(network, path):
    if not any(op.is_quantised for op in quantised_ops(network)):
        raise UserError(f'{path}: an fp32 network, without LSQ+ scales')
    if not all(op.is_quantised for op in quantised_ops(network)):
        raise UserError(f'{path}: its head is in fp32 (--fp32_head), which has no INT8 model')


def open_source(entry, settings, quant_mode, images):
    """ExportSource of an Entry as the settings say; images: RunImages, None with --skip_weights."""
    if settings.skip_weights:
        return random_source(entry, quant_mode, settings.seed)
    if settings.network is not None:
        return _network_source(entry, settings.network, quant_mode, images)
    path = find_checkpoint(entry.supernet, quant_mode, settings.checkpoint_path, settings.align_sample)
    supernet = load_supernet(entry.supernet, path, quant_mode)
    images.fit_classes(supernet.num_classes, path)
    complete_scales(supernet, [entry.subnet],
                    lambda: next(images_of(images.calibration))[:settings.batch_size], Job())
    network = calibrated_network(supernet, entry.subnet, images.calibration, Job()).eval()
    return ExportSource(entry, network, images.calibration, path, images.metadata(entry))


def _network_source(entry, path, quant_mode, images):
    network = load_network(path)
    if quant_mode:
        _check_int8(network, path)
    else:
        set_fp32_mode(network)
    images.fit_classes(network.num_classes, path)
    return ExportSource(entry, network, images.calibration, path, images.metadata(entry))


def random_source(entry, quant_mode, seed=0):
    """ExportSource with random weights, their batch norm calibrated on noise: the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed_of(seed, 'noise'))
    images = torch.randn(RANDOM_IMAGES, 3, entry.subnet.resolution, entry.subnet.resolution, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, str(entry.supernet), str(entry.subnet)))
        network = Network.build(entry.supernet, entry.subnet, None)
    calibrate(network, [images])
    if quant_mode:
        set_quant_mode(network)
    return ExportSource(entry, network.eval(), [(images, None)], f'random weights, seed {seed}')


# -- models -----------------------------------------------------------------------------------------------------

def fingerprint(network, *more):
    """sha256 of a network's weights, statistics, scales and bits and of `more` (what else the model depends on)."""
    digest = hashlib.sha256(repr((VERSION, quantisation_of(network), *map(str, more))).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + str(tensor.dtype).encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _digest(images):
    """What tells calibration images apart, near enough: their sum and that of their squares."""
    return tuple(images.shape), float(images.double().sum()), float(images.double().square().sum())


def export(source, folder, quant_mode, runtime=ONNX, reduce_range=False):
    """(path, model, whether it was written now): a model of the same subnet, weights and options is used again.

    reduce_range: INT8 weights of 7 bits.
    """
    entry, network = source.entry, source.network
    path = runtime.path(folder, entry, quant_mode)
    options = runtime.int8_options(reduce_range) if quant_mode else {}
    calibration = [images for images, _ in zip(images_of(source.batches), range(RANGE_BATCHES))] if quant_mode else []
    key = fingerprint(network, entry.supernet, entry.subnet, quant_mode, *map(_digest, calibration),
                      *options.items(), *source.metadata.items())
    model = runtime.read(path, key)
    if model is not None:
        return path, model, False
    metadata = {'fingerprint': key, 'supernet': str(entry.supernet), 'subnet': str(entry.subnet),
                'weights': source.origin, **source.metadata}
    if quant_mode:
        model = runtime.export_int8(network, observe(network, calibration), metadata, **options)
    else:
        model = runtime.export_fp32(network, metadata)
    runtime.write(path, model)
    return path, model, True


def export_all(settings, runtime, report=None):
    """What export_onnx.py and export_tflite.py do; report(ExportSource, model): after every INT8 model."""
    entries, kinds = open_entries(settings), settings.kinds()
    for package in runtime.export_packages:
        need(package)
    images = open_images(entries, settings)
    check_weights(entries, settings, kinds)
    for entry in entries:
        for quant_mode in kinds:
            source = open_source(entry, settings, quant_mode, images)
            path, model, written = export(source, settings.model_path, quant_mode, runtime, settings.reduce_range)
            print(f'{path}  ({source.origin}{"" if written else "; as it was"})', flush=True)
            if report is not None and quant_mode:
                report(source, model)
