"""The bench at its smallest: both sides train, test and read, and the figures come from what they did."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from floodrepro.system import bench
from floodrepro.system.bench import SIDES, StepClock, sum_up
from processes import Command
from tiny_training import Data, train


def forked(command: list[str], cwd: Path, env: dict[str, str], **_: object) -> SimpleNamespace:
    """As `subprocess.run` of ``python -m PROGRAM ARGUMENTS``, from a process that has imported TerraTorch already."""
    program, *arguments = command[2:]
    with contextlib.chdir(cwd):
        process = Command(*arguments, program=program, log=cwd / "log.txt", environment=env)
    return SimpleNamespace(returncode=process.wait(), stdout=process.log, stderr="")


@pytest.mark.slow
@pytest.mark.parametrize("action", ["train", "test"])
def test_both_sides_are_measured_in_turn_and_agree(cli, tmp_path, monkeypatch, asked_once, action):
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=forked))
    flags = ("--size", 32, "--steps", 2, "--rounds", 1, "--output", tmp_path, "--format", "json")
    found = json.loads(cli("bench", action, *flags).ok().out)["fp32"]
    assert json.loads((tmp_path / f"{action}-fp32.json").read_text()) == found
    assert set(found["chips_per_second"]) == set(SIDES)
    assert found["ratio"]["median"] > 0
    assert found["peak_memory"]["terratorch"]["process"] > 0.1
    assert found["environment"]["packages"]["torch"]
    assert found["score_difference"] == 0  # the same chips in the same order, from the same weights


def test_reading_alone_trains_nothing(tmp_path):
    data, out = Data(), tmp_path / "clock.json"
    data.batch_size = 2
    trainer = train(tmp_path, StepClock(str(out), steps=9, warm_up=2, read_only=True), data=data)
    assert trainer.global_step == 0
    assert json.loads(out.read_text())["batches"] == 9  # more than an epoch has: from the front again


def run(rate: float, loss: float = 0.5) -> dict:
    found = {"chips_per_second": rate, "batches": 4, "scores": {"loss": loss}}
    return found | {"memory": {"process": rate / 10}, "environment": {}}


@pytest.mark.parametrize("loss", [0.5, 0.75, float("nan")])
def test_ratios_are_of_one_round_and_scores_that_differ_are_told(loss):
    found = sum_up({"terratorch": [run(10), run(20)], "floodrepro": [run(20, loss), run(30)]})
    assert found["score_difference"] == pytest.approx(loss - 0.5, nan_ok=True)
    assert found["ratio"] == {"median": 1.75, "p10": 1.55, "p90": 1.95, "n": 2}
    assert found["peak_memory"]["floodrepro"] == {"process": 3.0}
    rates = found["chips_per_second"]["terratorch"]
    assert 10 <= rates["p10"] <= rates["median"] == 15 <= rates["p90"] <= 20
