"""One process at a time: a lock that goes with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, TextIO

from floodrepro import console
from floodrepro.errors import FloodreproError

# What flock(2) answers where the file system has no locks: Lustre without -o flock, NFSv3 without lockd, FUSE.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})

_held: set[TextIO] = set()


def _leave_to_the_parent() -> None:
    """In a forked process: close the lock, which the kernel would keep until the last of all forks has closed it."""
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)  # DataLoader workers outlive a killed parent by seconds


def acquire(file: IO[str] | IO[bytes], folder: Path) -> None:
    """Lock an open file, or say, once for each folder, that its file system has no locks.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_no_locks(folder)


@cache
def _say_no_locks(folder: Path) -> None:
    console.warn(f"the file system of {folder} has no locks: nothing keeps a second process from working there")


@contextlib.contextmanager
def hold(file: Path, taken: Callable[[str], FloodreproError]) -> Iterator[None]:
    """Keep every other process out while the context lasts.

    The lock is the kernel's. Its file stays: if it were deleted, two processes could hold locks on two files of one
    name. Where the file system has no locks, a warning says so and the work goes on.

    Args:
        file: The lock's file; made where it is missing.
        taken: Makes the error for a lock that is held elsewhere, from the holder's process id as text.
    """
    with file.open("a+", encoding="utf-8") as lock:
        try:
            acquire(lock, file.parent)
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
