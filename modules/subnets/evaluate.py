"""Accuracy of subnets of a trained supernet: what eval_supernet.py, eval_specific_net.py and search_subnet.py share."""
import contextlib
import functools
from dataclasses import dataclass, replace

from ..files import write_csv
from ..latency import add_platform_arguments
from ..modeling.complexity import config_complexity
from ..modeling.ops.lsq_plus import quantise_weights_once
from ..settings import add_settings, setting
from ..training.acceleration import choose_quantisers
from ..training.calibrate import initialize_all_scales
from ..training.classes import by_class, fit_classes, write_confusion
from ..training.data import add_data_arguments, calibration_batches, eval_loader, open_data
from ..training.distributed import add_distributed_arguments
from ..training.evaluate import DecodedImages, accuracy, calibrated_subnet, evaluate_subnet, images_of, kept_subnet
from ..training.log import note, progress
from ..zoo import load_supernet

COLUMNS = ('subnet', 'top1', 'top5', 'loss', 'MFLOPs', 'Mparams', 'ms')


@dataclass(frozen=True)
class EvaluationSettings:
    """How subnets of a trained supernet are calibrated and evaluated."""
    quant_mode: bool = setting(False, 'int8: lsq.pth instead of checkpoint.pth')
    batch_size: int = setting(64, 'images a batch and rank', least=1)
    num_calib_batches: int = setting(20, 'batches of training images, for batch-norm calibration; ranks share them',
                                     least=1)
    num_eval_images: int | None = setting(None, 'for short runs; default: all test images', least=1)
    cache_gb: float = setting(8.0, 'GiB a rank for test images that several subnets share; above it they are decoded '
                              'again', above=0)
    seed: int = setting(0, 'seed of the calibration images', most=2 ** 32 - 1)
    num_workers: int = setting(0, 'loader processes', flags=())


def add_evaluation_arguments(parser):
    """EvaluationSettings, latency platform, data and launcher."""
    add_settings(parser, EvaluationSettings)
    add_platform_arguments(parser)
    add_data_arguments(parser, trains=False)
    add_distributed_arguments(parser)


def add_confusion(parser):
    """--confusion of what evaluates networks."""
    parser.add_argument('--confusion', metavar='FILE', help='CSV: images by true and by answered class, of the last '
                        'network')


class _Watched:
    """Batches with a progress bar around each pass over them."""

    def __init__(self, batches, total, job):
        self.batches, self.total, self.job = batches, total, job

    def __iter__(self):
        with contextlib.closing(progress(self.total, 'evaluation', enabled=self.job.is_main)) as bar:
            for batch in self.batches:
                yield batch
                bar.update()


def evaluation_images(data, job, settings, passes=1):
    """(calibration, test) batches of this rank's share, the latter of images_to_test()."""
    calibration = DecodedImages(calibration_batches(
        data.train, settings.batch_size, settings.num_calib_batches, settings.seed, settings.num_workers, job.rank,
        job.world_size).to(job.device))
    return calibration, images_to_test(data, job, settings, passes)


def images_to_test(data, job, settings, passes=1):
    """Test batches of this rank's share; decoded once for several `passes` if they fit in settings.cache_gb (GiB)."""
    test = eval_loader(data.test, settings.batch_size, job.rank, job.world_size, settings.num_workers,
                       limit_images=settings.num_eval_images).to(job.device)
    total = len(test)
    if passes > 1:
        size = total * settings.batch_size * 3 * data.image_size ** 2 / 2 ** 30
        if size <= settings.cache_gb:
            test = DecodedImages(test)
        else:
            note(f'the test images take {size:.1f} GiB a rank, more than --cache_gb {settings.cache_gb:g}: decoded '
                 'per subnet')
    return _Watched(test, total, job)


def complete_scales(supernet, subnets, first_images, job):
    """Initialise the LSQ+ scales of subnets that training never reached.

    first_images(): a batch (N, 3, S, S) of training images, the same on every rank; called only where one is needed.
    """
    others = (functools.partial(supernet.set_active_subnet, subnet) for subnet in subnets)
    with kept_subnet(supernet):
        count = initialize_all_scales(supernet, lambda: first_images().to(job.device), supernet.set_max_subnet, others)
    if count:
        note(f'the LSQ+ scales of {count} ops were never trained: initialised on one batch of training images')


def open_supernet(supernet, path, quant_mode, dataset_path, dataset, valid_size):
    """(supernet model with the weights at `path`, Data of as many classes at its largest resolution)."""
    model = load_supernet(supernet, path, quant_mode)
    data = open_data(dataset_path, dataset, valid_size, image_size=max(supernet.superspace.resolutions))
    return model, fit_classes(data, model.num_classes, path)


def prepare(title, model, data, subnets, settings, job, held_out=False):
    """(calibration, test) batches for evaluate_all() of {name: Subnet}, a line with `title` once printed.

    The model and its data are open_supernet()'s; the model moves to the job's device and gets the LSQ+ scales that
    training never reached. held_out: on the images held out of the training images instead of the test images.
    """
    if held_out:
        note(f'on {len(data.valid)} held-out training images, not on the test images')
        data = replace(data, test=data.valid)
    if job.is_main:
        print(title, flush=True)
    model.to(job.device)
    choose_quantisers('auto', settings.quant_mode, job.device)

    def first_images():                     # the same on every rank, unlike the shares below
        return next(images_of(calibration_batches(data.train, settings.batch_size, 1, settings.seed)))
    images = evaluation_images(data, job, settings, len(subnets))
    complete_scales(model, list(subnets.values()), first_images, job)
    return images


def calibrated_network(supernet, subnet, calibration, job):
    """The static Network of a subnet with batch-norm statistics of its own; the supernet stays as it was."""
    with calibrated_subnet(supernet, subnet, calibration, job):
        return supernet.get_active_subnet()


def evaluate_static(supernet, subnet, calibration, test, job, table=None):
    """evaluate_subnet() by the extracted static network, which is what is deployed."""
    return accuracy(quantise_weights_once(calibrated_network(supernet, subnet, calibration, job)), test, job,
                    table)


def evaluate_all(supernet, subnets, images, job, milliseconds, path, names, measure=evaluate_subnet, confusion=None):
    """Accuracy of each of {name: Subnet}, printed and in a CSV at `path`; returns [Accuracy, …].

    images: of evaluation_images(); milliseconds: {name: predicted latency}; names: of the classes; confusion: file of
    the last subnet's confusion table.
    """
    rows, results = [], []
    for name, subnet in subnets.items():
        table = []
        result = measure(supernet, subnet, *images, job, table)
        with kept_subnet(supernet):
            supernet.set_active_subnet(subnet)
            mflops, mparams = config_complexity(supernet.get_active_subnet_config().blocks)
        rows.append([subnet, *(f'{value:.4f}' for value in (*result[:3], mflops, mparams, milliseconds[name]))])
        results.append(result)
        if job.is_main:
            print(f'{name}: {result}\n  {by_class(*table, names)}\n  {mflops:.1f} MFLOPs  {mparams:.2f} Mparams  '
                  f'{milliseconds[name]:.2f} ms predicted', flush=True)
            write_csv(path, COLUMNS, rows)
            if confusion:
                write_confusion(confusion, *table, names)
    if job.is_main:
        print(path)
    return results
