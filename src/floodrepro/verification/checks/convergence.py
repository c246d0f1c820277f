"""Did training converge, by its own log: the losses, the schedule, and what the record says came out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from floodrepro.recipe import Recipe
from floodrepro.verification.check import Check, Evidence, Plot, Value
from floodrepro.verification.judging import judge

ID = "convergence"
_TITLE = "Convergence"
_CLAIM = (
    "The validation loss fell after the first epoch, nothing in metrics.csv is not finite, the learning rate followed "
    "the recipe's schedule, and the record names the best epoch of metrics.csv."
)
_EVIDENCE = ("metrics.csv", "run.json", "recipe.yaml")
_SHOWN = 3

Rows = Sequence[Mapping[str, str]]


class Validation(NamedTuple):
    """One validation: its epoch from 0, its val/loss, and the learning rate that the epoch was trained with."""

    epoch: int
    loss: float
    rate: float | None


def check(evidence: Evidence) -> Check:
    """Read the trajectory; incidents and a rollback are told first, whatever comes out."""
    notes = _disturbances(evidence.record)
    if not evidence.metrics:
        reason = evidence.missing.get("metrics", "there is no metrics.csv")
        return Check(ID, _TITLE, _CLAIM, "skip", reason, notes=notes)
    finite = _finite_rows(evidence.metrics)
    validations = read_validations(evidence.metrics)
    measured = [validation for validation in validations if math.isfinite(validation.loss)]
    if len(validations) < 2 or not measured:
        status, reason = judge([finite], f"validations with a loss: {len(measured)}; a trajectory needs two")
        return Check(ID, _TITLE, _CLAIM, status, reason, [finite], notes=notes, evidence=_EVIDENCE)
    best = min(measured, key=lambda validation: validation.loss)  # the first of equals, as ModelCheckpoint keeps it
    values = [*_fall(evidence, validations, best), finite]
    values += _record(evidence.record, best, notes)
    values += _schedule(evidence.recipe, validations, notes)
    if best == validations[-1]:
        notes.append(f"The best epoch, {best.epoch}, is the last: training may not have converged.")
    values += (curve := _Curve.find(evidence, notes)).distance(best.loss, evidence.thresholds[ID]["curve_distance"])
    series = [_series(evidence.run.path.name, [(v.epoch, v.loss) for v in measured])]
    if curve.points:
        series.append(_series(curve.name, curve.points))
    caption = f"val/loss by epoch: {measured[0].loss:.4f} at first, {best.loss:.4f} at best, in epoch {best.epoch}."
    plot = Plot("convergence", "lines", "Validation loss", "epoch", "val/loss", series, caption)
    status, reason = judge(values)
    return Check(ID, _TITLE, _CLAIM, status, reason, values, plots=[plot], notes=notes, evidence=_EVIDENCE)


def read_validations(rows: Rows) -> list[Validation]:
    """The validations in metrics.csv, in order.

    Lightning 2.6.1 logs the learning rate when an epoch starts, in a row of its own without an epoch: the last one
    before a validation is the rate of its epoch.
    """
    found, rate = [], None
    for row in rows:
        rates = [value for name, value in row.items() if name and name.startswith("lr-") and value]
        rate = _number(rates[0]) if rates else rate
        if row.get("val/loss"):
            found.append(Validation(int(float(row["epoch"])), _number(row["val/loss"]), rate))
    return found


def plateau_rates(losses: Sequence[float], start: float, factor: float, patience: int, threshold: float) -> list[float]:
    """The learning rate in each epoch under torch's ReduceLROnPlateau with mode min and a relative threshold.

    Source: `torch.optim.lr_scheduler.ReduceLROnPlateau.step`, torch 2.14: a loss is better if it is below best x
    (1 - threshold), NaN is not, and after more than *patience* worse ones in a row the rate is multiplied, unless that
    changes it by 1e-8 or less.
    """
    rate, best, bad, rates = start, math.inf, 0, []
    for loss in losses:
        rates.append(rate)
        best, bad = (loss, 0) if loss < best * (1 - threshold) else (best, bad + 1)
        if bad > patience:
            rate, bad = (rate * factor if rate - rate * factor > 1e-8 else rate), 0
    return rates


def _disturbances(record: Mapping[str, Any]) -> list[str]:
    notes = []
    for incident in record.get("incidents") or []:
        place = f"step {incident.get('step')}, epoch {incident.get('epoch')} from 0"
        notes.append(f"The guard found an incident at {place}: {incident.get('kind')}, {incident.get('detail')}.")
    if rollback := record.get("rollback"):
        before, after = rollback.get("precision") or ("?", "?")
        notes.append(
            f"The run was rolled back at step {rollback.get('step')} to {rollback.get('state')} and went on in "
            f"{after} in place of {before}: its trajectory has two precisions."
        )
    return notes


def _finite_rows(rows: Rows) -> Value:
    bad = [
        f"{name} at step {row.get('step')}"
        for row in rows
        for name, value in row.items()
        if name and value and not math.isfinite(_number(value))
    ]
    where = f": {', '.join(bad[:_SHOWN])}{' …' if len(bad) > _SHOWN else ''}" if bad else ""
    return Value(f"values that are not finite{where}", len(bad), threshold="none", ok=not bad)


def _fall(evidence: Evidence, validations: Sequence[Validation], best: Validation) -> list[Value]:
    first, least = validations[0], evidence.thresholds[ID]["min_fall"]
    fall = first.loss - best.loss
    values = [
        Value("validations", len(validations)),
        Value("val/loss, first epoch", first.loss),
        Value("val/loss, best epoch", best.loss),
        Value("fall of val/loss to the best epoch", fall, threshold=f"at least {least}", ok=fall >= least),
        Value("best epoch, from 0", best.epoch, threshold="not the first", ok=best != first),
    ]
    for name, validation in (("first", first), ("best", best), ("last", validations[-1])):
        if (loss := _train_loss(evidence.metrics, validation.epoch)) is not None:
            values.append(Value(f"train/loss, {name} epoch", loss, method="mean over the epoch's logged values"))
    return values


def _train_loss(rows: Rows, epoch: int) -> float | None:
    """The epoch's mean as the guard logs it; without it the mean of the steps that were logged."""
    for column in ("train/loss_epoch", "train/loss"):
        logged = [_number(row[column]) for row in rows if row.get(column) and row.get("epoch") == str(epoch)]
        if logged:
            return sum(logged) / len(logged)
    return None


