"""One pass over a split with a checkpoint: validate and predict. The config counts, not what the checkpoint recalls."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import (
    EVENT,
    LABEL_DIR,
    MODALITIES,
    NO_DATA,
    PROTOCOLS,
    data_arguments,
    positive_class_of,
    protocol_of,
    suffix_of,
    uses_flood_data_module,
)
from floodrepro.data.splits import DataState, check_data
from floodrepro.errors import DataError, UsageError
from floodrepro.recipe import check_precision
from floodrepro.training.checkpoint import load_strictly, read_checkpoint
from floodrepro.training.layout import without_files
from floodrepro.training.terratorch_cli import RecipeCLI

MAIN_METRICS = ("mIoU", "IoU_0", "IoU_1", "IoU_2", "F1_Score", "Pixel_Accuracy")
UNSEEN = -1
"""Class of a predicted pixel where neither Sentinel-1 nor Sentinel-2 has data at the event; no-data in the file."""
_SATELLITES = ("S2L2A", "S1RTC")
_SUFFIXES = [suffix_of(p, part) for p in PROTOCOLS.values() for part in (*MODALITIES, LABEL_DIR)]


@dataclass(frozen=True)
class PassResult:
    """What one pass over one split, or over several at once, measured.

    Args:
        stage: validate or test.
        checkpoint: The file that was measured.
        recipe_sha256: Fingerprint of the recipe that was used.
        chips: Number of chips by split.
        metrics: TerraTorch's metrics by name (``test/mIoU`` …).
        tables: Chip tables by split; none if the trainer was told to leave batches out.
        disagreement: Largest difference between TerraTorch's metrics and those computed from the table.
    """

    stage: str
    checkpoint: Path
    recipe_sha256: str
    chips: dict[str, int]
    metrics: dict[str, float]
    tables: dict[str, Path] = field(default_factory=dict)
    disagreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        paths = {split: str(path) for split, path in self.tables.items()}
        return vars(self) | {"checkpoint": str(self.checkpoint), "tables": paths}

    def table(self) -> str:
        """The main metrics in two columns."""
        names = [name for main in MAIN_METRICS for name in self.metrics if name.rsplit("/", 1)[-1] == main]
        return console.columns([[name, f"{self.metrics[name]:.6f}"] for name in names])


class BatchLines(Callback):
    """Shows how far a pass has come, where no progress bar does.

    Args:
        show: Called with batches done and batches in all.
    """

    def __init__(self, show: Callable[[int, int], None]) -> None:
        self._show, self._done = show, 0

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        """Count one batch; the same for all three stages."""
        stage = {TrainerFn.VALIDATING: "val", TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "predict"}
        total = sum(getattr(trainer, f"num_{stage[trainer.state.fn]}_batches"))
        self._done += 1
        if total != float("inf"):
            self._show(self._done, int(total))

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]


class ChipWriter(BasePredictionWriter):
    """Writes what is predicted for each chip as GeoTIFFs on the chip's grid.

    Args:
        folder: Where ``CHIP_pred.tif`` goes: int16, the class of each pixel, UNSEEN where the satellites saw nothing.
        positive: The class of ``CHIP_prob.tif``: float32, its probability, NaN where the satellites saw nothing. None
            writes no probabilities.
        source: The chips on disk; None for a data module of other files, in which a pixel is unseen where its file has
            no data in any band.
    """

    def __init__(self, folder: Path, positive: int | None, source: Chips | None) -> None:
        super().__init__("batch")
        self._folder, self._positive, self._source = folder, positive, source
        self._written = 0

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *args: Any
    ) -> None:
        """Write a batch. TerraTorch's own writer names files after the DEM and marks where the DEM has no data."""
        (logits, _), _ = prediction
        for file, chip_logits in zip(
            chip_files(batch, trainer.predict_dataloaders, self._written), logits, strict=True
        ):
            self._write(file, chip_logits.detach().float().cpu())
        self._written += len(logits)

    def _write(self, file: str, logits: Tensor) -> None:
        """One chip, from its logits (K, H, W)."""
        with rasterio.open(file) as grid:
            profile = {"driver": "GTiff", "count": 1, "compress": "deflate", "crs": grid.crs}
            profile |= {"transform": grid.transform, "height": grid.height, "width": grid.width}
            unseen = self._unseen(file, grid)
        if unseen.shape != logits.shape[1:]:
            raise DataError(
                f"the prediction has {tuple(logits.shape[1:])} pixels, the chip {unseen.shape}",
                where=file,
                fix="leave transforms that crop or resize out of the recipe's predict_transform",
            )
        classes = logits.argmax(dim=0).numpy().astype(np.int16)
        classes[unseen] = UNSEEN
        chip = self._folder / chip_of(file)
        with rasterio.open(f"{chip}_pred.tif", "w", **profile, dtype="int16", nodata=UNSEEN) as target:
            target.write(classes, 1)
        if self._positive is not None:
            probability = logits.softmax(dim=0)[self._positive].numpy()
            probability[unseen] = np.nan
            with rasterio.open(f"{chip}_prob.tif", "w", **profile, dtype="float32", nodata=np.nan) as target:
                target.write(probability, 1)

    def _unseen(self, file: str, grid: Any) -> npt.NDArray[np.bool_]:
        """Pixels (H, W) that no satellite saw at the event."""
        if self._source is None:
            return np.asarray(grid.dataset_mask() == 0)
        seen = np.zeros(grid.shape, np.bool_)
        for modality in _SATELLITES:
            if chip_of(file) in self._source.having(modality):
                bands = self._source.bands(chip_of(file), modality)
                event = bands[min(EVENT, len(bands) - 1)].astype(np.float32)
                # float16 has no -9999: ImpactMesh stores it as -10000
                seen |= ((event > NO_DATA) & np.isfinite(event)).any(axis=0)
        return ~seen


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
    data = prepare(cli, checkpoint, "val")
    with watched(cli):
        results = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = {k: float(v) for result in results for k, v in result.items() if not k.endswith("Boundary_mIoU")}
    return PassResult("validate", checkpoint, recipes.fingerprint(cli.recipe), data.chips, metrics)


