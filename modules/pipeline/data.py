"""A pipeline's pictures: the first data set that can be had, or the user's own."""
import json
import os
from typing import NamedTuple

from ..errors import UserError
from ..files import write_text
from ..training.data import open_data

WHAT = {'CIFAR10': 'CIFAR-10, by torchvision', 'fashion-mnist': "Fashion-MNIST, by torchvision or Debian's package",
        'elpv': "solar cells, by PyPI's elpv-dataset (2,624 pictures, CC-BY-NC-SA)"}


class PipelineData(NamedTuple):
    """Which pictures, and why; path: the scripts' --dataset_path; images: how many to train on; held_out: how many for
    the subnet search."""
    dataset: str
    path: str
    why: str
    images: int
    held_out: int

    @property
    def flags(self):
        """Of every script that sees pictures."""
        return ['--dataset_path', self.path, '--dataset', self.dataset, '--valid_size', self.held_out]


def choose_data(path, datasets, valid_size, record=None):
    """PipelineData of the first of `datasets` that is at `path` or can be downloaded to it.

    record: the file of keep_data(), whose choice counts where it is one of them. UserError where none can be had.
    """
    if record is not None and os.path.isfile(record):
        try:
            with open(record, encoding='utf-8') as f:
                kept = PipelineData(*json.load(f))
        except (ValueError, TypeError):
            raise UserError(f'{record}: of another version, or damaged; remove its folder, or give another '
                            '--output_path') from None
        if kept.dataset in datasets:
            return kept
    problems = []
    for name in datasets:
        what = WHAT.get(name, f'class folders in {path}' if name == 'imagenet' else name)
        try:
            data = open_data(path, name, valid_size)
        except UserError as error:
            if len(datasets) == 1:
                raise
            problems.append(f'{what}: {error}')
            print(f'no {problems[-1]}', flush=True)
            continue
        why = f'{what}{"".join(f"; no {problem}" for problem in problems)}'
        return PipelineData(name, path, why, len(data.train), len(data.valid))
    raise UserError('no pictures to be had (above); give a folder of yours with --dataset imagenet --dataset_path, or '
                    '--dataset digits')


def keep_data(data, record):
    """Write the choice down, so that a pipeline continues with the pictures it began with."""
    write_text(record, json.dumps(data))
