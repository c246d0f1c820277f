"""A training of a second with Lightning's own trainer: dropout, running statistics, a sampler that starts mid-epoch."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from floodrepro.callbacks import ExactResume, NaNGuard, RunRecord
from floodrepro.data.samplers import ShuffledByEpoch


class Task(LightningModule):
    """Two layers; its plateau scheduler halves the rate after each validation, or its step scheduler each step."""

    def __init__(self, schedule: str | None = "plateau") -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.schedule = schedule

    def loss(self, batch: Any, name: str) -> torch.Tensor:
        image = batch["image"] if isinstance(batch, dict) else batch
        loss = self.model(image).square().mean()
        self.log(name, loss, batch_size=len(image))
        return loss

    def training_step(self, batch: Any) -> torch.Tensor:
        return self.loss(batch, "train/loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch, "val/loss")

    def configure_optimizers(self) -> Any:
        optimizer, schedulers = torch.optim.AdamW(self.parameters(), lr=0.01), torch.optim.lr_scheduler
        if self.schedule is None:
            return optimizer
        if self.schedule == "plateau":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}
        steps = schedulers.StepLR(optimizer, 3, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}


class Chips(Dataset[Any]):
    """Samples of four values: dictionaries with a file name, or plain tensors."""

    def __init__(self, *, named: bool) -> None:
        self.values, self.named = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), named

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return {"image": self.values[index], "filename": f"chip{index}.tif"} if self.named else self.values[index]


class Data(LightningDataModule):
    """Batches of two; *resumable* as floodrepro's own data module is, else shuffled by torch."""

    def __init__(self, *, resumable: bool = True, named: bool = True) -> None:
        super().__init__()
        self.resumable, self.chips = resumable, Chips(named=named)

    def train_dataloader(self) -> DataLoader[Any]:
        if not self.resumable:
            return DataLoader(self.chips, 2, shuffle=True)
        loop, world, rank = self.trainer.fit_loop, self.trainer.world_size, self.trainer.global_rank
        done = loop.epoch_loop.batch_progress.current.completed if loop.restarting else 0
        resumed = (loop.epoch_progress.current.processed, done)
        sampler = ShuffledByEpoch(len(self.chips), 1, batch_size=2, world=world, rank=rank, resumed=resumed)
        return DataLoader(self.chips, 2, sampler=sampler, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.chips, 4)


class Killed(BaseException):
    """What the process is said to have died of."""


class Kill(Callback):
    """Ends the process, as far as files go, when a number of its hooks were called."""

    def __init__(self, count: int) -> None:
        self.count = count

    def _strike(self, *args: Any) -> None:
        self.count -= 1
        if self.count == 0:
            raise Killed

    on_train_epoch_start = on_train_batch_start = on_before_backward = on_train_batch_end = _strike
    on_validation_batch_start = on_validation_end = on_train_epoch_end = on_train_end = _strike


def train(
    folder: Path,
    *more: Callback,
    schedule: str | None = "plateau",
    data: Any = None,
    resume: Any = None,
    **trainer: Any,
) -> Trainer:
    """Train two epochs of six steps, with states below *folder* every two steps."""
    seed_everything(3, verbose=False)
    monitor = "val/loss" if trainer.pop("best", True) else None
    best = ModelCheckpoint(folder / "checkpoints", "best-{epoch}", monitor=monitor)
    ours = [NaNGuard(), ExactResume(str(folder / "checkpoints"), trainer.pop("every", 2)), RunRecord()]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"num_sanity_val_steps": 0, "max_epochs": 2, "devices": 1}
    fitting = Trainer(default_root_dir=folder, callbacks=[*more, *ours, best], **quiet | trainer)
    fitting.fit(Task(schedule), datamodule=data or Data(), ckpt_path=resume)
    return fitting
