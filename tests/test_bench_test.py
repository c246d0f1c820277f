"""bench test, at its smallest: the command in a process of its own, for it forks and pytest has threads."""

import json
import os
import subprocess
import sys

import pytest

from floodrepro import recipe as recipes
from floodrepro.errors import FloodreproError, UsageError


def run(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "floodrepro", "bench", "test", *(str(argument) for argument in argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # beside other tests, threads that wait for each other cost most
    )


def test_test_pass_is_held_against_terratorchs_own_with_equal_metrics(tmp_path):
    file = tmp_path / "test.json"
    done = run("--batches", 4, "--batch", 2, "--size", 32, "--rounds", 1, "--output", file, "--format", "json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(file.read_text())
    rates, ratio = result["chips_per_second"], result["ratios"]["floodrepro / terratorch"]
    assert ratio["median"] == pytest.approx(rates["floodrepro"]["median"] / rates["terratorch"]["median"], rel=1e-3)
    assert result["largest_difference_of_metrics"] <= 1e-6
    assert 0 < result["metrics"]["test/IoU_1"] < 1
    ours, theirs = result["seconds"]["floodrepro"], result["seconds"]["terratorch"]
    assert theirs["counts by chip"] < ours["counts by chip"] < ours["forward, loss, metrics"]
    assert {"device", "device_type", "versions", "recipe_sha256", "precision", "chip_pixels"} <= result.keys()


def test_pass_of_nothing_but_warm_up_is_refused(chips):
    from floodrepro.system.bench_test import bench

    recipe = recipes.read(recipes.find("demo"))
    recipe["data"]["init_args"]["batch_size"] = 9  # of 18 chips
    with pytest.raises(UsageError, match="2 batches are warm-up"):
        bench(recipe, chips, size=64, rounds=1)


def passes(**changes: float) -> list[dict]:
    return [{"metrics": {"test/mIoU": 0.5, "test/IoU_0": 0.6, "test/IoU_1": 0.4} | changes}]


def test_metrics_that_differ_fail_the_bench():
    from floodrepro.system.bench_test import _difference

    theirs = [{"metrics": passes()[0]["metrics"] | {"test/Boundary_mIoU": 0.1}}]
    assert _difference(theirs, passes(**{"test/IoU_1": 0.4 + 5e-7})) == pytest.approx(5e-7)
    with pytest.raises(FloodreproError, match="differ by 2e-06"):
        _difference(theirs, passes(**{"test/IoU_1": 0.4 + 2e-6}))
    with pytest.raises(FloodreproError, match="differ by nan"):
        _difference(theirs, passes(**{"test/IoU_1": float("nan")}))


def test_weights_that_predict_one_class_prove_nothing():
    from floodrepro.system.bench_test import _difference

    one_class = passes(**{"test/IoU_1": 0.0})
    with pytest.raises(FloodreproError, match="one class everywhere"):
        _difference(one_class, one_class)
