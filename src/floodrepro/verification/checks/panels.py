"""What do the figures look like? Chips shown are those that the table was made from, or the pictures show nothing."""

from functools import partial

from floodrepro.verification.check import Check, Evidence, Plot, Table, Value
from floodrepro.verification.measured import evidence_file, unmeasured

ID = "panels"
_CLAIM = "The best, the median, the worst and a dry chip are shown, chosen by rule, and predicted as in the chip table."
_CAPTION = (
    "A row a chip: Sentinel-2 in true colour and Sentinel-1 VV before and at the event, the truth, the prediction, and "
    "where they differ."
)
_answer = partial(Check, ID, "Qualitative panels", _CLAIM)


def check(evidence: Evidence) -> Check:
    """Pictures of every kind that the split has, and their counts against the table's."""
    if refusal := unmeasured(evidence, ID):
        return _answer(*refusal)
    found, allowed = evidence.measured[ID], evidence.thresholds[ID]["differing_share"]
    panels = found["panels"]
    absent = [kind for kind in found["available"] if kind not in {panel["kind"] for panel in panels}]
    differing = [panel for panel in panels if not panel["differing_share"] <= allowed]
    worst = max((panel["differing_share"] for panel in panels), default=None)
    problems = [
        *([f"no picture of: {', '.join(absent)}"] if absent else []),
        *(
            f"{panel['chip']} is predicted otherwise than in the chip table: at least {panel['differing_pixels']} of "
            f"{panel['pixels']} pixels"
            for panel in differing
        ),
        *([] if panels else ["there is no picture"]),
    ]
    columns = ["kind", "chip", "event", "flood IoU", "pixels", "differing from the table"]
    keys = ("kind", "chip", "event", "flood_iou", "pixels", "differing_pixels")
    return _answer(
        "fail" if problems else "pass",
        "; ".join(problems),
        values=[
            Value("chips shown", len(panels), threshold=f"{len(found['available'])}", ok=bool(panels) and not absent),
            Value(
                "largest share of pixels predicted otherwise than in the chip table",
                worst,
                n_chips=len(panels),
                threshold=f"at most {allowed:g}",
                ok=worst is not None and not differing,
            ),
        ],
        tables=[Table("Chips shown", columns, [[panel[key] for key in keys] for panel in panels])],
        plots=[Plot(ID, "panels", "What was seen, what is true, what is predicted", caption=_CAPTION)]
        if panels
        else [],
        notes=_notes(evidence, worst),
        evidence=[evidence_file(ID), evidence_file(ID, ".npz")],
    )


def _notes(evidence: Evidence, worst: float | None) -> list[str]:
    found = evidence.measured[ID]
    notes = [
        "Best, median and worst by flood IoU among chips whose truth has at least "
        f"{100 * found['min_flood_share']:g} % flood; the dry chip is the one with the most false alarms."
    ]
    if missing := [kind for kind in ("best", "median", "worst", "dry") if kind not in found["available"]]:
        notes.append(f"The split has no chip for: {', '.join(missing)}.")
    if not found["same_device"]:
        notes.append("The pictures were predicted on another device, or in another precision, than the chip table.")
    elif worst:
        notes.append("Chips share a batch with others here than in the test, which may split sums differently.")
    return notes
