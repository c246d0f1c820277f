"""A callback that tests name in a recipe."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Notes(Callback):
    """Writes down the chips that each process sees."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _write(self, trainer: Trainer, stage: str, batch: Any) -> None:
        with (self.folder / f"{stage}-{trainer.global_rank}.txt").open("a") as file:
            file.write(" ".join(batch.chips) + "\n")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer, "train", batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, "val", batch)
