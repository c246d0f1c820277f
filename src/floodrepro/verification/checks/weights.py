"""Are the weights sound? Parameters alone do not tell: one overflow can leave NaN in a BatchNorm buffer only."""

from functools import partial

from floodrepro.verification.check import Check, Evidence, Table, Value
from floodrepro.verification.measured import evidence_file, listed, unmeasured

ID = "weights"
_CLAIM = "All parameters and buffers are finite, and they are those of the recipe's model in number, shape and dtype"
_MOVED = "; each tensor that was trained has moved from where it started."
_answer = partial(Check, ID, "Weights and buffers")


def check(evidence: Evidence) -> Check:
    """Every tensor of the checkpoint against the model that the recipe builds and against where it started."""
    if refusal := unmeasured(evidence, ID):
        return _answer(f"{_CLAIM}{_MOVED}", *refusal)
    found, expected = evidence.measured[ID], evidence.measured[ID]["expected"]
    recorded = found["start"] == "recorded"
    bad = found["not_finite"]
    problems = [
        *(["values that are not finite in " + listed([entry["name"] for entry in bad])] if bad else []),
        *(["missing tensors: " + listed(found["missing"])] if found["missing"] else []),
        *(["tensors that the model does not have: " + listed(found["unexpected"])] if found["unexpected"] else []),
        *([f"another {kind}: {names}" for kind in ("shape", "dtype") if (names := _others(found[f"other_{kind}"]))]),
    ]
    if found["parameters"] != expected["parameters"]:
        problems.append(f"{found['parameters']:,} parameters where the model has {expected['parameters']:,}")
    allowed = evidence.thresholds[ID]["unmoved"]
    if recorded and len(found["unmoved"]) > allowed:
        problems.append("never moved from where they started: " + listed(found["unmoved"]))
    values = [
        Value("tensors that hold a value that is not finite", len(bad), threshold="0", ok=not bad),
        Value(
            "tensors",
            found["tensors"],
            threshold=f"{expected['tensors']}, as the recipe's model",
            ok=not (found["missing"] or found["unexpected"] or found["other_shape"]),
        ),
        Value(
            "parameters",
            found["parameters"],
            threshold=f"{expected['parameters']}, as the recipe's model",
            ok=found["parameters"] == expected["parameters"],
        ),
        Value(
            "dtypes",
            ", ".join(f"{number} {dtype}" for dtype, number in found["dtypes"].items()),
            threshold="as the recipe's model",
            ok=not found["other_dtype"],
        ),
    ]
    if recorded:
        values += [
            Value(
                f"of {found['trained']} trained tensors, unmoved",
                len(found["unmoved"]),
                threshold=f"at most {allowed}",
                ok=len(found["unmoved"]) <= allowed,
            ),
            Value("tensors frozen by the recipe", found["frozen"]),
        ]
    if found["largest"]:
        values.append(Value(f"largest magnitude, in {found['largest']['name']}", found["largest"]["value"]))
    values += [Value("checkpoint", found["name"]), Value("its sha256", found["sha256"]), _size(found["bytes"])]
    rows = [[entry[key] for key in ("name", "kind", "nan", "inf")] for entry in bad]
    return _answer(
        f"{_CLAIM}{_MOVED}" if recorded else f"{_CLAIM}.",
        "fail" if problems else "pass",
        "; ".join(problems),
        values=values,
        tables=[Table("Values that are not finite", ["tensor", "kind", "NaN", "inf"], rows)] if rows else [],
        notes=[] if recorded else ["The run has no record of its starting point: whether all layers moved is unknown."],
        evidence=[evidence_file(ID)],
    )


def _others(entries: list[dict[str, object]]) -> str:
    return listed([str(entry["name"]) for entry in entries])


def _size(size: int) -> Value:
    return Value("size of the file", size / 1e6, "MB")
