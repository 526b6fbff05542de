"""Evaluation: pictures decoded once, one accuracy for all, and a supernet's subnets after batch-norm calibration."""
import contextlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError
from .calibrate import calibrate, kept_statistics
from .data import to_floats
from .distributed import sum_over_ranks


class Accuracy(NamedTuple):
    """Percent of `images` whose label is the first, or among the first five, of `classes`; loss: mean cross-entropy."""
    top1: float
    top5: float
    loss: float
    images: int
    classes: int = 1000

    def __str__(self):
        top5 = f'  top-5 {self.top5:.2f}%' if self.classes >= 10 else ''        # says nothing of a few
        return f'top-1 {self.top1:.2f}%{top5}  loss {self.loss:.4f}  ({self.images} images)'


class DecodedImages:
    """The batches (images, labels) of a Loader, decoded once and kept as bytes; each pass gives the loader's floats.

    A picture takes 3 S^2 bytes: 10,000 of 224 pixels 1.5 GB, a quarter of what they take as floats. len() is the
    number of images.
    """

    def __init__(self, loader):
        self.mean_std, self.device, self.batches = loader.dataset.mean_std, loader.device, list(loader.pixels())

    def to(self, device):
        """Keep the bytes on a device; returns itself."""
        self.device = device
        self.batches = [(pixels.to(device), labels.to(device)) for pixels, labels in self.batches]
        return self

    def __len__(self):
        return sum(len(labels) for _, labels in self.batches)

    def __iter__(self):
        for pixels, labels in self.batches:
            yield to_floats(pixels.to(self.device, non_blocking=True), self.mean_std), labels


def images_of(batches, device=None):
    """The images alone of batches (images, labels), for calibrate()."""
    for images, *_ in batches:
        yield images.to(device)


@torch.no_grad()
def accuracy(model, batches, job, table=None):
    """Accuracy of a model (in eval mode afterwards) on batches (images, labels), each rank its own share.

    Counts are summed over ranks, so it is exact whatever the shares. table: a list that gets the confusion table:
    (C, C) images by true and answered class.
    """
    model.eval()
    confusion = 0
    top1 = top5 = images = 0
    loss = 0.0
    for x, labels in batches:
        logits, labels = model(x.to(job.device)).float(), labels.to(job.device)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        top1, top5 = top1 + ranked[:, 0].sum(), top5 + ranked.sum()
        loss = loss + F.cross_entropy(logits, labels, reduction='sum').double()
        images += len(labels)
        if table is not None:
            confusion = confusion + confusion_table(labels, logits.argmax(1), logits.shape[1])
    top1, top5, loss, images = sum_over_ranks([float(value) for value in (top1, top5, loss, images)], job)
    if not images:
        raise UserError('no images to evaluate on')
    if table is not None:
        table.append(np.reshape(sum_over_ranks(confusion.flatten().tolist(), job), confusion.shape).astype(int))
    return Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, round(images), logits.shape[1])


def confusion_table(labels, answers, classes):
    """(C, C) counts: row by true class, column by answered class."""
    return torch.bincount(labels * classes + answers, minlength=classes * classes).view(classes, classes)


@contextlib.contextmanager
def kept_subnet(supernet):
    """Put the active subnet back at the end."""
    subnet = supernet.active_subnet
    try:
        yield
    finally:
        supernet.set_active_subnet(subnet)


@contextlib.contextmanager
def calibrated_subnet(supernet, subnet, calibration, job):
    """Inside, a subnet (string or Subnet) is active, with batch-norm statistics of its own; then all is as it was.

    calibration: this rank's share of batches (images, labels), such as DecodedImages.
    """
    with kept_subnet(supernet), kept_statistics(supernet):
        supernet.set_active_subnet(subnet)
        calibrate(supernet, images_of(calibration, job.device), job)
        yield


def evaluate_subnet(supernet, subnet, calibration, test, job, table=None):
    """Accuracy of a subnet (string or Subnet) with batch-norm statistics of its own; the supernet stays as it was.

    calibration, test: this rank's shares, batches (images, labels), such as DecodedImages; table: as for accuracy().
    """
    with calibrated_subnet(supernet, subnet, calibration, job):
        return accuracy(supernet, test, job, table)
