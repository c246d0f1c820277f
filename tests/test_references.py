"""Thresholds and published figures: found, sourced, and true to their own identities."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import floodrepro
from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.names import PROTOCOLS, SPLITS
from floodrepro.errors import UsageError
from floodrepro.verification import references
from floodrepro.verification.checks.identities import contradictions
from floodrepro.verification.references import load_published, load_thresholds

PUBLISHED = load_published()
ROWS = {stem: entry for stem, entry in PUBLISHED.items() if "figures" in entry}


def test_the_three_published_rows_and_the_data_set_are_there():
    assert set(ROWS) == {"published_amd", "published_amd_run_a", "published_ibm"}
    assert set(PUBLISHED) - set(ROWS) == {"dataset"}


@pytest.mark.parametrize("stem", PUBLISHED)
def test_every_reference_says_where_it_was_published(stem: str):
    assert "msradam/" in PUBLISHED[stem]["source"] or "ibm-esa-geospatial/" in PUBLISHED[stem]["source"]


@pytest.mark.parametrize("stem", ROWS)
def test_published_figures_satisfy_the_identities(stem: str):
    entry = ROWS[stem]
    assert contradictions(entry["figures"], entry["decimals"]) == []
    assert (entry["protocol"], entry["split"], entry["chips"]) == ("v0", "test", PROTOCOLS["v0"].chip_counts[2])


@pytest.mark.parametrize("name", ["mIoU", "IoU_0", "IoU_1", "F1_Score", "Pixel_Accuracy"])
def test_one_figure_off_by_three_of_its_last_digit_breaks_an_identity(name: str):
    figures = ROWS["published_ibm"]["figures"]
    assert contradictions(figures | {name: figures[name] + 3e-4}, 4)


def test_rows_mixed_from_two_runs_break_an_identity():
    mixed = ROWS["published_amd"]["figures"] | {"IoU_1": ROWS["published_amd_run_a"]["figures"]["IoU_1"]}
    assert any(line.startswith("mIoU is 0.6642, its IoUs give 0.666") for line in contradictions(mixed, 4))


@pytest.mark.parametrize("stem", ["published_amd_run_a", "published_ibm"])
def test_published_class_accuracies_follow_from_the_ious(stem: str):
    iou = [ROWS[stem]["figures"][f"IoU_{k}"] for k in (0, 1)]
    recall = [ROWS[stem]["figures"][f"Class_Accuracy_{k}"] for k in (0, 1)]
    errors = 1 / (sum(1 / (1 - x) for x in iou) - 1)  # FP + FN as a share of all pixels
    hits = [errors * x / (1 - x) for x in iou]
    missed = [hit * (1 - r) / r for hit, r in zip(hits, recall, strict=True)]
    assert sum(missed) == pytest.approx(errors, rel=0.005)  # four digits of each


def test_best_epoch_of_run_a_is_the_lowest_of_its_curve():
    losses = ROWS["published_amd_run_a"]["val_loss"]
    assert losses[10] is None, "epoch 10 was NaN"
    assert min(range(10), key=lambda epoch: losses[epoch]) == ROWS["published_amd_run_a"]["best_epoch"] == 9


def test_chip_counts_are_those_that_the_audit_knows():
    dataset = PUBLISHED["dataset"]
    assert dataset["data_of"] == DATA_OF
    for version, protocol in PROTOCOLS.items():
        assert tuple(dataset["chips"][version][split] for split in SPLITS) == protocol.chip_counts


def test_a_check_without_thresholds_of_its_own_cannot_be_required_by_mistake():
    order = (
        *("parity", "head_to_head", "convergence", "events", "calibration", "weights", "load_back", "round_trip"),
        *("throughput", "panels", "identities", "data", "provenance", "variance"),
    )
    thresholds = load_thresholds()
    assert set(thresholds["required"]) <= set(order)
    assert set(thresholds) - {"required"} <= set(order)


def test_a_wheel_finds_its_files_beside_its_code(tmp_path: Path):
    package = tmp_path / "floodrepro"
    shutil.copytree(Path(floodrepro.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    folder = package / "verification"
    (folder / "reference").mkdir(exist_ok=True)
    (folder / "thresholds.yaml").write_text("required: [only-in-the-wheel]\n", encoding="utf-8")
    (folder / "reference" / "someone.yaml").write_text("source: a wheel\n", encoding="utf-8")
    code = (
        "from floodrepro.verification.references import load_published, load_thresholds\n"
        "print(load_thresholds()['required'], load_published())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['only-in-the-wheel'] {'someone': {'source': 'a wheel'}}"


def test_damaged_thresholds_are_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(references, "_folder", lambda: tmp_path)
    (tmp_path / "thresholds.yaml").write_text("parity: [", encoding="utf-8")
    with pytest.raises(UsageError) as error:
        load_thresholds()
    assert "thresholds.yaml" in str(error.value.where)
