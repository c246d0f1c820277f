"""The run: its training log, its speed, its data, and where code, recipe and weights come from."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.data.protocols import MODALITIES, PROTOCOLS, data_arguments, protocol_of
from floodrepro.verification.check import Check, Evidence, Plot, Table, Value, check, judge

_FINDINGS = 20  # of the audit that are shown
_SEVERITIES = ("error", "warning", "info")
# Keys in which the recipe of a test may differ from that of its run: where the data lies, and how it is run.
_HARMLESS = re.compile(
    r"trainer\..*|data\.init_args\.((\w+_)?data_root|\w+_split(\.\w+)?|num_workers|prefetch_factor|batch_size)"
)


@check
def convergence(evidence: Evidence) -> Check:
    """The training's own log: losses, values that are not finite, and the best epoch that run.json names."""
    asked, record, rows = evidence.criteria["convergence"], evidence.record, evidence.metrics
    if not rows:
        raise evidence.without("metrics", "there is no metrics.csv")
    logged = [(key, row.get("step"), text) for row in rows for key, text in row.items() if key and text]
    bad = [f"{key} at step {step}" for key, step, text in logged if not math.isfinite(float(text))]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    values = [Value("logged values that are not finite", ", ".join(bad[:3]) + more or "none", expected="none")]
    losses = _validation_losses(rows)
    if len(losses) < 2:
        return judge(values, "", f"{len(losses)} validations: a trajectory needs two")
    best = min(losses, key=lambda epoch: losses[epoch])  # the first of equals, as ModelCheckpoint keeps it
    first, last = next(iter(losses)), next(reversed(losses))
    named = None if record.get("best_epoch") is None else record["best_epoch"] + 1  # run.json counts from 0
    by_loss = record.get("monitor", "val/loss") == "val/loss"  # a recipe may choose its best epoch by another score
    values += [
        Value("val/loss, first epoch", losses[first]),
        Value("val/loss, best epoch", losses[best]),
        Value("fall of val/loss to the best epoch", losses[first] - losses[best], at_least=asked["min_fall"]),
        Value("best epoch in run.json", named, expected=best if by_loss else None),
    ]
    if rates := [float(text) for key, _, text in logged if key.startswith("lr-")]:
        values.append(Value("learning rate, first and last", f"{rates[0]:g}, {rates[-1]:g}"))
    notes, curves = [], [{"label": evidence.run.path.name, "x": list(losses), "y": list(losses.values())}]
    if best == last:
        notes.append(f"The best epoch, {best}, is the last one: more epochs might have helped.")
    if other := _other_curve(evidence):
        name, theirs, comparable = other
        curves.append({"label": name, "x": list(theirs), "y": list(theirs.values())})
        limit = asked["curve_distance"] if comparable else None
        values.append(Value(f"best val/loss less that of {name}", losses[best] - min(theirs.values()), at_most=limit))
        if not comparable:
            notes.append(f"The curve of {name} is from other or unknown data: the distance has no criterion.")
    caption = f"val/loss by epoch: {losses[first]:.4f} at first, {losses[best]:.4f} at best, in epoch {best}."
    plot = Plot("loss", "lines", "Validation loss", "epoch", "val/loss", curves, caption)
    found = f"val/loss {losses[first]:.3f} to {losses[best]:.3f}, best epoch {best}"
    return judge(values, found, plots=[plot], notes=notes)


@check
def throughput(evidence: Evidence) -> Check:
    """Chips per second in training and test; the report's facts have device, memory and hours."""
    asked, record = evidence.criteria["throughput"]["min_steps"], evidence.record
    rate = record.get("chips_per_second")
    if not rate:
        raise evidence.without("record", "no epoch of training was timed")
    steps = sum(epoch["steps"] for epoch in record.get("epoch_times") or [])
    values = [
        Value("training, median epoch", rate["median"], "chips/s", rate["p10"], rate["p90"]),
        Value("timed steps", steps),
        Value("share of training spent waiting for data", record.get("share_waiting_for_data")),
    ]
    speed = (evidence.table.metadata.get("speed") if evidence.table else None) or {}
    if tested := speed.get("chips_per_second"):
        values.append(Value("test", tested["median"], "chips/s", tested["p10"], tested["p90"]))
    few = f"{steps} steps were timed, {asked} are needed" if steps < asked else ""
    return judge(values, f"{values[0].text} in training, {device_of(record)}", few)


