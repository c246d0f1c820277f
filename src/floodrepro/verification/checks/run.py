"""The run: its training log, its speed, its data, and where code, recipe and weights come from."""

import math
import re
from collections.abc import Mapping
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.data.protocols import MODALITIES, data_arguments
from floodrepro.verification.checks import CRITERIA, Check, Evidence, check, figure, judge

# Keys in which the recipe of a test may differ from that of its run: where the data lies, and how it is run.
_HARMLESS = re.compile(
    r"trainer\..*|data\.init_args\.((\w+_)?data_root|\w+_split(\.\w+)?|num_workers|prefetch_factor|batch_size)"
)


@check
def convergence(evidence: Evidence) -> Check:
    """The training's own log: losses, values that are not finite, and the best epoch that run.json names."""
    asked, record, rows = CRITERIA["convergence"], evidence.record, evidence.metrics
    if not rows:
        raise evidence.without("metrics", "there is no metrics.csv")
    logged = [(key, row.get("step"), text) for row in rows for key, text in row.items() if key and text]
    bad = [f"{key} at step {step}" for key, step, text in logged if not math.isfinite(float(text))]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    values = [figure("logged values that are not finite", ", ".join(bad[:3]) + more or "none", expected="none")]
    validated = {int(float(row["epoch"])) + 1: float(row["val/loss"]) for row in rows if row.get("val/loss")}
    losses = {epoch: loss for epoch, loss in validated.items() if math.isfinite(loss)}  # epochs count from 1
    if len(losses) < 2:
        return judge(values, "", f"{len(losses)} validations: a trajectory needs two")
    best = min(losses, key=lambda epoch: losses[epoch])  # the first of equals, as ModelCheckpoint keeps it
    first, last = next(iter(losses)), next(reversed(losses))
    named = None if record.get("best_epoch") is None else record["best_epoch"] + 1  # run.json counts from 0
    by_loss = record.get("monitor", "val/loss") == "val/loss"  # a recipe may choose its best epoch by another score
    values += [
        figure("val/loss, first epoch", losses[first]),
        figure("val/loss, best epoch", losses[best]),
        figure("fall of val/loss to the best epoch", losses[first] - losses[best], at_least=asked["min_fall"]),
        figure("best epoch in run.json", named, expected=best if by_loss else None),
    ]
    if rates := [float(text) for key, _, text in logged if key.startswith("lr-")]:
        values.append(figure("learning rate, first and last", f"{rates[0]:g}, {rates[-1]:g}"))
    plot = {
        "name": "loss",
        "kind": "lines",
        "x_label": "epoch",
        "y_label": "val/loss",
        "series": [{"label": evidence.run.path.name, "x": list(losses), "y": list(losses.values())}],
        "caption": f"val/loss by epoch: {losses[first]:.4f} at first, {losses[best]:.4f} at best, in epoch {best}.",
    }
    notes = [f"The best epoch, {best}, is the last one: more epochs might have helped."] if best == last else []
    found = f"val/loss {losses[first]:.3f} to {losses[best]:.3f}, best epoch {best}"
    return judge(values, found, plots=[plot], notes=notes)


@check
def throughput(evidence: Evidence) -> Check:
    """Chips per second in training; the report's facts have device, memory and hours."""
    asked, record = CRITERIA["throughput"]["min_steps"], evidence.record
    rate = record.get("chips_per_second")
    if not rate:
        raise evidence.without("record", "no epoch of training was timed")
    steps = sum(epoch["steps"] for epoch in record.get("epoch_times") or [])
    values = [
        figure("training, median epoch", rate["median"], "chips/s", rate["p10"], rate["p90"]),
        figure("timed steps", steps),
        figure("share of training spent waiting for data", record.get("share_waiting_for_data")),
    ]
    few = f"{steps} steps were timed, {asked} are needed" if steps < asked else ""
    return judge(values, f"{values[0]['text']} in training, {device_of(record)}", few)


