"""Runs that are declared before the first of them starts: nobody can drop the one that came out badly."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.errors import RunFolderError, UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import DECLARATION, RunFolder, timestamp, write_atomically

_SCHEMA = 1


def parse_seeds(text: str) -> list[int]:
    """Seeds from "42,43,44".

    Raises:
        UsageError: It is no list of different whole numbers.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds is {text!r}, not whole numbers with commas", fix="--seeds 42,43,44") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds is {text!r}: a seed is negative or there twice", fix="--seeds 42,43,44")
    return seeds


def declare(folder: Path, seeds: Sequence[int], recipe: Recipe) -> dict[int, Path]:
    """Write down which runs there will be, once; later calls have to ask for the same.

    Args:
        folder: Of all the runs.
        seeds: One for each run.
        recipe: What is trained; its own seed does not count.

    Returns:
        Run folders by seed.

    Raises:
        UsageError: Other runs were declared in this folder.
        RunFolderError: The declaration cannot be read or written.
    """
    digest = recipes.fingerprint({key: value for key, value in recipe.items() if key != "seed_everything"})
    runs = {seed: folder / f"seed-{seed}" for seed in seeds}
    file = folder / DECLARATION
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            content = {"schema": _SCHEMA, "declared": timestamp(), "seeds": list(seeds), "recipe_sha256": digest}
            write_atomically(file, json.dumps(content, indent=2) + "\n")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        same = (found["seeds"], found["recipe_sha256"]) == (list(seeds), digest)
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(f"the declaration of runs cannot be used: {error}", where=file) from error
    if not same:
        what = "seeds" if found["seeds"] != list(seeds) else "recipe"
        raise UsageError(
            f"other runs were declared here on {found['declared']}: seeds {found['seeds']}; now the {what} differs",
            where=file,
            fix="ask for the same runs, or declare others under another --name",
        )
    return runs


def status_of(run: Path) -> str:
    """finished, running, interrupted, failed, or "not started"."""
    folder = RunFolder(run)
    return str(folder.read_record().get("status", "not started")) if folder.record.exists() else "not started"
