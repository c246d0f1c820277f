"""Published figures: sourced, and true to their own identities."""

import pytest

from floodrepro.data.protocols import PROTOCOLS
from floodrepro.verification.battery import load_published

PUBLISHED = load_published()


def contradictions(figures: dict[str, float], decimals: int) -> list[str]:
    """Which identities a row of figures of two classes breaks by more than its rounding explains.

    With e = FP + FN as a share of all pixels, TP = e IoU_1 / (1 - IoU_1), TN = e IoU_0 / (1 - IoU_0), and the three add
    up to 1. Each identity grows with both IoUs: the ends of their rounding are reached together.
    """
    iou, half = [figures["IoU_0"], figures["IoU_1"]], 0.5 * 10**-decimals
    identities = {
        "mIoU": lambda x: sum(x) / 2,
        "F1_Score": lambda x: sum(2 * value / (1 + value) for value in x) / 2,
        "Pixel_Accuracy": lambda x: 1 - 1 / (sum(1 / (1 - value) for value in x) - 1),
    }
    ends = {name: [f([x + sign * half for x in iou]) for sign in (-1, 1)] for name, f in identities.items()}
    return [name for name, (low, high) in ends.items() if not low - half <= figures[name] <= high + half]


@pytest.mark.parametrize("stem", PUBLISHED)
def test_published_figures_have_a_source_and_satisfy_the_identities(stem: str):
    entry = PUBLISHED[stem]
    figures = entry["figures"]
    assert "msradam/" in entry["source"]
    assert contradictions(figures, entry["decimals"]) == []
    assert (entry["protocol"], entry["split"], entry["chips"]) == ("v0", "test", PROTOCOLS["v0"].counts["test"])
    if stem in ("published_amd_run_a", "published_ibm"):  # recalls follow from the IoUs
        iou, recall = ([figures[f"{name}_{k}"] for k in (0, 1)] for name in ("IoU", "Class_Accuracy"))
        errors = 1 / (sum(1 / (1 - x) for x in iou) - 1)  # FP + FN as a share of all pixels
        missed = [errors * x / (1 - x) * (1 - r) / r for x, r in zip(iou, recall, strict=True)]
        assert sum(missed) == pytest.approx(errors, rel=0.005)  # four digits of each
