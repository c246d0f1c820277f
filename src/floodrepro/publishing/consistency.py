"""Does a run's record agree with itself? A card is made of one run's figures or not at all."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from floodrepro.errors import RunFolderError
from floodrepro.recipe import Recipe, fingerprint
from floodrepro.run_folder import RECORD_SCHEMA

WARM_UP = 10  # steps of each part that the recorder leaves out of the step times
START_UP_S = 600.0  # building the model, looking through the data, the first batches
SLOWER = 2.0  # the mean epoch may take so many times the median one
TOLERANCE = 1e-6  # between two figures that were computed from the same counts, or printed from the same float

_NO_CARD = "make the record anew (fit, test, verify); --no-card exports the pair without a card"


def refuse_contradictions(
    where: Path,
    record: Mapping[str, Any],
    recipe: Recipe,
    metrics: Sequence[Mapping[str, str]],
    results: Mapping[str, Any] | None,
    checkpoint_sha256: str,
    counted: Mapping[str, float] | None = None,
) -> None:
    """Raise if a card of this run would mix figures of different runs.

    Args:
        where: The run folder, for the message.
        record: Its run.json.
        recipe: Its recipe.
        metrics: Rows of its metrics.csv; empty for a recipe without the CSV logger.
        results: Its verification/results.json, as `verification.results.load` gives it; None where it was not verified.
        checkpoint_sha256: Of its best.ckpt.
        counted: The scores of its chip table, which the results have to have; None where there is no table.

    Raises:
        RunFolderError: The run is not finished, or its record contradicts itself.
    """
    if record.get("status") != "finished":
        reason = f" ({record['reason']})" if record.get("reason") else ""
        what = f"the run is not finished, its status is {record.get('status', 'missing')!r}{reason}"
        raise RunFolderError(what, where=where, fix="finish the fit; --no-card exports the pair without a card")
    problems = of_record(record, recipe, metrics, checkpoint_sha256)
    if results is not None:
        problems += of_results(results, record, checkpoint_sha256, counted)
    if problems:
        raise RunFolderError(f"the record contradicts itself: {'; '.join(problems)}", where=where, fix=_NO_CARD)


def of_record(
    record: Mapping[str, Any], recipe: Recipe, metrics: Sequence[Mapping[str, str]], checkpoint_sha256: str
) -> list[str]:
    """Where run.json, the recipe and metrics.csv of a finished run disagree; each with both figures."""
    if record.get("schema") != RECORD_SCHEMA:
        return [f"run.json has schema {record.get('schema')}, this version of floodrepro reads {RECORD_SCHEMA}"]
    problems = []
    if (digest := fingerprint(recipe)) != record["recipe_sha256"]:
        problems.append(f"the recipe has sha256 {_short(digest)}, run.json names {_short(record['recipe_sha256'])}")
    if (weights := record.get("checkpoint_sha256")) != checkpoint_sha256:
        problems.append(f"best.ckpt has sha256 {_short(checkpoint_sha256)}, run.json names {_short(weights)}")
    epochs, best = int(record["epochs"]), record["best_epoch"]
    span = f"run.json has {epochs} epochs (the last is {epochs - 1})"
    if best is not None and not 0 <= best < epochs:
        problems.append(f"the best epoch is {best}, {span}")
    if record["progress"]["epochs"] != epochs:
        problems.append(f"{record['progress']['epochs']} epochs were recorded, {span}")
    known = [int(row["epoch"]) for row in metrics if row.get("epoch")]
    if known and max(known) != epochs - 1:
        problems.append(f"metrics.csv ends with epoch {max(known)}, {span}")
    if known and best is not None:
        losses = [row["val/loss"] for row in metrics if row.get("epoch") == str(best) and row.get("val/loss")]
        if not losses:
            problems.append(f"metrics.csv has no validation of epoch {best}, which run.json calls the best")
        elif not any(_close(float(loss), record["best_val_loss"]) for loss in losses):
            shown = f"{float(losses[-1]):.6f} in metrics.csv and {record['best_val_loss']:.6f} in run.json"
            problems.append(f"val/loss of the best epoch {best} is {shown}")
    return problems + _of_times(record, recipe)


def _of_times(record: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Hours against steps and epochs.

    Three rules, none of which a record of one run can break by chance:

    - No more steps than epochs x batches of one chip list, one unfinished epoch more.
    - Not shorter than half of the timed steps at their median: at least half of them took that long. A run that went
      on from another run's state is left out, its steps began before it did.
    - Not longer than ten minutes to start, and `SLOWER` x epochs x chips (training and validation) at the median
      rate, and the time for states. A run of several parts is left out: nobody knows how long it lay between them.
    """
    problems = []
    epochs, chips, steps = int(record["epochs"]), record["chips"], int(record["progress"]["step"])
    batch = (recipe["data"].get("init_args") or {}).get("batch_size")
    if batch and "train" in chips and steps > (most := (epochs + 1) * math.ceil(chips["train"] / batch)):
        problems.append(f"{steps} steps, and {epochs} epochs of {chips['train']} chips have {most} at most")
    seconds = (datetime.fromisoformat(record["ended"]) - datetime.fromisoformat(record["started"])).total_seconds()
    taken, resumes = f"{hours(seconds)} passed from start to end", record.get("resumes") or []
    if (step := record.get("step_seconds")) and not begun_elsewhere(record):
        timed = max(0, steps - WARM_UP * (1 + len(resumes)))
        if seconds + 1 < 0.5 * timed * step["median"]:
            least = hours(0.5 * timed * step["median"])
            problems.append(f"{taken}, and {steps} steps of {step['median']} s (median) take {least} at the very least")
    if (rate := record.get("chips_per_second")) and not resumes:
        passes = epochs * (chips.get("train", 0) + chips.get("val", 0)) / rate["median"]
        limit = START_UP_S + SLOWER * passes + float(record.get("seconds_writing_states") or 0)
        if seconds > limit:
            problems.append(f"{taken}, and {epochs} epochs at {rate['median']} chips/s take {hours(limit)} at most")
    return problems


