"""What the checks say of measured evidence that is missing, failed, or just beyond a threshold. No torch."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from floodrepro import recipe as recipes
from floodrepro.run_folder import RunFolder
from floodrepro.verification.check import Evidence
from floodrepro.verification.checks import load_back, panels, round_trip, weights
from verification_fixtures import DIGEST, demo_recipe, thresholds

CHECKS = (weights, load_back, round_trip, panels)
SHA = "5a" * 32
FILE = {"name": "demo.safetensors", "sha256": SHA}
SOUND = {
    "weights": {
        "name": "best.ckpt",
        "sha256": SHA,
        "bytes": 56_539_599,
        "tensors": 216,
        "parameters": 13_992_066,
        "expected": {"tensors": 216, "parameters": 13_992_066},
        "dtypes": {"float32": 207, "int64": 9},
        "missing": [],
        "unexpected": [],
        "other_shape": [],
        "other_dtype": [],
        "not_finite": [],
        "largest": {"name": "neck.weight", "value": 1.5},
        "start": "recorded",
        "trained": 161,
        "frozen": 0,
        "unmoved": [],
    },
    "load_back": {
        "chips": [{"name": "noise", "logit_difference": 1e-4, "equal_argmax": 1.0}],
        "logit_difference": 1e-4,
        "equal_argmax": 1.0,
        "pixels": 4096,
        "through": "safetensors",
        "config": FILE,
        "weights": FILE,
        "torch": "2.14.1",
    },
    "round_trip": {
        "checkpoint": {"name": "best.ckpt", "sha256": SHA},
        "weights": FILE,
        "tensors": 216,
        "altered": [],
        "missing": [],
        "added": [],
        "metadata": {
            "recipe_sha256": recipes.fingerprint(demo_recipe()),
            "source_sha256": SHA,
            "data_digest": DIGEST,
        },
        "untampered_accepted": True,
        "refused": {"length field one more": True, "first byte of the JSON": True},
    },
    "panels": {
        "file": "panels.npz",
        "sha256": SHA,
        "checkpoint": {"name": "best.ckpt", "sha256": SHA},
        "available": ["best", "dry"],
        "min_flood_share": 0.01,
        "device": "a CPU",
        "precision": "32-true",
        "same_device": True,
        "panels": [
            {
                "kind": kind,
                "chip": f"EMSR9_1_35TMF_x{place}_y0",
                "event": "EMSR9",
                "flood_iou": score,
                "pixels": 4096,
                "differing_pixels": 0,
                "differing_share": 0.0,
            }
            for place, (kind, score) in enumerate((("best", 0.8), ("dry", None)))
        ],
    },
}


def judge(check, measured=None, **fields):
    measured = copy.deepcopy(SOUND) if measured is None else measured
    defaults = {"record": {"data_digest": DIGEST}, "recipe": demo_recipe(), "thresholds": thresholds()}
    return check.check(Evidence(run=RunFolder(Path("run")), measured=measured, **(defaults | fields)))


def changed(check, **entries):
    return copy.deepcopy(SOUND) | {check.ID: copy.deepcopy(SOUND[check.ID]) | entries}


@pytest.mark.parametrize("check", CHECKS)
def test_sound_evidence_passes(check):
    answer = judge(check)
    assert (answer.id, answer.status, answer.reason) == (check.ID, "pass", "")
    assert answer.evidence[0] == f"verification/evidence/{check.ID}.json"
    assert any(value.ok for value in answer.values)


@pytest.mark.parametrize("check", CHECKS)
def test_what_was_not_measured_is_skipped_with_its_reason(check):
    answer = judge(check, {}, missing={check.ID: "the run has no export"})
    assert (answer.status, answer.reason) == ("skip", "the run has no export")
    assert judge(check, {}).reason == "it was not measured"


@pytest.mark.parametrize("check", CHECKS)
def test_what_could_not_be_measured_fails_with_its_text(check):
    answer = judge(check, {check.ID: {"problem": "the checkpoint is damaged"}})
    assert (answer.status, answer.reason) == ("fail", "the checkpoint is damaged")


FAULTS = [
    (weights, {"not_finite": [{"name": "a.running_var", "kind": "buffer", "nan": 1, "inf": 0}]}, "a.running_var"),
    (weights, {"unmoved": ["a.weight"]}, "never moved from where they started: a.weight"),
    (weights, {"missing": ["a.weight"], "tensors": 215}, "missing tensors: a.weight"),
    (weights, {"unexpected": ["a.lora"], "tensors": 217}, "a.lora"),
    (weights, {"parameters": 13_992_065}, "13,992,065 parameters where the model has 13,992,066"),
    (weights, {"other_dtype": [{"name": "a", "dtype": "float16", "expected": "float32"}]}, "another dtype: a"),
    (weights, {"other_shape": [{"name": "a", "shape": [1], "expected": [2]}]}, "another shape: a"),
    (load_back, {"logit_difference": 1.1e-4}, "logits differ by up to 0.00011"),
    (load_back, {"logit_difference": None}, "logits are not finite"),
    (load_back, {"equal_argmax": 4095 / 4096}, "only 99.98 % of pixels are given the same class"),
    (round_trip, {"altered": ["a.weight"]}, "altered tensors: a.weight"),
    (round_trip, {"missing": ["a.weight"]}, "missing tensors: a.weight"),
    (round_trip, {"added": ["a.weight"]}, "added tensors: a.weight"),
    (round_trip, {"refused": {"length": True, "offset": False}}, "a tampered header was accepted: offset"),
    (round_trip, {"untampered_accepted": False}, "refuses an untampered header"),
    (round_trip, {"metadata": {"recipe_sha256": "0"}}, "recipe_sha256 is 0"),
    (round_trip, {"metadata": {}}, "source_sha256 is None"),
    (panels, {"available": ["best", "worst", "dry"]}, "no picture of: worst"),
    (panels, {"available": [], "panels": []}, "there is no picture"),
]


@pytest.mark.parametrize(("check", "fault", "says"), FAULTS)
def test_fault_fails_and_is_named(check, fault, says):
    answer = judge(check, changed(check, **fault))
    assert answer.status == "fail"
    assert says in answer.reason
    assert any(value.ok is False for value in answer.values)


def test_panel_predicted_otherwise_than_in_the_table_fails_beyond_the_threshold_only():
    for pixels, status in ((4, "pass"), (5, "fail")):
        shown = copy.deepcopy(SOUND["panels"]["panels"])
        shown[1] |= {"differing_pixels": pixels, "differing_share": pixels / 4096}
        answer = judge(panels, changed(panels, panels=shown, same_device=False))
        assert answer.status == status
        assert "another device" in answer.notes[-1]
        assert answer.tables[0].rows[1][-1] == pixels


@pytest.mark.parametrize("check", [load_back, round_trip])
def test_report_says_which_pair_was_measured(check):
    assert "made for this check" in judge(check, changed(check, pair="made for this check")).notes[-1]


def test_data_digest_of_another_record_fails():
    assert "data_digest" in judge(round_trip, record={"data_digest": "0" * 64}).reason


def test_threshold_decides_how_many_layers_may_stay():
    allowed = thresholds() | {"weights": {"unmoved": 1}}
    evidence = changed(weights, unmoved=["a.weight"])
    assert judge(weights, evidence, thresholds=allowed).status == "pass"


def test_checks_need_no_torch():
    modules = ", ".join(f"floodrepro.verification.checks.{check.ID}" for check in CHECKS)
    program = f"import sys, {modules}; print(sorted({{'torch', 'lightning', 'terratorch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
