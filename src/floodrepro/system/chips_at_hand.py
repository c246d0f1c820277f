"""One long epoch of training from few chips, in memory or read each time."""

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader


class LongEpoch(Callback):
    """Makes an epoch of the chips that there are, over and over: what ends an epoch stays out of the measurement.

    In memory, batches are as the data module's own loader collates them, in the split's order and in page-locked memory
    where there is a GPU; the transfer and the work after it are done at every step, as in any training.

    Args:
        batches: Of the epoch.
        in_memory: Whether reading and collating are left out.
    """

    def __init__(self, batches: int, *, in_memory: bool) -> None:
        self._count, self._in_memory = batches, in_memory

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the data module's own, and before its loader is asked for."""
        module: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset, size = module.train_dataset, module.batch_size
        if not self._in_memory:
            ids = dataset.chips if hasattr(dataset, "chips") else dataset.samples  # impactmesh's name for them
            ids *= -(-self._count * size // len(ids))
            return
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=size,
            drop_last=True,
            collate_fn=module.train_dataloader().collate_fn,
            pin_memory=torch.cuda.is_available(),
        )
        epoch = _Epoch(list(loader), self._count)
        module.train_dataloader = lambda: epoch


class _Epoch:
    """Batches over and over. No list: Lightning takes that for several loaders."""

    def __init__(self, batches: Sequence[Any], length: int) -> None:
        self._batches, self._length = batches, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return islice(cycle(self._batches), self._length)
