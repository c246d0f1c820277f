"""One pass over a split with a checkpoint: validate, test, predict. The config counts, not the checkpoint's memory."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.presence import DataCheck, check_data
from floodrepro.errors import UsageError
from floodrepro.evaluation.checkpoint import load_strictly, read_checkpoint
from floodrepro.heap import keep_freed_memory
from floodrepro.recipe import check_precision
from floodrepro.training.recipe_cli import CustomWriter, RecipeCLI
from floodrepro.training.wiring import without_files

MAIN_METRICS = ("mIoU", "IoU_0", "IoU_1", "IoU_2", "F1_Score", "Pixel_Accuracy")


@dataclass(frozen=True)
class PassResult:
    """Metrics of one pass over one split, or over several at once.

    Args:
        stage: validate or test.
        checkpoint: The file that was measured.
        recipe_sha256: Fingerprint of the recipe that was used.
        chips: Number of chips by split.
        metrics: TerraTorch's metrics by name (``test/mIoU`` …).
    """

    stage: str
    checkpoint: Path
    recipe_sha256: str
    chips: dict[str, int]
    metrics: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "stage": self.stage,
            "checkpoint": str(self.checkpoint),
            "recipe_sha256": self.recipe_sha256,
            "chips": self.chips,
            "metrics": self.metrics,
        }

    def table(self) -> str:
        """The main metrics in two columns."""
        rows: list[Sequence[str]] = [[n, f"{v:.6f}"] for n, v in self.metrics.items() if _is_main(n.rsplit("/", 1)[-1])]
        return console.columns(sorted(rows, key=_place))


class BatchLines(Callback):
    """How far a pass has come, where no progress bar shows it.

    Args:
        show: Called with batches done and batches in all.
    """

    def __init__(self, show: Callable[[int, int], None]) -> None:
        self._show = show

    def _count(self, batches: Any, index: int, loader: int = 0) -> None:
        total = sum(batches)
        if total != float("inf"):
            self._show(int(sum(batches[:loader])) + index + 1, int(total))

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        """Report; arguments: task, outputs, batch, its index, and the loader's index where there are several."""
        self._count(trainer.num_val_batches, *args[3:5])

    def on_test_batch_end(self, trainer: Any, *args: Any) -> None:
        """As for validation."""
        self._count(trainer.num_test_batches, *args[3:5])

    def on_predict_batch_end(self, trainer: Any, *args: Any) -> None:
        """As for validation."""
        self._count(trainer.num_predict_batches, *args[3:5])


@contextlib.contextmanager
def watched(cli: RecipeCLI) -> Iterator[None]:
    """Keep libraries off stdout, and show progress in a log, where their bar was left out."""
    with console.progress("batches") as show, console.stdout_to_stderr():
        if not sys.stderr.isatty():
            cli.trainer.callbacks.append(BatchLines(show))
        yield


def validate(cli: RecipeCLI, checkpoint: Path) -> PassResult:
    """Run TerraTorch's own validation loop once.

    Args:
        cli: The parsed recipe.
        checkpoint: Weights to measure.

    Returns:
        TerraTorch's metrics without Boundary_mIoU, which depends on the batch size where pixels are ignored
        (terratorch 1.2.7).

    Raises:
        UsageError: The recipe does not build or run here.
        DataError: Chips are missing.
        CheckpointError: The weights cannot be read or do not fit.
    """
    data = prepare(cli, checkpoint, "val", labels=True)
    with watched(cli):
        [result] = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = {k: float(v) for k, v in result.items() if not k.endswith("Boundary_mIoU")}
    return PassResult("validate", checkpoint, recipes.fingerprint(cli.recipe), data.chips, metrics)


def predict(cli: RecipeCLI, checkpoint: Path, output: Path) -> list[Path]:
    """Write one GeoTIFF for each chip of the predict split, in the chip's own CRS.

    A pixel has its class, or -1 where the terrain model has no data: TerraTorch looks at that image alone.

    Args:
        cli: The parsed recipe.
        checkpoint: Weights to predict with.
        output: Folder for the masks; made if it is not there, refused if it holds anything.

    Returns:
        The files, ``<chip id>_DEM_pred.tif``: TerraTorch names them after the file whose georeference they take.

    Raises:
        UsageError: The folder is not empty or cannot be made; otherwise as `validate`.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        taken = any(output.iterdir())
    except OSError as error:
        raise UsageError(f"the output folder cannot be made: {error.strerror}", where=output) from error
    if taken:
        raise UsageError("the output folder is not empty and nothing in it is overwritten", where=output)
    prepare(cli, checkpoint, "predict", labels=False)
    cli.trainer.predict_output_dir = str(output)
    cli.trainer.callbacks.append(CustomWriter(write_interval="batch"))
    with watched(cli):
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    return sorted(output.glob("*.tif"))


def _is_main(metric: str) -> bool:
    return metric in MAIN_METRICS


def _place(row: Sequence[str]) -> tuple[str, int]:
    """Split by split, the metrics of each in the order of `MAIN_METRICS`."""
    split, _, metric = row[0].rpartition("/")
    return split, MAIN_METRICS.index(metric)


def prepare(
    cli: RecipeCLI,
    checkpoint: Path,
    split: str,
    *,
    labels: bool,
    wire: Callable[[Namespace], None] = lambda config: None,
) -> DataCheck:
    """Look at data and weights, build the recipe's objects, and put the weights in.

    Args:
        cli: The parsed recipe.
        checkpoint: The weights.
        split: train, val, test or predict.
        labels: Whether masks are needed.
        wire: Changes the parsed config before anything is built from it.

    Returns:
        What is known of the data.

    Raises:
        UsageError: The recipe does not build or run here.
        DataError: Chips are missing.
        CheckpointError: The weights cannot be read or do not fit.
    """
    check_precision(cli.recipe, gpu=torch.cuda.is_available())
    weights = read_checkpoint(checkpoint)
    data = check_data(cli.recipe, (split,), labels=labels)

    def reading_only(config: Namespace) -> None:
        without_files(config, progress_bar=sys.stderr.isatty())
        wire(config)

    keep_freed_memory()
    cli.build(reading_only)
    load_strictly(weights, cli.model, cli.recipe)
    console.say(f"{checkpoint.name} over {data.chips or split}")
    return data
