"""The README's first command, whole: generate, train, test, export, verify, and what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

GIB_IN_KIB = 1024**2
# In between, a process that has no other children: the largest of the demo's own is known by it alone.
MEASURED = """
import pathlib, resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
pathlib.Path(sys.argv[1]).write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, dict, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURED,
            folder / "peak",
            ROOT / "scripts" / "reproduce.sh",
            "--demo",
            "--folder",
            folder,
            "--format",
            "json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_demo_learns_floods_of_events_it_has_not_seen(demo):
    _, report, _ = demo
    flood_iou = {name.split(" (")[0]: scores["IoU_1"] for name, scores in report["scores"].items()}
    assert flood_iou["this model"] >= 0.5
    assert flood_iou["nothing flooded"] == 0
    assert flood_iou["this model"] > 1.5 * flood_iou["everything flooded"]
    assert 0 < flood_iou["VV drop"] < 1


def test_demo_splits_share_no_event(demo):
    folder, _, _ = demo
    split = folder / "ImpactMesh-Flood" / "split"
    events = [
        {line.split("_")[0] for line in (split / f"impactmesh_flood_{name}.txt").read_text().split()}
        for name in ("train", "val", "test")
    ]
    assert all(events)
    assert len(set.union(*events)) == sum(len(one) for one in events)


def test_demo_leaves_what_it_names(demo):
    _, report, _ = demo
    assert all(Path(path).exists() for path in report["where"].values())
    assert set(report["scores"]["this model"]) == {"mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy"}


def test_demo_says_what_it_does_while_it_does_it(demo):
    said = [line for line in demo[2].splitlines() if line.startswith("floodrepro:")]
    for part in ("generating", "training", "epoch 1/", "a second model", "testing", "measuring: load back", "judging"):
        assert any(part in line for line in said), part


def test_demo_is_verified_against_a_second_model_and_claims_no_more_than_it_shows(demo):
    folder, report, _ = demo
    must = {"convergence", "events", "weights", "load_back", "round_trip", "panels", "identities", "data"}
    assert {id_ for id_, status in report["checks"].items() if status == "pass"} >= must
    shown, not_shown = report["verdict"]
    assert "the shorter-trained model" in shown
    assert "another seed" in not_shown
    results = json.loads((folder / "runs" / "demo" / "verification" / "results.json").read_text())
    assert str(folder) not in json.dumps(results)
    tests = results["scores"]["rows"][0]
    assert tests["ours"] == pytest.approx(report["scores"]["this model"]["IoU_1"], abs=1e-6)
    card = Path(report["where"]["card"]).read_text()
    assert f"{tests['ours']:.4f}" in card
    assert "More Information Needed" not in card


def test_no_process_of_the_demo_needs_half_of_six_gib(demo):
    """One interpreter waits for another at the end, so that two count."""
    folder, _, _ = demo
    assert 0 < int((folder / "peak").read_text()) < 3 * GIB_IN_KIB


def test_demo_again_takes_the_chips_that_are_there_overwrites_nothing_and_fails_if_nothing_was_learnt(demo, cli):
    folder, _, _ = demo
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = cli("reproduce", "--demo", "--folder", folder, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")
    assert "chips are there already" in again.err
    assert again.code == 1
    assert "the model has not learnt enough" in again.report[0]
    assert "demo-2" in again.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