@check
def data(evidence: Evidence) -> Check:
    """Digests of training, test, audit and reference, the audit's findings, and the number of chips.

    A digest is over the ids and file sizes of a split. Only splits that both sides have are compared.
    """
    record, table, audit = evidence.record, evidence.table, evidence.audit
    tested = table.metadata if table else {}
    all_parts = set(data_arguments(evidence.recipe).get("modalities") or MODALITIES) == set(MODALITIES)
    sides = {
        "training": digests_of(record),
        "test": digests_of(tested),
        "audit": digests_of(audit if all_parts else {}),  # an audit's digests are over all modalities
        "reference": digests_of(evidence.reference.metadata if evidence.reference else {}),
    }
    values = []
    for one, other in (("training", "test"), ("training", "audit"), ("test", "audit"), ("test", "reference")):
        for split in sorted(sides[one].keys() & sides[other].keys()):
            values.append(_same(f"{split} chips of {one} and {other}", sides[one][split], sides[other][split]))
    ours, theirs = record.get("data") or {}, tested.get("data") or {}
    for key in ("protocol", "commit"):
        if ours.get(key) and theirs.get(key):
            values.append(_same(f"{key} of training and test", theirs[key], ours[key]))
    found = f"the same: {', '.join(value.name for value in values)}"
    skip = "" if values else "there are no two records of the data to compare"
    notes, tables = [], []
    if "audit" in evidence.absent:
        values.append(Value("the audit's manifest", evidence.absent["audit"][1], expected="readable"))
    elif not audit:
        found += "; not audited"
        notes.append("There is no audit of the data (floodrepro data audit): ids and sizes were compared, no pixel.")
    else:
        findings = sorted(audit["findings"], key=lambda one: _SEVERITIES.index(one["severity"]))
        errors = Counter(one["severity"] for one in findings)["error"]
        depth = "all chips read" if audit.get("deep") else "no pixel read"
        found += f"; no error in the audit ({depth})"
        values.append(Value(f"errors of the audit ({depth})", errors, at_most=0))
        columns = ["severity", "check", "message"]
        rows = [[one[key] for key in columns] for one in findings[:_FINDINGS]]
        tables.append(Table(f"The audit's first findings of {len(findings)}", columns, rows))
    if table is not None:
        split = str(tested.get("split", "test"))
        whole = (ours.get("chips") or {}).get(split)
        values.append(Value(f"chips in the table of {split}", len(table), expected=whole))
    if not (sides["training"] and sides["test"]):
        skip = "the digests of training or test are not recorded"
    return judge(values, found, skip, tables=tables, notes=notes)


