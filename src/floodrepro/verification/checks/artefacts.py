"""The artefacts: weights, exported pair and pictures, judged by what `verification.measure` found of them."""

from collections.abc import Sequence
from functools import partial

from floodrepro import recipe as recipes
from floodrepro.verification.check import Check, Evidence, Plot, Status, Table, Value, judge, number


def weights(evidence: Evidence) -> Check:
    """Every tensor of the checkpoint against the recipe's model and against where training started.

    Parameters alone do not tell: one overflow can leave NaN in a BatchNorm buffer only.
    """
    claim = "All weights and buffers are finite, they fit the recipe's model, and each trained tensor has moved."
    answer = partial(Check, "weights", "Weights and buffers", claim, evidence=_files("weights"))
    if refusal := _unmeasured(evidence, "weights"):
        return answer(*refusal)
    found, allowed = evidence.measured["weights"], evidence.thresholds["weights"]["unmoved"]
    bad, other, unmoved = found["not_finite"], found["other_than_model"], found["unmoved"]
    values = [
        Value("tensors with values that are not finite", len(bad), at_most=0),
        Value("tensors that differ from the recipe's model", len(other), at_most=0),
        Value("parameters", found["parameters"], expected=found["expected_parameters"]),
        Value("size of the file", found["bytes"] / 1e6, "MB"),
    ]
    if unmoved is not None:
        values.append(Value(f"of {found['trained']} trained tensors, unmoved", len(unmoved), at_most=allowed))
    if found["largest"]:
        values.append(Value(f"largest magnitude, in {found['largest']['name']}", found["largest"]["value"]))
    problems = [
        *([f"values that are not finite in {_some([entry['name'] for entry in bad])}"] if bad else []),
        *([f"other than the recipe's model: {_some(other)}"] if other else []),
        *([f"never moved from where they started: {_some(unmoved)}"] if unmoved and len(unmoved) > allowed else []),
    ]
    moved = "how far they moved is unknown" if unmoved is None else f"{found['trained']} trained tensors, all moved"
    status, finding = judge(values, f"{found['tensors']} tensors, all finite; {moved}")
    rows = [[entry[key] for key in ("name", "kind", "nan", "inf")] for entry in bad]
    tables = [Table("Values that are not finite", ["tensor", "kind", "NaN", "inf"], rows)] if rows else []
    return answer(status, "; ".join(problems) or finding, values=values, tables=tables)


def load_back(evidence: Evidence) -> Check:
    """The exported pair in plain TerraTorch, in a process without floodrepro, on fixed chips."""
    claim = "The exported pair loads in plain TerraTorch, without floodrepro, and predicts the same from raw chips."
    answer = partial(Check, "load_back", "Loads in plain TerraTorch", claim, evidence=_files("load_back"))
    if refusal := _unmeasured(evidence, "load_back"):
        return answer(*refusal)
    found, asked = evidence.measured["load_back"], evidence.thresholds["load_back"]
    values = [
        Value("largest difference of logits", found["logit_difference"], at_most=asked["logit_difference"]),
        Value("smallest share of equal pixels", found["equal_argmax"], at_least=asked["equal_argmax"]),
    ]
    same = f"{len(found['chips'])} chips of {found['pixels']:,} pixels predicted the same"
    status, finding = judge(values, same)
    rows = [[chip[key] for key in ("name", "logit_difference", "equal_argmax")] for chip in found["chips"]]
    twin = f"torch {found['torch']} cannot load safetensors (2.13 can): a .pt twin of the tensors was loaded."
    return answer(
        status,
        finding,
        values=values,
        tables=[Table("Fixed chips", ["chip", "largest difference of logits", "share of equal pixels"], rows)],
        notes=[*([twin] if found["through"] == "pt" else []), _pair(found["pair"])],
    )


def round_trip(evidence: Evidence) -> Check:
    """The exported file against the checkpoint: tensors to the bit, and the hashes in its header."""
    claim = "The exported safetensors hold the checkpoint's tensors bit for bit and name the recipe and checkpoint."
    answer = partial(Check, "round_trip", "Safetensors round trip", claim, evidence=_files("round_trip"))
    if refusal := _unmeasured(evidence, "round_trip"):
        return answer(*refusal)
    found = evidence.measured["round_trip"]
    differing, metadata = found["differing"], found["metadata"]
    values = [
        Value("tensors that differ from the checkpoint's", len(differing), at_most=0),
        Value(
            "recipe_sha256 in the header", metadata.get("recipe_sha256"), expected=recipes.fingerprint(evidence.recipe)
        ),
        Value("source_sha256 in the header", metadata.get("source_sha256"), expected=found["checkpoint_sha256"]),
    ]
    status, finding = judge(values, f"{found['tensors']} tensors, bit for bit")
    if differing:
        finding = f"{finding}: {_some(differing)}"
    return answer(status, finding, values=values, notes=[_pair(found["pair"])])


def panels(evidence: Evidence) -> Check:
    """Pictures of every kind that the split has, and their counts against the chip table's."""
    claim = (
        "The best, the median, the worst and an empty chip are shown, chosen by rule, predicted as in the chip table."
    )
    answer = partial(Check, "panels", "Pictures", claim, evidence=_files("panels", ".json", ".npz"))
    if refusal := _unmeasured(evidence, "panels"):
        return answer(*refusal)
    found, allowed, name = (
        evidence.measured["panels"],
        evidence.thresholds["panels"]["differing_share"],
        evidence.iou_name,
    )
    shown = found["panels"]
    worst = max((panel["differing_share"] for panel in shown), default=None)
    values = [
        Value("chips shown", len(shown), expected=len(found["available"]) or None, at_least=1),
        Value("largest share of pixels predicted otherwise than in the chip table", worst, at_most=allowed),
    ]
    kinds = ", ".join(found["available"])
    status, finding = judge(
        values, f"{kinds} chip shown, " + ("as in the table" if not worst else f"{worst:.2g} differ")
    )
    rows = [[panel[key] for key in ("kind", "chip", "score", "pixels", "differing_pixels")] for panel in shown]
    notes = [
        f"Best, median and worst by {name} among chips whose truth has at least {100 * found['min_share']:g} % "
        f"{evidence.class_name}; the empty chip is the one without any that has the most false alarms."
    ]
    if worst:
        notes.append(f"Predicted on {found['made_on']}; the table: {found['table_made_on']}.")
    caption = (
        "A row a chip: Sentinel-2 in true colour and Sentinel-1 VV before and at the event, the truth, the prediction, "
        "and where they differ."
    )
    return answer(
        status,
        finding,
        values=values,
        tables=[Table("Chips shown", ["kind", "chip", name, "pixels", "differing from the table"], rows)],
        plots=[Plot("panels", "panels", "What was seen, what is true, what is predicted", caption=caption)]
        if shown
        else [],
        notes=notes,
    )


def _files(name: str, *suffixes: str) -> list[str]:
    return [f"verification/evidence/{name}{suffix}" for suffix in suffixes or (".json",)]


def _unmeasured(evidence: Evidence, name: str) -> tuple[Status, str] | None:
    """Status and finding where a measurement is missing (a skip) or could not be made (a failure)."""
    measured = evidence.measured.get(name)
    if measured is None:
        return evidence.absent(name, "it was not measured")
    return ("fail", str(measured["problem"])) if "problem" in measured else None


def _pair(which: str) -> str:
    return f"The pair that was measured: {which}."


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {number(len(names) - shown)} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
