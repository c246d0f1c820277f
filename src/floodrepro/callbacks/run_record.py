"""What a run says of itself while it trains: speed, memory, energy and one line an epoch, in any TerraTorch recipe."""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from floodrepro.callbacks.energy import EnergyMeter, find_sources
from floodrepro.callbacks.nan_guard import tensors_of

_WARM_UP = 10  # batches of each process: allocators, autotuning and page caches settle


class RunRecord(Callback):
    """Writes a run's speed, memory and energy to a file after each epoch, and one line an epoch to stderr.

    In a recipe::

        trainer:
          callbacks:
            - class_path: floodrepro.callbacks.RunRecord

    ``checkpoints/run_record.json`` below ``default_root_dir`` holds, for all parts of a resumed run: ``progress``
    (epochs, steps, and steps that GradScaler skipped), ``epoch_times`` (of each epoch, from 0: batches, chips of all
    processes, seconds without validation, seconds waiting for batches), ``chips_per_second`` over epochs, the
    ``share_waiting_for_data``, ``memory_gib`` (`peak_memory` of the newest part) and the ``energy`` of each part.

    Args:
        write: Called with the record's entries, by name, in place of writing a file.
    """

    def __init__(self, write: Callable[..., None] | None = None) -> None:
        self._write = write
        self._epochs: list[dict[str, Any]] = []
        self._epoch = {"steps": 0, "chips": 0, "seconds": 0.0, "waiting": 0.0}
        self._energy: list[dict[str, Any]] = []  # of the parts before this one
        self._meter = EnergyMeter([])
        self._began = self._last = 0.0  # of the epoch; end of the batch before
        self._batches = 0  # of this process

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues."""
        return {"epochs": [*self._epochs], "epoch": {**self._epoch}, "energy": [*self._energy, self._meter.reading()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue it."""
        self._epochs, self._epoch, self._energy = (state_dict[key] for key in ("epochs", "epoch", "energy"))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to measure. An epoch that is resumed in its middle has no start of its own."""
        self._began = self._last = time.perf_counter()
        if trainer.is_global_zero:
            self._meter = EnergyMeter(find_sources(trainer.device_ids if pl_module.device.type == "cuda" else []))
            self._meter.start()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the epoch's clock."""
        self._began = self._last = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch as waiting for data."""
        self._epoch["waiting"] += time.perf_counter() - self._last

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close the step."""
        if trainer.is_last_batch and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # once an epoch: what the device still had to do is training too
        now, sample = time.perf_counter(), next(tensors_of(batch), None)
        self._epoch["seconds"] += now - self._last
        self._epoch["chips"] += 0 if sample is None else len(sample) * trainer.world_size
        self._epoch["steps"] += 1
        self._batches, self._last = self._batches + 1, now
        if self._batches == _WARM_UP and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Time from here: a validation within an epoch is neither waiting for data nor a step."""
        self._last = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the epoch: the record, and its line."""
        self._epochs.append({"epoch": trainer.current_epoch, **self._epoch})
        self._epoch = dict.fromkeys(self._epoch, 0)
        self._publish(trainer, pl_module)
        if trainer.is_global_zero:
            known = trainer.callback_metrics
            names = ["train/loss", "val/loss", "val/mIoU", *[n for n in known if n.startswith("val/IoU_")]]
            shown = "  ".join(f"{name} {float(known[name]):.4f}" for name in names if name in known)
            of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            line = f"epoch {trainer.current_epoch + 1}{of}  {shown}  {time.perf_counter() - self._began:.1f} s"
            print(f"floodrepro: {line}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Any, pl_module: Any, exception: BaseException | None = None) -> None:
        """Write the end, or how far the run came."""
        self._meter.stop()
        self._publish(trainer, pl_module)

    on_exception = on_train_end

    def _publish(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        states = trainer.optimizers[0].state.values() if trainer.optimizers else ()
        taken = [int(state["step"]) for state in states if "step" in state]
        skipped = trainer.global_step - max(taken) if taken else None
        seconds, waiting = (sum(epoch[key] for epoch in self._epochs) for key in ("seconds", "waiting"))
        record = {
            "progress": {"epochs": len(self._epochs), "step": trainer.global_step, "skipped_steps": skipped},
            "epoch_times": [{key: round(value, 4) for key, value in epoch.items()} for epoch in self._epochs],
            "chips_per_second": percentiles([e["chips"] / e["seconds"] for e in self._epochs if e["seconds"]]),
            "share_waiting_for_data": round(waiting / seconds, 4) if seconds else None,
            "memory_gib": {"after_warm_up": peak_memory(pl_module.device)},
            "energy": self.state_dict()["energy"],
        }
        if self._write is not None:
            self._write(**record)
        elif not trainer.fast_dev_run:
            path = Path(trainer.default_root_dir, "checkpoints", "run_record.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peaks in GiB: of the ``process``; on a GPU also ``allocated``, ``reserved`` and now in use on the ``device``."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        peak |= {"allocated": allocated, "reserved": reserved, "device": total - free}
    return {name: round(value / 2**30, 3) for name, value in peak.items()}


def percentiles(values: Sequence[float]) -> dict[str, float | int] | None:
    """Median, 10th and 90th percentile (linear interpolation, five digits) and number of values; None of none."""
    if not values:
        return None
    p10, median, p90 = (float(f"{value:.5g}") for value in np.percentile(values, (10, 50, 90)))
    return {"median": median, "p10": p10, "p90": p90, "n": len(values)}
