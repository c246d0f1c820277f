"""A measurement in a process of its own: the device's first touch, the allocator and peak memory belong to it alone."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from floodrepro import console
from floodrepro.errors import FloodreproError


def in_own_process(work: Callable[..., dict[str, Any]], *arguments: Any, method: str | None = None) -> dict[str, Any]:
    """Work in a new process and give back its result.

    Args:
        work: A function at module level.
        arguments: What it is called with; they and the result are pickled.
        method: "fork" takes over what is imported already, "spawn" imports it again. Default: spawn where there is a
            GPU. Importing TerraTorch asks torch for GPUs (diffusers 0.42 does), and torch refuses to start CUDA in a
            process that was forked after such a question.

    Raises:
        FloodreproError: The work failed, or its process died.
    """
    method = method or ("spawn" if torch.cuda.is_available() else "fork")
    with ProcessPoolExecutor(1, mp_context=get_context(method), initializer=_end_with_parent) as pool:
        future = pool.submit(_quietly, work, arguments)
        error = future.exception()
    if error is None:
        return future.result()
    reason = str(error).strip().splitlines()
    what = error.what if isinstance(error, FloodreproError) else f"{type(error).__name__}: {(reason or ['died'])[0]}"
    raise FloodreproError(f"a measurement failed: {what}") from error


def _end_with_parent() -> None:
    """A parent that is killed says nothing to its pool, whose process would keep its memory, and a GPU's, for ever."""
    parent = parent_process()
    assert parent is not None  # it is called in a pool's process only

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _quietly(work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What libraries print goes to stderr; an error travels as one that can be pickled."""
    try:
        with console.stdout_to_stderr():
            return work(*arguments)
    except FloodreproError as error:
        raise FloodreproError(error.what, where=error.where, fix=error.fix) from None
