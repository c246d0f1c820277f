"""The artefacts: weights, exported pair and pictures, judged by what `verification.measure` found of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.verification.check import Check, Evidence, Plot, Table, Unanswered, Value, check, judge


@check(
    "Weights and buffers",
    "All weights and buffers are finite, they fit the recipe's model, and each trained tensor has moved.",
    "verification/evidence/weights.json",
)
def weights(evidence: Evidence) -> Check:
    """Every tensor of the checkpoint against the recipe's model and against where training started.

    Parameters alone do not tell: one overflow can leave NaN in a BatchNorm buffer only.
    """
    found, allowed = _measured(evidence, "weights"), evidence.thresholds["weights"]["unmoved"]
    bad, unmoved = found["not_finite"], found["unmoved"]
    values = [
        _named("tensors with values that are not finite", [entry["name"] for entry in bad]),
        _named("tensors that differ from the recipe's model", found["other_than_model"]),
        Value("parameters", found["parameters"], expected=found["expected_parameters"]),
    ]
    moved = "how far they moved is unknown"
    if unmoved is not None:
        moved = f"{found['trained']} trained tensors, all moved"
        values.append(_named("trained tensors that never moved", unmoved, allowed))
    rows = [[entry[key] for key in ("name", "kind", "nan", "inf")] for entry in bad]
    tables = [Table("Values that are not finite", ["tensor", "kind", "NaN", "inf"], rows)]
    return judge(values, f"{found['tensors']} tensors, all finite; {moved}", tables=tables)


@check(
    "Loads in plain TerraTorch",
    "The exported pair loads in plain TerraTorch, without floodrepro, and predicts the same from raw chips.",
    "verification/evidence/load_back.json",
)
def load_back(evidence: Evidence) -> Check:
    """The exported pair in plain TerraTorch, in a process without floodrepro, on fixed chips."""
    found, asked = _measured(evidence, "load_back"), evidence.thresholds["load_back"]
    values = [
        Value("largest difference of logits", found["logit_difference"], at_most=asked["logit_difference"]),
        Value("smallest share of equal pixels", found["equal_argmax"], at_least=asked["equal_argmax"]),
    ]
    twin = f"torch {found['torch']} cannot load safetensors (2.13 can): a .pt twin of the tensors was loaded."
    return judge(
        values,
        f"{found['chips']} chips of {found['pixels']:,} pixels predicted the same",
        notes=[*([twin] if found["through"] == "pt" else []), f"The pair that was measured: {found['pair']}."],
    )


@check(
    "Safetensors round trip",
    "The exported safetensors hold the checkpoint's tensors bit for bit and name the recipe and checkpoint.",
    "verification/evidence/round_trip.json",
)
def round_trip(evidence: Evidence) -> Check:
    """The exported file against the checkpoint: tensors to the bit, and the hashes in its header."""
    found = _measured(evidence, "round_trip")
    hashes = {"recipe_sha256": recipes.fingerprint(evidence.recipe), "source_sha256": found["checkpoint_sha256"]}
    values = [
        _named("tensors that differ from the checkpoint's", found["differing"]),
        *(Value(f"{key} in the header", found["metadata"].get(key), expected=sha) for key, sha in hashes.items()),
    ]
    notes = [f"The pair that was measured: {found['pair']}."]
    return judge(values, f"{found['tensors']} tensors, bit for bit", notes=notes)


@check(
    "Pictures",
    "The best, the median, the worst and an empty chip are shown, chosen by rule, predicted as in the chip table.",
    "verification/evidence/panels.json",
    "verification/evidence/panels.png",
)
def panels(evidence: Evidence) -> Check:
    """Pictures of every kind that the split has, and their counts against the chip table's."""
    found, allowed = _measured(evidence, "panels"), evidence.thresholds["panels"]["differing_share"]
    name, shown = evidence.iou_name, found["panels"]
    worst = max(panel["differing_share"] for panel in shown)
    values = [Value("largest share of pixels predicted otherwise than in the chip table", worst, at_most=allowed)]
    keys = ("kind", "chip", "score", "pixels", "differing_pixels")
    rows = [[panel[key] for key in keys] for panel in shown]
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
    return judge(
        values,
        f"{', '.join(row[0] for row in rows)} chip shown, " + (f"{worst:.2g} differ" if worst else "as in the table"),
        tables=[Table("Chips shown", ["kind", "chip", name, "pixels", "differing from the table"], rows)],
        plots=[Plot("panels", "panels", "What was seen, what is true, what is predicted", caption=caption)],
        notes=notes,
    )


def _measured(evidence: Evidence, name: str) -> Mapping[str, Any]:
    """A measurement.

    Raises:
        Unanswered: It is missing (a skip) or could not be made (a failure).
    """
    if name not in evidence.measured:
        raise evidence.without(name, "it was not measured")
    if problem := evidence.measured[name].get("problem"):
        raise Unanswered("fail", str(problem))
    return evidence.measured[name]


def _named(what: str, names: Sequence[str], allowed: int = 0) -> Value:
    """How many there are, and the first of them by name."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    return Value(f"{what} ({shown})" if names else what, len(names), at_most=allowed)
