"""How the C library hands out memory for tensors on a CPU."""

import ctypes

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # glibc's names, from malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones; the commands do so on a CPU.

    By itself glibc asks the system for every large tensor and gives it back at once, and each of its pages is
    cleared and mapped anew. The process stays at its peak of memory; GPU memory is not concerned.

    Returns:
        whether the C library is glibc and has taken it; elsewhere nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
