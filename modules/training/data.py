"""Pictures in, batches out: ImageNet folders and tars, torchvision's data sets, digits, plain picture folders.

    data = open_data('./dataset', 'imagenet')             # or fashion-mnist, cifar10, digits, …
    for images, labels in train_loader(data.train, 64, epoch=3, seed=0, start_step=120):
        …                                                 # (64, 3, 224, 224) float32, (64,) int64

Pictures leave the loader's workers as bytes, a quarter of what floats take in shared memory and on the way to a device;
there they become floats and are normalised: train_loader(…).to(device).

Everything random is a function of (seed, epoch, index) alone: a resumed run, any number of loader workers and
any rank see the same pixels, and the global random states are left as they were.

A picture that cannot be read is left out of its batch, reported once on stderr and counted in `data.broken`.
"""
import contextlib
import copy
import functools
import hashlib
import random
import re
import signal
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..cli import not_negative, within
from ..errors import UserError, one_line
from .log import note
from .sources import LAYOUTS, open_source, plain_name
from .threads import default_workers

VALID_SIZE = 50000              # held out, where nothing else is said
SPLIT_SEED = 2147483647         # the held-out images are the same in every run, whatever --seed says
AUGMENTATIONS = ('default', 'auto_augment_tf', 'none')
NORMALIZATIONS = {              # mean and std of the three channels, of pixels in 0..1
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'half': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),      # TensorFlow's EfficientNet-lite
}
# flipping a character or a traffic sign makes another one
NO_FLIP = ('digits', 'mnist', 'kmnist', 'emnist', 'qmnist', 'usps', 'svhn', 'gtsrb', 'semeion', 'renderedsst2')


class BrokenImage(UserError):
    """One picture cannot be read; `name` says which, `reason` why."""

    def __init__(self, name, reason):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self):
        return f'{self.name}: {self.reason}'