def of_results(
    results: Mapping[str, Any],
    record: Mapping[str, Any],
    checkpoint_sha256: str,
    counted: Mapping[str, float] | None,
) -> list[str]:
    """Where results.json is another run's, or its scores disagree. Its reader has seen to schema and summary."""
    run, problems = results["run"], []
    digest = (run.get("checkpoint") or {}).get("sha256")
    if digest != checkpoint_sha256:
        problems.append(f"results.json is of the checkpoint {_short(digest)}, the run's is {_short(checkpoint_sha256)}")
    for key, name in (("recipe_sha256", "recipe"), ("data_digest", "data")):
        if run.get(key) != record.get(key):
            problems.append(f"results.json is of the {name} {_short(run.get(key))}, the run's is {_short(record[key])}")
    for key in ("epochs", "best_epoch"):
        if key in run and run[key] != record[key]:
            problems.append(f"{key} is {run[key]} in results.json and {record[key]} in run.json")
    if run.get("split") in ("train", "val"):
        problems.append(f"the scores are of the split {run['split']}, and a card speaks of a test")
    rows = results["scores"]["rows"]
    if rows and counted is None:
        problems.append("results.json has scores, and the chip table that they were counted in is not there")
    elif counted is not None:
        ours = {row["metric"]: row["ours"] for row in rows if row.get("ours") is not None}
        problems += [
            f"{name} is {score:.6g} in results.json, and {counted.get(name, math.nan):.6g} in the chip table"
            for name, score in ours.items()
            if not _close(score, counted.get(name, math.nan))
        ]
    return problems + _of_scores(results)


def _of_scores(results: Mapping[str, Any]) -> list[str]:
    """The mean IoU is the mean of the IoU, F1_Score that of 2 IoU / (1 + IoU); of the run and of the reference.

    A class that neither truth nor prediction has stands as IoU 0 without a recall, and is in no mean; one that was only
    predicted looks the same and is in it.
    """
    problems = []
    for column in ("ours", "reference"):
        score = {row["metric"]: row[column] for row in results["scores"]["rows"] if row.get(column) is not None}
        ious = {name: value for name, value in score.items() if re.fullmatch(r"IoU_\d+", name)}
        sure = [v for name, v in ious.items() if v or name.replace("IoU", "Class_Accuracy") in score]
        for name, of_one in (("mIoU", lambda iou: iou), ("F1_Score", lambda iou: 2 * iou / (1 + iou))):
            means = [statistics.fmean(map(of_one, values)) for values in (list(ious.values()), sure) if values]
            if name in score and means and not any(_close(score[name], mean) for mean in means):
                figures = ", ".join(f"{value:.6g}" for value in ious.values())
                problems.append(f"{name} ({column}) is {score[name]:.6g}, the IoU {figures} give {means[0]:.6g}")
    return problems


def begun_elsewhere(record: Mapping[str, Any]) -> bool:
    """Whether the run's first part went on from another run's state: it is noted before the run's own start."""
    resumes = record.get("resumes") or []
    return bool(resumes) and resumes[0]["when"] <= record["started"]


def hours(seconds: float) -> str:
    """A duration as a reader takes it in: hours, or minutes below one, or seconds below two minutes."""
    for unit, least, name in ((3600, 3600, "h"), (60, 120, "min")):
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(1.0, abs(other))


def _short(digest: str | None) -> str:
    return f"{digest[:12]}…" if digest else "none"
