"""How the C library hands out memory, which decides a seventh of a training step's time on a CPU."""

import ctypes
import mmap
import sys

# <malloc.h> of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8
NEVER = -1

HUGE_PAGE = 2 << 20
HEAP = 4 << 30  # training the full networks takes 1.5 GB at batch size 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next allocations, in huge pages; nothing without glibc.

    glibc returns large blocks to the system at once. A step frees and allocates hundreds of megabytes of
    gradients, which the system then has to clear and map again, 4 KiB at a time. And where weights of
    megabytes are read once, looking up so many small pages takes longer than reading them.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    libc.mallopt(M_ARENA_MAX, 1)  # a thread's own heap is unmapped whenever it is empty, the loader's too
    try:  # Not beyond a limit: when a malloc fails, this thread turns to another heap, which is trimmed.
        mmap.mmap(-1, HEAP, flags=mmap.MAP_PRIVATE).close()
    except OSError:
        return
    # The heap grows by HEAP and, as nothing is trimmed, keeps it. It is memory only once it is written to.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(HEAP)
    if block is not None:
        begin, end = -(-block // HUGE_PAGE) * HUGE_PAGE, (block + HEAP) // HUGE_PAGE * HUGE_PAGE
        libc.madvise(begin, end - begin, mmap.MADV_HUGEPAGE)  # advice: refused, it changes nothing
        libc.free(block)
