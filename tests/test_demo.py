"""The README's first command, whole: generate, train, test, export, verify, card, and what it prints."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from floodrepro.data.protocols import event_of
from floodrepro.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, str], str]:
    """The run, the paths that the demo names at its end, and what it said. test_reproduce.py stops a stage."""
    folder = tmp_path_factory.mktemp("demo")
    command = [ROOT / "scripts" / "reproduce.sh", "--demo", "--run-dir", folder, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index('{\n  "where"') :])
    return RunFolder(folder / "runs" / "seed-42"), report["where"], done.stderr


def scores(run: RunFolder) -> dict[str, float]:
    """Flood IoU by the label of its column."""
    table = json.loads(run.results.read_text())["scores"]
    [values] = [row["values"] for row in table["rows"] if row["metric"] == "IoU_1"]
    return {column["label"]: value for column, value in zip(table["columns"], values, strict=True)}


def test_demo_learns_floods_of_events_it_has_not_seen(demo):
    iou = scores(demo[0])
    assert iou["seed-42"] >= 0.5
    assert iou["seed-42"] > 1.5 * iou["everything"]
    files = [*(demo[0].path.parents[1] / "ImpactMesh-Flood" / "split").glob("*.txt")]
    events = [{event_of(chip) for chip in file.read_text().split()} for file in files]
    assert [bool(one) for one in events] == [True] * 3
    assert len(set.union(*events)) == sum(map(len, events))


def test_demo_leaves_what_it_names_and_says_what_it_does(demo):
    _, places, said = demo
    assert all(Path(path).exists() for path in places.values())
    assert [f"[{n}/7]" in said for n in range(1, 8)] == [True] * 7
    for noise in ("Total FLOPs", "is not the published data", "litlogger"):
        assert noise not in said, noise


def test_demo_is_verified_against_a_second_model_and_claims_no_more_than_it_shows(demo):
    run, places, _ = demo
    results = json.loads(run.results.read_text())
    status = {check["id"]: check["status"] for check in results["checks"]}
    for name in ("weights", "exported_pair", "panels", "identities", "data"):
        assert status[name] == "pass", name
    assert results["verdict"]["word"] in ("undecided", "different (better)", "equivalent")
    assert "the shorter-trained model" in results["verdict"]["sentence"]
    assert str(run.path.parents[1]) not in run.results.read_text()
    card = Path(places["card"]).read_text()
    assert f"{scores(run)['seed-42']:.4f}" in card
    assert "More Information Needed" not in card


def test_demo_again_skips_every_stage(demo, cli):
    run, _, _ = demo
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    again = cli("reproduce", "--demo", "--run-dir", run.path.parents[1])
    assert (again.code, again.err.count("done already")) == (0, 7), again.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    os.utime(run.best)  # as if it were trained on: what was made of the weights is made again
    once_more = cli("reproduce", "--demo", "--run-dir", run.path.parents[1], "--from", "export", "--until", "export")
    assert (once_more.code, "done already" in once_more.err) == (0, False), once_more.err
