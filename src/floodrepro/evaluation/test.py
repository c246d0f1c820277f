"""``floodrepro test``: TerraTorch's own test loop, run once, and the chip table that it leaves."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.callbacks.run_record import peak_memory, percentiles, reset_peaks
from floodrepro.data import protocols
from floodrepro.data.splits import read_splits
from floodrepro.errors import FloodreproError, RunFolderError, UsageError
from floodrepro.evaluation.baselines import write_baselines
from floodrepro.evaluation.chip_table import ChipTable, write_table
from floodrepro.evaluation.counting import count
from floodrepro.evaluation.metrics import scores
from floodrepro.evaluation.passes import ChipPass, run_pass
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, sha256_of, timestamp
from floodrepro.system.environment import environment
from floodrepro.training.terratorch_cli import RecipeCLI

_AGREEMENT = 1e-6  # TerraTorch sums counts on the device and divides in float32
_WARM_UP = 3  # batches: allocators and autotuning settle
_SEEN = ("modalities", "means", "stds", "timesteps", "no_data_value", "no_data_replace")


class ChipCounts(ChipPass):
    """Counts, chip by chip, what TerraTorch's test loop predicts, and how fast: waiting for data included."""

    def __init__(self, checkpoint: Path, positive: int = -1) -> None:
        super().__init__(checkpoint)
        self._positive = positive  # the class whose probabilities are kept
        self._batches: list[dict[str, Any]] = []
        self._rates: list[float] = []
        self._memory: dict[str, float] = {}
        self._last = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        reset_peaks(pl_module.device)  # a training before it in this process used more
        self._last = time.perf_counter()

    def use(self, logits: Tensor, files: list[str], batch: Any, task: Any) -> None:
        """Count the batch; fetching the counts waits for the device, so that the clock has seen all of its work."""
        ignored = task.hparams["ignore_index"]
        self._batches.append(
            count(
                task.squeeze_ground_truth(batch["mask"]),
                logits.argmax(dim=1),
                logits.float().softmax(dim=1)[:, self._positive],
                classes=logits.shape[1],
                positive=self._positive,
                ignore_index=protocols.IGNORE_INDEX if ignored is None else ignored,
            )
        )
        now = time.perf_counter()
        self._rates.append(len(files) / (now - self._last))
        self._last, self._memory = now, peak_memory(task.device)

    def table(self, metadata: dict[str, Any], events: Mapping[str, str]) -> ChipTable:
        """All chips seen so far; a chip that `events` does not name is its own event."""
        rates = percentiles(self._rates[_WARM_UP:] or self._rates)
        speed = {"speed": {"chips_per_second": rates, "memory_gib": self._memory}}
        return ChipTable.of_batches([(c, events.get(c, c)) for c in self.chips], self._batches, metadata | speed)


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
        JSON types: `stage`, `checkpoint`, `chips` by split, `metrics` of TerraTorch by its names (None where a class
        is absent; those of subsets are computed from the table), `tables` by split, and `disagreement`, the largest
        difference between TerraTorch's metrics and the table's. No tables where the trainer left batches out.

    Raises:
        UsageError, DataError, CheckpointError: The recipe has no such split; as `run_pass`.
        RunFolderError: The table cannot be written.
        FloodreproError: TerraTorch's metrics and the table's differ.
    """
    recipe, chosen = cli.recipe, choose_split(cli.recipe, split)
    run, named = RunFolder.of_checkpoint(checkpoint), checkpoint
    changes = list(recipes.differences(recipes.read_yaml(run.recipe), recipe)) if run else None
    if folder is None and {"data.init_args.limit", "data.init_args.fraction"} & set(changes or ()):
        named = checkpoint.with_stem(f"{checkpoint.stem}-part")  # the table of the whole split stays
    path = table_path(named, chosen.name, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the pass: on a GPU it takes a while
    except OSError as error:
        what = f"the chip table cannot be written here: {error.strerror}"
        raise RunFolderError(what, where=path.parent, fix="--output DIR") from error

    test_name = chosen.name if chosen.subsets or chosen.name not in protocols.SPLITS else None
    protocol, kind = protocols.protocol_of(recipe), split if split in ("train", "val") else "test"
    counter = ChipCounts(checkpoint, protocol.positive_class)
    data, metrics = run_pass(cli, "test", counter, kind, file=chosen.file, name=test_name)
    arguments, precision = protocols.data_arguments(recipe), str(cli.trainer.precision)
    failed: dict[str, str] = dict(getattr(cli.datamodule, "failed_chips", {}))  # left out by --skip-damaged
    surroundings = environment(precision)
    on_cpu = cli.trainer.strategy.root_device.type == "cpu"
    metadata = {
        "split": chosen.name,
        "class_names": list(protocol.class_names),
        "positive_class": protocol.positive_class,
        "protocol": protocol.name,
        "predictor": {"kind": "model", "name": checkpoint.name},
        "checkpoint": {"name": checkpoint.name, "sha256": sha256_of(checkpoint)},
        "recipe_sha256": recipes.fingerprint(recipe),
        "recipe_changes": changes,
        "inputs": {key: arguments[key] for key in _SEEN if key in arguments},
        "data": data.as_dict(),
        "failed_chips": failed,
        "precision": precision,
        "device": surroundings["cpu"]["model"] if on_cpu else surroundings["accelerator"]["name"],
        "environment": surroundings,
        "metrics": metrics,
        "made": timestamp(),
    }
    table = counter.table(metadata, chosen.events)
    parts = {chosen.name: table}
    found = {"stage": "test", "checkpoint": str(checkpoint), "chips": {chosen.name: len(table)}, "metrics": metrics}
    wanted = len(cli.trainer.test_dataloaders.dataset) - len(failed)
    if len(table) != wanted:
        console.warn(f"{len(table)} of {wanted} chips were tested (trainer.limit_test_batches): no table is written")
        return found | {"tables": {}}
    if not chosen.events:
        console.warn("this data module names no flood events: each file counts as an event of its own")
    ours = scores(table.counts.sum(axis=0))
    pairs = {key: ours[key.rsplit("/", 1)[-1]] for key in metrics if key.rsplit("/", 1)[-1] in ours}
    disagreement = max(abs((own or 0.0) - metrics[key]) for key, own in pairs.items())  # of an absent class it says 0
    if disagreement > _AGREEMENT:
        what = f"TerraTorch's metrics and those from the chips' counts differ by {disagreement:g}"
        fix = "this is an error in floodrepro, or in a library of another version: please report it"
        raise FloodreproError(f"{what}; no table was written", where=checkpoint, fix=fix)
    shown: dict[str, float | None] = metrics | {key: None for key, own in pairs.items() if own is None}
    for name, listed in chosen.subsets.items():
        kept = [chip for chip in listed if chip not in failed]
        parts[name] = table.subset(kept, split=name, subset_of=chosen.name, metrics={})
        shown |= {f"test/{name}/{key}": own for key, own in scores(parts[name].counts.sum(axis=0)).items()}
    paths = {name: table_path(named, name, folder) for name in parts}
    for name, part in parts.items():
        write_table(part, paths[name])
    if baselines and named == checkpoint:
        write_baselines(recipe, table, path.parent.parent)
    chips = {name: len(part) for name, part in parts.items()}
    tables = {name: str(place) for name, place in paths.items()}
    return found | {"chips": chips, "metrics": shown, "tables": tables, "disagreement": disagreement}


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