@check
def data(evidence: Evidence) -> Check:
    """Digests of training, test, audit and reference, the audit's findings, and the number of chips.

    A digest is over the ids and file sizes of a split. Only splits that both sides have are compared.
    """
    record, table, audit = evidence.record, evidence.table, evidence.audit
    tested, reference = (one.metadata if one else {} for one in (table, evidence.reference))
    ours, theirs = record.get("data") or {}, tested.get("data") or {}
    all_parts = set(data_arguments(evidence.recipe).get("modalities") or MODALITIES) == set(MODALITIES)
    digests = {
        "training": ours.get("digests") or {},
        "test": theirs.get("digests") or {},
        "audit": (audit.get("digests") or {}) if all_parts else {},  # an audit's are over all modalities
        "reference": (reference.get("data") or {}).get("digests") or {},
    }
    values = []
    for split in sorted(set().union(*digests.values())):
        known = {name: each[split] for name, each in digests.items() if split in each}
        if len(known) > 1:
            values.append(_same(f"{split} chips of {', '.join(known)}", *known.values()))
    for key in ("protocol", "commit"):
        if ours.get(key) and theirs.get(key):
            values.append(_same(f"{key} of training and test", theirs[key], ours[key]))
    recorded = bool(values and digests["training"] and digests["test"])
    found = f"the same: {', '.join(value['name'] for value in values)}"
    notes = []
    if "audit" in evidence.absent:
        values.append(figure("the audit's manifest", evidence.absent["audit"][1], expected="readable"))
    elif not audit:
        found += "; not audited"
        notes.append("There is no audit of the data (floodrepro data audit): ids and sizes were compared, no pixel.")
    else:
        errors = [one["message"] for one in audit["findings"] if one["severity"] == "error"]
        depth = "all chips read" if audit.get("deep") else "no pixel read"
        found += f"; no error in the audit ({depth})"
        named = f" ({', '.join(errors[:3])})" if errors else ""
        values.append(figure(f"errors of the audit, {depth}{named}", len(errors), at_most=0))
    if table is not None:
        split, chips = str(tested.get("split", "test")), ours.get("chips") or {}
        values.append(figure(f"chips in the table of {split}", len(table), expected=chips.get(split)))
    skip = "" if recorded else "training and test have not recorded the digest of one split"
    return judge(values, found, skip, notes=notes)


@check
def provenance(evidence: Evidence) -> Check:
    """Code, recipe, weights and table by their hashes, and every run that was declared."""
    record, table = evidence.record, evidence.table
    if not record:
        raise evidence.without("record", "there is no run.json")
    code, recorded = record.get("code") or {}, record.get("recipe_sha256")
    values = [
        figure("status of the run", record.get("status"), expected="finished"),
        _same("recipe.yaml and run.json", recipes.fingerprint(evidence.recipe), recorded),
    ]
    notes = [f"Resumed on {one.get('when')} from {one.get('from')}." for one in record.get("resumes") or []]
    if commit := code.get("commit"):
        tree = "clean" if code.get("dirty") is False else "with changes"
        values.append(figure("working tree", tree, expected="clean"))
    else:
        hashed = "hashed" if code.get("source_sha256") else "unknown"
        values.append(figure("source of the code", hashed, expected="hashed"))
        notes.append("No commit is recorded: the version and the hash of the source stand for it.")
    if table is not None:
        changes, tested = table.metadata.get("recipe_changes"), table.metadata.get("recipe_sha256")
        if tested != recorded and changes:
            other = ", ".join(key for key in changes if not _HARMLESS.fullmatch(key)) or "nothing that counts"
            values.append(figure("recipe of the table, changed", other, expected="nothing that counts"))
        else:
            values.append(_same("recipe of table and run", tested, recorded))
        ours, theirs = (one.metadata.get("inputs") if one else None for one in (table, evidence.reference))
        if ours and theirs:
            other = ", ".join(recipes.differences(ours, theirs)) or "the same"
            values.append(figure("what run and reference see of a chip", other, expected="the same"))
    if seeds := evidence.seeds:
        declared = "yes" if record.get("seed") in {run.seed for run in seeds} else "no"
        values.append(figure("the seed was declared", declared, expected="yes"))
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


def _same(name: str, *found: Any) -> dict[str, Any]:
    alike = found[0] is not None and len(set(found)) == 1
    return figure(name, "the same" if alike else " and ".join(str(one)[:12] for one in found), expected="the same")
