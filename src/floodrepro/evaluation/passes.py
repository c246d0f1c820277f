"""One pass over a split with a checkpoint. The config counts, not what the checkpoint recalls."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rasterio.io import MemoryFile
from torch import Tensor

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.data.splits import DataState, check_data
from floodrepro.errors import CheckpointError, RunFolderError, UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import replacing
from floodrepro.training.checkpoint import load_strictly, read_checkpoint
from floodrepro.training.terratorch_cli import RecipeCLI, without_files

_UNSEEN = -1  # class of a pixel where neither Sentinel-1 nor Sentinel-2 has data at the event; no-data in the file
_PROBABILITY_TYPES = {"float32": (1, np.nan), "uint8": (250, 255)}  # the values that mean 1 and nothing seen
_SUFFIXES = [protocols.suffix_of(p, part) for p in protocols.PROTOCOLS.values() for part in protocols.PARTS]


class ChipPass(Callback):
    """Sees the logits of every batch of a pass; values that are not finite end it. A validation needs no more."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.chips: list[str] = []  # seen so far
        self.show: Callable[[int, int], None] | None = None  # is told how many batches are done, and of how many
        self._logits: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Listen where a task turns images into logits, tiled or whole; and let a prediction be logits.

        Whatever output_on_inference says: terratorch 1.2.7 writes probabilities as int16 zeros.
        """
        infer = pl_module.handle_full_or_tiled_inference

        def listen(*args: Any, **kwargs: Any) -> Any:
            output = infer(*args, **kwargs)
            self._logits = output.output
            return output

        pl_module.handle_full_or_tiled_inference = listen
        pl_module.select_classes = pl_module.operation_map["logits"]

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Name the chips of a batch of any stage, and use their logits.

        Raises:
            CheckpointError: They are not finite.
        """
        logits: Any = outputs[0][0] if trainer.predicting else self._logits
        loader = trainer.val_dataloaders or trainer.test_dataloaders or trainer.predict_dataloaders
        files = _chip_files(batch, loader, len(self.chips), len(logits))
        finite = logits.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            bad = [chip_of(file) for file, fine in zip(files, finite.tolist(), strict=True) if not fine]
            what = f"the model predicts values that are not finite for {len(bad)} chips, the first is {bad[0]}"
            fix = "--precision bf16 or fp32; floodrepro verify names weights and buffers that are not finite"
            raise CheckpointError(what, where=self.checkpoint, fix=fix)
        self.use(logits, files, batch, pl_module)
        self.chips += map(chip_of, files)
        if self.show:
            totals = trainer.num_val_batches + trainer.num_test_batches + trainer.num_predict_batches
            self.show(batch_idx + 1, int(sum(totals)))  # two of the three stages have none

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def use(self, logits: Tensor, files: list[str], batch: Any, task: Any) -> None:
        """Do something with the logits (B, K, H, W) of a batch and a file of each of its chips."""