def _record(record: Mapping[str, Any], best: Validation, notes: list[str]) -> list[Value]:
    """Whether run.json names the epoch that metrics.csv shows as the best."""
    if record.get("best_epoch") is None or record.get("best_val_loss") is None:
        notes.append(f"run.json names no best epoch; the run's status is {record.get('status', 'not recorded')}.")
        return []
    epoch, loss = record["best_epoch"], float(record["best_val_loss"])
    asked = f"{best.epoch}, as in metrics.csv"
    same = math.isclose(loss, best.loss, rel_tol=1e-6)  # float32 on either side
    return [
        Value("best epoch in run.json", epoch, threshold=asked, ok=epoch == best.epoch),
        Value("best val/loss in run.json", loss, threshold=f"{best.loss:.6g}, as in metrics.csv", ok=same),
    ]


def _schedule(recipe: Recipe, validations: Sequence[Validation], notes: list[str]) -> list[Value]:
    """Whether the rate fell where the rule says, and nowhere else."""
    scheduler = recipe.get("lr_scheduler") or {}
    rule = {"patience": 10, "factor": 0.1, "threshold": 1e-4} | (scheduler.get("init_args") or {})  # torch's defaults
    known = {"monitor": "val/loss", "mode": "min", "threshold_mode": "rel", "cooldown": 0, "min_lr": 0, "eps": 1e-8}
    logged = [validation.rate for validation in validations if validation.rate is not None]
    if not str(scheduler.get("class_path")).endswith("ReduceLROnPlateau"):
        notes.append("The recipe has no plateau schedule, so that none was followed up.")
    elif any(rule.get(key) not in (None, value) for key, value in known.items()):
        notes.append("The recipe's plateau schedule has further options, and was not recomputed.")
    elif len(logged) != len(validations):
        notes.append("The learning rate was not logged: whether the schedule fired is not known.")
    elif [validation.epoch for validation in validations] != list(range(len(validations))):
        notes.append("Not every epoch has one validation, so that the plateau schedule was not recomputed.")
    else:
        arguments = float(rule["factor"]), int(rule["patience"]), float(rule["threshold"])
        due = plateau_rates([validation.loss for validation in validations], logged[0], *arguments)
        wrong = [n for n, (ours, rate) in enumerate(zip(logged, due, strict=True)) if not math.isclose(ours, rate)]
        falls = _falls(logged)
        if not _falls(due):
            notes.append("The loss never stagnated beyond the schedule's patience: no fall of the rate was due.")
        return [
            Value("learning rate fell before epoch", ", ".join(map(str, falls)) or "never"),
            Value(
                "epochs with another learning rate than the schedule's",
                f"{len(wrong)}, the first is {wrong[0]}" if wrong else 0,
                threshold=f"none under ReduceLROnPlateau (factor {arguments[0]:g}, patience {arguments[1]})",
                ok=not wrong,
            ),
        ]
    return []


