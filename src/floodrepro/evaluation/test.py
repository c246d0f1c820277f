"""``floodrepro test``: TerraTorch's own test loop, run once, and the chip table that it leaves.

B = chips of a batch, K = classes, H, W = pixels.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.callbacks.run_record import peak_memory, percentiles, reset_peaks
from floodrepro.data.protocols import (
    IGNORE_INDEX,
    SPLITS,
    class_names_of,
    data_arguments,
    positive_class_of,
    protocol_of,
    uses_flood_data_module,
)
from floodrepro.data.splits import read_splits
from floodrepro.errors import CheckpointError, FloodreproError, RunFolderError, TableError, UsageError
from floodrepro.evaluation.baselines import write_baselines
from floodrepro.evaluation.chip_table import ChipTable, read_table, write_table
from floodrepro.evaluation.counting import count, largest_class
from floodrepro.evaluation.metrics import scores
from floodrepro.evaluation.passes import chip_files, chip_of, prepare, watched
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, free_name, sha256_of, timestamp
from floodrepro.system.environment import environment
from floodrepro.training.terratorch_cli import RecipeCLI

AGREEMENT = 1e-6
"""TerraTorch sums counts on the device and divides in float32; the same figures from the table may differ by that."""

_WARM_UP = 3  # batches: allocators and autotuning settle
_SEEN = ("modalities", "means", "stds", "timesteps", "no_data_value", "no_data_replace")
_SAME = ("checkpoint", "recipe_sha256", "data", "precision", "device")


class ChipCounts(Callback):
    """Counts, chip by chip, what TerraTorch's test loop predicts.

    Args:
        checkpoint: Whose predictions they are, for messages.
        ignore_index: Truth of the pixels that do not count.
        positive: The class whose probabilities are kept; the last one by default.
    """

    def __init__(self, checkpoint: Path, ignore_index: int, positive: int = -1) -> None:
        self._checkpoint, self._ignore_index, self._positive = checkpoint, ignore_index, positive
        self._logits: Tensor | None = None
        self._chips: list[str] = []
        self._batches: list[dict[str, Any]] = []
        self._seconds: list[float] = []
        self._rates: list[float] = []
        self._memory: dict[str, float] = {}
        self._start = self._end = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen where a task turns images into logits, tiled or whole: the test step hands them to no callback."""
        infer = pl_module.handle_full_or_tiled_inference
        reset_peaks(pl_module.device)  # a training before it in this process used more

        def listen(*args: Any, **kwargs: Any) -> Any:
            output = infer(*args, **kwargs)
            self._logits = output.output
            return output

        pl_module.handle_full_or_tiled_inference = listen
        self._end = time.perf_counter()

    def on_test_batch_start(self, *args: Any) -> None:
        """Begin the batch's clock."""
        self._start = time.perf_counter()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Count the batch; fetching the counts waits for the device, so that the clock has seen all of its work."""
        logits = self._logits
        assert logits is not None
        chips = [chip_of(file) for file in chip_files(batch, trainer.test_dataloaders, len(self._chips))]
        finite = logits.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            bad = [chip for chip, fine in zip(chips, finite.tolist(), strict=True) if not fine]
            raise CheckpointError(
                f"the model predicts values that are not finite for {len(bad)} chips, the first is {bad[0]}",
                where=self._checkpoint,
                fix="floodrepro verify names weights and buffers that are not finite; no chip table was written",
            )
        counted = count(
            pl_module.squeeze_ground_truth(batch["mask"]),
            largest_class(logits),
            logits.float().softmax(dim=1)[:, self._positive],
            classes=logits.shape[1],
            positive=self._positive,
            ignore_index=self._ignore_index,
        )
        self._batches.append(counted)
        self._chips += chips
        now = time.perf_counter()
        self._seconds.append(now - self._start)
        self._rates.append(len(chips) / (now - self._end))
        self._end = now
        self._memory = peak_memory(pl_module.device)

    def speed(self) -> dict[str, Any]:
        """Seconds a batch and chips per second with waiting for data (median, p10, p90, n), and memory in GiB.

        The first batches are left out where there are enough others.
        """
        skip = _WARM_UP if len(self._seconds) > 2 * _WARM_UP else 0
        return {
            "batch_seconds": percentiles(self._seconds[skip:]),
            "chips_per_second": percentiles(self._rates[skip:]),
            "memory_gib": self._memory,
        }

    def table(self, metadata: dict[str, Any], events: Mapping[str, str] | None = None) -> ChipTable:
        """All chips seen so far; a chip that `events` does not name is its own event."""
        return ChipTable.of_batches({c: (events or {}).get(c, c) for c in self._chips}, self._batches, metadata)


class ChosenSplit(NamedTuple):
    """What one pass reads."""

    name: str  # test, val, train, or one of several test splits
    file: str | None = None  # chip ids; None for a data module that knows its own files
    events: Mapping[str, str] = {}  # the event of each chip; empty for such a data module
    subsets: Mapping[str, list[str]] = {}  # chips of further test splits: their tables come from the same pass


def tabulate_checkpoint(
    cli: RecipeCLI, checkpoint: Path, *, split: str = "test", folder: Path | None = None, baselines: bool = True
) -> dict[str, Any]:
    """Run TerraTorch's own test loop over a split and write the chip table.

    A table that is there already is replaced if it was made from the same checkpoint, recipe, data and device;
    otherwise it is set aside under a free name.

    Args:
        cli: The parsed recipe, with any TerraTorch data module.
        checkpoint: Weights to measure.
        split: `test`, `val`, `train`, or one of the recipe's test splits by name.
        folder: Where `<split>/<checkpoint>.parquet` goes. Default: `evaluation` of the checkpoint's run folder, or
            beside the checkpoint.
        baselines: Whether ``baselines/<split>/NAME.parquet`` are written too, where they are not there yet.

    Returns:
        JSON types: `stage`, `checkpoint`, `chips` by split, `metrics` of TerraTorch by its names (those of subsets are
        computed from the table), `tables` by split, and `disagreement`, the largest difference between TerraTorch's
        metrics and the table's. No tables where the trainer was told to leave batches out.

    Raises:
        UsageError: The recipe does not build or run here, or has no such split.
        DataError: Chips are missing.
        CheckpointError: The weights cannot be read, do not fit, or predict values that are not finite.
        RunFolderError: The table cannot be written.
        FloodreproError: TerraTorch's metrics and the table's differ.
    """
    chosen = choose_split(cli.recipe, split)
    path = table_path(checkpoint, chosen.name, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the pass: on a GPU it takes a while
    except OSError as error:
        what = f"the chip table cannot be written here: {error.strerror}"
        raise RunFolderError(what, where=path.parent, fix="--output DIR") from error

    def one_split(config: Namespace) -> None:
        if chosen.file is not None:
            config.data.init_args.test_split = chosen.file
            if "test_dataloaders_names" in config.model.init_args:
                several = chosen.subsets or chosen.name not in SPLITS
                config.model.init_args.test_dataloaders_names = [chosen.name] if several else None

    data = prepare(cli, checkpoint, split if split in ("train", "val") else "test", wire=one_split)
    arguments, positive = data_arguments(cli.recipe), positive_class_of(cli.recipe)
    ignored = cli.model.hparams["ignore_index"]
    counter = ChipCounts(checkpoint, IGNORE_INDEX if ignored is None else ignored, positive)
    cli.trainer.callbacks.append(counter)
    with watched(cli):
        results = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = {name: float(value) for result in results for name, value in result.items()}
    failed: dict[str, str] = dict(getattr(cli.datamodule, "failed_chips", {}))  # left out by --skip-damaged
    surroundings = environment(str(cli.trainer.precision))
    on_cpu = cli.trainer.strategy.root_device.type == "cpu"
    table = counter.table(
        {
            "split": chosen.name,
            "class_names": class_names_of(cli.recipe),
            "positive_class": positive,
            "protocol": protocol_of(cli.recipe).name,
            "predictor": {"kind": "model", "name": checkpoint.name},
            "checkpoint": {"name": checkpoint.name, "sha256": sha256_of(checkpoint)},
            "recipe_sha256": recipes.fingerprint(cli.recipe),
            "recipe_changes": _changes(cli.recipe, checkpoint),
            "inputs": {key: arguments[key] for key in _SEEN if key in arguments},
            "data": data.as_dict(),
            "failed_chips": failed,
            "precision": str(cli.trainer.precision),
            "device": surroundings["cpu"]["model"] if on_cpu else surroundings["accelerator"]["name"],
            "environment": surroundings,
            "metrics": metrics,
            "speed": counter.speed(),
            "made": timestamp(),
        },
        chosen.events,
    )
    chips: dict[str, int] = {chosen.name: len(table)}
    tables: dict[str, str] = {}
    found = {"stage": "test", "checkpoint": str(checkpoint), "chips": chips, "metrics": metrics, "tables": tables}
    wanted = len(cli.trainer.test_dataloaders.dataset) - len(failed)
    if len(table) != wanted:
        console.warn(
            f"{len(table)} of {wanted} chips were tested (trainer.limit_test_batches): no chip table is written"
        )
        return found
    if not uses_flood_data_module(cli.recipe):
        console.warn("this data module names no flood events: each file counts as an event of its own")
    disagreement = _disagreement(table, metrics)
    if not disagreement <= AGREEMENT:
        raise FloodreproError(
            f"TerraTorch's metrics and those from the chips' counts differ by {disagreement:g}; no table was written",
            where=checkpoint,
            fix="this is an error in floodrepro, or in a library of another version: please report it",
        )
    tables[chosen.name] = str(keep(table, path))
    for name, listed in chosen.subsets.items():
        part = table.subset([c for c in listed if c not in failed], split=name, subset_of=chosen.name, metrics={})
        by_name = scores(part.counts.sum(axis=0))
        metrics |= {f"test/{name}/{metric}": value for metric, value in by_name.items() if value is not None}
        tables[name] = str(keep(part, table_path(checkpoint, name, folder)))
        chips[name] = len(part)
    if baselines:
        write_baselines(cli.recipe, table, path.parent.parent)
    return found | {"disagreement": disagreement}


def choose_split(recipe: Recipe, split: str) -> ChosenSplit:
    """What a pass over a split reads, and which other test splits lie within it.

    Raises:
        UsageError: The recipe names no such split, or none of its test splits holds all the others.
    """
    arguments = data_arguments(recipe)
    if not uses_flood_data_module(recipe):
        if split != "test":
            raise UsageError(f"this data module has no split {split!r} for a test", fix="leave --split out")
        return ChosenSplit(split)
    several = isinstance(arguments.get("test_split"), dict)
    if split in ("train", "val") or not several:
        if split not in SPLITS:
            raise UsageError(f"the recipe names no split {split!r}", fix=f"--split {', '.join(SPLITS)}")
        return ChosenSplit(split, arguments.get(f"{split}_split"), read_splits(arguments, split)[split])
    files, chips = arguments["test_split"], read_splits(arguments, "test")
    if split in chips and split != "test":
        return ChosenSplit(split, files[split], chips[split])
    whole = next((name for name in chips if all(set(other) <= set(chips[name]) for other in chips.values())), None)
    if whole is None or split != "test":
        problem = f"names no split {split!r}" if whole else "has no test split that holds all the others"
        raise UsageError(f"the recipe {problem}", where="data.init_args.test_split", fix=f"--split {', '.join(chips)}")
    subsets = {name: list(others) for name, others in chips.items() if name != whole}
    return ChosenSplit(whole, files[whole], chips[whole], subsets)


def table_path(checkpoint: Path, split: str, folder: Path | None = None) -> Path:
    """Where a checkpoint's chip table over a split lies."""
    if folder is None:
        run = RunFolder.of_checkpoint(checkpoint)
        folder = run.evaluation if run else checkpoint.resolve().parent / RunFolder.evaluation_name
    return folder / split / f"{checkpoint.stem}.parquet"