class ChipWriter(ChipPass):
    """Writes GeoTIFFs on each chip's grid: ``CHIP_pred.tif``, and ``CHIP_prob.tif`` of the positive class.

    TerraTorch's own writer names files after the DEM and marks where the DEM has no data. Of a data module of other
    files, a pixel is unseen where its file has no data in any band. `probabilities` is a type, float32 or uint8, or
    None.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, folder: Path, probabilities: str | None) -> None:
        super().__init__(checkpoint)
        self._folder, self._type, self._source = folder, probabilities, None
        self._positive, arguments = protocols.protocol_of(recipe).positive_class, protocols.data_arguments(recipe)
        if protocols.uses_flood_data_module(recipe):
            root = arguments.get("predict_data_root") or arguments["data_root"]
            self._source = Chips(Path(root), protocols.protocol_of(recipe))

    def use(self, logits: Tensor, files: list[str], batch: Any, task: Any) -> None:
        """Write a batch; on a full disk, a RunFolderError is raised and nothing half-written stays."""
        for file, scores in zip(files, logits.float().cpu(), strict=True):
            with rasterio.open(file, driver="GTiff" if self._source else None) as grid:
                profile = {"driver": "GTiff", "count": 1, "compress": "deflate", "crs": grid.crs}
                profile |= {"transform": grid.transform, "height": grid.height, "width": grid.width}
                unseen = self._unseen(file, grid)
            self._write(f"{chip_of(file)}_pred.tif", scores.argmax(dim=0).numpy(), unseen, profile, "int16", _UNSEEN)
            if self._type:
                one, no_data = _PROBABILITY_TYPES[self._type]
                share = one * scores.softmax(dim=0)[self._positive].numpy()
                share = share.round() if one > 1 else share
                self._write(f"{chip_of(file)}_prob.tif", share, unseen, profile, self._type, no_data)

    def _write(self, name: str, values: Any, unseen: Any, profile: dict[str, Any], kind: str, no_data: float) -> None:
        path = self._folder / name
        with MemoryFile() as memory:  # on a full disk GDAL leaves an empty file and tells nobody
            with memory.open(**profile, dtype=kind, nodata=no_data) as target:
                target.write(np.where(unseen, no_data, values).astype(kind), 1)
            try:
                with replacing(path) as partial:
                    partial.write_bytes(memory.read())
            except OSError as error:
                raise RunFolderError(f"the mask cannot be written: {error.strerror}", where=path) from error

    def _unseen(self, file: str, grid: Any) -> npt.NDArray[np.bool_]:
        """Pixels (H, W) that no satellite saw at the event."""
        if self._source is None:
            return np.asarray(grid.dataset_mask() == 0)
        seen, chip = np.zeros(grid.shape, np.bool_), chip_of(file)
        for modality in ("S2L2A", "S1RTC"):
            if chip in self._source.having(modality):
                bands = self._source.bands(chip, modality)
                event = bands[min(protocols.EVENT, len(bands) - 1)].astype(np.float32)
                # float16 has no -9999: ImpactMesh stores it as -10000
                seen |= ((event > protocols.NO_DATA) & np.isfinite(event)).any(axis=0)
        return ~seen


def run_pass(
    cli: RecipeCLI, stage: str, watch: ChipPass, split: str, *, file: str | None = None, name: str | None = None
) -> tuple[DataState, dict[str, float]]:
    """Look at data and weights, build the recipe's objects, put the weights in, and run one of the trainer's loops.

    Libraries are kept off stdout, and progress is shown in a log, where their bar was left out.

    Args:
        cli: The parsed recipe, with any TerraTorch data module.
        stage: validate, test or predict.
        watch: Names the weights, and takes what they predict.
        split: train, val, test or predict.
        file: Chip ids that are tested in place of the recipe's test split.
        name: What TerraTorch calls them in its metrics; None for its plain names.

    Returns:
        The state of the data, and TerraTorch's metrics by their names.

    Raises:
        UsageError: The recipe does not build or run here.
        DataError: Chips are missing.
        CheckpointError: The weights cannot be read or do not fit; or predictions or metrics are not finite.
    """
    weights, log = read_checkpoint(watch.checkpoint), not sys.stderr.isatty()
    data = check_data(cli.recipe, (split,))
    without_files(cli.config)
    if file is not None:
        cli.config.data.init_args.test_split = file
        if "test_dataloaders_names" in cli.config.model.init_args:
            cli.config.model.init_args.test_dataloaders_names = [name] if name else None
    cli.build()
    load_strictly(weights, cli.model, cli.recipe)
    console.say(f"{watch.checkpoint.name} over {data.chips or split}")
    cli.trainer.callbacks.append(watch)
    with console.progress("batches") as show, console.stdout_to_stderr():
        watch.show = show if log else None
        options = {"return_predictions": False} if stage == "predict" else {"verbose": False}
        results = getattr(cli.trainer, stage)(cli.model, datamodule=cli.datamodule, **options)
    metrics = {key: float(value) for result in results or () for key, value in result.items()}
    if bad := [key for key, value in metrics.items() if not math.isfinite(value)]:
        fix = "a batch without a labelled pixel may have no loss: another --data.init_args.batch_size"
        raise CheckpointError(f"not finite: {', '.join(bad)}", where=watch.checkpoint, fix=fix)
    return data, metrics


def predict(cli: RecipeCLI, checkpoint: Path, output: Path, *, probabilities: str | None = None) -> list[Path]:
    """Write what `ChipWriter` writes for each chip of the predict split into a new or empty folder; return the files.

    Raises:
        UsageError: The folder holds something, or cannot be made.
        UsageError, DataError, CheckpointError, RunFolderError: As `run_pass` and `ChipWriter`.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise UsageError("the output folder is not empty and nothing in it is overwritten", where=output)
    except OSError as error:
        raise UsageError(f"the output folder cannot be made: {error.strerror}", where=output) from error
    run_pass(cli, "predict", ChipWriter(checkpoint, cli.recipe, output, probabilities), "predict")
    return sorted(output.glob("*.tif"))


def chip_of(file: str) -> str:
    """The chip id that a file is named after: its name without what a part's or any other suffix adds."""
    name = Path(file).name
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), Path(file).stem)


def _chip_files(batch: Any, loader: Any, done: int, size: int) -> list[str]:
    """A file of each chip of a batch, after `done` others: from the batch or, where it names none, the data set."""
    names = batch.get("filename")
    if names is None:
        names = getattr(loader.dataset, "image_files", None) or [f"chip-{n:06d}" for n in range(done + size)]
        names = names[done : done + size]
    return [str(name) for name in (next(iter(names.values())) if isinstance(names, dict) else names)]
