"""The run: its training log, its data, and where code, recipe and weights come from."""

import math
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.data.protocols import MODALITIES, data_arguments
from floodrepro.verification.checks import CRITERIA, Check, Evidence, Unanswered, figure, judge, tally

# Keys in which the recipe of a test may differ from that of its run, besides those of `recipe.PLACE`.
_HARMLESS = ("trainer.", "data.init_args.batch_size")


def convergence(evidence: Evidence) -> Check:
    """The training's own log: losses, values that are not finite, and the best epoch that run.json names."""
    record, rows = evidence.record, evidence.need("metrics", "there is no metrics.csv")
    logged = [(key, row.get("step"), text) for row in rows for key, text in row.items() if key and text]
    bad = [f"{key} at step {step}" for key, step, text in logged if not math.isfinite(float(text))]
    values = [tally("logged values that are not finite", bad)]
    validated = {int(float(row["epoch"])) + 1: float(row["val/loss"]) for row in rows if row.get("val/loss")}
    losses = {epoch: loss for epoch, loss in validated.items() if math.isfinite(loss)}  # epochs count from 1
    if len(losses) < 2:
        return judge(values, "", f"{len(losses)} validations: a trajectory needs two")
    best = min(losses, key=lambda epoch: losses[epoch])  # the first of equals, as ModelCheckpoint keeps it
    first, last = next(iter(losses)), next(reversed(losses))
    recorded = None if record.get("best_epoch") is None else record["best_epoch"] + 1  # run.json counts from 0
    by_loss = record.get("monitor", "val/loss") == "val/loss"  # a recipe may choose its best epoch by another score
    fall = losses[first] - losses[best]
    values += [
        figure("fall of val/loss to the best epoch", fall, at_least=CRITERIA["convergence"]["min_fall"]),
        figure("best epoch by run.json, from 1", recorded, expected=best if by_loss else None),
    ]
    plot = {
        "name": "loss",
        "kind": "lines",
        "x_label": "epoch",
        "y_label": "val/loss",
        "series": [{"label": evidence.run.path.name, "x": list(losses), "y": list(losses.values())}],
        "caption": f"val/loss by epoch: {losses[first]:.4f} at first, {losses[best]:.4f} at best, in epoch {best}.",
    }
    notes = [f"The best epoch, {best}, is the last one: more epochs might have helped."] if best == last else []
    found = f"val/loss {losses[first]:.3f} to {losses[best]:.3f}, best epoch {best}{', the last one' * (best == last)}"
    return judge(values, found, plots=[plot], notes=notes)


def data(evidence: Evidence) -> Check:
    """Digests of training, test, audit and reference, the audit's findings, and the number of chips.

    A digest is over the ids and file sizes of a split. Only splits that both sides have are compared.
    """
    table, audit = evidence.table, evidence.audit
    if "audit" in evidence.absent:
        raise Unanswered(*evidence.absent["audit"])
    tested, reference = (one.metadata if one else {} for one in (table, evidence.reference))
    ours, theirs, other = (each.get("data") or {} for each in (evidence.record, tested, reference))
    # an audit's digests are over all modalities
    whole = set(data_arguments(evidence.recipe).get("modalities") or MODALITIES) == set(MODALITIES)
    sources = {"training": ours, "test": theirs, "audit": audit if whole else {}, "reference": other}
    digests = {name: source.get("digests") or {} for name, source in sources.items()}
    values = []
    for split in sorted(set().union(*digests.values())):
        known = {name: each[split] for name, each in digests.items() if split in each}
        if len(known) > 1:
            values.append(_same(f"{split} chips of {', '.join(known)}", *known.values()))
    listed = ours.get("listed") or {}, theirs.get("listed") or {}
    for name in listed[0].keys() & listed[1].keys():
        if name.rpartition("/")[2] == tested.get("split"):
            values.append(_same(f"list of {name} at training and test", listed[1][name], listed[0][name]))
    for key in ("protocol", "commit"):
        if ours.get(key) and theirs.get(key):
            values.append(_same(f"{key} of training and test", theirs[key], ours[key]))
    compared = bool(values and digests["training"] and digests["test"])
    read = "no error in the audit" if audit else "no pixel was audited (floodrepro data audit)"
    found = f"chips, lists and protocol agree, as far as recorded; {read}"
    if audit:
        errors = [one["message"] for one in audit["findings"] if one["severity"] == "error"]
        values.append(tally("errors of the audit", errors))
    if table is not None:
        split, chips = str(tested.get("split", "test")), ours.get("chips") or {}
        values.append(figure(f"chips in the table of {split}", len(table), expected=chips.get(split)))
    return judge(values, found, "" if compared else "training and test have not recorded the digest of one split")


def provenance(evidence: Evidence) -> Check:
    """Code, recipe, weights and table by their hashes, and every run that was declared."""
    record, table = evidence.need("record", "there is no run.json"), evidence.table
    code, recorded = (record.get("environment") or {}).get("code") or {}, record.get("recipe_sha256")
    commit, hashed = code.get("commit"), "hashed" if code.get("source_sha256") else "unknown"
    dirty = code.get("dirty")
    values = [
        figure("status of the run", record.get("status"), expected="finished"),
        _same("recipe.yaml and run.json", recipes.fingerprint(evidence.recipe), recorded),
        figure("working tree", "with changes" if dirty else "clean", expected="clean")
        if dirty is not None  # else the hash of the source stands for it: a wheel or an image has no repository
        else figure("source of the code", hashed, expected="hashed"),
    ]
    if table is not None:
        changes, tested = table.metadata.get("recipe_changes") or [], table.metadata.get("recipe_sha256")
        changed = [key for key in changes if not (key.startswith(_HARMLESS) or recipes.PLACE.fullmatch(key))]
        same = _same("recipe of table and run", tested, recorded)
        values.append(tally("changes of the table's recipe", changed) if tested != recorded and changes else same)
        if trained := record.get("checkpoint_sha256"):
            values.append(_same("weights of table and run", table.weights, trained))
        ours, theirs = (one.metadata.get("inputs") if one else None for one in (table, evidence.reference))
        if ours and theirs:
            other = list(recipes.differences(ours, theirs))
            values.append(tally("differences in what run and reference see of a chip", other))
    if evidence.seeds:
        declared = "yes" if record.get("seed") in {run.seed for run in evidence.seeds} else "no"
        values.append(figure("the seed was declared", declared, expected="yes"))
    notes = [f"Resumed on {one.get('when')} from {one.get('from')}." for one in record.get("resumes") or []]
    skip = "" if table else evidence.absent.get("table", ("skip", "the run has no chip table"))[1]
    source = str(commit)[:12] if commit else f"source {str(code.get('source_sha256'))[:12]}"
    return judge(values, f"finished, code {source}, hashes agree", skip, notes=notes)


def _same(name: str, *found: Any) -> dict[str, Any]:
    alike = found[0] is not None and len(set(found)) == 1
    return figure(name, "the same" if alike else " and ".join(str(one)[:12] for one in found), expected="the same")
