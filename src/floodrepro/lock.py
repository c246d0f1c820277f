"""One process at a time: a lock that goes with its process, however that ends."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from floodrepro.errors import FloodreproError

_held: set[TextIO] = set()


def _leave_to_the_parent() -> None:
    """In a forked process: close the lock, which the kernel would keep until the last of all forks has closed it."""
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)  # DataLoader workers outlive a killed parent by seconds


@contextlib.contextmanager
def hold(file: Path, taken: Callable[[str], FloodreproError]) -> Iterator[None]:
    """Keep every other process out while the context lasts.

    The lock is the kernel's. Its file stays: if it were deleted, two processes could hold locks on two files of one
    name.

    Args:
        file: The lock's file; made where it is missing.
        taken: Makes the error for a lock that is held elsewhere, from the holder's process id as text.
    """
    with file.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise taken(lock.read().strip() or "unknown") from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)
