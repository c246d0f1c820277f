"""What a run says of itself while it goes: speed, memory, energy and one line an epoch, in any TerraTorch recipe."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from floodrepro.callbacks.energy import EnergyMeter, find_sources
from floodrepro.callbacks.exact_resume import ExactResume
from floodrepro.callbacks.nan_guard import tensors_of

_WARM_UP = 10  # batches of each process: allocators, autotuning and page caches settle


class RunRecord(Callback):
    """Writes a run's speed, memory and energy to a file after each epoch, and one line an epoch to stderr.

    In a recipe::

        trainer:
          callbacks:
            - class_path: floodrepro.callbacks.RunRecord
              init_args: {path: runs/mine/run_record.json}

    The file holds, for all parts of a resumed run:

    - ``epochs``: of each one ``epoch`` (from 0), ``steps`` (batches), ``chips`` (of all processes), ``seconds``
      (without validation and the writing of states) and ``waiting`` (seconds until a batch was there).
    - ``chips_per_second`` over epochs: ``median``, ``p10``, ``p90``, ``n``; ``share_waiting_for_data`` of the seconds.
    - ``memory_gib``: peaks of this part ``with_warm_up`` (its first 10 batches) and ``after_warm_up``: ``process``; on
      a GPU also ``allocated``, ``reserved`` and ``device`` (in use on the whole device now).
    - ``energy``: an entry for each part, see `floodrepro.callbacks.energy`.
    - ``progress``: ``epochs``, ``step``, ``skipped_steps`` (by GradScaler; null where the optimizer counts none).
    - ``seconds_writing_states``: of this part, by `ExactResume`.

    Args:
        path: The file; ``checkpoints/run_record.json`` below ``default_root_dir`` if None.
        metrics: Names in the line of an epoch; if None the losses, val/mIoU and the last class's val/IoU.
        write: Called with the record in place of writing a file.
    """

    def __init__(
        self,
        path: str | None = None,
        metrics: list[str] | None = None,
        write: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._path, self._metrics, self._write = path, metrics, write
        self._epochs: list[dict[str, Any]] = []
        self._epoch = {"steps": 0, "chips": 0, "seconds": 0.0, "waiting": 0.0}
        self._energy: list[dict[str, Any]] = []  # of the parts before this one
        self._meter = EnergyMeter([])
        self._began = self._last = 0.0  # of the epoch; end of the batch before
        self._batches = 0  # of this process
        self._warm: dict[str, float] | None = None  # peaks of the warm-up

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"epochs": [*self._epochs], "epoch": {**self._epoch}, "energy": [*self._energy, self._meter.reading()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._epochs, self._epoch, self._energy = (state_dict[key] for key in ("epochs", "epoch", "energy"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure."""
        reset_peaks(pl_module.device)
        if trainer.is_global_zero:
            self._meter = EnergyMeter(find_sources(trainer.device_ids if pl_module.device.type == "cuda" else []))
            self._meter.start()
        self._began = self._last = self._now(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's clock."""
        self._began = self._last = self._now(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch as waiting for data."""
        self._epoch["waiting"] += self._now(trainer) - self._last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the step."""
        if trainer.is_last_batch and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # once an epoch: what the device still had to do is training too
        now, sample = self._now(trainer), next(tensors_of(batch), None)
        self._epoch["seconds"] += now - self._last
        self._epoch["chips"] += 0 if sample is None else len(sample) * trainer.world_size
        self._epoch["steps"] += 1
        self._batches, self._last = self._batches + 1, now
        if self._batches == _WARM_UP:
            self._warm = peak_memory(pl_module.device)
            reset_peaks(pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on timing from here: a validation within an epoch is neither waiting for data nor a step."""
        self._last = self._now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the epoch: the record, and its line."""
        self._epochs.append({"epoch": trainer.current_epoch, **self._epoch})
        self._epoch = dict.fromkeys(self._epoch, 0)
        self._publish(trainer, pl_module)
        if trainer.is_global_zero:
            known = trainer.callback_metrics
            last_class = [name for name in known if name.startswith("val/IoU_")][-1:]
            names = self._metrics or ["train/loss", "val/loss", "val/mIoU", *last_class]
            shown = "  ".join(f"{name} {float(known[name]):.4f}" for name in names if name in known)
            of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            line = f"epoch {trainer.current_epoch + 1}{of}  {shown}  {self._now(trainer) - self._began:.1f} s"
            print(f"floodrepro: {line}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the end."""
        self._meter.stop()
        self._publish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write how far it came."""
        self.on_train_end(trainer, pl_module)

    def _publish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        record = self._record(trainer, peak_memory(pl_module.device))
        if self._write is not None:
            self._write(record)
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(self._path or Path(trainer.default_root_dir, "checkpoints", "run_record.json"))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)

    def _record(self, trainer: Trainer, memory: dict[str, float]) -> dict[str, Any]:
        seconds, waiting = (sum(epoch[key] for epoch in self._epochs) for key in ("seconds", "waiting"))
        return {
            "progress": {
                "epochs": len(self._epochs),
                "step": trainer.global_step,
                "skipped_steps": _skipped_steps(trainer),
            },
            "epochs": [{key: round(value, 4) for key, value in epoch.items()} for epoch in self._epochs],
            "chips_per_second": percentiles([e["chips"] / e["seconds"] for e in self._epochs if e["seconds"]]),
            "share_waiting_for_data": round(waiting / seconds, 4) if seconds else None,
            "seconds_writing_states": round(_seconds_writing(trainer), 3),
            "memory_gib": {"with_warm_up": self._warm or memory, "after_warm_up": memory},
            "energy": self.state_dict()["energy"],
        }

    def _now(self, trainer: Trainer) -> float:
        """Seconds on a clock that stands still while a state is written."""
        return time.perf_counter() - _seconds_writing(trainer)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peaks in GiB: of the process on a CPU; allocated, reserved and in use on the whole device on a GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        peak |= {"allocated": allocated, "reserved": reserved, "device": total - free}
    return {name: round(value / 2**30, 3) for name, value in peak.items()}


def percentiles(values: Sequence[float]) -> dict[str, float | int] | None:
    """Median, 10th and 90th percentile (linear interpolation) and number of values; None of none."""
    if not values:
        return None
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    p10, median, p90 = (float(f"{value:.5g}") for value in (tenths[0], statistics.median(values), tenths[8]))
    return {"median": median, "p10": p10, "p90": p90, "n": len(values)}


def reset_peaks(device: torch.device) -> None:
    """Let a GPU's peaks begin again at what is in use now; those of a process on a CPU cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _seconds_writing(trainer: Trainer) -> float:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.seconds for callback in callbacks if isinstance(callback, ExactResume))


def _skipped_steps(trainer: Trainer) -> int | None:
    """Optimizer steps that GradScaler left out so far; None for an optimizer that does not count its own."""
    states = trainer.optimizers[0].state.values() if trainer.optimizers else ()
    taken = [float(state["step"]) for state in states if "step" in state]
    return trainer.global_step - int(max(taken)) if taken else None
