"""Do a checkpoint's classes and a data set's fit? Parts of ImageNet do, by the names of their folders."""
import copy
import dataclasses

import numpy as np

from ..errors import UserError
from .log import note

IMAGENET = 1000


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
