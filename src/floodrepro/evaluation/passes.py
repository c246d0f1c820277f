"""One pass over a split with a checkpoint: validate and predict. The config counts, not what the checkpoint recalls."""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, LambdaCallback
from rasterio.io import MemoryFile
from torch import Tensor

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.data.splits import DataState, check_data
from floodrepro.errors import CheckpointError, DataError, RunFolderError, UsageError
from floodrepro.training.checkpoint import load_strictly, read_checkpoint
from floodrepro.training.terratorch_cli import RecipeCLI, without_files

UNSEEN = -1
"""Class of a predicted pixel where neither Sentinel-1 nor Sentinel-2 has data at the event; no-data in the file."""
PROBABILITY_TYPES = {"float32": (1, np.nan), "uint8": (250, 255)}
"""How probabilities may be written: the value that means 1, and the one that means that nothing was seen."""
_SATELLITES = ("S2L2A", "S1RTC")
_SUFFIXES = [protocols.suffix_of(p, part) for p in protocols.PROTOCOLS.values() for part in protocols.PARTS]


class ChipWriter(BasePredictionWriter):
    """Writes what is predicted for each chip as GeoTIFFs on the chip's grid.

    Args:
        folder: Where ``CHIP_pred.tif`` goes: int16, the class of each pixel, UNSEEN where the satellites saw nothing.
        positive: The class whose probability goes to ``CHIP_prob.tif``.
        probabilities: The type of that file, of PROBABILITY_TYPES; None writes none.
        source: The chips on disk; None for a data module of other files, in which a pixel is unseen where its file has
            no data in any band.
    """

    def __init__(self, folder: Path, positive: int, probabilities: str | None, source: Chips | None) -> None:
        super().__init__("batch")
        self._folder, self._positive, self._source, self._type = folder, positive, source, probabilities
        self._written = 0

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, *args: Any
    ) -> None:
        """Write a batch. TerraTorch's own writer names files after the DEM and marks where the DEM has no data."""
        (logits, _), _ = prediction
        files = chip_files(batch, trainer.predict_dataloaders, self._written)
        for file, chip_logits in zip(files, logits, strict=True):
            self._write(file, chip_logits.detach().float().cpu())
        self._written += len(logits)

    def _write(self, file: str, logits: Tensor) -> None:
        """One chip, from its logits (K, H, W)."""
        if not bool(logits.isfinite().all()):
            what = f"the model predicts values that are not finite for {chip_of(file)}"
            raise CheckpointError(what, fix="--precision bf16 or fp32")
        with rasterio.open(file, driver="GTiff" if self._source else None) as grid:
            profile = {"driver": "GTiff", "count": 1, "compress": "deflate", "crs": grid.crs}
            profile |= {"transform": grid.transform, "height": grid.height, "width": grid.width}
            unseen = self._unseen(file, grid)
        if unseen.shape != logits.shape[1:]:
            what = f"the prediction has {tuple(logits.shape[1:])} pixels, the chip {unseen.shape}"
            fix = "leave transforms that crop or resize out of the recipe's predict_transform"
            raise DataError(what, where=file, fix=fix)
        layers: dict[str, tuple[Any, str, float]] = {"pred": (logits.argmax(dim=0).numpy(), "int16", UNSEEN)}
        if self._type:
            scale, no_data = PROBABILITY_TYPES[self._type]
            probability = scale * logits.softmax(dim=0)[self._positive].numpy()
            layers["prob"] = (probability.round() if scale > 1 else probability, self._type, no_data)
        for name, (values, kind, no_data) in layers.items():
            path = self._folder / f"{chip_of(file)}_{name}.tif"
            with MemoryFile() as memory:  # on a full disk GDAL leaves an empty file and tells nobody
                with memory.open(**profile, dtype=kind, nodata=no_data) as target:
                    target.write(np.where(unseen, no_data, values).astype(kind), 1)
                try:
                    path.write_bytes(memory.read())
                except OSError as error:
                    raise RunFolderError(f"the mask cannot be written: {error.strerror}", where=path) from error

    def _unseen(self, file: str, grid: Any) -> npt.NDArray[np.bool_]:
        """Pixels (H, W) that no satellite saw at the event."""
        if self._source is None:
            return np.asarray(grid.dataset_mask() == 0)
        seen, chip = np.zeros(grid.shape, np.bool_), chip_of(file)
        for modality in _SATELLITES:
            if chip in self._source.having(modality):
                bands = self._source.bands(chip, modality)
                event = bands[min(protocols.EVENT, len(bands) - 1)].astype(np.float32)
                # float16 has no -9999: ImpactMesh stores it as -10000
                seen |= ((event > protocols.NO_DATA) & np.isfinite(event)).any(axis=0)
        return ~seen


