"""Where pictures come from: ImageNet folders and tars, picture folders, torchvision's data sets, ELPV, digits."""
import contextlib
import csv
import glob
import gzip
import inspect
import io
import os
import re
import zlib

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset
from torchvision import datasets, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ..errors import UserError, one_line
from .packages import fetch_elpv, fetch_fashion_mnist
from .tars import is_picture, tar_index

SMALL = 96                      # pixels: data sets of at most this are stretched whole instead of cropped
DEBIAN = '/usr/share/datasets'
TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')
LAYOUTS = f'a folder a class, in train/ and val/ or by themselves, or {TARS[0]} and {TARS[1]}'
NO_CLASSES = ('__MACOSX',)      # what archives leave behind, beside names that begin with a dot
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
ELPV_CLASSES, ELPV_TEST, ELPV_SEED = ('functional', 'defective'), 0.25, 0
MNIST_LIKE = ('mnist', 'fashionmnist', 'kmnist')     # four idx files, gzipped or not


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
    classes: the names behind the labels, None without any.
    """
    small, classes = False, None

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


def open_source(path, dataset, labelled, min_side, train_alone=False):
    """(train source, test source or None, number of classes, 0 for unlabelled) of a data set by name.

    A source gives (RGB PIL image, label) by index and has name(index) and small. min_side: as for Pictures.
    train_alone: without the val split where there is one.
    """
    path, name = os.path.expanduser(path), plain_name(dataset)
    if name == 'imagenet':
        return _open_imagenet(path, labelled, min_side)
    if name == 'digits':
        from sklearn.datasets import load_digits
        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        return Named('digits', _Arrays(pixels, digits.target)), None, 10
    if name in ('elpv', 'elpvdataset'):
        return _open_elpv(path, min_side)
    return _open_torchvision(path, dataset, name, train_alone)


def plain_name(name):
    """A data set's name as it is compared: cifar10 of CIFAR-10."""
    return re.sub('[-_ ]', '', name).lower()


