"""Batch-norm calibration: the statistics of the active subnet, from images, without touching the trained ones."""
import contextlib
import itertools

import torch
import torch.distributed as dist

from ..errors import UserError
from ..modeling.ops.lsq_plus import local_initialisation, quantised_ops
from ..modeling.ops.op import is_norm


def norms(model):
    """The model's batch norms."""
    return [module for module in model.modules() if is_norm(module)]


def norm_statistics(model):
    """Copy of the running statistics of every batch norm, for set_norm_statistics()."""
    return [(norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone())
            for norm in norms(model)]


@torch.no_grad()
def set_norm_statistics(model, statistics):
    """Put copied statistics back."""
    for norm, (mean, var, batches) in zip(norms(model), statistics):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.num_batches_tracked.copy_(batches)


@contextlib.contextmanager
def kept_statistics(model):
    """Put batch-norm statistics, momenta and training modes back at the end."""
    statistics, momenta = norm_statistics(model), [norm.momentum for norm in norms(model)]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        set_norm_statistics(model, statistics)
        for norm, momentum in zip(norms(model), momenta):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


@torch.no_grad()
def calibrate(model, batches, job=None):
    """Set the batch-norm statistics to those of `batches` (tensors (N, C, H, W)).

    Of a supernet inside kept_statistics(): its subnets share their batch norms. Means and variances are averaged over
    batches weighted by their images, so that every image counts the same whatever the batch sizes; with a job of
    several ranks, over the union of the ranks' batches. Leaves the model in eval mode.
    """
    model.eval()
    for norm in norms(model):
        norm.reset_running_stats()
        norm.training = True
    seen = 0
    for batch in batches:
        seen += len(batch)
        for norm in norms(model):
            norm.momentum = len(batch) / seen
        try:
            model(batch)
        except ValueError as error:
            if len(batch) > 1 or 'more than 1 value' not in str(error):
                raise
            raise UserError('batch norm cannot be calibrated on one image: give a larger batch size') from None
    if job is not None and job.world_size > 1:
        _average_over_ranks(norms(model), seen, job)
    elif seen == 0:
        raise ValueError('no images to calibrate batch norm with')
    model.eval()


def _average_over_ranks(modules, seen, job):
    statistics = [buffer for norm in modules for buffer in (norm.running_mean, norm.running_var)]
    flat = torch.cat([torch.cat(statistics) * seen, torch.tensor([float(seen)], device=job.device)])
    dist.all_reduce(flat)
    for buffer, part in zip(statistics, (flat[:-1] / flat[-1]).split([len(b) for b in statistics])):
        buffer.copy_(part)


def initialize_all_scales(model, images, first, others, patience=None):
    """Initialise the LSQ+ scales that no forward has reached yet; changes nothing else.

    model: a Supernet or a Student, whose active_ops() are what the next forward runs. images: a batch, or a function
    that gives one where it is needed. first() activates the largest subnet; others: functions that activate one more
    each, perhaps without end. A subnet runs if it has ops without scales. It stops when all scales have a value, or
    after `patience` subnets that gave none. Returns the number of ops initialised. Ranks that call this with the same
    images and subnets get the same scales. Which subnet is active afterwards is not said.
    """
    def missing(ops):
        return sum(op.is_quantised and not op.scales_initialized for op in ops)

    before = left = missing(quantised_ops(model))
    waited = 0
    with torch.no_grad(), local_initialisation(), kept_statistics(model):
        model.train()
        for activate in itertools.chain([first], others):
            if waited == patience or not left:
                break
            activate()
            if missing(model.active_ops()):
                images = images() if callable(images) else images
                model(images)
            waited = waited + 1 if missing(quantised_ops(model)) == left else 0
            left = missing(quantised_ops(model))
    return before - left