def run_loop(cli: RecipeCLI, stage: str, **options: Any) -> dict[str, float]:
    """TerraTorch's metrics by their names, after one of the trainer's loops: validate, test or predict.

    Libraries are kept off stdout, and progress is shown in a log, where their bar was left out.
    """
    batches = itertools.count(1)
    with console.progress("batches") as show, console.stdout_to_stderr():

        def one_more(trainer: Any, *args: Any) -> None:
            totals = trainer.num_val_batches + trainer.num_test_batches + trainer.num_predict_batches
            show(next(batches), sum(totals))  # two of the three stages have none

        if not sys.stderr.isatty():
            hooks = [f"on_{name}_batch_end" for name in ("validation", "test", "predict")]
            cli.trainer.callbacks.append(LambdaCallback(**dict.fromkeys(hooks, one_more)))
        results = getattr(cli.trainer, stage)(cli.model, datamodule=cli.datamodule, **options)
    return {name: float(value) for result in results or () for name, value in result.items()}


def validate(cli: RecipeCLI, checkpoint: Path) -> dict[str, Any]:
    """Run TerraTorch's own validation loop once.

    Returns:
        JSON types: `stage`, `checkpoint`, `chips` by split, and `metrics` of TerraTorch by its names.

    Raises:
        UsageError, DataError, CheckpointError: As `prepare`.
    """
    data = prepare(cli, checkpoint, "val")
    metrics = run_loop(cli, "validate", verbose=False)
    return {"stage": "validate", "checkpoint": str(checkpoint), "chips": data.chips, "metrics": metrics}


def predict(cli: RecipeCLI, checkpoint: Path, output: Path, *, probabilities: str | None = None) -> list[Path]:
    """Write one GeoTIFF for each chip of the predict split, in the chip's own CRS: see `ChipWriter`.

    Args:
        cli: The parsed recipe, with any TerraTorch data module.
        checkpoint: Weights to predict with.
        output: Folder for the masks; made if it is not there, refused if it holds anything.
        probabilities: The type in which the probability of the positive class is written too, if it is.

    Returns:
        The files.

    Raises:
        UsageError: The folder is not empty or cannot be made.
        RunFolderError: The disk is full.
        UsageError, DataError, CheckpointError: As `prepare`.
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
    arguments, source = protocols.data_arguments(cli.recipe), None
    if protocols.uses_flood_data_module(cli.recipe):
        root = arguments.get("predict_data_root") or arguments["data_root"]
        source = Chips(Path(root), protocols.protocol_of(cli.recipe))
    cli.trainer.callbacks.append(ChipWriter(output, protocols.positive_class_of(cli.recipe), probabilities, source))
    run_loop(cli, "predict", return_predictions=False)
    return sorted(output.glob("*.tif"))


def prepare(
    cli: RecipeCLI, checkpoint: Path, split: str, *, test_file: str | None = None, test_name: str | None = None
) -> DataState:
    """Look at data and weights, build the recipe's objects, and put the weights in.

    Args:
        cli: The parsed recipe.
        checkpoint: The weights.
        split: train, val, test or predict.
        test_file: Chip ids that are tested in place of the recipe's test split.
        test_name: What TerraTorch calls them in its metrics; None for its plain names.

    Raises:
        UsageError: The recipe does not build or run here.
        DataError: Chips are missing.
        CheckpointError: The weights cannot be read or do not fit.
    """
    weights = read_checkpoint(checkpoint)
    data = check_data(cli.recipe, (split,))
    without_files(cli.config)
    if test_file is not None:
        cli.config.data.init_args.test_split = test_file
        if "test_dataloaders_names" in cli.config.model.init_args:
            cli.config.model.init_args.test_dataloaders_names = [test_name] if test_name else None
    cli.build()
    load_strictly(weights, cli.model, cli.recipe)
    console.say(f"{checkpoint.name} over {data.chips or split}")
    return data


def chip_files(batch: Any, loader: Any, done: int) -> list[str]:
    """A file of each chip of a batch, after `done` others: from the batch or, where it names none, the data set."""
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
