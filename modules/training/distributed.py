"""One process or many: plain python, torchrun and torch.distributed.launch; NCCL on GPUs, gloo on CPUs.

Plain objects and waits of unknown length go over gloo: no GPU spins meanwhile, and none gives up after TIMEOUT.
"""
import contextlib
import os
import re
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..cli import INTERRUPTED, STOPPED, add_local_rank, exit_code, note
from ..errors import UserError, one_line

TIMEOUT = timedelta(minutes=30)         # of a reduction; ranks take the same steps side by side
PATIENCE = timedelta(days=2)            # of a barrier: ranks may have unequal work before it
_joined = []                            # the Job of this process, while it is one of several


@dataclass(frozen=True)
class Job:
    """This process's place: rank of world_size, and its device."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device('cpu')
    waiting: object = None              # process group of barrier()

    @property
    def is_main(self):
        return self.rank == 0

    def alone(self):
        """The same process as a job of its own: for work that ranks do not share."""
        return Job(0, 1, self.device)


def add_distributed_arguments(parser):
    """--local_rank and --local-rank, which torch.distributed.launch passes by version, and how a device computes."""
    add_local_rank(parser)
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto', help='auto: a GPU if any')
    parser.add_argument('--deterministic', action='store_true',
                        help='on GPUs: only operations that give the same bits in each run; slower')


def _be_deterministic():
    """The same bits in each run on GPUs; operations that cannot are errors of torch."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def distributed_job(local_rank=None, device='auto', deterministic=False):
    """The Job of this process; joins the process group that RANK and WORLD_SIZE announce, leaves it at the end.

    Inside another one it is the same job. After an error a process of several leaves at once, by os._exit() behind its
    error line: leaving the process group in order would wait for ranks that wait for this one.
    """
    if device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: torch sees no GPU here')
    if deterministic:
        _be_deterministic()
    use_cuda = device != 'cpu' and torch.cuda.is_available()
    _check_environment()
    local_rank = int(os.environ.get('LOCAL_RANK', local_rank or 0))
    place = torch.device('cuda', local_rank % torch.cuda.device_count()) if use_cuda else torch.device('cpu')
    if use_cuda:
        torch.cuda.set_device(place)
    if 'RANK' not in os.environ or _joined:
        yield _joined[-1] if _joined else Job(device=place)
        return
    shared = use_cuda and int(os.environ.get('LOCAL_WORLD_SIZE', 1)) > torch.cuda.device_count()
    nccl = use_cuda and not shared                      # NCCL wants a GPU for each rank
    try:
        dist.init_process_group('cpu:gloo,cuda:nccl' if nccl else 'gloo', timeout=TIMEOUT,
                                device_id=place if nccl else None)
        waiting = dist.new_group(backend='gloo', timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(f'the ranks cannot meet: {one_line(error)[:200]}') from None
    _joined.append(Job(dist.get_rank(), dist.get_world_size(), place, waiting))
    try:
        yield _joined[-1]
    except BaseException as error:
        _leave(error)
    _joined.pop()
    dist.destroy_process_group()


def _leave(error):
    """End this process of several: its error line, or its traceback, and exit code, without a word to the others."""
    if (isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)   # DistBackendError is one
            and re.search('gloo|nccl|connection|timed out', str(error), re.IGNORECASE)):
        error = UserError(f'rank {dist.get_rank()}: another rank is gone or does not answer '
                          f'({one_line(error)[:120]}); the job ends, --resume continues')
    code = error.code if isinstance(error, SystemExit) else exit_code(error)
    if code == INTERRUPTED:
        note(STOPPED)
    if code is None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


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


def sum_over_ranks(values, job):
    """Sum over ranks of numbers (a list, or a 1-d tensor), exact for counts; with one wait for the device."""
    if job.world_size == 1:
        return values.tolist() if isinstance(values, torch.Tensor) else list(values)
    tensor = torch.as_tensor(values, dtype=torch.float64, device=job.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def average(values, job):
    """Mean over ranks of numbers (a list, or a 1-d tensor), as plain numbers."""
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


def gather(value, job):
    """[value of rank 0, of rank 1, …] (anything that can be pickled) on every rank."""
    values = [value] * job.world_size
    if job.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def of_main(read, job):
    """What rank 0's read() gives, on every rank, so that a file is looked for and read in one place only.

    Its UserError or OSError is every rank's.
    """
    found = error = None
    if job.is_main:
        try:
            found = read()
        except (UserError, OSError) as wrong:
            error = wrong
    found, error = share((found, error), job)
    if error is not None:
        raise error
    return found


def check_same(what, value, job):
    """UserError unless all ranks have the same value (a number or a text)."""
    values = gather(value, job)
    if len(set(values)) > 1:
        raise UserError(f'rank {job.rank}: ranks differ in {what}: {" ".join(map(str, values))}; do all see the same '
                        'files, packages and flags?')


def any_rank(flag, job):
    """Whether `flag` is true on some rank; no GPU waits for it."""
    if job.world_size == 1:
        return flag
    tensor = torch.tensor(int(flag))
    dist.all_reduce(tensor, group=job.waiting)
    return bool(tensor)


def barrier(job):
    """Wait for every rank, as long as that takes."""
    if job.world_size > 1:
        dist.barrier(group=job.waiting)
