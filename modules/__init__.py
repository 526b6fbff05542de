"""SpaceEvo: search INT8-friendly search spaces, then the networks in them."""
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))     # of the repository


def usable_cores():
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
