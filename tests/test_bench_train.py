"""bench train and bench guard, at their smallest, in processes of their own: they fork, and pytest has threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def bench(*argv: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "floodrepro", "bench", *(str(argument) for argument in argv), "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # beside other tests, threads that wait for each other cost most
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_training_is_held_against_plain_terratorch_on_the_same_chips(tmp_path: Path):
    file = tmp_path / "train.json"
    result = bench("train", "--rounds", 1, "--steps", 4, "--batch", 2, "--output", file)
    assert json.loads(file.read_text()) == result
    assert set(result["chips_per_second"]) > {"terratorch", "floodrepro"}
    ratio = result["ratios"]["floodrepro / terratorch"]
    rates = result["chips_per_second"]
    assert ratio["median"] == pytest.approx(rates["floodrepro"]["median"] / rates["terratorch"]["median"], rel=1e-3)
    assert ratio["memory"] > 0
    assert all(0 < loss < 1 for loss in result["loss_at_step_20"].values())


def test_the_guard_s_share_of_a_step_is_measured():
    result = bench("guard", "--steps", 8, "--batch", 2)
    spent = result["step_seconds"]
    assert 0 < spent["in the guard's hooks"] < spent["without"]
    assert result["share_of_a_step"] == pytest.approx(spent["in the guard's hooks"] / spent["without"], rel=0.01)
