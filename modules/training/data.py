"""Pictures in, batches out: ImageNet folders and tars, torchvision's data sets, digits, plain picture folders.

    data = open_data('./dataset', 'imagenet')             # or fashion-mnist, cifar10, digits, …
    for images, labels in train_loader(data.train, 64, epoch=3, seed=0, start_step=120):
        …                                                 # (64, 3, 224, 224) float32, (64,) int64

Everything random is a function of (seed, epoch, index) alone: a resumed run, any number of loader workers and
any rank see the same pixels, and the global random states are left as they were.

A picture that cannot be read is left out of its batch, reported once on stderr and counted in `data.broken`.
"""
import argparse
import contextlib
import copy
import glob
import gzip
import hashlib
import inspect
import io
import json
import os
import random
import re
import sys
import tarfile
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ..errors import UserError
from ..files import write_text

SPLIT_SEED = 2147483647         # the held-out images are the same in every run, whatever --seed says
AUGMENTATIONS = ('default', 'auto_augment_tf')
NORMALIZATIONS = {              # mean and std of the three channels, of pixels in 0..1
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    'half': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),      # TensorFlow's EfficientNet-lite
}
SMALL = 96                      # pixels: data sets of at most this are stretched whole instead of cropped
DEBIAN = '/usr/share/datasets'
TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
LAYOUTS = f'class folders train/ and val/, or {TARS[0]} and {TARS[1]}'
# flipping a character or a traffic sign makes another one
NO_FLIP = ('digits', 'mnist', 'kmnist', 'emnist', 'qmnist', 'usps', 'svhn', 'gtsrb', 'semeion', 'renderedsst2')
# torchvision's data sets of pictures with one class each
TORCHVISION = ('CIFAR10', 'CIFAR100', 'Flowers102', 'OxfordIIITPet', 'Food101', 'StanfordCars', 'FGVCAircraft',
               'MNIST', 'FashionMNIST', 'KMNIST', 'EMNIST', 'QMNIST', 'USPS', 'SEMEION', 'SVHN', 'STL10', 'GTSRB',
               'DTD', 'EuroSAT', 'Caltech101', 'Caltech256', 'SUN397', 'Country211', 'RenderedSST2', 'PCAM',
               'Imagenette')
# torchvision splits where train is not split='train' and test is not split='test'
SPLITS = {'flowers102': (('train', 'val'), 'test'), 'dtd': (('train', 'val'), 'test'),
          'country211': (('train', 'valid'), 'test'), 'renderedsst2': (('train', 'val'), 'test'),
          'pcam': (('train', 'val'), 'test'), 'fgvcaircraft': (('trainval',), 'test'),
          'oxfordiiitpet': (('trainval',), 'test'), 'imagenette': (('train',), 'val')}
MNIST_LIKE = ('mnist', 'fashionmnist', 'kmnist')     # four idx files, gzipped or not


class BrokenImage(UserError):
    """One picture cannot be read; `name` says which, `reason` why."""

    def __init__(self, name, reason):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self):
        return f'{self.name}: {self.reason}'


# ---------------------------------------------------------------- randomness