def _found(folder):
    """What is in a folder, for an error line: at most five entries."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    shown = ' '.join(entry.name + ('/' if entry.is_dir() else '') for entry in entries[:5])
    return (shown or 'nothing') + (f' … ({len(entries)} entries)' if len(entries) > 5 else '')


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
    if len(_class_names(path)) > 1:
        return _open_class_folders(path)
    if labelled:
        hint = ' (pictures without labels do for block KD only)' if any(_walk(path)) else ''
        raise UserError(f'{path}: expected {LAYOUTS}; found {_found(path)}{hint}')
    return _open_pictures(path, min_side), None, 0


def count_classes(path):
    """Classes of an ImageNet folder by its layout, without looking for its pictures; 0 where it has none."""
    path = os.path.expanduser(path)
    train = os.path.join(path, 'train')
    if os.path.isdir(train) or not os.path.isfile(os.path.join(path, TARS[0])):
        names = _class_names(train if os.path.isdir(train) else path)
        return len(names) if len(names) > 1 else 0
    return 1000


def _class_names(folder):
    """Names of the folders in `folder` that hold a picture, in order; hidden ones are none."""
    with contextlib.suppress(OSError):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name not in NO_CLASSES
                      and not entry.name.startswith('.') and _has_pictures(entry.path))
    return []


def _has_pictures(folder):
    with os.scandir(folder) as entries:                 # stops at the first, in the folder itself mostly
        return any(is_picture(entry.name) for entry in entries) or any(_walk(folder))


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
        yield from (os.path.relpath(os.path.join(folder, name), path) for name in sorted(names) if is_picture(name))


def _open_pictures(path, min_side):
    names = list(_walk(path))
    if not names:
        raise UserError(f'{path}: expected pictures ({" ".join(IMG_EXTENSIONS)}); found {_found(path)}')
    return Pictures(path, names, np.zeros(len(names)), min_side=min_side)


def _open_class_folders(train, val=None):
    """(train source, val source or None, number of classes)."""
    classes, sources = _class_names(train), []
    for folder in filter(None, (train, val)):
        names = classes if folder == train else _class_names(folder)
        if not names:
            raise UserError(f'{folder}: expected one folder per class; found {_found(folder)}')
        _check_classes(folder, names, classes, train)
        if len(classes) < 2:
            raise UserError(f'{folder}: expected at least two classes; found {classes[0]}/ alone')
        numbers = {name: number for number, name in enumerate(classes) if name in names}
        samples = make_dataset(folder, numbers, IMG_EXTENSIONS)
        files = [os.path.relpath(name, folder) for name, _ in samples]
        sources.append(Pictures(folder, files, [label for _, label in samples]))
    found = _with_classes(sources, classes)
    return (*found, None, len(classes)) if val is None else (*found, len(classes))


def _with_classes(sources, classes):
    for source in sources:
        source.classes = tuple(classes)
    return sources


def _check_classes(where, names, classes, train):
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(f'{where}: class {unknown[0]} is not one of the {len(classes)} classes of {train}')


def _open_tars(train, val, labelled):
    classes, sources = [], []
    indices = [tar_index(path) for path in (train, val)]
    for path, (found, _) in zip((train, val), indices):
        members = sorted((name.rpartition('/')[0].rpartition('/')[2], name, offset, size)
                         for name, offset, size in found)
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
    for _, keep in indices:                 # when both tars have turned out to be good ones
        keep()
    return *_with_classes(sources, classes), len(classes)


class _Arrays:
    """(N, H, W) uint8 images and their labels."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def _open_torchvision(path, dataset, name, train_alone):
    """(train source, test source or None, number of classes)."""
    known = {plain_name(key): key for key in TORCHVISION}
    if name not in known:
        raise UserError(f'--dataset {dataset}: expected one of imagenet digits elpv {" ".join(TORCHVISION)}')
    cls = getattr(datasets, known[name])
    if name in MNIST_LIKE and (local := _open_idx(path, cls, name)) is not None:
        return local
    parameters = inspect.signature(cls.__init__).parameters
    train_splits, test_split = SPLITS.get(name, (('train',), 'test'))
    fixed = {'split': 'balanced'} if name == 'emnist' else {}
    if 'train' in parameters or name in ('emnist', 'qmnist'):
        choices = [{'train': True, **fixed}, {'train': False, **fixed}]
    elif 'split' in parameters:
        choices = [*({'split': split} for split in train_splits[:1 if train_alone else None]), {'split': test_split}]
    else:
        choices = [{}]
    try:
        parts = _local_or_download(path, dataset, cls, choices)
    except UserError as error:
        if name != 'fashionmnist':
            raise
        try:
            with _downloading(path):
                if _open_idx(path, cls, name) is None:
                    fetch_fashion_mnist(path)
        except (UserError, OSError) as second:
            raise UserError(f"{error}; Debian's package: {one_line(second)}") from None
        return _open_idx(path, cls, name)
    train, test = (parts[:-1], parts[-1]) if len(parts) > 1 else (parts, None)
    source = Named(name, train[0] if len(train) == 1 else ConcatDataset(train))
    test = None if test is None else Named(f'{name} test', test)
    return source, test, _num_classes(parts[0], name)


def _open_idx(path, cls, name):
    """What _open_torchvision() gives, of an MNIST-like set whose four idx files are here; None where they are not."""
    for folder in (os.path.join(path, cls.__name__, 'raw'), os.path.join(path, cls.__name__), path,
                   *(folder for root in (path, DEBIAN) for folder in sorted(glob.glob(f'{glob.escape(root)}/*'))
                     if plain_name(os.path.basename(folder)) == name)):
        if (files := _idx_files(folder)) is not None:
            train, test = (Named(name, _idx_pair(*pair, len(cls.classes))) for pair in (files[:2], files[2:]))
            return train, test, len(cls.classes)
    return None


