"""``floodrepro test``: TerraTorch's own test loop, run once, and the chip table that it leaves."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.callbacks.run_record import peak_memory, percentiles, reset_peaks
from floodrepro.data import protocols
from floodrepro.data.splits import read_splits
from floodrepro.errors import CheckpointError, FloodreproError, RunFolderError, UsageError
from floodrepro.evaluation.baselines import write_baselines
from floodrepro.evaluation.chip_table import ChipTable, write_table
from floodrepro.evaluation.counting import count
from floodrepro.evaluation.metrics import scores
from floodrepro.evaluation.passes import chip_files, chip_of, prepare, run_loop
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, sha256_of, timestamp
from floodrepro.system.environment import environment
from floodrepro.training.terratorch_cli import RecipeCLI

AGREEMENT = 1e-6
"""TerraTorch sums counts on the device and divides in float32; the same figures from the table may differ by that."""

_WARM_UP = 3  # batches: allocators and autotuning settle
_SEEN = ("modalities", "means", "stds", "timesteps", "no_data_value", "no_data_replace")


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
        self._rates: list[float] = []
        self._memory: dict[str, float] = {}
        self._last = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen where a task turns images into logits, tiled or whole: the test step hands them to no callback."""
        infer = pl_module.handle_full_or_tiled_inference
        reset_peaks(pl_module.device)  # a training before it in this process used more

        def listen(*args: Any, **kwargs: Any) -> Any:
            output = infer(*args, **kwargs)
            self._logits = output.output
            return output

        pl_module.handle_full_or_tiled_inference = listen
        self._last = time.perf_counter()

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Count the batch; fetching the counts waits for the device, so that the clock has seen all of its work."""
        logits = self._logits
        assert logits is not None
        chips = [chip_of(file) for file in chip_files(batch, trainer.test_dataloaders, len(self._chips))]
        finite = logits.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            bad = [chip for chip, fine in zip(chips, finite.tolist(), strict=True) if not fine]
            what = f"the model predicts values that are not finite for {len(bad)} chips, the first is {bad[0]}"
            fix = "floodrepro verify names weights and buffers that are not finite; no chip table was written"
            raise CheckpointError(what, where=self._checkpoint, fix=fix)
        self._batches.append(
            count(
                pl_module.squeeze_ground_truth(batch["mask"]),
                logits.argmax(dim=1),
                logits.float().softmax(dim=1)[:, self._positive],
                classes=logits.shape[1],
                positive=self._positive,
                ignore_index=self._ignore_index,
            )
        )
        self._chips += chips
        now = time.perf_counter()
        self._rates.append(len(chips) / (now - self._last))
        self._last, self._memory = now, peak_memory(pl_module.device)

    def speed(self) -> dict[str, Any]:
        """Chips per second of the batches after the first few, waiting for data included, and peak memory in GiB."""
        return {"chips_per_second": percentiles(self._rates[_WARM_UP:] or self._rates), "memory_gib": self._memory}

    def table(self, metadata: dict[str, Any], events: Mapping[str, str] | None = None) -> ChipTable:
        """All chips seen so far; a chip that `events` does not name is its own event."""
        rows = [(chip, (events or {}).get(chip, chip)) for chip in self._chips]
        return ChipTable.of_batches(rows, self._batches, metadata)


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

    Args:
        cli: The parsed recipe, with any TerraTorch data module.
        checkpoint: Weights to measure.
        split: `test`, `val`, `train`, or one of the recipe's test splits by name.
        folder: As `table_path` has it.
        baselines: Whether the baselines' tables are written too, where they are not there yet.

    Returns:
        JSON types: `stage`, `checkpoint`, `chips` by split, `metrics` of TerraTorch by its names (those of subsets are
        computed from the table), `tables` by split, and `disagreement`, the largest difference between TerraTorch's
        metrics and the table's. No tables where the trainer was told to leave batches out.

    Raises:
        UsageError, DataError: As `prepare`, or the recipe has no such split.
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

    kind = split if split in ("train", "val") else "test"
    test_name = chosen.name if chosen.subsets or chosen.name not in protocols.SPLITS else None
    data = prepare(cli, checkpoint, kind, test_file=chosen.file, test_name=test_name)
    arguments, positive = protocols.data_arguments(cli.recipe), protocols.positive_class_of(cli.recipe)
    ignored = cli.model.hparams["ignore_index"]
    counter = ChipCounts(checkpoint, protocols.IGNORE_INDEX if ignored is None else ignored, positive)
    cli.trainer.callbacks.append(counter)
    metrics = run_loop(cli, "test", verbose=False)
    failed: dict[str, str] = dict(getattr(cli.datamodule, "failed_chips", {}))  # left out by --skip-damaged
    surroundings = environment(str(cli.trainer.precision))
    on_cpu = cli.trainer.strategy.root_device.type == "cpu"
    metadata = {
        "split": chosen.name,
        "class_names": protocols.class_names_of(cli.recipe),
        "positive_class": positive,
        "protocol": protocols.protocol_of(cli.recipe).name,
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
        "metrics": dict(metrics),
        "speed": counter.speed(),
        "made": timestamp(),
    }
    table = counter.table(metadata, chosen.events)
    chips: dict[str, int] = {chosen.name: len(table)}
    tables: dict[str, str] = {}
    found = {"stage": "test", "checkpoint": str(checkpoint), "chips": chips, "metrics": metrics, "tables": tables}
    wanted = len(cli.trainer.test_dataloaders.dataset) - len(failed)
    if len(table) != wanted:
        console.warn(f"{len(table)} of {wanted} chips were tested (trainer.limit_test_batches): no table is written")
        return found
    if not chosen.events:
        console.warn("this data module names no flood events: each file counts as an event of its own")
    disagreement = _disagreement(table, metrics)
    if not disagreement <= AGREEMENT:
        what = f"TerraTorch's metrics and those from the chips' counts differ by {disagreement:g}"
        fix = "this is an error in floodrepro, or in a library of another version: please report it"
        raise FloodreproError(f"{what}; no table was written", where=checkpoint, fix=fix)
    write_table(table, path)
    tables[chosen.name] = str(path)
    for name, listed in chosen.subsets.items():
        part = table.subset([c for c in listed if c not in failed], split=name, subset_of=chosen.name, metrics={})
        by_name = scores(part.counts.sum(axis=0))
        metrics |= {f"test/{name}/{metric}": value for metric, value in by_name.items() if value is not None}
        write_table(part, table_path(checkpoint, name, folder))
        chips[name], tables[name] = len(part), str(table_path(checkpoint, name, folder))
    if baselines:
        write_baselines(cli.recipe, table, path.parent.parent)
    return found | {"disagreement": disagreement}


def choose_split(recipe: Recipe, split: str) -> ChosenSplit:
    """What a pass over a split reads. Of several test splits, `test` is the one that holds all the others.

    Raises:
        UsageError: The recipe names no such split, or none of its test splits holds all the others.
    """
    if not protocols.uses_flood_data_module(recipe):
        if split != "test":
            raise UsageError(f"this data module has no split {split!r} for a test", fix="leave --split out")
        return ChosenSplit(split)
    arguments, kind = protocols.data_arguments(recipe), split if split in ("train", "val") else "test"
    given, chips = arguments.get(f"{kind}_split"), read_splits(arguments, kind)
    name: str | None = split
    if split == "test":
        name = next((one for one in chips if all(set(other) <= set(chips[one]) for other in chips.values())), None)
    if name not in chips:
        problem = f"names no split {split!r}" if name else "has no test split that holds all the others"
        raise UsageError(f"the recipe {problem}", where="data.init_args.test_split", fix=f"--split {', '.join(chips)}")
    subsets = {other: list(listed) for other, listed in chips.items() if split == "test" and other != name}
    return ChosenSplit(name, given[name] if isinstance(given, Mapping) else given, chips[name], subsets)


def table_path(checkpoint: Path, split: str, folder: Path | None = None) -> Path:
    """Where a checkpoint's chip table over a split lies: ``<split>/<checkpoint>.parquet`` in a folder.

    By default the folder is `evaluation` of the checkpoint's run folder, or beside the checkpoint.
    """
    if folder is None:
        run = RunFolder.of_checkpoint(checkpoint)
        folder = (run or RunFolder(checkpoint.resolve().parent)).evaluation
    return folder / split / f"{checkpoint.stem}.parquet"


def _changes(recipe: Recipe, checkpoint: Path) -> list[str] | None:
    """Keys in which the recipe is another than that of the checkpoint's run; None outside a run folder."""
    run = RunFolder.of_checkpoint(checkpoint)
    return list(recipes.differences(recipes.read_yaml(run.recipe), recipe)) if run else None


def _disagreement(table: ChipTable, metrics: Mapping[str, float]) -> float:
    """Largest difference between the table's scores and TerraTorch's; a class that is absent is 0 there."""
    theirs = {name.rsplit("/", 1)[-1]: value for name, value in metrics.items()}
    ours = scores(table.counts.sum(axis=0))
    return max(abs((ours[name] or 0.0) - theirs[name]) for name in ours if name in theirs)
