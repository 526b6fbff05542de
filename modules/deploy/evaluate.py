"""How near exported models are to torch: accuracy and agreement on test images, and the error of each layer."""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..files import check_file, write_csv
from ..modeling.ops.op import resize
from ..optional import need
from ..settings import setting
from ..training.checkpoint import precision
from ..training.classes import by_class, class_names, write_confusion
from ..training.evaluate import confusion_table
from .export import ExportSettings, check_weights, export, open_entries, open_images, open_source
from .onnx_models import metadata_of
from .quantisation import IMAGE, op_inputs
from .runtimes import open_session


@dataclass(kw_only=True)
class EvaluationSettings(ExportSettings):
    """Those of the export, and which images."""
    quant_mode: bool = setting(False, 'INT8 models too')
    only_int8: bool = setting(False, 'INT8 models, not those of fp32')
    num_eval_images: int | None = setting(None, 'for short runs; default: all test images', least=1)
    num_torch_images: int | None = setting(None, 'the first of them, which torch runs too; default: all', least=1)
    cache_gb: float = setting(8.0, 'GiB for test images that several models share; above it they are decoded for each',
                              above=0)
    threads: int = setting(1, 'threads of the runtime', least=1)
    output: str | None = setting(None, 'CSV of the results')
    confusion: str | None = setting(None, 'CSV: images by true and by answered class, of the last network')

    def kinds(self):
        return [True] if self.only_int8 else super().kinds()


class Comparison(NamedTuple):
    """torch on the first `torch_images` images and an exported model on all `images`: percent right of each, percent of
    torch's images with the same first class, rms of the difference of their logits over the standard deviation, and the
    model's confusion table (C, C)."""
    torch: float
    exported: float
    agreement: float
    logit_error: float
    images: int
    torch_images: int
    table: np.ndarray

    def describe(self, runtime):
        """As a line; runtime: name of what ran the model."""
        part = '' if self.torch_images == self.images else f', torch on {self.torch_images}'
        return (f'torch {self.torch:.2f}%  {runtime} {self.exported:.2f}%  agreement {self.agreement:.2f}%  logit '
                f'error {self.logit_error:.4f}  ({self.images} images{part})')


@torch.no_grad()
def compare(network, run, batches, torch_images=None):
    """Comparison of a torch Network and run(images (N, 3, r, r)) -> logits on batches (images, labels), which are
    resized to the network's resolution; torch_images: of how many, default all."""
    ours, theirs, labels, left = [], [], [], torch_images or math.inf
    network.eval()
    for images, truth in batches:
        images = resize(images, network.resolution)
        if left > 0:
            ours.append(network(images[:min(left, len(images))]).numpy())
            left -= len(images)
        theirs.append(run(images.numpy()))
        labels.append(truth.numpy())
    if not labels:
        raise UserError('no images to evaluate on')
    ours, theirs, labels = map(np.concatenate, (ours, theirs, labels))
    n, first, second = len(ours), ours.argmax(1), theirs.argmax(1)
    error = np.sqrt(np.mean((ours - theirs[:n]) ** 2)) / max(ours.std(), 1e-12)
    table = confusion_table(torch.as_tensor(labels), torch.as_tensor(second), ours.shape[1]).numpy()
    right, their_right, same = (100 * float(np.mean(hits)) for hits in (
        first == labels[:n], second == labels, first == second[:n]))
    return Comparison(right, their_right, same, float(error), len(labels), n, table)


def evaluate(settings, runtime):
    """What eval_onnx.py and eval_tflite.py do."""
    if settings.skip_weights:
        raise UserError('--skip_weights: random weights have no accuracy')
    entries, kinds, rows = open_entries(settings), settings.kinds(), []
    if settings.output:
        check_file(settings.output)
    for package in runtime.packages:
        need(package)
    images = open_images(entries, settings, passes=len(entries) * len(kinds), num_images=settings.num_eval_images,
                         cache_gb=settings.cache_gb)
    check_weights(entries, settings, kinds)
    for entry in entries:
        print(f'{entry.supernet} {entry.subnet}')
        for quant_mode in kinds:
            source = open_source(entry, settings, quant_mode, images)
            path, model, _ = export(source, settings.model_path, quant_mode, runtime, settings.reduce_range)
            found = compare(source.network, runtime.open(model, settings.threads).run, images.test,
                            settings.num_torch_images)
            kind, names = precision(quant_mode), class_names(images.data)
            print(f'  {kind}: {found.describe(runtime.name)}\n        {by_class(found.table, names)}'
                  f'\n        {path}', flush=True)
            if settings.confusion:              # of the last model, INT8 where there is one
                write_confusion(settings.confusion, found.table, names)
            rows.append([entry.supernet, entry.subnet, kind, *(f'{figure:.4f}' for figure in found[:4]), found.images,
                         found.torch_images])
            if settings.output:
                write_csv(settings.output, ('supernet', 'subnet', 'kind', 'torch', runtime.ending, 'agree', 'error',
                                            'images', 'torch_images'), rows)


# -- by layer, of ONNX models -----------------------------------------------------------------------------------

class LayerError(NamedTuple):
    """How far the input of a quantised op is from torch's: rms over the standard deviation, mean over its scale;
    added: the part of rms that is more than the op before had."""
    name: str
    rms: float
    bias: float
    added: float

    def __str__(self):
        return f'{self.name:<44} {self.rms:8.4f} {self.added:8.4f} {self.bias:+8.3f}'


def layer_errors(network, model, images):
    """[LayerError] of the inputs of all quantised ops in order, and of the logits; model: ModelProto of the Network.

    images (N, 3, r, r). The graph is run with every quantised tensor as an output.
    """
    onnx = need('onnx')
    tensors = metadata_of(model)['tensors']
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = {output.name for output in model.graph.output}
    added = dict.fromkeys(tensor for tensor, *_ in tensors.values() if tensor not in outputs)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
    values = open_session(watched).run([model.graph.output[0].name, *added], {IMAGE: images.numpy()})
    logits, codes = values[0], dict(zip(added, values[1:]))
    inputs, expected = op_inputs(network, images)
    errors = []
    for name, (tensor, scale, zero_point, shift) in tensors.items():
        ours, theirs = inputs[name].numpy(), scale * (codes[tensor].astype(np.float32) - zero_point) + shift
        difference = theirs.reshape(ours.shape) - ours
        errors.append(_layer_error(name, difference, ours.std(), scale, errors))
    expected = expected.numpy()
    return [*errors, _layer_error('logits', logits - expected, expected.std(), expected.std(), errors)]


def _layer_error(name, difference, deviation, step, before):
    rms = float(np.sqrt(np.mean(difference ** 2)) / max(deviation, 1e-12))
    last = before[-1].rms if before else 0.0
    return LayerError(name, rms, float(difference.mean() / max(step, 1e-12)), max(0.0, rms ** 2 - last ** 2) ** 0.5)
