"""Whether a fit starts, resumes or has nothing to do: decided from files alone, so that all processes decide alike."""

import re
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.callbacks.exact_resume import LAST, PREVIOUS
from floodrepro.data.splits import DataState
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, free_name

KEY = "floodrepro"  # under which a full state keeps the run's identity
_PACKAGES = ("torch", "lightning", "terratorch", "torchmetrics", "timm", "segmentation-models-pytorch", "numpy")
_SHOWN = 3

# What a resumed run may have changed: where it takes place, how long it lasts and what it prints.
_MAY_CHANGE = re.compile(
    r"trainer\.(default_root_dir|accelerator|devices|num_nodes|strategy|enable_\w+|logger.*|callbacks.*|plugins.*"
    r"|log_every_n_steps|max_epochs|max_steps|max_time|min_epochs|min_steps|profiler.*|num_sanity_val_steps)"
    r"|data\.init_args\.(\w*(root|dir|path|split)(\..+)?|num_workers|prefetch_factor|pin_memory|persistent_workers)"
    r"|predict_output_dir|output_file_prefix|out_dtype|deploy_config_file|custom_modules_path"
)


def identity(recipe: Recipe, data: DataState) -> dict[str, Any]:
    """What two parts of one run must have in common, as plain values; it is stored in every full state.

    Args:
        recipe: The resolved recipe.
        data: What `floodrepro.data.splits.check_data` found.
    """
    kept = {key: value for key, value in recipes.leaves(recipe) if not _MAY_CHANGE.fullmatch(key)}
    packages = {name: version(name) for name in _PACKAGES}
    return {"recipe": kept, "data": dict(data.digests), "packages": packages}


def choose_state(
    run: RunFolder, now: Mapping[str, Any], *, resume: str, ckpt_path: str | None, allow_changes: bool
) -> tuple[Path | None, list[str]]:
    """Decide what a fit starts from.

    Args:
        run: The run folder; it may not exist yet.
        now: Identity of what is asked for.
        resume: "auto", or "never" to refuse a run that exists.
        ckpt_path: A full state to resume from: a path, or "last" for the run's own.
        allow_changes: Accept changes of all but model and optimizer.

    Returns:
        The full state to resume from, None to start from the beginning; and what changed since it, a line each.

    Raises:
        UsageError: The folder holds something else, the run must not be resumed, or it would not be the same run.
        CheckpointError: The state cannot be read.
    """
    if run.path.exists() and not run.is_resumable():
        raise UsageError("the folder exists and holds no run of floodrepro", where=run.path, fix="give another --name")
    if run.record.exists() and resume == "never":
        raise UsageError("the run exists already", where=run.path, fix=f"--name {free_name(run.path)} for a new run")
    state = newest_state(run.checkpoints) or (Path(ckpt_path) if ckpt_path not in (None, "last") else None)
    if state is None:
        return None, []
    before = read_identity(state)
    changes = [
        f"{section}.{key}: {old!r} became {new!r}".removeprefix("recipe.")
        for section in ("recipe", "data", "packages")
        for key, (old, new) in recipes.differences(before[section], now[section]).items()
    ]
    fixed = [line for line in changes if line.startswith(("model.", "optimizer.", "lr_scheduler."))]
    if changes and (fixed or not allow_changes):
        shown = fixed or changes
        more = f" (and {len(shown) - _SHOWN} more)" if len(shown) > _SHOWN else ""
        hint = f"--weights {state} starts from its weights alone" if fixed else "or --resume-anyway, which is recorded"
        raise UsageError(
            f"this would not be the same run: {'; '.join(shown[:_SHOWN])}{more}",
            where=state,
            fix=f"undo the change, or give another --name; {hint}",
        )
    return state, changes


def is_done(recipe: Recipe, record: Mapping[str, Any]) -> bool:
    """Whether a run is finished, and the recipe asks for no more epochs or steps than it was asked for."""
    length = record.get("length") or {}
    longer = [(recipe["trainer"].get(key) or 0) > (length.get(key) or 0) for key in ("max_epochs", "max_steps")]
    return record.get("status") == "finished" and not any(longer)


def newest_state(folder: Path) -> Path | None:
    """The newest full state of which every byte is as it was written.

    Returns:
        ``last.ckpt``; where that is damaged, ``previous.ckpt``, with a warning; None where neither was written yet.

    Raises:
        CheckpointError: There was one, and none is whole.
    """
    found = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    whole = next((path for path in found if _is_whole(path)), None)
    if found and whole is None:
        raise CheckpointError("the full state is damaged", where=found[0], fix="start again under another --name")
    if whole is not None and whole != found[0]:  # else it would become the previous one
        aside = found[0].replace(found[0].with_name(f"{LAST}.damaged"))
        console.warn(f"{found[0]} is damaged and was renamed to {aside.name}; {PREVIOUS} is used instead")
    return whole


def _is_whole(state: Path) -> bool:
    """Whether the checksums of a file of torch.save, a ZIP archive, are right."""
    try:
        with zipfile.ZipFile(state) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


def read_identity(state: Path) -> dict[str, Any]:
    """The identity that is stored in a full state.

    Raises:
        CheckpointError: It is no full state of floodrepro.
    """
    try:
        content = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
        found: dict[str, Any] = content[KEY]["identity"]
    except Exception as error:  # torch.load raises what zipfile, pickle and the system raise
        what = "there is no full state here that a run can resume from"
        fix = "give checkpoints/last.ckpt of a run, or start from the weights alone: --weights FILE"
        raise CheckpointError(what, where=state, fix=fix) from error
    return found
