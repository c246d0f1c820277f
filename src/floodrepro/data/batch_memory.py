"""Memory that batches travel in from a loader's workers, used again as soon as nobody looks at it.

torch gives each batch a new piece of shared memory. A batch of 16 chips is 118 MB, 29,000 pages that the kernel has to
find, clear and map, one page fault each, and to take back after the batch: twice the time of decoding it. Here workers
inherit their memory when they are forked, fill a slot of it, and send its number.

A slot is free again once the last tensor in it is gone, views of whatever kind included: torch keeps the object that
`torch.frombuffer` was given for as long as the storage lives, and a weak reference tells when that object dies. Where
no slot is free, or none is large enough, and in a process that was spawned, a batch travels as torch would have it.
"""

import itertools
import math
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

Part = tuple[str, torch.dtype, tuple[int, ...], int]  # a tensor's name, dtype, shape, and place in its slot in bytes
_ALIGNED = 64  # bytes: a cache line, and more than any dtype asks for


class BatchMemory:
    """Slots of shared memory for one loader, made by its process before the workers are forked.

    Args:
        batch_bytes: Of the largest batch.
        workers: Of the loader.
        slots: For each worker. Pages that are never written to take no memory.
    """

    def __init__(self, batch_bytes: int, workers: int, slots: int) -> None:
        self._size = batch_bytes + mmap.PAGESIZE  # room to align each tensor
        self._slots = slots
        self._taken = mmap.mmap(-1, workers * slots)  # a byte each; anonymous and shared with what is forked
        self._memory = mmap.mmap(-1, workers * slots * self._size)
        self._process = os.getpid()
        self.key = next(_keys)
        _memories[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """A spawned process cannot inherit it."""
        return (type(None), ())

    def take_slot(self, worker: int) -> int | None:
        """A slot of a worker's own that nobody looks at; the first ones first, so that the last are seldom touched."""
        for slot in range(worker * self._slots, (worker + 1) * self._slots):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return None

    def place(self, like: Mapping[str, Tensor], count: int) -> list[Part] | None:
        """Where *count* tensors of each kind would lie in a slot; None where they do not fit."""
        parts, end = [], 0
        for name, tensor in like.items():
            parts.append((name, tensor.dtype, (count, *tensor.shape), end))
            end += -(-tensor.nbytes * count // _ALIGNED) * _ALIGNED
        return parts if end <= self._size else None

    def tensors(self, slot: int, parts: Sequence[Part]) -> dict[str, Tensor]:
        """A slot's tensors. In the process that made the memory, the slot is free again when the last one is gone."""
        view = memoryview(self._memory)
        if os.getpid() == self._process:
            weakref.finalize(view, _free, self._taken, slot, self._process).atexit = False
        start = slot * self._size
        return {
            name: torch.frombuffer(view, dtype=dtype, count=math.prod(shape), offset=start + place).view(shape)
            for name, dtype, shape, place in parts
        }


def _free(taken: mmap.mmap, slot: int, process: int) -> None:
    if os.getpid() == process:  # a worker that is forked later inherits a batch at hand, and may drop it
        taken[slot] = 0


class _InSlot(dict[str, Any]):
    """A batch in a slot, in the worker: what is sent is where it lies; what arrives is a dict of tensors."""

    def __init__(self, memory: BatchMemory, slot: int, parts: Sequence[Part]) -> None:
        super().__init__(memory.tensors(slot, parts))
        self._memory, self._slot, self._parts = memory, slot, parts

    def __reduce__(self) -> tuple[Any, ...]:
        others = {name: value for name, value in self.items() if not isinstance(value, Tensor)}
        return _arrive, (self._memory.key, self._slot, self._parts, others)


def _arrive(key: int, slot: int, parts: Sequence[Part], others: Mapping[str, Any]) -> dict[str, Any]:
    return {**_memories[key].tensors(slot, parts), **others}


_keys = itertools.count()
_memories: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()
_of_this_worker: BatchMemory | None = None


def use(memory: BatchMemory | None) -> None:
    """In a worker: let its batches travel in this memory."""
    global _of_this_worker
    _of_this_worker = memory


def room(like: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    """Tensors for a batch, of *count* times a chip's: in shared memory where this process is a worker that has some."""
    worker, memory = get_worker_info(), _of_this_worker
    if worker is not None and memory is not None:
        parts = memory.place(like, count)
        slot = None if parts is None else memory.take_slot(worker.id)
        if parts is not None and slot is not None:
            return _InSlot(memory, slot, parts)
    return {name: tensor.new_empty((count, *tensor.shape)) for name, tensor in like.items()}