@check
def provenance(evidence: Evidence) -> Check:
    """Code, recipe, weights and table by their hashes, and every run that was declared."""
    record, table = evidence.record, evidence.table
    if not record:
        raise evidence.without("record", "there is no run.json")
    code, recorded = record.get("code") or {}, record.get("recipe_sha256")
    values = [
        Value("status of the run", record.get("status"), expected="finished"),
        _same("recipe.yaml and run.json", recipes.fingerprint(evidence.recipe), recorded),
    ]
    notes = [f"Resumed on {one.get('when')} from {one.get('from')}." for one in record.get("resumes") or []]
    if commit := code.get("commit"):
        tree = "clean" if code.get("dirty") is False else "with changes"
        values.append(Value("working tree", tree, expected="clean"))
    else:
        hashed = "hashed" if code.get("source_sha256") else "unknown"
        values.append(Value("source of the code", hashed, expected="hashed"))
        notes.append("No commit is recorded: the version and the hash of the source stand for it.")
    if table is not None:
        changes = table.metadata.get("recipe_changes")
        tested, name = table.metadata.get("recipe_sha256"), "recipe of table and run"
        if tested != recorded and changes:
            other = ", ".join(key for key in changes if not _HARMLESS.fullmatch(key))
            values.append(Value(name, f"other {other}" if other else "the same", expected="the same"))
        else:
            values.append(_same(name, tested, recorded))
        ours, theirs = (one.metadata.get("inputs") if one else None for one in (table, evidence.reference))
        if ours and theirs:
            other = ", ".join(recipes.differences(ours, theirs)) or "the same"
            values.append(Value("what run and reference see of a chip", other, expected="the same"))
    if seeds := evidence.seeds:
        reported = [run for run in seeds if run.status == "failed" or (run.status == "finished" and run.table)]
        values.append(Value("declared runs that are reported", len(reported), expected=len(seeds)))
        declared = "yes" if record.get("seed") in {run.seed for run in seeds} else "no"
        values.append(Value("the seed was declared", declared, expected="yes"))
    skip = "" if table is not None else evidence.absent.get("table", ("", "the run has no chip table"))[1]
    source = str(commit)[:12] if commit else f"source {str(code.get('source_sha256'))[:12]}"
    return judge(values, f"finished, code {source}, hashes agree", skip, notes=notes)


def device_of(record: Mapping[str, Any]) -> str:
    """What trained: the GPU's or the CPU's name, and how many of them.

    That there is a GPU does not say that it trained; its memory in the record does.
    """
    gpu = "allocated" in ((record.get("memory_gib") or {}).get("after_warm_up") or {})
    part = (record.get("environment") or {}).get("accelerator" if gpu else "cpu") or {}
    name, count = str(part.get("name") or part.get("model") or "unknown device"), record.get("processes") or 1
    return f"{count} x {name}" if count > 1 else name


def digests_of(holder: Mapping[str, Any]) -> dict[str, str]:
    """Digest of the data by split: of a run.json, of a chip table's metadata, or of an audit's manifest."""
    return (holder.get("data") or {}).get("digests") or holder.get("digests") or {}


def _validation_losses(rows: Sequence[Mapping[str, str]]) -> dict[int, float]:
    """val/loss by epoch, counted from 1, where it is finite."""
    found = {int(float(row["epoch"])) + 1: float(row["val/loss"]) for row in rows if row.get("val/loss")}
    return {epoch: loss for epoch, loss in found.items() if math.isfinite(loss)}


def _other_curve(evidence: Evidence) -> tuple[str, dict[int, float], bool] | None:
    """Name and val/loss of the reference run, or of the published run of this recipe, and whether they compare."""
    if losses := _validation_losses(evidence.reference_metrics):
        ours, theirs = digests_of(evidence.record), digests_of(evidence.reference_record)
        return evidence.reference_name or "the reference", losses, bool(ours) and ours == theirs
    task = (evidence.recipe.get("model") or {}).get("init_args") or {}
    recipe = (task.get("model_args") or {}).get("backbone"), task.get("loss"), protocol_of(evidence.recipe).name
    published = evidence.published.get("published_amd_run_a")
    if not published or recipe != ("terramind_v1_base", "dice", "v0"):
        return None
    chips, counts = (evidence.record.get("data") or {}).get("chips") or {}, PROTOCOLS["v0"].counts
    whole = all(chips.get(split) == counts[split] for split in ("train", "val"))
    return published["name"], {n: loss for n, loss in enumerate(published["val_loss"], 1) if loss is not None}, whole


def _same(name: str, one: Any, other: Any) -> Value:
    same = one is not None and one == other
    text = "the same" if same else f"{str(one)[:12]} and {str(other)[:12]}"
    return Value(name, text, expected="the same")
