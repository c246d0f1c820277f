"""One pass over a split with a checkpoint: validate, test and predict. The config counts, not what it recalls."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rasterio.io import MemoryFile
from torch import Tensor

from floodrepro import console, recipe as recipes
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.data.splits import DataState, check_data, read_splits
from floodrepro.data.weights import describe_model
from floodrepro.errors import CheckpointError, RunFolderError, UsageError
from floodrepro.evaluation.baselines import write_baselines
from floodrepro.evaluation.chip_table import ChipTable, write_table
from floodrepro.evaluation.counting import count
from floodrepro.evaluation.metrics import scores
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, replacing, sha256_of, timestamp
from floodrepro.system.environment import environment
from floodrepro.training.checkpoint import load_strictly, read_checkpoint
from floodrepro.training.terratorch_cli import RecipeCLI, without_files

_UNSEEN = -1  # class of a pixel where neither Sentinel-1 nor Sentinel-2 has data at the event; no-data in the file
# The values that mean 1 and nothing seen.
_PROBABILITY_TYPES = {"float32": (1, np.nan), "uint8": (protocols.PROBABILITY_STEPS, 255)}
_INPUTS = ("modalities", "means", "stds", "timesteps", "no_data_value", "no_data_replace")


class ChipPass(Callback):
    """Sees the logits of every batch of a pass; a CheckpointError ends it where they are not finite."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.chips: list[str] = []  # seen so far
        self.show: Callable[[int, int], None] | None = None  # is told how many batches are done, and of how many
        self._logits: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Listen where a task makes logits, tiled or whole; predict has them too (terratorch 1.2.7: int16 zeros)."""
        if "logits" not in getattr(pl_module, "operation_map", ()):
            what = f"{type(pl_module).__name__} predicts no classes"
            raise UsageError(what, where="model.class_path", fix="name a task of semantic segmentation")
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
        """Name the chips of a batch of any stage, and use their logits; values that are not finite are an error."""
        logits: Any = outputs[0][0] if trainer.predicting else self._logits
        names, seen = batch.get("filename"), slice(len(self.chips), len(self.chips) + len(logits))
        if names is None:  # the data set may know them, in its order
            loader: Any = trainer.val_dataloaders or trainer.test_dataloaders or trainer.predict_dataloaders
            numbers = range(seen.stop)
            names = (getattr(loader.dataset, "image_files", None) or [f"chip-{n:06d}" for n in numbers])[seen]
        files = [str(name) for name in (next(iter(names.values())) if isinstance(names, dict) else names)]
        chips = list(getattr(batch, "chips", ())) or [protocols.chip_of(file) or Path(file).stem for file in files]
        finite = logits.flatten(1).isfinite().all(dim=1).tolist()
        if bad := [chip for chip, fine in zip(chips, finite, strict=True) if not fine]:
            what = f"the model predicts values that are not finite for {len(bad)} chips, the first is {bad[0]}"
            fix = "--precision bf16 or fp32; floodrepro verify names weights and buffers that are not finite"
            raise CheckpointError(what, where=self.checkpoint, fix=fix)
        self.use(logits, list(zip(chips, files, strict=True)), batch, pl_module)
        self.chips += chips
        if self.show:
            totals = trainer.num_val_batches + trainer.num_test_batches + trainer.num_predict_batches
            self.show(batch_idx + 1, int(sum(totals)))  # two of the three stages have none

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def use(self, logits: Tensor, files: list[tuple[str, str]], batch: Any, task: Any) -> None:
        """Take the logits (B, K, H, W) of a batch, and the file of each of its chips; a validation does not."""


class ChipCounts(ChipPass):
    """Counts, chip by chip, what TerraTorch's test loop predicts; probabilities are those of the class `positive`."""

    def __init__(self, checkpoint: Path, positive: int = -1) -> None:
        super().__init__(checkpoint)
        self._positive = positive
        self._batches: list[dict[str, Any]] = []

    def use(self, logits: Tensor, files: list[tuple[str, str]], batch: Any, task: Any) -> None:
        """Count the batch."""
        truth, ignored = task.squeeze_ground_truth(batch["mask"]), task.hparams["ignore_index"]
        layers = truth, logits.argmax(dim=1), logits.float().softmax(dim=1)[:, self._positive]
        kept = {} if ignored is None else {"ignore_index": ignored}
        self._batches.append(count(*layers, classes=logits.shape[1], positive=self._positive, **kept))

    def table(self, metadata: dict[str, Any], events: Mapping[str, str]) -> ChipTable:
        """All chips seen so far; a chip that `events` does not name is its own event."""
        return ChipTable.of_batches([(c, events.get(c, c)) for c in self.chips], self._batches, metadata)