def seed_of(*parts):
    """63-bit seed that depends on all parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def _permutation(n, *parts):
    """Fixed permutation of range(n) as an int64 tensor, drawn from parts alone."""
    seed = parts[0] if len(parts) == 1 else seed_of(*parts)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def _seeded(*parts):
    """The global random states that transforms draw from (torch's CPU one, random, numpy) follow parts inside.

    Other devices' generators are not touched, which torch.manual_seed would do.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class ImageSet(Dataset):
    """Some pictures of a source with a transform: set[index] is ((3, S, S) uint8, label).

    mean_std ((r, g, b), (r, g, b)) is what their floats are normalised with, see to_floats().

    An augmented set (seed not None) is indexed by (epoch, index), a plain index means epoch 0, and a sample is a
    function of (seed, epoch, index). Raises BrokenImage for one that cannot be read; the loaders below leave
    those out and count them in `broken`, {file: reason}.
    """

    def __init__(self, source, indices, transform, eval_transform, seed, broken, mean_std):
        self.source, self.indices, self.mean_std = source, np.asarray(indices, dtype=np.int64), mean_std
        self.transform, self.eval_transform = transform, eval_transform
        self.seed, self.broken = seed, broken

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        epoch, index, position = int(epoch), int(index), int(self.indices[index])
        try:
            image, label = self.source[position]
        except MemoryError:
            raise
        except Exception as error:
            raise BrokenImage(self.source.name(position), _reason(error)) from None
        if self.seed is None:
            return self.transform(image), label
        with _seeded(self.seed, epoch, index % len(self)):
            return self.transform(image), label

    def evaluated(self):
        """The same pictures with the evaluation transform."""
        view = copy.copy(self)
        view.transform, view.seed = self.eval_transform, None
        return view

    def report(self, broken):
        """Count [(name, reason), …], one line on stderr for each file that is new."""
        for name, reason in broken:
            if name not in self.broken:
                self.broken[name] = reason
                print(f'broken image skipped ({len(self.broken)} so far): {name}: {reason}', file=sys.stderr)


@dataclass
class Data:
    """train is augmented; valid was held out of it; test is another set. The latter two see the evaluation transform.

    num_classes is 0 for unlabelled pictures; broken {file: reason} holds what could not be read so far;
    image_size: pixels of an image's side.
    """
    train: ImageSet
    valid: ImageSet
    test: ImageSet
    num_classes: int
    broken: dict = field(default_factory=dict)
    image_size: int = 224


def to_floats(pixels, mean_std):
    """Images (…, 3, H, W) of 8-bit pixels as normalised float32, on their device."""
    mean, std = (_channels(values, pixels.device) for values in mean_std)
    return (pixels.to(torch.float32) / 255 - mean) / std


@functools.cache
def _channels(values, device):
    return torch.tensor(values, device=device).view(3, 1, 1)


def build_transforms(image_size=224, augment='default', normalize='imagenet', small=False, flip=True):
    """(train, evaluation) transforms from an RGB PIL image to (3, image_size, image_size) uint8.

    Evaluation: the short side resized to 256/224 image_size, centre crop, bicubic. small: the whole picture is
    stretched to image_size, and shifted by up to an eighth in training. auto_augment_tf adds AutoAugment's
    ImageNet policy v0 with 4 to 8 bits in Posterize, magnitude noise 0.5, translations of 0.45 image_size, filled with
    the pixel mean; none is the evaluation transform, for runs too short to overfit.
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f'--augment {augment}: not one of {" ".join(AUGMENTATIONS)}')
    if normalize not in NORMALIZATIONS:
        raise UserError(f'normalize {normalize}: not one of {" ".join(NORMALIZATIONS)}')
    bicubic = transforms.InterpolationMode.BICUBIC
    to_tensor = [transforms.PILToTensor()]
    if small:
        evaluation = [transforms.Resize((image_size, image_size), bicubic)]
        train = evaluation + [transforms.RandomCrop(image_size, padding=image_size // 8)]
    else:
        evaluation = [transforms.Resize(round(image_size * 256 / 224), bicubic), transforms.CenterCrop(image_size)]
        train = [transforms.RandomResizedCrop(image_size, interpolation=bicubic)]
    train += [transforms.RandomHorizontalFlip()] * flip
    if augment == 'none':
        train = list(evaluation)
    if augment == 'auto_augment_tf':
        train.append(_auto_augment(image_size, NORMALIZATIONS[normalize][0]))
    return transforms.Compose(train + to_tensor), transforms.Compose(evaluation + to_tensor)


def _auto_augment(image_size, mean):
    """timm's policy v0 as SpaceEvo's training has it: Posterize keeps 4 to 8 bits, where timm's keeps 0 to 4."""
    from timm.data.auto_augment import LEVEL_TO_ARG, auto_augment_transform
    transform = auto_augment_transform('v0-mstd0.5', {
        'translate_const': int(0.45 * image_size), 'img_mean': tuple(round(255 * value) for value in mean),
        'interpolation': (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)})
    for operation in (operation for pair in transform.policy for operation in pair):
        if operation.name == 'Posterize':
            operation.level_fn = LEVEL_TO_ARG['PosterizeOriginal']
    return transform


def add_data_arguments(parser, trains=True, more_paths=('--imagenet_path',)):
    """--dataset_path (also --dataset_dir and more_paths), --dataset, --num_workers, --valid_size, and --augment where
    a script `trains`."""
    parser.add_argument('--dataset_path', '--dataset_dir', *more_paths, dest='dataset_path',
                        default='./dataset', help=f'ImageNet: {LAYOUTS}')
    parser.add_argument('--dataset', default='imagenet', help='imagenet, digits, elpv, or any of torchvision by name')
    parser.add_argument('--num_workers', type=within(int, 0, 1024), default=min(8, default_workers()),
                        help='loader processes per rank')
    parser.add_argument('--valid_size', type=not_negative(int), default=VALID_SIZE,
                        help='training images held out for validation')
    if trains:
        parser.add_argument('--augment', choices=AUGMENTATIONS, default='default',
                            help='augmentation of the training images')


def open_data(path, dataset='imagenet', valid_size=VALID_SIZE, augment='default', image_size=224, labelled=True,
              seed=0, normalize='imagenet', original=False):
    """Data of a data set by name; images are (3, image_size, image_size), normalised.

    path: ImageNet's folder, or where torchvision's data sets lie or are downloaded to. Class folders without train/ and
    val/, and data sets without a test set: a fifth of the pictures are the test images. labelled=False: any
    folder of pictures does (or ImageNet's, or its tars); their labels are then 0, and where there is no val/, the
    held-out images are the test images too.
    Data sets with a name keep their labels.
    valid: valid_size images of train, at most a fifth of it. original: as the original's fine-tuning takes them, small
    pictures by random resized crops too, and without a val split.
    Raises UserError: unknown name or layout, nothing found, failed download.
    """
    name = plain_name(dataset)
    source, test_source, num_classes = open_source(path, dataset, labelled, 4 * image_size, original)
    train_transform, eval_transform = build_transforms(image_size, augment, normalize, source.small and not original,
                                                       flip=name not in NO_FLIP)
    broken = {}

    def image_set(source, indices, train=False):
        transform = train_transform if train else eval_transform
        return ImageSet(source, indices, transform, eval_transform, seed if train else None, broken,
                        NORMALIZATIONS[normalize])

    for part in filter(None, (source, test_source)):
        _check_readable(part)
    indices = np.arange(len(source))
    test = None
    if test_source is not None:
        test = image_set(test_source, np.arange(len(test_source)))
    elif num_classes:                   # no test set of its own: a fifth, chosen once and for all
        order = _permutation(len(source), SPLIT_SEED, 'test').numpy()
        test, indices = image_set(source, np.sort(order[:len(order) // 5])), np.sort(order[len(order) // 5:])
    held_out = _valid_size(valid_size, len(indices))
    order = _permutation(len(indices), SPLIT_SEED).numpy()
    train = image_set(source, np.sort(indices[order[held_out:]]), train=True)
    valid = image_set(source, indices[order[:held_out]])
    note(f'{path if name == "imagenet" else dataset}: ' + (f'{num_classes} classes, ' if num_classes else '')
         + f'{len(train):,} pictures to train on, {held_out:,} held out'
         + ('' if test is None else f', {len(test):,} to test with'))
    return Data(train, valid, valid if test is None else test, num_classes, broken, image_size)


def _check_readable(source):
    """UserError where not one of up to 100 pictures, spread evenly over a source, can be read."""
    first = None
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), 100)).astype(int)).tolist():
        try:
            return source[index]
        except MemoryError:
            raise
        except Exception as error:
            first = first or f'{source.name(index)}: {_reason(error)}'
    raise UserError(f'not one picture could be read; the first: {first}')


