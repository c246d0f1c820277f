"""Whether a run may go on, and from where."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import PARTIAL, RunFolder, free_name, timestamp
from floodrepro.training.checkpoint_files import LAST, PREVIOUS, has_digest, is_whole, newest_whole
from floodrepro.training.full_state import KEY

_SHOWN = 3


def identity(
    recipe: Recipe,
    recipe_sha256: str,
    data_digest: str | None,
    code: Mapping[str, Any],
    numerics: Mapping[str, bool],
) -> dict[str, Any]:
    """What two parts of one run have in common; stored in every full state.

    The code is known by the digest of its source: another commit may have changed the documentation only.

    Args:
        recipe: The resolved recipe.
        recipe_sha256: Its fingerprint.
        data_digest: Of the data, as the quick audit gives it.
        code: Versions of the code that decides what is computed.
        numerics: Options that may change roundings.
    """
    known = {key: value for key, value in code.items() if key not in ("commit", "dirty")}
    return {
        "recipe": recipe,
        "recipe_sha256": recipe_sha256,
        "data_digest": data_digest,
        "code": known,
        "numerics": dict(numerics),
    }


def begin(run: RunFolder, now: Mapping[str, Any], resume: str, *, anyway: bool) -> Path | None:
    """Decide what a fit starts from, and leave recipe and record in the run folder as they have to be for it.

    Args:
        run: The run folder, empty for a new run.
        now: Identity of what is asked for.
        resume: auto, never, or a path to a full state.
        anyway: Go on although the identity changed.

    Returns:
        The full state to go on from; None to start from the beginning.

    Raises:
        UsageError: The run is finished, is another one, or must not be gone on with.
        CheckpointError: No state of it is whole.
    """
    old = run.recipe.exists() and run.record.exists()
    run.refuse_to_begin(resume)
    _remove_partial(run.path)
    own = newest_whole(run.checkpoints) if resume in ("auto", "never") or _started_from(run, resume) else None
    state = own if own or resume in ("auto", "never") else _given(Path(resume))
    if own and resume != "auto":
        console.say(f"this run was started from {resume} and goes on from its own {own.name}")
    if state is not None:
        before: Mapping[str, Any] = read_identity(state)
    elif old and "environment" in run.read_record():  # killed before its first state; else it was never built
        before = {
            "recipe": recipes.read(run.recipe),
            **{k: run.read_record()[k] for k in ("data_digest", "code", "numerics")},
        }
    else:
        before = now
    changes = list_changes(before, now)
    there = run.recipe.exists()
    stale = there and recipes.fingerprint(recipes.read(run.recipe)) != now["recipe_sha256"]
    if old and stale and "environment" in run.read_record():  # else it was never built, and may be mended
        kept = list_changes({**now, "recipe": recipes.read(run.recipe)}, now)
        changes += [line for line in kept if line not in changes]
    if state is not None and before["numerics"]["fused"] != now["numerics"]["fused"]:
        raise UsageError(
            "a state of AdamW in one kernel goes on in one kernel only, and another state never does",
            where=state,
            fix="fit with --fused" if before["numerics"]["fused"] else "fit without --fused",
        )
    if not anyway:
        refuse_changes(changes, state or run.recipe)
    if there and (changes or stale):
        run.recipe.replace(run.recipe.with_name(free_name(run.recipe)))  # nothing is lost
    if changes or stale or not old:
        run.save_recipe(now["recipe"])
    if state is not None:
        _bring_along(state, run)
    if not old:
        run.update_record(started=timestamp(), started_from=str(state.resolve()) if state else None)
    if old or state:
        entry = {"when": timestamp(), "from": str(state) if state else "the start", "changes": changes}
        run.update_record(resumes=[*run.read_record().get("resumes", []), entry])
    run.update_record(recipe_sha256=now["recipe_sha256"], command=["floodrepro", *sys.argv[1:]])
    return state


def _remove_partial(folder: Path) -> None:
    """Remove what a killed process has left half written."""
    for orphan in folder.glob(f".*{PARTIAL}"):
        orphan.unlink()


def _started_from(run: RunFolder, state: str) -> bool:
    """Whether this run was new when a state was named for it: what it has saved since descends from that state."""
    return run.record.exists() and run.read_record().get("started_from") == str(Path(state).resolve())


def _given(state: Path) -> Path:
    """A state that was named on the command line; it may have been copied without its hash."""
    if has_digest(state) and not is_whole(state):
        raise CheckpointError(f"{state.name} is damaged (its sha256 is another)", where=state)
    return state


def _bring_along(state: Path, run: RunFolder) -> None:
    """Copy what belongs to a state of another run: where its weights began, and the best that it knows of.

    Later best weights of that run are none of the state's own.
    """
    start, best = (state.with_name(path.name) for path in (run.starting_point, run.best))
    if state.parent.resolve() == run.checkpoints.resolve():
        return
    if start.is_file():
        _copy(start, run.starting_point)
    if best.is_file():
        content = _read(state)
        step = torch.load(best, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        if step < content["global_step"] or content[KEY]["moment"] == "end":
            _copy(best, run.best)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}{PARTIAL}")
    shutil.copyfile(source, partial)
    partial.replace(target)


def follow(run: RunFolder, resume: str) -> Path | None:
    """What `begin` decides, for the other processes of a run: they read, and leave all writing to the first."""
    given = None if resume in ("auto", "never") else Path(resume)
    if resume == "never" or (given and not _started_from(run, resume)):
        return given
    return next((state for name in (LAST, PREVIOUS) if is_whole(state := run.checkpoints / name)), given)


def read_identity(state: Path) -> dict[str, Any]:
    """The identity in a full state's file.

    Raises:
        CheckpointError: It is no full state.
    """
    found: dict[str, Any] = _read(state)[KEY]["identity"]
    return found


def read_step(state: Path) -> int:
    """The number of optimizer steps that a full state has behind it; raises as `read_identity`."""
    return int(_read(state)["global_step"])


def _read(state: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
        content[KEY]
    except FileNotFoundError as error:
        raise CheckpointError("the state to resume from is not there", where=state) from error
    except Exception as error:  # torch.load raises what zipfile, pickle and the system raise
        raise CheckpointError(
            "this is no full state that a run can resume from", where=state, fix="give checkpoints/last.ckpt of a run"
        ) from error
    return content


def list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one line each: recipe keys, data digest, versions."""
    changes = []
    for section in ("recipe", "data_digest", "code", "numerics"):
        for key, (old, new) in recipes.differences(before[section], now[section], section).items():
            changes.append(f"{key.removeprefix('recipe.')}: {old!r} became {new!r}")
    return changes


def refuse_changes(changes: list[str], state: Path) -> None:
    """Raise `UsageError` with the differences, if there are any."""
    if changes:
        more = f" (and {len(changes) - _SHOWN} more)" if len(changes) > _SHOWN else ""
        raise UsageError(
            f"the run cannot go on as the same run: {'; '.join(changes[:_SHOWN])}{more}",
            where=state,
            fix="undo the change, start a new run with --name, or --resume-anyway, which is recorded",
        )
