"""bench train and bench guard, at their smallest, in processes of their own: they fork, and pytest has threads."""

import json
import os
import subprocess
import sys

import pytest

from floodrepro import recipe as recipes

# Sides that the command's default has not, few steps; one that cannot be.
OPTIONS = """
import json, sys
from pathlib import Path
from floodrepro import recipe as recipes
from floodrepro.system import bench_train as b

b.LOSS_AT = 3
recipe = recipes.read(recipes.find("terramind_v1_tiny_impactmesh_flood"))
recipe["trainer"]["precision"] = "32-true"
recipe["data"]["init_args"] |= {"batch_size": 2, "num_workers": 0}
recipe["model"]["init_args"]["model_args"]["backbone_pretrained"] = False
chosen = [side for side in b.SIDES["all"] if side.name in sys.argv[2:]]
chosen += [b.Side("impossible", overrides=("--trainer.precision=16-mixed", "--trainer.accelerator=cpu"))]
print(json.dumps(b.bench(recipe, Path(sys.argv[1]), chosen, size=32, steps=2, rounds=1)))
"""


def run(*command: object) -> dict:
    done = subprocess.run(
        [sys.executable, *(str(argument) for argument in command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # beside other tests, threads that wait for each other cost most
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def bench(*argv: object) -> dict:
    return run("-m", "floodrepro", "bench", *argv, "--format", "json")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("bench") / "train.json"
    result = bench("train", "--rounds", 1, "--steps", 4, "--batch", 2, "--size", 32, "--output", file)
    assert json.loads(file.read_text()) == result
    return result


def test_training_is_held_against_plain_terratorch(measured):
    rates, ratios = measured["chips_per_second"], measured["ratios"]
    for suffix in ("", ", reading"):
        ours, theirs = f"floodrepro{suffix}", f"terratorch{suffix}"
        ratio = ratios[f"{ours} / {theirs}"]
        assert ratio["median"] == pytest.approx(rates[ours]["median"] / rates[theirs]["median"], rel=1e-3)
        assert ratio["memory"] > 0
    for name, parts in measured["seconds"].items():
        assert 2 / sum(parts.values()) == pytest.approx(rates[name]["median"], rel=0.5)  # medians of parts of a step
    assert measured["failed"] == {}


def test_from_the_same_chips_in_memory_both_lose_the_same_bits(measured):
    losses = measured["loss_at_step_20"]
    assert losses["floodrepro"] == losses["terratorch"]
    assert measured["loss_difference"]["floodrepro"] == 0
    assert 0 < losses["terratorch"][0] < 1
    assert not any("reading" in name for name in losses)  # those have other chips in other orders


def test_speed_is_set_beside_what_this_device_multiplies(measured):
    matmul = measured["matmul_tflops"]["median"]
    assert 0.001 < matmul < 100
    for name, rate in measured["chips_per_second"].items():
        tflops = 3 * measured["forward_gflop_per_chip"] / 1e3 * rate["median"]
        assert measured["model_tflops"][name] == pytest.approx(tflops, rel=1e-3)
        assert measured["share_of_matmul_rate"][name] == pytest.approx(tflops / matmul, abs=1e-4)


def test_result_says_on_what_it_was_measured(measured):
    assert {"device", "device_type", "threads", "versions", "recipe_sha256", "precision", "when"} <= measured.keys()
    assert measured["device_type"] == "cpu"
    assert measured["chip_pixels"] == 32


def test_each_option_is_measured_alone_and_one_that_cannot_be_is_named(chips):
    names = ["floodrepro", "--channels-last", "--fused", "--precision bf16"]
    result = run("-c", OPTIONS, chips, *names)
    assert list(result["chips_per_second"]) == names
    assert set(result["ratios"]) == {f"{name} / floodrepro" for name in names[1:]}
    assert all(0 < values[0] < 1 for values in result["loss_at_step_3"].values())
    assert "fp16 does not run on a CPU" in result["failed"]["impossible"]


def test_a_loader_that_limits_is_seen_though_its_batches_come_in_bursts():
    """Four batches lie ready, then the next four are waited for: 1.6 s for four, where the device takes 0.1 s each."""
    from floodrepro.system.bench_train import step_seconds

    bursts = [0.1, 0.1, 0.1, 1.3] * 6
    ends = [sum(bursts[:n]) for n in range(len(bursts) + 1)]
    assert step_seconds(ends, in_bursts=True) == pytest.approx(0.4)
    assert step_seconds(ends, in_bursts=False) == pytest.approx(0.1)


def test_batches_read_ahead_are_no_measure_of_reading():
    from floodrepro.system.bench_sides import read_ahead

    recipe = recipes.read(recipes.find("terramind_v1_base_impactmesh_flood_amd"))
    assert read_ahead(recipe) == 2 * recipe["data"]["init_args"]["num_workers"] > 0
    recipe["data"]["init_args"]["num_workers"] = 0
    assert read_ahead(recipe) == 0


def test_counted_work_of_a_chip_is_what_is_known_of_the_models():
    from floodrepro.system.device_rate import forward_gflop

    known = {"terramind_v1_base_impactmesh_flood_amd": 682, "terramind_v1_tiny_impactmesh_flood": 64}
    for name, gflop in known.items():
        assert forward_gflop(recipes.read(recipes.find(name)), 256) == pytest.approx(gflop, rel=0.01)


def test_the_guard_s_share_of_a_step_is_measured():
    result = bench("guard", "--steps", 8, "--batch", 2)
    spent = result["step_seconds"]
    assert 0 < spent["in the guard's hooks"] < spent["without"]
    assert result["share_of_a_step"] == pytest.approx(spent["in the guard's hooks"] / spent["without"], rel=0.01)
    assert {"device", "versions", "recipe_sha256"} <= result.keys()
