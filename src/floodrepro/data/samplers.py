"""Which chips come when, in a run of one process or of several."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data.distributed import DistributedSampler


def hashed_number(seed: int, epoch: int, what: str) -> int:
    """A number from 0 to 2^64 - 1 that looks random and depends on the three arguments only.

    So neither the order of chips, nor the number of workers or processes, nor an interruption changes it.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{what}".encode(), digest_size=8).digest(), "little")


class ShuffledByEpoch(DistributedSampler[int]):
    """Every chip once an epoch, in an order that seed and epoch alone decide. Lightning calls `set_epoch`.

    Several processes take turns batch by batch, so that each step sees the chips that one process with a batch of
    their total size would see. Chips that do not fill a batch of all processes are left out.

    Args:
        count, seed, batch_size: Number of chips, the run's seed, and the chips in the batch of one process.
        world, rank: Number of processes, and this one's, from 0.
        resumed: The epoch of a resumed run and the number of its batches that were trained before. That epoch begins
            after them; every other epoch is whole.
    """

    starts_mid_epoch = True  # tells `floodrepro.callbacks.ExactResume` so

    def __init__(
        self, count: int, seed: int, *, batch_size: int = 1, world: int = 1, rank: int = 0, resumed: Any = (0, 0)
    ) -> None:
        super().__init__(range(count), num_replicas=world, rank=rank, seed=seed)  # type: ignore[arg-type]
        self._count, self._batch_size, self._resumed = count, batch_size, resumed
        self.epoch = resumed[0]

    def __len__(self) -> int:
        """Number of chips of this process in a whole epoch."""
        return self._count // (self._batch_size * self.num_replicas) * self._batch_size

    def __iter__(self) -> Iterator[int]:
        """Indices of the chips."""
        generator = torch.Generator().manual_seed(hashed_number(self.seed, self.epoch, "order") % 2**63)
        order = torch.randperm(self._count, generator=generator)
        batches = order[: len(self) * self.num_replicas].view(-1, self.num_replicas, self._batch_size)
        done = self._resumed[1] if self.epoch == self._resumed[0] else 0
        yield from batches[done:, self.rank].flatten().tolist()


class EachOnce(DistributedSampler[int]):
    """Every one of `count` chips of an evaluation once; some processes may have one chip more than others.

    torch's own repeats chips until all have as many. DDP does not need it: without gradients torch 2.14 synchronises in
    the first forward only.
    """

    def __init__(self, count: int, *, world: int, rank: int) -> None:
        super().__init__(range(count), num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._mine = range(rank, count, world)

    def __len__(self) -> int:
        """Number of chips of this process."""
        return len(self._mine)

    def __iter__(self) -> Iterator[int]:
        """Indices of the chips."""
        yield from self._mine
