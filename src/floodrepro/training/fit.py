"""Turn a recipe and chips into a run folder."""

import platform
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from floodrepro import __version__, console
from floodrepro.data.presence import check_data
from floodrepro.errors import FloodreproError
from floodrepro.recipe import check_precision
from floodrepro.run_folder import RunFolder
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.wiring import into_run_folder

_RECORDED_PACKAGES = ("torch", "torchvision", "lightning", "terratorch", "torchgeo", "impactmesh", "zarr", "numpy")


@dataclass(frozen=True)
class FitResult:
    """What a fit left behind.

    Args:
        run: The run folder.
        recipe_sha256: Fingerprint of the resolved recipe.
        epochs: Number of epochs that were run.
        best_epoch: Epoch of ``best.ckpt``, counted from 0; None if no checkpoint was written.
        best_val_loss: Its val/loss.
        seconds: Wall-clock seconds spent in fitting.
    """

    run: RunFolder
    recipe_sha256: str
    epochs: int
    best_epoch: int | None
    best_val_loss: float | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "run": str(self.run.path),
            "checkpoint": str(self.run.best),
            "recipe_sha256": self.recipe_sha256,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
            "seconds": round(self.seconds, 1),
        }


class EpochLines(Callback):
    """One line on stderr after each epoch: losses, flood IoU and the time that it took."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line; Lightning has validated by now."""
        names = ("train/loss", "val/loss", "val/mIoU", "val/IoU_1")
        shown = [f"{n} {float(trainer.callback_metrics[n]):.4f}" for n in names if n in trainer.callback_metrics]
        seconds = time.monotonic() - self._start
        console.say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(shown)}  {seconds:.1f} s")


def fit(cli: RecipeCLI, path: Path) -> FitResult:
    """Train a recipe.

    Args:
        cli: The parsed recipe.
        path: The run folder to make.

    Returns:
        What was left behind.

    Raises:
        UsageError: The recipe cannot be built or run on this machine, or the run folder exists.
        DataError: Chips are missing.
        FloodreproError: The fit was interrupted.
    """
    check_precision(cli.recipe, gpu=torch.cuda.is_available())
    data = check_data(cli.recipe, ("train", "val"))
    run = RunFolder.create(path)
    digest = run.save_recipe(cli.recipe)
    run.update_record(
        status="running",
        recipe_sha256=digest,
        command=["floodrepro", *sys.argv[1:]],
        versions=_versions(),
        chips=data.chips,
        data_digest=data.digest,
        started=_now(),
    )
    console.say(f"recipe sha256 {digest[:12]}…, chips {data.chips}, into {run.path}")
    start = time.monotonic()
    try:
        cli.build(lambda config: into_run_folder(config, run, progress_bar=sys.stderr.isatty()))
        trainer = cli.trainer
        trainer.callbacks.append(EpochLines())
        with console.stdout_to_stderr():
            trainer.fit(cli.model, datamodule=cli.datamodule)
        if trainer.interrupted:
            raise FloodreproError("the fit was interrupted", where=run.path, fix="start it again under another --name")
        result = _result(run, digest, trainer, time.monotonic() - start)
    except BaseException as error:
        run.update_record(status="failed", ended=_now(), reason=f"{type(error).__name__}: {error}")
        raise
    run.update_record(status="finished", ended=_now(), **{k: v for k, v in result.as_dict().items() if k != "run"})
    return result


def _result(run: RunFolder, digest: str, trainer: Trainer, seconds: float) -> FitResult:
    """Read the best epoch from the file itself: the only source that cannot disagree with the weights in it."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    best = next((c for c in callbacks if c.best_model_path and Path(c.best_model_path).name == run.best.name), None)
    if best is None or best.best_model_score is None:
        return FitResult(run, digest, trainer.current_epoch, None, None, seconds)
    epoch = torch.load(run.best, map_location="cpu", weights_only=True, mmap=True)["epoch"]
    return FitResult(run, digest, trainer.current_epoch, epoch, float(best.best_model_score), seconds)


def _versions() -> dict[str, str]:
    found = {"floodrepro": __version__, "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
