"""Classes: do a checkpoint's and a data set's fit? Parts of ImageNet do. Their names, and what each one costs."""
import copy
import dataclasses

import numpy as np
import torch

from ..errors import UserError
from ..files import write_csv
from .log import note

IMAGENET = 1000
CLASS_WEIGHTS = 'none', 'balanced'
SHOWN = 20                      # classes whose accuracies are printed; of more the worst ones


class _Renumbered:
    """A source whose labels are `numbers` of its own labels."""

    def __init__(self, source, numbers):
        self.source, self.numbers, self.small = source, np.asarray(numbers), source.small

    def __len__(self):
        return len(self.source)

    def name(self, index):
        return self.source.name(index)

    def __getitem__(self, index):
        image, label = self.source[index]
        return image, int(self.numbers[label])


def fit_classes(data, num_classes, what):
    """The Data, its labels as a network of `num_classes` (named `what`) counts them; UserError where it cannot be.

    A network of ImageNet's 1000 classes can be evaluated on class folders of some of them: n01440764 is class 0
    there, however many folders there are.
    """
    if data.num_classes == num_classes:
        return data
    names = getattr(data.test.source, 'classes', None)
    if names and num_classes == IMAGENET:
        from timm.data import ImageNetInfo
        numbers = {name: number for number, name in enumerate(ImageNetInfo('imagenet-1k').label_names())}
        if all(name in numbers for name in names):
            note(f'{len(names)} of the 1000 classes of ImageNet, numbered by the names of their folders')
            return _renumbered(data, [numbers[name] for name in names])
    raise UserError(f'the data set has {data.num_classes} classes, {what} tells {num_classes} apart')


def _renumbered(data, numbers):
    sources = {}

    def renumbered(images):
        images = copy.copy(images)
        images.source = sources.setdefault(id(images.source), _Renumbered(images.source, numbers))
        return images

    return dataclasses.replace(data, train=renumbered(data.train), valid=renumbered(data.valid),
                               test=renumbered(data.test), num_classes=IMAGENET)


def class_names(data):
    """Names of the classes of `data` in their order, numbers where it knows no names."""
    source = data.test.source
    names = getattr(source, 'classes', None) or getattr(getattr(source, 'dataset', None), 'classes', None) or ()
    known = len(names) == data.num_classes and all(isinstance(name, str) for name in names)
    return list(names) if known else [str(number) for number in range(data.num_classes)]


def by_class(table, names):
    """A line with the accuracy of each class, or of the worst of many, of a confusion table (C, C)."""
    images = table.sum(1)
    shares = sorted((100 * table[i, i] / images[i], i) for i in range(len(table)) if images[i])
    shown = shares[:SHOWN] if len(shares) > SHOWN else sorted(shares, key=lambda share: share[1])
    names = names if len(names) == len(table) else [str(i) for i in range(len(table))]
    what = 'by class' if len(shown) == len(shares) else f'the worst {SHOWN} of {len(shares)} classes'
    return f'{what}: ' + ', '.join(f'{names[i]} {share:.1f}%' for share, i in shown)


def write_confusion(path, table, names):
    """CSV of a confusion table: a row a true class, a column an answered class, counts of images."""
    names = names if len(names) == len(table) else [str(i) for i in range(len(table))]
    write_csv(path, ('true \\ answered', *names), [(name, *row) for name, row in zip(names, table.tolist())])


def loss_weights(kind, images, num_classes, device):
    """(num_classes,) weights of the loss by class, of an ImageSet: N / (C n_c), as scikit-learn's `balanced`; None for
    `none`."""
    if kind == 'none':
        return None
    counts = np.bincount(_labels(images), minlength=num_classes)
    if not counts.all():
        raise UserError(f'--class_weights balanced: no training picture of {int((counts == 0).sum())} of the '
                        f'{num_classes} classes')
    return torch.tensor(counts.sum() / (num_classes * counts), dtype=torch.float32, device=device)


def _labels(images):
    labels = getattr(images.source, 'labels', None)
    if labels is None:
        labels = [images.source[int(index)][1] for index in images.indices]
        return np.asarray(labels)
    return np.asarray(labels)[images.indices]
