"""Criteria and published figures: found in the package, sourced, and true to their own identities."""

import ast
from pathlib import Path

import pytest

from floodrepro.data.protocols import PROTOCOLS
from floodrepro.verification import checks
from floodrepro.verification.battery import CHECKS, load_published
from floodrepro.verification.checks import CRITERIA

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
    assert "msradam/" in entry["source"]
    assert contradictions(entry["figures"], entry["decimals"]) == []
    assert (entry["protocol"], entry["split"], entry["chips"]) == ("v0", "test", PROTOCOLS["v0"].counts["test"])


@pytest.mark.parametrize("stem", ["published_amd_run_a", "published_ibm"])
def test_published_class_accuracies_follow_from_the_ious(stem: str):
    figures = PUBLISHED[stem]["figures"]
    iou = [figures[f"IoU_{k}"] for k in (0, 1)]
    recall = [figures[f"Class_Accuracy_{k}"] for k in (0, 1)]
    errors = 1 / (sum(1 / (1 - x) for x in iou) - 1)  # FP + FN as a share of all pixels
    hits = [errors * x / (1 - x) for x in iou]
    missed = [hit * (1 - r) / r for hit, r in zip(hits, recall, strict=True)]
    assert sum(missed) == pytest.approx(errors, rel=0.005)  # four digits of each


def test_every_check_is_a_function_here_or_in_measure_and_says_what_it_claims():
    makers = {
        node.name
        for node in ast.parse(Path(checks.__file__).parents[1].joinpath("measure.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(CHECKS) <= set(CRITERIA) <= set(CHECKS) | makers
    assert all({"title", "claim", "files"} <= set(about) for about in CRITERIA.values())
