"""One process or many: plain python, torchrun and torch.distributed.launch; NCCL on GPUs, gloo on CPUs."""
import contextlib
import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..cli import add_local_rank
from ..errors import UserError, one_line


@dataclass(frozen=True)
class Job:
    """This process's place: rank of world_size, and its device."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device('cpu')

    @property
    def is_main(self):
        return self.rank == 0

    def alone(self):
        """The same process as a job of its own: for work that ranks do not share."""
        return Job(0, 1, self.device)


def add_distributed_arguments(parser):
    """--local_rank and --local-rank, which torch.distributed.launch passes by version, and --device."""
    add_local_rank(parser)
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help='auto: a GPU if any')


@contextlib.contextmanager
def distributed_job(local_rank=None, device='auto'):
    """The Job of this process; joins the process group that RANK and WORLD_SIZE announce, leaves it at the end.

    Inside another one it is the same job.
    """
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no GPU here')
    use_cuda = device != 'cpu' and torch.cuda.is_available()
    _check_environment()
    local_rank = int(os.environ.get('LOCAL_RANK', local_rank or 0))
    place = torch.device('cuda', local_rank % torch.cuda.device_count()) if use_cuda else torch.device('cpu')
    if use_cuda:
        torch.cuda.set_device(place)
    if 'RANK' not in os.environ or dist.is_initialized():
        yield Job(dist.get_rank(), dist.get_world_size(), place) if dist.is_initialized() else Job(device=place)
        return
    shared = use_cuda and int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > torch.cuda.device_count()
    try:
        dist.init_process_group('nccl' if use_cuda and not shared else 'gloo')     # NCCL wants a GPU for each rank
    except (ValueError, RuntimeError) as error:
        raise UserError(f'the ranks cannot meet: {one_line(error)[:200]}') from None
    rank = dist.get_rank()
    try:
        yield Job(rank, dist.get_world_size(), place)
    except RuntimeError as error:               # DistBackendError is one
        if not re.search('gloo|nccl|connection|timed out', str(error), re.IGNORECASE):
            raise
        raise UserError(f'rank {rank}: another rank is gone or does not answer ({one_line(error)[:120]}); the job '
                        'ends, --resume goes on') from None
    finally:
        dist.destroy_process_group()


def _check_environment():
    """UserError for variables of a launcher that are no numbers, or a rank that the job does not have."""
    values = {}
    for name in ('LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'RANK', 'WORLD_SIZE', 'MASTER_PORT'):
        text = os.environ.get(name, '0')
        if not (text.isascii() and text.isdigit()):
            raise UserError(f'{name}={text} in the environment: expected a number')
        values[name] = int(text)
    if 'RANK' in os.environ and values['RANK'] >= values['WORLD_SIZE']:
        raise UserError(f'RANK={values["RANK"]} in the environment: expected WORLD_SIZE to be larger, found '
                        f'{values["WORLD_SIZE"]}')


def _sum_over_ranks(tensors):
    """In-place sum over ranks of tensors of one dtype and device, in one reduction."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def average_gradients(parameters, job):
    """Mean of the gradients over ranks, in one reduction; every rank must have gradients for the same ones."""
    if job.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients:
        gradient /= job.world_size
    _sum_over_ranks(gradients)


def sum_over_ranks(values, job):
    """Sum over ranks of a list of plain numbers, exact for counts."""
    if job.world_size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=job.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def average(values, job):
    """Mean over ranks of a list of plain numbers."""
    return [value / job.world_size for value in sum_over_ranks(values, job)]


def broadcast(module, job):
    """Give every rank rank 0's parameters and buffers."""
    if job.world_size > 1:
        with torch.no_grad():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def share(value, job):
    """Rank 0's value (anything that can be pickled) on every rank."""
    if job.world_size == 1:
        return value
    box = [value if job.is_main else None]
    dist.broadcast_object_list(box, 0)
    return box[0]


def barrier(job):
    """Wait for every rank."""
    if job.world_size > 1:
        dist.barrier()
