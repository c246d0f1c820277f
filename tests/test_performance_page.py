"""docs/performance.md: what the files in verification/benchmarks say, and nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

BENCHMARKS = ROOT / "verification" / "benchmarks"
SCRIPT = ROOT / "scripts" / "make_performance_page.py"


def page(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BENCHMARKS, tmp_path / "benchmarks"))


def put(folder: Path, name: str, like: str, **changes: object) -> None:
    result = json.loads((folder / like).read_text()) | changes
    (folder / name).write_text(json.dumps(result))


def test_page_is_what_the_script_prints():
    assert (ROOT / "docs" / "performance.md").read_text() == page().stdout


def test_every_file_is_on_the_page_with_where_it_was_measured(folder):
    text = page(folder).stdout
    for file in folder.glob("*.json"):
        result = json.loads(file.read_text())
        assert f"### `{file.name}`" in text
        assert result["device"] in text
        assert result["versions"]["torch"] in text


def test_nothing_is_said_of_gpus_that_were_not_measured(folder):
    text = page(folder).stdout
    assert "No GPU is among them" in text
    assert "reached" not in text


def test_file_of_another_device_becomes_a_part_of_the_page(folder):
    train = json.loads((folder / "train-cpu.json").read_text())
    ratio = {"median": 2.5, "min": 2.4, "max": 2.6, "memory": 1.07}
    put(
        folder,
        "train-accelerator.json",
        "train-cpu.json",
        device="Some Accelerator",
        device_type="gpu",
        ratios=train["ratios"] | {"floodrepro / terratorch": ratio},
        share_of_matmul_rate=train["share_of_matmul_rate"] | {"floodrepro": 0.39},
        loss_difference=train["loss_difference"] | {"floodrepro": 1e-4},
        loss_spread_of_first=2e-4,
        failed={"--compile": "no compiler"},
    )
    text = page(folder).stdout
    assert "### `train-accelerator.json`" in text
    assert "Some Accelerator" in text
    assert "No GPU is among them" not in text
    assert "| floodrepro: 2 times as fast | 2.5 | reached |" in text
    assert "| floodrepro: 40% of the matmul rate | 39% | not reached |" in text
    assert "| floodrepro: no more memory | 1.07 times | not reached |" in text
    assert "| floodrepro: loss within 0.0002 | 0.0001 | reached |" in text
    assert "--compile failed here: no compiler" in text


def test_figures_are_those_of_the_files(folder):
    changed = {"terratorch": {"median": 123.4, "p10": 111.1, "p90": 133.3, "n": 3}}
    result = json.loads((folder / "test-cpu.json").read_text())
    put(folder, "test-cpu.json", "test-cpu.json", chips_per_second=result["chips_per_second"] | changed)
    assert "| terratorch | 123 | 111 to 133 |" in page(folder).stdout


def test_file_of_no_known_benchmark_is_refused_by_name(folder):
    shutil.copy(folder / "train-cpu.json", folder / "speed-cpu.json")
    done = page(folder)
    assert done.returncode != 0
    assert "speed-cpu.json" in done.stderr
