"""The demo's pictures: the first data set that can be had, or the user's own."""
import json
import os
from typing import NamedTuple

from ..errors import UserError
from ..files import write_text
from ..training.data import open_data

# in this order: each is tried where those before it cannot be had, on machines that reach package mirrors only too
SOURCES = {'CIFAR10': 'CIFAR-10, by torchvision', 'fashion-mnist': "Fashion-MNIST, by torchvision or Debian's package",
           'elpv': "solar cells, by PyPI's elpv-dataset (2,624 pictures, CC-BY-NC-SA)"}
HELD_OUT = {'digits': 400, 'elpv': 300}         # images for the subnet search; else 5,000, at most a fifth
SPACES = {'elpv': 'demo_96'}                    # cracks need 96 pixels


class DemoData(NamedTuple):
    """Which pictures, and why; path: the scripts' --dataset_path; images: how many to train on."""
    dataset: str
    path: str
    why: str
    images: int

    @property
    def space(self):
        """The hyperspace for pictures of this size."""
        return SPACES.get(self.dataset, 'demo')

    @property
    def flags(self):
        """Of every script that sees pictures."""
        return ['--dataset_path', self.path, '--dataset', self.dataset, '--valid_size', held_out(self.dataset)]


def held_out(dataset):
    """Images of --valid_size."""
    return HELD_OUT.get(dataset, 5000)


def choose_data(path, dataset=None, record=None):
    """DemoData of `dataset`, or of the first of SOURCES that is at `path` or can be downloaded to it.

    record: the file of keep_data(), whose choice counts where there is one. UserError where none can be had.
    """
    if dataset is not None:
        return DemoData(dataset, path, 'as --dataset says', _images(path, dataset))
    if record is not None and os.path.isfile(record):
        with open(record, encoding='utf-8') as f:
            return DemoData(*json.load(f))
    problems = []
    for name, what in SOURCES.items():
        try:
            images = _images(path, name)
        except UserError as error:
            problems.append(f'{what}: {error}')
            print(f'no {problems[-1]}', flush=True)
            continue
        return DemoData(name, path, f'{what}{"".join(f"; no {problem}" for problem in problems)}', images)
    raise UserError('no pictures to be had (above); give a folder of yours with --dataset imagenet --dataset_path, or '
                    '--dataset digits')


def _images(path, dataset):
    return len(open_data(path, dataset, held_out(dataset)).train)


def keep_data(data, record):
    """Write the choice down, so that a demo goes on with the pictures it began with."""
    write_text(record, json.dumps(data))