def _reason(error):
    """Why a picture cannot be read: decoders raise OSError, SyntaxError, ValueError, struct.error, …"""
    return getattr(error, 'strerror', None) or re.sub(' ?<_io.BytesIO[^>]*>', '', one_line(error))


def _valid_size(wanted, train_size):
    if wanted < 0:
        raise UserError(f'--valid_size {wanted}: negative')
    most = max(train_size // 5, int(train_size > 1))
    if wanted > most:
        note(f'valid_size {wanted} is more than a fifth of the {train_size} training images: {most} are held out')
    return min(wanted, most)


class _Batches(Dataset):
    """Batches as items: [epoch, indices] is (images, labels, [(broken file, reason), …]).

    Without any readable picture images and labels are None; with `refill` the next readable one after the
    batch's stands in, since every rank has to take the same number of steps.
    """

    def __init__(self, dataset, refill):
        self.dataset, self.refill = dataset, refill

    def __getitem__(self, key):
        epoch, indices = key
        samples, broken = [], []
        indices = [int(index) for index in indices]
        spare = range(indices[-1] + 1, indices[-1] + len(self.dataset)) if self.refill else ()
        for number, index in enumerate((*indices, *spare)):
            if number >= len(indices) and samples:
                break
            try:
                samples.append(self.dataset[epoch, index % len(self.dataset)])
            except BrokenImage as error:
                broken.append((error.name, error.reason))
        if not samples:
            return None, None, broken
        images, labels = zip(*samples)
        return torch.stack(images), torch.tensor(labels), broken


def _same(batch):
    return batch


def _leave_signals_to_the_main_process(_):
    """Ctrl-C reaches a whole terminal, SIGTERM of SLURM a whole job: the main process then needs its workers for the
    step that writes its state, and ends them itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Loader:
    """Batches (images (n, 3, S, S) float32, labels (n,)); len() is the number of batches of the whole epoch or set.

    Images are normalised, on the device that to() names; pixels() gives them as the bytes that the workers send.
    A picture that cannot be read makes its batch smaller, a batch without any other is left out. Raises UserError
    at the end when not one picture could be read.
    """

    def __init__(self, dataset, batches, length, workers, refill=False, whole=True):
        self.dataset, self.length, self.whole, self.device = dataset, length, whole, torch.device('cpu')
        # its own generator: a DataLoader would draw from torch's global one each time it is started
        self.loader = DataLoader(_Batches(dataset, refill), batch_size=None, sampler=batches, collate_fn=_same,
                                 num_workers=workers, pin_memory=torch.cuda.is_available(),
                                 worker_init_fn=_leave_signals_to_the_main_process,
                                 generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return self.length

    def to(self, device):
        """Give images on a device from now on; returns itself."""
        self.device = torch.device(device)
        return self

    def __iter__(self):
        for pixels, labels in self.pixels():
            yield to_floats(pixels.to(self.device, non_blocking=True), self.dataset.mean_std), labels

    def pixels(self):
        """Batches (images (n, 3, S, S) uint8, labels (n,)) in the host's memory."""
        readable, unreadable = False, None
        for images, labels, broken in self._loaded():
            self.dataset.report(broken)
            if images is not None:
                readable = True
                yield images, labels
            else:
                unreadable = broken[0]
                if self.loader.dataset.refill:
                    break
        if unreadable and not readable and self.whole:
            raise UserError(f'not one picture could be read; the first: {unreadable[0]}: {unreadable[1]}')

    def _loaded(self):
        try:
            yield from self.loader
        except RuntimeError as error:
            if not re.search(r'DataLoader worker \(pid|</?torch_', str(error)):
                raise
            raise UserError('a loader process was killed, or had no shared memory left: fewer --num_workers, or more '
                            f'memory (Docker: --shm-size 2g); torch says: {one_line(error)[:120]}') from None


def train_loader(dataset, batch_size, epoch, seed=0, rank=0, world_size=1, workers=0, start_step=0):
    """Loader of one rank's share of an epoch, shuffled by (seed, epoch); what does not fill a step is dropped.

    Step s takes batch_size * world_size images of the shuffled set, so the same global batch at any number of
    ranks. start_step: begin with this step, the earlier ones are not read. Raises UserError: less than one step.
    """
    together = batch_size * world_size
    steps = len(dataset) // together
    if not steps:
        raise UserError(f'{len(dataset)} training images are fewer than one step of {world_size} x {batch_size}; '
                        'a smaller batch size is needed')
    order = _permutation(len(dataset), seed, epoch, 'shuffle').numpy()
    batches = [(epoch, order[step * together + rank * batch_size:][:batch_size])
               for step in range(start_step, steps)]
    return Loader(dataset, batches, steps, workers, refill=True)


def eval_loader(dataset, batch_size, rank=0, world_size=1, workers=0, limit=None, limit_images=None):
    """Loader of every world_size-th image in order, none dropped and none twice.

    limit: only so many batches, of all ranks together; limit_images: only so many images. They are spread evenly
    over the set, whose classes often lie one after the other, and are the same at any number of ranks.
    """
    limits = [limit_images, None if limit is None else limit * batch_size]
    count = min([len(dataset), *(most for most in limits if most is not None)])
    indices = np.arange(count) * len(dataset) // max(count, 1)
    return _in_order(dataset, indices[rank::world_size], batch_size, workers, whole=world_size == 1)


def calibration_batches(dataset, batch_size, num_batches, seed=0, workers=0, rank=0, world_size=1):
    """Loader of num_batches random batches with the evaluation transform: a function of the set and seed alone.

    No image occurs twice; a set smaller than num_batches * batch_size gives all it has. Ranks share the batches.
    """
    dataset = dataset.evaluated()
    order = _permutation(len(dataset), seed, 'calibration').numpy()
    return _in_order(dataset, order[:num_batches * batch_size], batch_size, workers, world_size == 1, rank, world_size,
                     together=True)


def _in_order(dataset, indices, batch_size, workers, whole=True, first=0, step=1, together=False):
    """Loader of batches in this order; together: a last image alone, too few for batch norm, joins the others."""
    batches = [(0, indices[start:start + batch_size]) for start in range(0, len(indices), batch_size)]
    if together and len(batches) > 1 and len(batches[-1][1]) == 1:
        batches[-2:] = [(0, indices[-1 - batch_size:])]
    batches = batches[first::step]
    return Loader(dataset, batches, len(batches), workers, whole=whole)
