"""Whether a fit starts, resumes or has nothing to do: decided from files alone, so that all processes decide alike."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from floodrepro import recipe as recipes
from floodrepro.callbacks.exact_resume import newest_state
from floodrepro.data.splits import DataState
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, free_name

STATE_KEY = "floodrepro"  # ExactResume keeps the identity under it
_PACKAGES = ("torch", "lightning", "terratorch", "torchmetrics", "timm", "segmentation-models-pytorch", "numpy")
_SHOWN = 3

# What a resumed run may have changed: where it takes place, how long it lasts and what it prints.
_MAY_CHANGE = re.compile(
    r"trainer\.(default_root_dir|accelerator|devices|num_nodes|strategy|enable_\w+|logger.*|callbacks.*|plugins.*"
    r"|log_every_n_steps|max_epochs|max_steps|max_time|min_epochs|min_steps|profiler.*|num_sanity_val_steps)"
    r"|data\.init_args\.(\w*(root|dir|path|split)(\..+)?|num_workers|prefetch_factor|pin_memory|persistent_workers)"
    r"|predict_output_dir|output_file_prefix|out_dtype|deploy_config_file|custom_modules_path"
)
_ONLY_WATCH = ("ProgressBar", "Monitor", "ModelSummary", "ModelCheckpoint", "EarlyStopping", "Timer")


def identity(recipe: Recipe, data: DataState) -> dict[str, Any]:
    """What two parts of one run must have in common, as plain values; it is stored in every full state.

    Args:
        recipe: The resolved recipe.
        data: What `floodrepro.data.splits.check_data` found.
    """
    kept = {key: value for key, value in recipes.leaves(recipe) if not _MAY_CHANGE.fullmatch(key)}
    callbacks = (recipe.get("trainer") or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = callback["class_path"].rsplit(".", 1)[-1] if isinstance(callback, Mapping) else str(callback)
        if not name.endswith(_ONLY_WATCH):
            kept |= dict(recipes.leaves(callback, f"trainer.callbacks.{name}"))
    return {
        "recipe": kept,
        "data": dict(data.digests),
        "packages": {name: version(name) for name in _PACKAGES},
    }


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
    if ckpt_path == "best":
        raise UsageError(
            "best.ckpt holds weights only and cannot be resumed",
            where=run.best,
            fix=f"--ckpt_path last, or --weights {run.best} under another --name",
        )
    own = newest_state(run.checkpoints) if run.checkpoints.is_dir() else None
    state = own or (Path(ckpt_path) if ckpt_path not in (None, "last") else None)
    if state is None:
        return None, []
    before = read_identity(state)
    changes = [
        f"{section}.{key}: {old!r} became {new!r}" if section != "recipe" else f"{key}: {old!r} became {new!r}"
        for section in ("recipe", "data", "packages")
        for key, (old, new) in recipes.differences(before[section], now[section]).items()
    ]
    fixed = [line for line in changes if line.startswith(("model.", "optimizer.", "lr_scheduler."))]
    if changes and (fixed or not allow_changes):
        shown = fixed or changes
        more = f" (and {len(shown) - _SHOWN} more)" if len(shown) > _SHOWN else ""
        hint = (
            f"--weights {state} starts a new run from its weights" if fixed else "or --resume-anyway, which is recorded"
        )
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


def read_identity(state: Path) -> dict[str, Any]:
    """The identity that is stored in a full state.

    Raises:
        CheckpointError: It is no full state of floodrepro.
    """
    try:
        content = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
        found: dict[str, Any] = content[STATE_KEY]["identity"]
    except FileNotFoundError as error:
        raise CheckpointError("the checkpoint to resume from does not exist", where=state) from error
    except Exception as error:  # torch.load raises what zipfile, pickle and the system raise
        raise CheckpointError(
            "this is no full state that a run can resume from",
            where=state,
            fix="give checkpoints/last.ckpt of a run, or start from the weights alone: --weights FILE",
        ) from error
    return found


def read_step(state: Path) -> int:
    """The number of optimizer steps that a full state has behind it."""
    return int(torch.load(state, map_location="cpu", weights_only=True, mmap=True)["global_step"])