def _seed(*parts):
    """63-bit seed that depends on all parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def _permutation(n, *parts):
    """Fixed permutation of range(n) as an int64 tensor, drawn from parts alone."""
    seed = parts[0] if len(parts) == 1 else _seed(*parts)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def _seeded(*parts):
    """The global random states that transforms draw from (torch's CPU one, random, numpy) follow parts inside.

    Other devices' generators are not touched, which torch.manual_seed would do.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = _seed(*parts)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


# ---------------------------------------------------------------- pictures and where they come from

def to_rgb(image):
    """RGB of any PIL image: transparency on white, 16-bit grey scaled to 8; very long ones cut to 16:1."""
    width, height = image.size
    side = 16 * min(width, height)          # resizing the short side of a 1 x 10,000 line would take gigabytes
    if max(width, height) > side:
        image = transforms.functional.center_crop(image, (min(height, side), min(width, side)))
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


class Pictures:
    """Picture files below a folder, or members of a tar that is read in place.

    names are relative to root; labels class numbers; where, for a tar, (N, 2) offsets and sizes in bytes.
    min_side: JPEGs may be decoded smaller, their sides at least this many pixels (None: as they are).
    """
    small = False

    def __init__(self, root, names, labels, where=None, min_side=None):
        self.root, self.where, self.min_side = root, where, min_side
        # arrays, not lists: a million Python objects would be copied into every forked worker
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.asarray(labels, dtype=np.int64)
        self._file = None

    def __len__(self):
        return len(self.names)

    def __getstate__(self):
        return {**self.__dict__, '_file': None}

    def name(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def _bytes(self, index):
        if self.where is None:
            with open(self.name(index), 'rb') as f:
                return f.read()
        if self._file is None:
            self._file = open(self.root, 'rb', buffering=0)
        offset, size = self.where[index].tolist()
        # pread has no position that forked workers could share by mistake
        return os.pread(self._file.fileno(), size, offset)

    def __getitem__(self, index):
        image = Image.open(io.BytesIO(self._bytes(index)))
        if self.min_side:
            image.draft(None, (self.min_side, self.min_side))
        return to_rgb(image), int(self.labels[index])


class Named:
    """A data set known by its name: any `dataset` whose items are (PIL image or uint8 array, label)."""

    def __init__(self, name, dataset):
        self.dataset, self._name, self.small = dataset, name, False
        for index in range(len(dataset)):
            with contextlib.suppress(Exception):        # the first that is not broken
                self.small = max(self[index][0].size) <= SMALL
                break

    def __len__(self):
        return len(self.dataset)

    def name(self, index):
        return f'{self._name} image {index}'

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return to_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image), int(label)


class ImageSet(Dataset):
    """Some pictures of a source with a transform: set[index] is ((3, S, S) float32, label).

    An augmented set (seed not None) is indexed by (epoch, index), a plain index means epoch 0, and a sample is a
    function of (seed, epoch, index). Raises BrokenImage for one that cannot be read; the loaders below leave
    those out and count them in `broken`, {file: reason}.
    """

    def __init__(self, source, indices, transform, eval_transform, seed, broken):
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
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
        except Exception as error:      # decoders raise OSError, SyntaxError, ValueError, struct.error, …
            reason = getattr(error, 'strerror', None) or re.sub(' ?<_io.BytesIO[^>]*>', '', _one_line(error))
            raise BrokenImage(self.source.name(position), reason) from None
        if self.seed is None:
            return self.transform(image), label
        with _seeded(self.seed, epoch, index % len(self)):
            return self.transform(image), label

    def evaluated(self):
        """The same pictures with the evaluation transform, each once."""
        view = copy.copy(self)
        first = np.unique(self.indices, return_index=True)[1]
        view.indices = self.indices[np.sort(first)]
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
    """train is augmented; valid is held out of train and test apart from it, both with the evaluation transform.

    num_classes is 0 for unlabelled pictures; broken {file: reason} holds what could not be read so far.
    """
    train: ImageSet
    valid: ImageSet
    test: ImageSet
    num_classes: int
    broken: dict = field(default_factory=dict)


# ---------------------------------------------------------------- transforms

def build_transforms(image_size=224, augment='default', normalize='imagenet', small=False, flip=True):
    """(train, evaluation) transforms from an RGB PIL image to (3, image_size, image_size) float32.

    Evaluation: the short side resized to 256/224 image_size, centre crop, bicubic. small: the whole picture is
    stretched to image_size, and shifted by up to an eighth in training. auto_augment_tf adds timm's AutoAugment
    ImageNet policy v0, translations of 0.45 image_size, filled with the pixel mean.
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f'--augment {augment}: not one of {" ".join(AUGMENTATIONS)}')
    if normalize not in NORMALIZATIONS:
        raise UserError(f'normalize {normalize}: not one of {" ".join(NORMALIZATIONS)}')
    mean, std = NORMALIZATIONS[normalize]
    bicubic = transforms.InterpolationMode.BICUBIC
    to_tensor = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if small:
        evaluation = [transforms.Resize((image_size, image_size), bicubic)]
        train = evaluation + [transforms.RandomCrop(image_size, padding=image_size // 8)]
    else:
        evaluation = [transforms.Resize(round(image_size * 256 / 224), bicubic), transforms.CenterCrop(image_size)]
        train = [transforms.RandomResizedCrop(image_size, interpolation=bicubic)]
    train += [transforms.RandomHorizontalFlip()] * flip
    if augment == 'auto_augment_tf':
        train.append(_auto_augment(image_size, mean))
    return transforms.Compose(train + to_tensor), transforms.Compose(evaluation + to_tensor)


def _auto_augment(image_size, mean):
    from timm.data.auto_augment import auto_augment_transform, posterize
    fill = tuple(round(255 * value) for value in mean)
    transform = auto_augment_transform('v0', {'translate_const': int(0.45 * image_size), 'img_mean': fill})
    for operation in (operation for pair in transform.policy for operation in pair):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image, bits, **kwargs):
    """timm's posterize, and black for the policy's 0 bits, which Pillow 13 refuses."""
    from timm.data.auto_augment import posterize
    return posterize(image, bits, **kwargs) if bits else Image.new(image.mode, image.size)


# ---------------------------------------------------------------- opening

def add_data_arguments(parser):
    """--dataset_path (also --dataset_dir, --imagenet_path), --dataset, --num_workers, --valid_size, --augment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    parser.add_argument('--dataset_path', '--dataset_dir', '--imagenet_path', dest='dataset_path',
                        default='./dataset', help=f'ImageNet: {LAYOUTS}')
    parser.add_argument('--dataset', default='imagenet', help='imagenet, digits, or any of torchvision by name')
    parser.add_argument('--num_workers', type=_count, default=min(8, cores), help='loader processes per rank')
    parser.add_argument('--valid_size', type=_count, default=50000, help='training images held out for validation')
    parser.add_argument('--augment', choices=AUGMENTATIONS, default='default')


def _count(text):
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f'{text} is negative')
    return int(text)