def _open_elpv(path, min_side):
    """ELPV: 2,624 electroluminescence pictures of solar cells, 300 x 300 grey (Deitsch et al., Solar Energy 2019).

    A cell counts as defective where its label, the probability of a defect (0, 1/3, 2/3, 1), is above a half. A quarter
    is the test set, stratified by probability and type of cell, always the same. Licence: CC BY-NC-SA 4.0.
    """
    from sklearn.model_selection import train_test_split
    folder = os.path.join(path, 'elpv')
    if not os.path.isdir(folder):
        try:
            with _downloading(path):
                if not os.path.isdir(folder):
                    fetch_elpv(path)
        except (UserError, OSError) as error:
            raise UserError(f"--dataset elpv: no {folder}; PyPI's package elpv-dataset: {one_line(error)}") from None
    labels = os.path.join(folder, 'labels.csv')
    try:
        with open(labels, encoding='utf-8', newline='') as file:
            rows = [(name, float(probability), kind) for name, probability, kind in
                    csv.reader(file, delimiter=' ', skipinitialspace=True)]
        train, test = train_test_split(rows, test_size=ELPV_TEST, random_state=ELPV_SEED,
                                       stratify=[row[1:] for row in rows])
    except (OSError, ValueError) as error:
        raise UserError(f'{labels}: expected lines of picture, probability of a defect and type: {error}') from None
    sources = [Pictures(folder, [name for name, *_ in part], [probability > 0.5 for _, probability, _ in part],
                        min_side=min_side) for part in (train, test)]
    for source in sources:
        source.small = True             # not small, but a cell is judged by all of it, so none is cropped
    return *_with_classes(sources, ELPV_CLASSES), len(ELPV_CLASSES)


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
        with _downloading(path):
            return load_local() or load(download=True)
    except ImportError as error:
        raise UserError(f'--dataset {dataset}: torchvision needs a package for it: {error}') from None
    except Exception as error:          # URLError, RuntimeError, ValueError, errors of zip and tar files, …
        raise UserError(f'--dataset {dataset}: expected its files under {path} as torchvision keeps them, found '
                        f'none; downloading them failed: {one_line(error)}') from None


@contextlib.contextmanager
def _downloading(path):
    """Inside, the folder `path` is there, and of the ranks of a machine only one, the others wait.

    What fails inside leaves no empty folders of its own in it, nor an empty `path` that is new.
    """
    import fcntl
    is_new = not os.path.isdir(path)
    os.makedirs(path, exist_ok=True)
    before, folder = set(os.listdir(path)), os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    except Exception:
        with contextlib.suppress(OSError):
            tops = [os.path.join(path, name) for name in set(os.listdir(path)) - before]
            for root in [root for top in tops for root, *_ in os.walk(top, topdown=False)] + [path] * is_new:
                with contextlib.suppress(OSError):
                    os.rmdir(root)
        raise
    finally:
        os.close(folder)


def _idx_files(folder):
    """The four files of an MNIST-like set in a folder, train then test, images then labels; None without them."""
    files = []
    for kind in ('train-images-idx3', 'train-labels-idx1', 't10k-images-idx3', 't10k-labels-idx1'):
        paths = [os.path.join(folder, f'{kind}-ubyte{ending}') for ending in ('', '.gz')]
        files += [path for path in paths if os.path.isfile(path)][:1]
    return files if len(files) == 4 else None


def _idx_pair(images, labels, classes):
    """_Arrays of a file of images and one of labels; UserError where they do not belong together."""
    pixels, numbers = _read_idx(images), _read_idx(labels)
    if pixels.ndim != 3 or numbers.shape != pixels.shape[:1] or not pixels.size:
        raise UserError(f'{labels}: expected one label for each of the images in {images}; found sizes '
                        f'{numbers.shape} for {pixels.shape}')
    if numbers.max() >= classes:
        raise UserError(f'{labels}: label {numbers.max()}, expected 0 to {classes - 1}')
    return _Arrays(pixels, numbers)


def _read_idx(path):
    """uint8 array of an idx file, gzipped or not."""
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            data = f.read()
        if data[:3] != b'\0\0\x08':
            raise ValueError('not bytes')
        dims = data[3]
        shape = np.frombuffer(data, '>i4', dims, offset=4)
        if shape.min() < 0:
            raise ValueError(f'sizes {shape.tolist()}')
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
