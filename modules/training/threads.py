"""Work spread over threads without changing a bit of the result."""
import contextlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from .. import usable_cores


def default_workers():
    """Cores of this process's share of the machine: all of them over the ranks on it."""
    return max(1, usable_cores() // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


@contextlib.contextmanager
def one_core():
    """Inside, torch computes on one core of a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def thread_map(function, items, workers):
    """function(item) for each item, in order, computed by `workers` threads.

    Inside, torch uses one core per thread: sums of convolutions depend on the number of cores they are spread
    over, so this gives the same numbers on any machine of a kind, for any number of workers and ranks. Items are
    taken only as they are needed. A single worker is this thread itself: a GPU's plans are kept by thread.
    """
    if workers == 1:
        for item in items:
            with one_core():
                result = function(item)
            yield result
        return
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
