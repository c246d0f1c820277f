"""How fast floodrepro is beside plain TerraTorch: the same chips and weights, each side in processes of its own.

`train` runs ``terratorch fit`` and ``floodrepro fit``, `test` both tests with the same checkpoint, and `data` reads
training batches with both data modules. `StepClock`, a callback that the recipe of both sides names, takes the time.
"""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from floodrepro import console
from floodrepro.callbacks.run_record import peak_memory, percentiles
from floodrepro.errors import FloodreproError
from floodrepro.publishing.export import with_stock_data
from floodrepro.recipe import Recipe, to_yaml
from floodrepro.system.environment import environment

SIDES = ("terratorch", "floodrepro")
WARM_UP = 4  # steps that do not count, beside the batches that loader processes have read ahead


class StepClock(Callback):
    """Times a training or a test and writes what it found to a JSON file.

    In a training the chips come in the order of the split, over and over, on both sides; dropout is drawn from the same
    seed. float32 matrix products are exact on both sides: importing TerraTorch would leave bf16 products on some CPUs.

    Args:
        output: The JSON file.
        steps: Steps that count.
        warm_up: Steps before them.
        read_only: Read the batches of the steps and train on none.
    """

    def __init__(self, output: str, steps: int, warm_up: int, read_only: bool = False) -> None:
        self._output, self._steps, self._warm_up, self._read_only = Path(output), steps, warm_up, read_only
        self._done, self._start = 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fix the order of the training chips. The data module has been set up by now."""
        torch.set_float32_matmul_precision("highest")
        module: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit":
            loader = _in_order(module.train_dataloader(), self._warm_up + self._steps)
            module.train_dataloader = lambda: loader

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed dropout, or read."""
        torch.manual_seed(0)
        if self._read_only:
            for _ in trainer.datamodule.train_dataloader():  # type: ignore[attr-defined]
                self._step(pl_module)
            self._write(trainer, pl_module, {})
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Count a training step."""
        self._step(pl_module)
        if self._done == self._warm_up + self._steps:
            self._write(trainer, pl_module, {"loss": float(outputs["loss"])})

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count a batch of the test."""
        self._step(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the time and the metrics of the test."""
        self._write(trainer, pl_module, {name: float(value) for name, value in trainer.callback_metrics.items()})

    def _step(self, module: LightningModule) -> None:
        self._done += 1
        if self._done == self._warm_up:
            self._start = self._now(module)

    def _now(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _write(self, trainer: Trainer, module: LightningModule, scores: dict[str, float]) -> None:
        seconds = self._now(module) - self._start
        batches = self._done - self._warm_up
        rate = batches * trainer.datamodule.batch_size / seconds  # type: ignore[attr-defined]
        found = {"chips_per_second": rate, "batches": batches, "scores": scores}
        found |= {"memory": peak_memory(module.device), "environment": environment(str(trainer.precision))}
        self._output.write_text(json.dumps(found))


def _in_order(loader: DataLoader[Any], batches: int) -> DataLoader[Any]:
    """A loader like another one, with batches in the order of the data set, from the front again at its end."""
    size, count = loader.batch_size or 1, len(loader.dataset)  # type: ignore[arg-type]
    order = [[(step * size + i) % count for i in range(size)] for step in range(batches)]
    kept = ("num_workers", "prefetch_factor", "collate_fn", "pin_memory", "worker_init_fn", "persistent_workers")
    return DataLoader(loader.dataset, batch_sampler=order, **{name: getattr(loader, name) for name in kept})


def bench(action: str, recipe: Recipe, folder: Path, *, steps: int, rounds: int) -> dict[str, Any]:
    """Run both sides in turn, round by round, and return what was measured beside `sum_up` of it.

    Args:
        action: train, test or data.
        recipe: Resolved, for floodrepro's data module, with absolute paths of chips that are extracted.
        folder: An empty folder for what the runs leave.
        steps: Training steps, or batches read, that count. A test counts its whole split but for the warm-up.
        rounds: Processes of each side.

    Raises:
        FloodreproError: A process failed, or ended before its steps.
    """
    arguments = recipe["data"]["init_args"]
    # Batches that lie ready before the first step say nothing about how fast they are read.
    ahead = arguments.get("num_workers", 0) * (arguments.get("prefetch_factor") or 2)
    warm_up = 2 if action == "test" else WARM_UP + ahead
    clock = {"steps": steps, "warm_up": warm_up, "read_only": action == "data"}
    checkpoint = None
    if action == "test":
        console.say("training two steps, for weights that both sides test")
        _run_side(SIDES[0], recipe, folder, "weights", {"steps": 1, "warm_up": 1})
        checkpoint = max(folder.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            console.say(f"{action}, round {number + 1} of {rounds}: {side}")
            runs[side].append(_run_side(side, recipe, folder, f"{side}-{number}", clock, checkpoint))
    counted = f"{runs[SIDES[0]][0]['batches']} batches each after {warm_up} of warm-up"
    return {
        "what": f"{action}: {rounds} processes a side in turn, {counted}, with reading, without augmentation",
        "precision": str(recipe["trainer"]["precision"]),
        "batch_size": arguments["batch_size"],
        **sum_up(runs),
    }


def sum_up(runs: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Sum up what `StepClock` wrote, by side, one for each round: ratios are ours over theirs, round by round."""
    theirs, ours = (runs[side] for side in SIDES)
    pairs = list(zip(ours, theirs, strict=True))
    shared = ours[0]["scores"].keys() & theirs[0]["scores"].keys()
    gaps = [abs(a["scores"][name] - b["scores"][name]) for a, b in pairs for name in shared]
    return {
        "chips_per_second": {side: percentiles([run["chips_per_second"] for run in runs[side]]) for side in SIDES},
        "ratio": percentiles([a["chips_per_second"] / b["chips_per_second"] for a, b in pairs]),
        "peak_memory": {
            side: {kind: max(run["memory"][kind] for run in runs[side]) for kind in ours[0]["memory"]} for side in SIDES
        },
        "scores": {side: [run["scores"] for run in runs[side]] for side in SIDES},
        "score_difference": float(np.max(gaps)) if gaps else None,  # NaN if one is
        "environment": ours[0]["environment"],
    }


def describe(found: Mapping[str, Any]) -> str:
    """What `bench` returned, as a table and a few lines."""
    rows = [["", "chips/s", "p10", "p90", "peak GiB"]]
    for side, rate in found["chips_per_second"].items():
        peaks = [f"{kind} {value:.2f}" for kind, value in found["peak_memory"][side].items()]
        rows.append([side, *(f"{rate[q]:.2f}" for q in ("median", "p10", "p90")), ", ".join(peaks)])
    text = "times as fast: {median:.3f} (p10 {p10:.3f}, p90 {p90:.3f} of the rounds)\n".format(**found["ratio"])
    if found["score_difference"] is not None:
        text += f"largest difference of loss or metrics: {found['score_difference']:.1e}\n"
    text += f"{found['what']}; {found['precision']}, batches of {found['batch_size']}"
    return f"{console.columns(rows)}\n\n{text}"


def _run_side(
    side: str, recipe: Recipe, folder: Path, name: str, clock: Mapping[str, Any], checkpoint: Path | None = None
) -> dict[str, Any]:
    """Run one process: random weights, no augmentation, the clock last. Returns what the clock wrote."""
    steps, output, file = clock["steps"] + clock["warm_up"], folder / f"{name}.json", folder / f"{name}.yaml"
    timed = copy.deepcopy(recipe)
    timed["data"]["init_args"]["augment"] = False
    timed["model"]["init_args"]["model_args"]["backbone_pretrained"] = False
    timed["trainer"] |= {"devices": 1, "max_epochs": 1, "max_steps": steps, "enable_progress_bar": False}
    callbacks = [c for c in timed["trainer"].get("callbacks") or [] if not c["class_path"].endswith("ProgressBar")]
    own = {"class_path": "floodrepro.system.bench.StepClock", "init_args": {"output": str(output), **clock}}
    timed["trainer"]["callbacks"] = [*callbacks, own]
    file.write_text(to_yaml(with_stock_data(timed) if side == "terratorch" else timed), encoding="utf-8")
    command = [sys.executable, "-m", side, "test" if checkpoint else "fit", "--config", str(file)]
    command += ["--ckpt_path", str(checkpoint)] if checkpoint else []
    place = ["--output", str(folder / name)] if checkpoint else ["--runs-root", str(folder / "runs"), "--name", name]
    command += place if side == "floodrepro" else []
    variables = os.environ | {"LIGHTLY_DID_VERSION_CHECK": "True", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        print("\n".join((done.stdout + done.stderr).strip().splitlines()[-20:]), file=sys.stderr)
        raise FloodreproError(f"a process of the bench ended with exit code {done.returncode}", where=" ".join(command))
    if not output.is_file():
        raise FloodreproError(f"{side} ended after fewer than {steps} steps", fix="give more --steps")
    return dict(json.loads(output.read_text()))