def keep(table: ChipTable, path: Path) -> Path:
    """Write a table; one of another checkpoint, recipe, data or device is set aside first, under a free name.

    Raises:
        RunFolderError: The table cannot be written.
    """
    try:
        old = read_table(path).metadata
        replaces = all(old.get(key) == table.metadata.get(key) for key in _SAME)
    except TableError:  # there is none, or it is damaged
        replaces = not path.exists()
    try:
        if not replaces:
            aside = path.with_name(f"{free_name(path.with_suffix(''))}.parquet")
            path.replace(aside)
            console.say(f"a chip table of another checkpoint, recipe, data or device was set aside as {aside}")
        write_table(table, path)
    except OSError as error:
        raise RunFolderError(f"the chip table cannot be written: {error.strerror}", where=path) from error
    return path


def _changes(recipe: Recipe, checkpoint: Path) -> list[str] | None:
    """Keys in which the recipe is another than that of the checkpoint's run; None outside a run folder."""
    run = RunFolder.of_checkpoint(checkpoint)
    return list(recipes.differences(recipes.read_yaml(run.recipe), recipe)) if run else None


def _disagreement(table: ChipTable, metrics: Mapping[str, float]) -> float:
    """Largest difference between the table's scores and TerraTorch's; a class that is absent is 0 there."""
    theirs = {name.rsplit("/", 1)[-1]: value for name, value in metrics.items()}
    ours = scores(table.counts.sum(axis=0))
    return max(abs((ours[name] or 0.0) - theirs[name]) for name in ours if name in theirs)