def _say(line):
    """One line on stderr, of the first rank only."""
    if os.environ.get('RANK', '0') == '0':
        print(line, file=sys.stderr)


def open_data(path, dataset='imagenet', valid_size=50000, augment='default', image_size=224, labelled=True,
              seed=0, normalize='imagenet', repeat=1):
    """Data of a data set by name; images are (3, image_size, image_size), normalised.

    path: ImageNet's folder, or where torchvision's data sets lie or are downloaded to. labelled=False: any
    folder of pictures does (or ImageNet's, or its tars); their labels are then 0, and without val/ test is valid.
    Data sets with a name keep their labels.
    valid: valid_size images of train, at most a fifth of it. repeat: each training picture occurs so often in an
    epoch, differently augmented, which makes few and large pictures go further.
    Raises UserError: unknown name or layout, nothing found, failed download.
    """
    path, name = os.path.expanduser(path), _plain(dataset)
    test_source = None
    if name == 'imagenet':
        source, test_source, num_classes = _open_imagenet(path, labelled, 4 * image_size)
    elif name == 'digits':
        from sklearn.datasets import load_digits
        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        source, num_classes = Named('digits', _Arrays(pixels, digits.target)), 10
    else:
        source, test_source, num_classes = _open_torchvision(path, dataset, name)

    train_transform, eval_transform = build_transforms(image_size, augment, normalize, source.small,
                                                       flip=name not in NO_FLIP)
    broken = {}

    def image_set(source, indices, train=False):
        transform = train_transform if train else eval_transform
        return ImageSet(source, indices, transform, eval_transform, seed if train else None, broken)

    indices = np.arange(len(source))
    test = None
    if test_source is not None:
        test = image_set(test_source, np.arange(len(test_source)))
    elif name != 'imagenet':            # no test set of its own: a fifth, chosen once and for all
        order = _permutation(len(source), SPLIT_SEED, 'test').numpy()
        test, indices = image_set(source, np.sort(order[:len(order) // 5])), np.sort(order[len(order) // 5:])
    held_out = _valid_size(valid_size, len(indices))
    order = _permutation(len(indices), SPLIT_SEED).numpy()
    train = image_set(source, np.tile(np.sort(indices[order[held_out:]]), repeat), train=True)
    valid = image_set(source, indices[order[:held_out]])
    return Data(train, valid, valid if test is None else test, num_classes, broken)


def _valid_size(wanted, train_size):
    if wanted < 0:
        raise UserError(f'--valid_size {wanted}: negative')
    most = max(train_size // 5, int(train_size > 1))
    if wanted > most:
        _say(f'valid_size {wanted} is more than a fifth of the {train_size} training images: {most} are held out')
    return min(wanted, most)


def _plain(name):
    return re.sub('[-_ ]', '', name).lower()


def _one_line(error):
    return ' '.join(str(error).split()) or type(error).__name__


def _found(folder):
    """What is in a folder, for an error line: at most five entries."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    shown = ' '.join(entry.name + '/' * entry.is_dir() for entry in entries[:5])
    return (shown or 'nothing') + f' … ({len(entries)} entries)' * (len(entries) > 5)


def _open_imagenet(path, labelled, min_side):
    """(train source, test source or None, number of classes)."""
    if not os.path.isdir(path):
        found = 'a file' if os.path.exists(path) else 'no such folder'
        raise UserError(f'{path}: expected {LAYOUTS}; found {found}')
    folders = [os.path.join(path, name) for name in ('train', 'val')]
    tars = [os.path.join(path, name) for name in TARS]
    if all(map(os.path.isdir, folders)):
        if not labelled:
            return *(_open_pictures(folder, min_side) for folder in folders), 0
        return _open_class_folders(*folders)
    if all(map(os.path.isfile, tars)):
        return _open_tars(*tars, labelled)
    if labelled:
        hint = ' (pictures without labels do for block KD only)' * any(_walk(path))
        raise UserError(f'{path}: expected {LAYOUTS}; found {_found(path)}{hint}')
    return _open_pictures(path, min_side), None, 0


def _is_picture(name):
    return name.lower().endswith(IMG_EXTENSIONS)


def _walk(path):
    """Relative names of all pictures below a folder, in order; links to folders are followed, but not in circles."""
    seen = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (os.path.relpath(os.path.join(folder, name), path) for name in sorted(names) if _is_picture(name))


def _open_pictures(path, min_side):
    names = list(_walk(path))
    if not names:
        raise UserError(f'{path}: expected pictures ({" ".join(IMG_EXTENSIONS)}); found {_found(path)}')
    return Pictures(path, names, np.zeros(len(names)), min_side=min_side)


def _open_class_folders(train, val):
    classes, sources = None, []
    for folder in (train, val):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        classes = classes or names
        if not names:
            raise UserError(f'{folder}: expected one folder per class; found {_found(folder)}')
        _check_classes(folder, names, classes, train)
        numbers = {name: number for number, name in enumerate(classes) if name in names}
        samples = make_dataset(folder, numbers, IMG_EXTENSIONS, allow_empty=True)
        if not samples:
            raise UserError(f'{folder}: expected pictures in class folders; found none in {_found(folder)}')
        files = [os.path.relpath(name, folder) for name, _ in samples]
        sources.append(Pictures(folder, files, [label for _, label in samples]))
    return *sources, len(classes)


def _check_classes(where, names, classes, train):
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(f'{where}: class {unknown[0]} is not one of the {len(classes)} classes of {train}')


def _open_tars(train, val, labelled):
    classes, sources = [], []
    for path in (train, val):
        members = sorted((name.rpartition('/')[0].rpartition('/')[2], name, offset, size)
                         for name, offset, size in _tar_index(path))
        if not members:
            raise UserError(f'{path}: expected pictures x/<class>/<file>; found none')
        labels = np.zeros(len(members))
        if labelled:
            flat = next((name for label, name, *_ in members if label in ('', '.')), None)
            if flat is not None:
                raise UserError(f'{path}: expected members x/<class>/<file>; found {flat}, which has no class')
            names = sorted({member[0] for member in members})
            classes = classes or names
            _check_classes(path, names, classes, train)
            numbers = {name: number for number, name in enumerate(classes)}
            labels = [numbers[member[0]] for member in members]
        where = np.array([member[2:] for member in members], dtype=np.int64)
        sources.append(Pictures(path, [member[1] for member in members], labels, where))
    return *sources, len(classes)


# ---------------------------------------------------------------- tars

def _tar_index(path):
    """[(name, offset, size), …] of the pictures in a tar: offsets and sizes in bytes.

    Read once, then kept as JSON beside the tar or in ~/.cache/spaceevo; used while size and time of the tar agree.
    """
    stat = os.stat(path)
    stamp = {'version': 1, 'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:12]
    places = [path + '.index.json',
              os.path.join(cache, 'spaceevo', f'{digest}-{os.path.basename(path)}.index.json')]
    for place in places:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(place, encoding='utf-8') as f:
                index = json.load(f)
            if all(index[key] == value for key, value in stamp.items()):
                return list(zip(index['names'], index['offsets'], index['sizes'], strict=True))
    _say(f'{path}: looking for the pictures in it (once)')
    members = _scan_tar(path)
    names, offsets, sizes = map(list, zip(*members)) if members else ([], [], [])
    text = json.dumps({**stamp, 'names': names, 'offsets': offsets, 'sizes': sizes})
    for place in places:
        with contextlib.suppress(OSError):
            write_text(place, text)
            return members
    _say(f'{path}: its index could not be kept ({" ".join(places)})')
    return members


def _scan_tar(path):
    """The pictures of a tar; members that are tars themselves, as in ILSVRC's train tar, are classes."""
    members = []
    try:
        with open(path, 'rb') as outer, open(path, 'rb') as inner:
            for member in _tar_files(outer):
                if member.name.endswith('.tar'):
                    label = os.path.basename(member.name)[:-len('.tar')]
                    inner.seek(member.offset_data)
                    members += [(f'{label}/{os.path.basename(nested.name)}', nested.offset_data, nested.size)
                                for nested in _tar_files(inner) if _is_picture(nested.name)]
                elif _is_picture(member.name):
                    members.append((member.name, member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f'{path}: expected an uncompressed tar, found one that cannot be read: {error}') from None
    return members


def _tar_files(file):
    """TarInfos of the plain files in the tar that begins at the file's position."""
    with tarfile.open(fileobj=file, mode='r:') as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()         # a million TarInfos would stay in memory
            if member.isfile():
                yield member


# ---------------------------------------------------------------- torchvision's data sets

class _Arrays:
    """(N, H, W) uint8 images and their labels."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def _open_torchvision(path, dataset, name):
    """(train source, test source or None, number of classes)."""
    known = {_plain(key): key for key in TORCHVISION}
    if name not in known:
        raise UserError(f'--dataset {dataset}: expected one of imagenet digits {" ".join(TORCHVISION)}')
    cls = getattr(datasets, known[name])
    if name in MNIST_LIKE:
        for folder in (os.path.join(path, known[name], 'raw'), os.path.join(path, known[name]), path,
                       *(folder for root in (path, DEBIAN) for folder in sorted(glob.glob(f'{glob.escape(root)}/*'))
                         if _plain(os.path.basename(folder)) == name)):
            if (files := _idx_files(folder)) is not None:
                train, test = (Named(name, _Arrays(*map(_read_idx, pair))) for pair in (files[:2], files[2:]))
                return train, test, len(cls.classes)

    parameters = inspect.signature(cls.__init__).parameters
    train_splits, test_split = SPLITS.get(name, (('train',), 'test'))
    fixed = {'split': 'balanced'} if name == 'emnist' else {}
    if 'train' in parameters or name in ('emnist', 'qmnist'):
        choices = [{'train': True, **fixed}, {'train': False, **fixed}]
    elif 'split' in parameters:
        choices = [*({'split': split} for split in train_splits), {'split': test_split}]
    else:
        choices = [{}]
    parts = _local_or_download(path, dataset, cls, choices)
    train, test = (parts[:-1], parts[-1]) if len(parts) > 1 else (parts, None)
    source = Named(name, train[0] if len(train) == 1 else ConcatDataset(train))
    test = None if test is None else Named(f'{name} test', test)
    return source, test, _num_classes(parts[0], name)


def _local_or_download(path, dataset, cls, choices):
    """One torchvision data set for each of the keyword choices, from the folder, else from the network."""
    def load(download):
        return [cls(path, **choice, download=download) for choice in choices]

    def load_local():
        with contextlib.suppress(RuntimeError, OSError):
            return load(download=False) if os.path.isdir(path) else None

    try:
        if (local := load_local()) is not None:
            return local
        import fcntl
        os.makedirs(path, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)      # of the ranks of a machine one downloads, the others wait
            return load_local() or load(download=True)
        finally:
            os.close(folder)
    except ImportError as error:
        raise UserError(f'--dataset {dataset}: torchvision needs a package for it: {error}') from None
    except Exception as error:          # URLError, RuntimeError, ValueError, errors of zip and tar files, …
        raise UserError(f'--dataset {dataset}: expected its files under {path} as torchvision keeps them, found '
                        f'none; downloading them failed: {_one_line(error)}') from None


def _idx_files(folder):
    """The four files of an MNIST-like set in a folder, train then test, images then labels; None without them."""
    files = []
    for kind in ('train-images-idx3', 'train-labels-idx1', 't10k-images-idx3', 't10k-labels-idx1'):
        paths = [os.path.join(folder, f'{kind}-ubyte{ending}') for ending in ('', '.gz')]
        files += [path for path in paths if os.path.isfile(path)][:1]
    return files if len(files) == 4 else None


def _read_idx(path):
    """uint8 array of an idx file, gzipped or not."""
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            data = f.read()
        dims = data[3]
        shape = np.frombuffer(data, '>i4', dims, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise UserError(f'{path}: expected an idx file of bytes, found one that cannot be read: {error}') from None


def _num_classes(dataset, name):
    for key in ('classes', 'categories'):
        if getattr(dataset, key, None):
            return len(getattr(dataset, key))
    for key in ('targets', 'labels', '_labels'):
        if getattr(dataset, key, None) is not None:
            return int(max(getattr(dataset, key))) + 1
    return {'gtsrb': 43, 'pcam': 2}[name]


# ---------------------------------------------------------------- batches

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


class Loader:
    """Batches (images (n, 3, S, S), labels (n,)); len() is the number of batches of the whole epoch or set.

    A picture that cannot be read makes its batch smaller, a batch without any other is left out. Raises UserError
    at the end when not one picture could be read.
    """

    def __init__(self, dataset, batches, length, workers, refill=False, whole=True):
        self.dataset, self.length, self.whole = dataset, length, whole
        # its own generator: a DataLoader would draw from torch's global one each time it is started
        self.loader = DataLoader(_Batches(dataset, refill), batch_size=None, sampler=batches, collate_fn=_same,
                                 num_workers=workers, pin_memory=torch.cuda.is_available(),
                                 generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return self.length

    def __iter__(self):
        readable, unreadable = False, None
        for images, labels, broken in self.loader:
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


def calibration_batches(dataset, batch_size, num_batches, seed=0, workers=0):
    """Loader of num_batches random batches with the evaluation transform: a function of the set and seed alone.

    No image occurs twice; a set smaller than num_batches * batch_size gives all it has.
    """
    dataset = dataset.evaluated()
    order = _permutation(len(dataset), seed, 'calibration').numpy()
    return _in_order(dataset, order[:num_batches * batch_size], batch_size, workers)


def _in_order(dataset, indices, batch_size, workers, whole=True):
    batches = [(0, indices[start:start + batch_size]) for start in range(0, len(indices), batch_size)]
    return Loader(dataset, batches, len(batches), workers, whole=whole)
