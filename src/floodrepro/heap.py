"""Memory that is kept for the next step, and what is not kept for the next run."""

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_GIB = 1 << 30


def keep_freed_memory() -> None:
    """Let this process use freed arrays of up to a GiB again.

    By default glibc gives large ones back one by one, and each new one costs a page fault for every 4 KiB, which takes
    longer than a copy into it: a step of the tiny model on two cores and 64 px chips has 13,000 of them. Without them
    steps were 5 to 18 % faster, from 256 px to 64 px (medians of few and noisy rounds).
    On another C library nothing is changed.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _GIB)
        library.mallopt(_TRIM_THRESHOLD, _GIB)


def release_memory() -> None:
    """Let go of what an earlier run of this process left, on a GPU as well.

    A failed run's last graph, with all its activations, hangs in a cycle: incident, traceback, trainer, callback.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