class _Curve(NamedTuple):
    """A val/loss curve to hold the run's own against: (epoch, loss), and whether the data are known to be the same."""

    name: str
    points: list[tuple[int, float]]
    comparable: bool

    @classmethod
    def find(cls, evidence: Evidence, notes: list[str]) -> "_Curve":
        """The reference run's curve; else the published one of run A for the recipe that it belongs to."""
        losses = [(v.epoch, v.loss) for v in read_validations(evidence.reference_metrics) if math.isfinite(v.loss)]
        if losses:
            keys = ("data_digest", "chips")
            ours, theirs = ([side.get(key) for key in keys] for side in (evidence.record, evidence.reference_record))
            same = ours == theirs and None not in ours
            if not same:
                notes.append("The reference's curve is from other or unknown data: its distance is not judged.")
            return cls(evidence.reference_name or "reference", losses, same)
        published = evidence.published.get("published_amd_run_a", {})
        if not published or not _is_published_recipe(evidence.recipe):
            notes.append("There is no reference curve for this recipe: its distance is not available.")
            return cls("", [], False)
        counts = evidence.published.get("dataset", {}).get("chips", {}).get("v0", {})
        chips = evidence.record.get("chips") or {}
        whole = all(chips.get(split) == counts.get(split) for split in ("train", "val"))
        if not whole:
            notes.append("The published curve is from the whole data, this run's is not: its distance is not judged.")
        points = [(epoch, loss) for epoch, loss in enumerate(published["val_loss"]) if loss is not None]
        return cls(published["name"], points, whole)

    def distance(self, best: float, most: float) -> list[Value]:
        """How far the best val/loss lies above this curve's; below it is no failure."""
        if not self.points:
            return []
        above = best - min(loss for _, loss in self.points)
        name = f"best val/loss minus that of {self.name}"
        if not self.comparable:
            return [Value(name, above)]
        return [Value(name, above, threshold=f"at most {most}", ok=above <= most)]


def _is_published_recipe(recipe: Recipe) -> bool:
    """TerraMind base on protocol v0, with dice: what run A's losses are of."""
    data = (recipe.get("data") or {}).get("init_args") or {}
    task = (recipe.get("model") or {}).get("init_args") or {}
    backbone = (task.get("model_args") or {}).get("backbone")
    return (backbone, task.get("loss"), data.get("label_map")) == ("terramind_v1_base", "dice", [0, 1])


def _series(label: str, points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    return {"label": label, "x": [epoch for epoch, _ in points], "y": [loss for _, loss in points]}


def _falls(rates: Sequence[float]) -> list[int]:
    """Epochs that start with a lower rate than the one before."""
    return [epoch for epoch in range(1, len(rates)) if rates[epoch] < rates[epoch - 1]]


def _number(text: str) -> float:
    """NaN for what is no number: it is not finite either way."""
    try:
        return float(text)
    except ValueError:
        return math.nan