class ChipWriter(ChipPass):
    """Writes GeoTIFFs on each chip's grid: ``CHIP_pred.tif``, and ``CHIP_prob.tif`` of the positive class.

    TerraTorch's own writer names files after the DEM and marks where the DEM has no data. Here a pixel is unseen where
    no satellite has data at the event; of another data module, where its file has no data in any band. `probabilities`
    is a type, float32 or uint8, or None.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe, folder: Path, probabilities: str | None) -> None:
        super().__init__(checkpoint)
        self._folder, self._type, self._source = folder, probabilities, None
        self._positive, arguments = protocols.protocol_of(recipe).positive_class, protocols.data_arguments(recipe)
        if protocols.uses_flood_data_module(recipe):
            root = arguments.get("predict_data_root") or arguments["data_root"]
            self._source = Chips(Path(root), protocols.protocol_of(recipe))

    def use(self, logits: Tensor, files: list[tuple[str, str]], batch: Any, task: Any) -> None:
        """Write a batch; on a full disk nothing half-written stays."""
        for (chip, file), values in zip(files, logits.float().cpu(), strict=True):
            with rasterio.open(file, driver="GTiff" if self._source else None) as grid:
                profile = {"driver": "GTiff", "count": 1, "compress": "deflate", "crs": grid.crs}
                profile |= {"transform": grid.transform, "height": grid.height, "width": grid.width}
                unseen = self._unseen(chip, grid)
            layers: list[tuple[str, Any, str, float]] = [("pred", values.argmax(dim=0).numpy(), "int16", _UNSEEN)]
            if self._type:
                one, no_data = _PROBABILITY_TYPES[self._type]
                share = one * values.softmax(dim=0)[self._positive].numpy()
                layers.append(("prob", share.round() if one > 1 else share, self._type, no_data))
            for name, layer, kind, no_data in layers:
                profile |= {"dtype": kind, "nodata": no_data}
                filled = np.where(unseen, no_data, layer).astype(kind)
                # In memory first: on a full disk GDAL leaves an empty file and tells nobody.
                with MemoryFile() as memory, replacing(self._folder / f"{chip}_{name}.tif") as partial:
                    with memory.open(**profile) as target:
                        target.write(filled, 1)
                    partial.write_bytes(memory.read())

    def _unseen(self, chip: str, grid: Any) -> npt.NDArray[np.bool_]:
        if self._source is None:
            return np.asarray(grid.dataset_mask() == 0)
        seen = np.zeros(grid.shape, np.bool_)
        for modality in ("S2L2A", "S1RTC"):
            if chip in self._source.having(modality):
                bands = self._source.bands(chip, modality)
                event = bands[min(protocols.EVENT, len(bands) - 1)].astype(np.float32)
                # float16 has no -9999: ImpactMesh stores it as -10000
                seen |= ((event > protocols.NO_DATA) & np.isfinite(event)).any(axis=0)
        return ~seen


def run_pass(
    cli: RecipeCLI, stage: str, watch: ChipPass, split: str, *, file: str | None = None
) -> tuple[DataState, dict[str, float]]:
    """Check data and weights, build what the recipe describes, and run one of the trainer's loops with the weights.

    `stage` is validate, test or predict, and `split` train, val, test or predict; `watch` names the weights and takes
    what they predict. `file` lists chips that are tested in place of the recipe's test split.

    Returns:
        The state of the data, and TerraTorch's metrics by its plain names (``test/mIoU``).

    Raises:
        UsageError, DataError: The recipe does not build or run here; chips are missing.
        CheckpointError: The weights cannot be read or do not fit; or predictions are not finite.
    """
    weights, log = read_checkpoint(watch.checkpoint), not sys.stderr.isatty()
    data = check_data(cli.recipe, (split,))
    without_files(cli.config)
    if file is not None:
        cli.config.data.init_args.test_split = file
        if "test_dataloaders_names" in cli.config.model.init_args:
            cli.config.model.init_args.test_dataloaders_names = None
    cli.build()
    load_strictly(weights, cli.model, cli.recipe)
    console.say(f"{watch.checkpoint.name} over {data.chips or split}")
    cli.trainer.callbacks.append(watch)
    with console.progress("batches") as show, console.stdout_to_stderr():
        watch.show = show if log else None  # a terminal has Lightning's bar
        options = {"return_predictions": False} if stage == "predict" else {"verbose": False}
        results = getattr(cli.trainer, stage)(cli.model, datamodule=cli.datamodule, **options)
    return data, {key: float(value) for result in results or () for key, value in result.items()}


def tabulate_checkpoint(
    cli: RecipeCLI, checkpoint: Path, *, split: str = "test", folder: Path | None = None, baselines: bool = True
) -> dict[str, Any]:
    """Run TerraTorch's own test loop over a split and write the chip table.

    `split` is `test`, `val`, `train`, or one of the recipe's test splits by name; the folder is that of `table_path`.
    The baselines' tables are written too, where they are not there yet.

    Returns:
        JSON types: `stage`, `checkpoint`, `metrics` of TerraTorch by its names (None where a class is absent; those of
        further splits, ``test/<split>/…``, are computed from the table), and `chips` and `tables` by split (none where
        the trainer left batches out).

    Raises:
        UsageError, DataError, CheckpointError: The recipe has no such split; as `run_pass`; the file was replaced.
    """
    recipe, kind = cli.recipe, split if split in ("train", "val") else "test"
    splits = choose_split(recipe, split)
    name, events = next(iter(splits.items()))
    run, named = RunFolder.of_checkpoint(checkpoint), checkpoint
    changes = list(recipes.differences(recipes.read_yaml(run.recipe), recipe)) if run else None
    if folder is None and {"data.init_args.limit", "data.init_args.fraction"} & set(changes or ()):
        named = checkpoint.with_stem(f"{checkpoint.stem}-part")  # the table of the whole split stays
    place = table_path(checkpoint, name, folder).parent
    place.mkdir(parents=True, exist_ok=True)  # before the pass: on a GPU it takes a while
    protocol, arguments = protocols.protocol_of(recipe), protocols.data_arguments(recipe)
    counter, given = ChipCounts(checkpoint, protocol.positive_class), arguments.get(f"{kind}_split")
    file = given[name] if isinstance(given, Mapping) else given
    digest = sha256_of(checkpoint)
    data, metrics = run_pass(cli, "test", counter, kind, file=file)
    if sha256_of(checkpoint) != digest:
        raise CheckpointError("the checkpoint was replaced while it was tested", where=checkpoint, fix="test it again")
    failed: dict[str, str] = dict(getattr(cli.datamodule, "failed_chips", {}))  # left out by --skip-damaged
    precision = str(cli.trainer.precision)
    metadata = {
        "split": name,
        "class_names": list(protocol.class_names),
        "positive_class": protocol.positive_class,
        "protocol": protocol.name,
        "predictor": {"kind": "model", "name": checkpoint.name},
        "detail": _describe(recipe, run),
        "checkpoint": {"name": checkpoint.name, "sha256": digest},
        "recipe_sha256": recipes.fingerprint(recipe),
        "recipe_changes": changes,
        "inputs": {key: arguments[key] for key in _INPUTS if key in arguments},
        "data": vars(data),
        "failed_chips": failed,
        "precision": precision,
        "device": str(cli.trainer.strategy.root_device),
        "environment": environment(precision),
        "metrics": metrics,
        "made": timestamp(),
    }
    table, where = counter.table(metadata, events), str(checkpoint)
    result: dict[str, Any] = {"stage": "test", "checkpoint": where, "metrics": metrics, "chips": {}, "tables": {}}
    wanted = len(cli.trainer.test_dataloaders.dataset) - len(failed)
    if len(table) != wanted:
        console.warn(f"{len(table)} of {wanted} chips were tested (trainer.limit_test_batches): no table is written")
        return result
    if not events:
        console.warn("this data module names no flood events: each file counts as an event of its own")
    absent = {f"test/{key}": None for key, value in scores(table.counts.sum(axis=0)).items() if value is None}
    shown: dict[str, float | None] = {key: absent.get(key, value) for key, value in metrics.items()}
    for part, listed in splits.items():
        one, path = table, table_path(named, part, folder)
        if part != name:
            one = table.subset([c for c in listed if c not in failed], split=part, subset_of=name, metrics={})
            shown |= {f"test/{part}/{key}": value for key, value in scores(one.counts.sum(axis=0)).items()}
        write_table(one, path)
        result["chips"][part], result["tables"][part] = len(one), str(path)
    if baselines and named == checkpoint:
        write_baselines(recipe, table, place.parent)
    return result | {"metrics": shown}


def predict(cli: RecipeCLI, checkpoint: Path, output: Path, *, probabilities: str | None = None) -> list[Path]:
    """Write what `ChipWriter` writes for each chip of the predict split into a new or empty folder; return the files.

    Raises:
        UsageError, DataError, CheckpointError: The folder holds something; as `run_pass`.
    """
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise UsageError("the output folder is not empty and nothing in it is overwritten", where=output)
    run_pass(cli, "predict", ChipWriter(checkpoint, cli.recipe, output, probabilities), "predict")
    return sorted(output.glob("*.tif"))


def choose_split(recipe: Recipe, split: str) -> dict[str, dict[str, str]]:
    """The chips that a pass over a split reads and the event of each, by the split's name; then parts of it.

    Of several test splits, `test` is the one that holds all the others, its parts; a UsageError is raised where there
    is none. Another data module knows its own files, and has no chips here.
    """
    if not protocols.uses_flood_data_module(recipe):
        if split != "test":
            raise UsageError(f"this data module has no split {split!r} for a test", fix="leave --split out")
        return {split: {}}
    splits = read_splits(protocols.data_arguments(recipe), split if split in ("train", "val") else "test")
    name = max(splits, key=lambda one: len(splits[one])) if split == "test" else split
    parts = splits if split == "test" else {}
    if name not in splits or any(chips.keys() - splits[name].keys() for chips in parts.values()):
        what = f"the recipe has no split {split!r}; of several, test is the one that holds all the others"
        raise UsageError(what, where="data.init_args.test_split", fix=f"--split {', '.join(splits)}")
    return {name: splits[name]} | parts


def table_path(checkpoint: Path, split: str, folder: Path | None = None) -> Path:
    """Where a checkpoint's chip table over a split lies: ``<split>/<checkpoint>.parquet`` in a folder.

    By default the folder is `evaluation` of the checkpoint's run folder, or beside the checkpoint.
    """
    run = RunFolder.of_checkpoint(checkpoint) or RunFolder(checkpoint.resolve().parent)
    return (folder or run.evaluation) / split / f"{checkpoint.stem}.parquet"


def _describe(recipe: Recipe, run: RunFolder | None) -> str:
    """Which model this is, how it was trained and on what, as far as its run has recorded it."""
    with contextlib.suppress(RunFolderError, LookupError, TypeError, AttributeError):  # no record, or an edited one
        record = run.read_record() if run else {}
        data, epochs = record["data"], record["progress"]["epochs"]
        chips = f"{data['chips']['train']:,} {'generated ' if data['generated'] else ''}chips ({data['protocol']})"
        how = f"trained on {chips} for {epochs} epochs with seed {record['seed']}"
        return "; ".join([*describe_model(recipe, record), how])
    return f"{describe_model(recipe, {})[0]}; how it was trained is not recorded here"
