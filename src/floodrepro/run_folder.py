"""The run folder: where everything of one run lies, and the record that the run keeps of itself."""

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError, RunFolderError, UsageError
from floodrepro.recipe import Recipe

RECORD_SCHEMA = 3
DECLARATION = "declared.json"  # beside runs that were declared together, `seed-<seed>` each


class RunFolder:
    """Paths inside one run's folder. Nothing is created by asking for a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"  # resolved, saved before the first step
        self.record = path / "run.json"  # what the run records of itself
        self.log = path / "log.txt"  # what the fit wrote to stderr
        self.metrics = path / "metrics.csv"  # of Lightning's CSV logger: a row a logging step, a row a validation
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / "best.ckpt"  # weights of the best epoch by the recipe's own monitor
        self.evaluation = path / "evaluation"  # chip tables, <split>/<checkpoint>.parquet
        self.verification = path / "verification"  # results.json, the report, and what was measured for it
        self.results = self.verification / "results.json"
        self.export = path / "export"  # the exported pair and its card
        self.lock = path / ".lock"  # held by the process that trains in this folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run folder; raises `UsageError` where there is none, or it holds no recipe."""
        run = cls(path)
        if not run.recipe.is_file():
            raise UsageError("this is no run folder: it holds no recipe.yaml", where=path, fix="give runs/NAME")
        return run

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> Self | None:
        """The run folder that a checkpoint lies in; None if it lies in none."""
        run = cls(checkpoint.resolve().parent.parent)
        return run if run.checkpoints == checkpoint.resolve().parent and run.recipe.is_file() else None

    def save_recipe(self, recipe: Recipe) -> str:
        """Save the resolved recipe and return its sha256."""
        digest = recipes.fingerprint(recipe)
        write_atomically(self.recipe, f"# The resolved recipe of this run, sha256 {digest}\n{recipes.to_yaml(recipe)}")
        return digest

    def update_record(self, **entries: Any) -> None:
        """Add entries to ``run.json`` or change them; the file is whole at every moment."""
        record = self.read_record() or {"schema": RECORD_SCHEMA}
        write_atomically(self.record, json.dumps(record | entries, indent=2) + "\n")

    def read_record(self) -> dict[str, Any]:
        """The content of ``run.json``, empty where there is none; raises `RunFolderError` where it is damaged."""
        try:
            return dict(json.loads(self.record.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunFolderError(f"the run's record cannot be read: {error}", where=self.record) from error

    def read_metrics(self) -> list[dict[str, str]]:
        """The rows of ``metrics.csv``, values as text; none for a recipe without the CSV logger."""
        return list(csv.DictReader(self.metrics.read_text("utf-8").splitlines())) if self.metrics.is_file() else []


def config_beside(checkpoint: Path) -> Path:
    """The config that goes with a checkpoint: ``recipe.yaml`` of its run folder, or the YAML beside an export.

    Raises `UsageError` where it is not one, and `CheckpointError` where it would run code: a download must not unasked.
    """
    run, twin = RunFolder.of_checkpoint(checkpoint), checkpoint.with_suffix(".yaml")
    found = [run.recipe] if run else [twin] if twin.is_file() else []
    if not found:  # a scene.yaml is no recipe
        found = [path for path in checkpoint.parent.glob("*.y*ml") if "model" in recipes.read_yaml(path)]
    if len(found) != 1:
        raise UsageError(f"{len(found)} configs lie beside the checkpoint", where=checkpoint, fix="--config YAML")
    refuse_code(found[0], f"--config {found[0]}")
    return found[0]


def refuse_code(config: Path, fix: str) -> None:
    """Raise `CheckpointError` for a config that nobody named and that would run code; `fix` is how to name it."""
    if recipes.read_yaml(config).get("custom_modules_path"):
        what = "the config beside the checkpoint runs code of its own (custom_modules_path)"
        raise CheckpointError(what, where=config, fix=f"if you trust its author: {fix}")


def timestamp() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside *path* for a file that takes its place once it is whole; an error leaves nothing of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails names none
        raise
    finally:
        with contextlib.suppress(OSError):  # as on a read-only disk, whose first error is the one to tell
            partial.unlink(missing_ok=True)
