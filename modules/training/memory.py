"""Memory of a training process on a CPU."""
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4                   # of mallopt(3)


def keep_freed_memory(enable=True):
    """Let glibc keep freed memory for the next tensor; whether it could (nothing happens elsewhere).

    By default glibc gives a large tensor back to the system when it is freed and gets new pages for the next one, and
    the system fills each with zeros first: up to a fifth of a training step, for operations on 20 to 50 MB ten times
    their own time. The process then stays as large as it was at its largest.
    """
    if not sys.platform.startswith('linux'):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, 'mallopt'):                    # musl
        return False
    if enable:
        return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
    done = libc.mallopt(M_MMAP_MAX, 65536) and libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)   # glibc's defaults
    libc.malloc_trim(0)
    return bool(done)
