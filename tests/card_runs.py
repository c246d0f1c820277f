"""Run folders as fit, test and verify leave them, made in a moment: the weights are a handful of numbers."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from floodrepro import recipe as recipes
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.run_folder import RunFolder
from floodrepro.verification.check import Check, Evidence, Value
from floodrepro.verification.results import save, summarise

CHIPS, EPOCHS, BEST = {"train": 90, "val": 18}, 4, 2
LOSSES = [0.5, 0.4, 0.25, 0.3]
REQUIRED = ["parity", "weights"]


def make_run(path: Path, *, recipe: recipes.Recipe | None = None, **changes: Any) -> RunFolder:
    """A finished run of the demo recipe, its record changed as given."""
    run = RunFolder.create(path)
    recipe = recipe or recipes.read(recipes.find("demo"))
    digest = run.save_recipe(recipe)
    run.checkpoints.mkdir()
    weights = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(4)}
    torch.save({"state_dict": weights, "hyper_parameters": recipe["model"]["init_args"], "epoch": BEST}, run.best)
    with run.metrics.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "val/loss", "train/loss"])
        for epoch, loss in enumerate(LOSSES):
            writer.writerows([[epoch, 12 * epoch + 11, loss, ""], [epoch, 12 * epoch + 11, "", loss]])
    sha256 = hashlib.sha256(run.best.read_bytes()).hexdigest()
    run.update_record(**{**record(digest), "checkpoint_sha256": sha256, **changes})
    return run


def record(recipe_sha256: str) -> dict[str, Any]:
    """A run.json whose figures fit each other: 4 epochs of 12 batches, half a second each."""
    return {
        **{"started": "2026-03-01T10:00:00+00:00", "ended": "2026-03-01T10:00:50+00:00", "status": "finished"},
        **{"reason": "the recipe's end was reached", "recipe_sha256": recipe_sha256, "chips": CHIPS, "seed": 42},
        **{"data_digest": "d" * 64, "processes": 1, "batch_size": 8},
        "code": {"floodrepro": "0.1", "source_sha256": "5" * 64},
        "numerics": {"compiled": False, "channels_last": False, "fused": False},
        "resumes": [],
        "environment": {
            "code": {"commit": "c" * 40, "dirty": False, "note": None},
            "packages": {"python": "3.12.1", "torch": "2.9.1", "terratorch": "1.2.7", "lightning": "2.6.1"},
            "torch": {"version": "2.9.1+rocm7.2", "build": "rocm", "build_version": "7.2"},
            "accelerator": {"count": 1, "name": "AMD Instinct MI300X", "memory_gib": 191.7, "drivers": {}},
            "numerics": {"precision": "16-mixed"},
            "cpu": {"model": "a CPU"},
        },
        "progress": {"epochs": EPOCHS, "step": 48, "skipped_steps": 3},
        "step_seconds": {"median": 0.5, "p10": 0.4, "p90": 0.7, "n": 38},
        "chips_per_second": {"median": 15.5, "p10": 15.1, "p90": 15.9, "n": 4},
        "seconds_writing_states": 1.5,
        "memory_gib": {"with_warm_up": {"process": 2.5}, "after_warm_up": {"process": 2.25, "allocated": 30.5}},
        "energy": [{"joules": 30_600.0, "kWh": 0.0085, "method": "power", "note": "sampled power of a device"}],
        **{"checkpoint": "best.ckpt", "epochs": EPOCHS, "best_epoch": BEST, "best_val_loss": LOSSES[BEST]},
    }


def verify(run: RunFolder, failing: str = "", *, everywhere: bool = False, **changes: Any) -> dict[str, Any]:
    """Write the results.json that a battery of three checks leaves; *failing* names one that does not pass.

    Args:
        run: The run folder.
        failing: Id of a check that fails.
        everywhere: Whether all is flood, in truth and prediction, so that class 0 occurs nowhere.
        changes: Keys to replace at its top level, after it was made.
    """
    recipe, sha256 = recipes.read(run.recipe), hashlib.sha256(run.best.read_bytes()).hexdigest()
    own, other = table(sha256, everywhere=everywhere), table("e" * 64, wrong=9, everywhere=everywhere)
    chip_table.write(own, run.evaluation / "test" / "best.parquet")
    evidence = Evidence(run, run.read_record(), recipe, table=own, reference=other)
    evidence = Evidence(**{**vars(evidence), "reference_name": "IBM's checkpoint"})
    gap = Value("flood IoU, difference to the reference", -0.4, "pp", -1.1, 0.3, 0.9, "event jackknife", 18, 6)

    def status(name: str) -> str:
        return "fail" if name == failing else "pass"

    checks = [
        Check("parity", "Parity", "Flood IoU is equivalent.", status("parity"), "it | differs", values=[gap]),
        Check("weights", "Weights", "All are finite.", status("weights"), "two are NaN" * (failing == "weights")),
        Check("throughput", "Throughput", "It was measured.", "skip", "no bench was run"),
    ]
    results = summarise(evidence, checks, REQUIRED, "2026-03-01T11:00:00+00:00") | changes
    path = run.path / "verification" / "results.json"
    save(results, path)
    return json.loads(path.read_text())


def table(sha256: str, wrong: int = 5, *, everywhere: bool = False) -> ChipTable:
    """A chip table of 18 chips of 6 events, 100 pixels each, *wrong* of them dry and called flood."""
    counts = np.array([[[0, 0], [0, 100]] if everywhere else [[90 - wrong, wrong], [3, 7]]] * 18)
    names = np.array([f"EMSR{900 + i // 3}_1_35TMF_x{i}_y0" for i in range(18)])
    histogram = np.zeros((18, 2, 2, BINS), dtype=np.int64)  # sure of all: probabilities of nearly 0 and 1
    histogram[..., 1, -1], histogram[..., 1, 0] = counts[..., 1], counts[..., 0]
    histogram[..., 0, -1], histogram[..., 0, 0] = counts[..., 0], counts[..., 1]
    metadata = {"split": "test", "protocol": "v0", "class_names": ["rest", "flood"]}
    metadata |= {"checkpoint": {"name": "best.ckpt", "sha256": sha256}}
    zeros = np.zeros((18, 2, BINS))
    return ChipTable(names, counts, np.zeros(18, dtype=np.int64), histogram, zeros, zeros.sum(axis=2), metadata)
