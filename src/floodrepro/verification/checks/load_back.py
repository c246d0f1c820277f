"""Does a stranger get our model? The exported pair in plain TerraTorch, in a process that has no floodrepro."""

from functools import partial

from floodrepro.verification.check import Check, Evidence, Table, Value
from floodrepro.verification.measured import evidence_file, unmeasured, which_pair

ID = "load_back"
_CLAIM = (
    "The exported pair loads through plain LightningInferenceModel.from_config in a fresh process without floodrepro, "
    "and predicts the same from raw chips as the run's checkpoint."
)
_answer = partial(Check, ID, "Loads in plain TerraTorch", _CLAIM)


def check(evidence: Evidence) -> Check:
    """Largest difference of logits, and share of pixels with the same class, over fixed chips."""
    if refusal := unmeasured(evidence, ID):
        return _answer(*refusal)
    found, asked = evidence.measured[ID], evidence.thresholds[ID]
    difference, equal = found["logit_difference"], found["equal_argmax"]
    near = difference is not None and difference <= asked["logit_difference"]
    same = equal >= asked["equal_argmax"]
    problems = []
    if difference is None:
        problems.append("logits are not finite")
    elif not near:
        problems.append(f"logits differ by up to {difference:.3g}")
    if not same:
        problems.append(f"only {100 * equal:.4g} % of pixels are given the same class")
    rows = [[chip["name"], chip["logit_difference"], chip["equal_argmax"]] for chip in found["chips"]]
    return _answer(
        "fail" if problems else "pass",
        "; ".join(problems),
        values=[
            Value(
                "largest difference of logits", difference, threshold=f"at most {asked['logit_difference']:g}", ok=near
            ),
            Value(
                "smallest share of pixels with the same class", equal, threshold=f"{asked['equal_argmax']:g}", ok=same
            ),
            Value("torch", found["torch"]),
            Value("sha256 of the YAML", found["config"]["sha256"]),
        ],
        tables=[Table("Fixed chips", ["chip", "largest difference of logits", "share with the same class"], rows)],
        notes=[*_notes(found["through"], found["torch"]), *which_pair(found)],
        evidence=[evidence_file(ID)],
    )


def _notes(through: str, torch: str) -> list[str]:
    if through == "safetensors":
        return []
    return [
        f"torch {torch} cannot load safetensors (2.13 can): what was loaded is a .{through} twin, made for this test, "
        "with the same tensors."
    ]