def predict(cli: RecipeCLI, checkpoint: Path, output: Path, *, probabilities: bool = False) -> list[Path]:
    """Write one GeoTIFF for each chip of the predict split, in the chip's own CRS: see `ChipWriter`.

    Args:
        cli: The parsed recipe, with any TerraTorch data module.
        checkpoint: Weights to predict with.
        output: Folder for the masks; made if it is not there, refused if it holds anything.
        probabilities: Whether the probability of the positive class is written too.

    Returns:
        The files.

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
    prepare(cli, checkpoint, "predict")
    # The writer needs logits, whatever output_on_inference says (terratorch 1.2.7 writes probabilities as int16 zeros).
    cli.model.select_classes = cli.model.operation_map["logits"]
    arguments, source = data_arguments(cli.recipe), None
    if uses_flood_data_module(cli.recipe):
        root = arguments.get("predict_data_root") or arguments["data_root"]
        source = Chips(Path(root), protocol_of(cli.recipe))
    positive = positive_class_of(cli.recipe) if probabilities else None
    cli.trainer.callbacks.append(ChipWriter(output, positive, source))
    with watched(cli):
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    return sorted(output.glob("*.tif"))


def prepare(
    cli: RecipeCLI,
    checkpoint: Path,
    split: str,
    *,
    wire: Callable[[Namespace], None] = lambda config: None,
) -> DataState:
    """Look at data and weights, build the recipe's objects, and put the weights in.

    Args:
        cli: The parsed recipe.
        checkpoint: The weights.
        split: train, val, test or predict.
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
    data = check_data(cli.recipe, (split,))

    def reading_only(config: Namespace) -> None:
        without_files(config, progress_bar=sys.stderr.isatty())
        wire(config)

    cli.build(reading_only)
    load_strictly(weights, cli.model, cli.recipe)
    console.say(f"{checkpoint.name} over {data.chips or split}")
    return data


def chip_files(batch: Any, loader: Any, done: int) -> list[str]:
    """A file of each chip of a batch, from the batch or, where it names none, from the data set's own list.

    Args:
        batch: What the model was given.
        loader: The loader that it came from, in the data set's order.
        done: Chips before it.
    """
    names = batch.get("filename")
    if names is None:
        image = batch["image"]
        size = len(next(iter(image.values())) if isinstance(image, dict) else image)
        listed = getattr(loader.dataset, "image_files", None)
        names = listed[done : done + size] if listed else [f"chip-{done + n:06d}" for n in range(size)]
    return [str(name) for name in (next(iter(names.values())) if isinstance(names, dict) else names)]


def chip_of(file: str) -> str:
    """The chip id that a file is named after: its name without what a part's or any other suffix adds."""
    name = Path(file).name
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), Path(file).stem)
