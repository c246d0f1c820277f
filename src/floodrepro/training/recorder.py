"""What a run says of itself while it goes: times, memory, progress, in ``run.json``."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from floodrepro.run_folder import RunFolder
from floodrepro.training.guard import skipped_steps

_WARM_UP = 10  # steps of each process: allocators, autotuning and page caches settle
_WINDOW = 20  # steps between two waits for a GPU: a step's own time on the host says nothing about the device
_WRITE_EVERY = 30.0  # seconds
_GIB = 2**30


class Recorder(Callback):
    """Times steps and epochs and keeps the run's record up to date.

    Args:
        run: The run folder.
        paused: Seconds spent so far in writing states, which belong to no step.
        energy: The run's energy so far, session by session, as JSON types.
    """

    def __init__(self, run: RunFolder, paused: Callable[[], float], energy: Callable[[], list[dict[str, Any]]]) -> None:
        self._run, self._paused, self._energy = run, paused, energy
        self._windows: list[float] = []  # mean seconds of a step, window by window, warm-up left out
        self._epochs: list[dict[str, float]] = []
        self._epoch = {"seconds": 0.0, "waiting": 0.0, "chips": 0.0}
        self._steps_here = 0
        self._open = (0, 0.0)  # steps and start of the window that is being filled
        self._last: float | None = None  # end of the batch before, on a clock without pauses
        self._written = 0.0
        self._memory_warm: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"windows": list(self._windows), "epochs": list(self._epochs), "epoch": dict(self._epoch)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._windows, self._epochs, self._epoch = (state_dict[key] for key in ("windows", "epochs", "epoch"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out what the process used a GPU for before: another seed's run, a run before its rollback."""
        reset_peaks(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the epoch's clock."""
        self._last = self._now()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch as waiting for data."""
        if self._last is not None:
            self._epoch["waiting"] += self._now() - self._last
        else:  # the first batch after a resume in the middle of an epoch
            self._last = self._now()
        if self._open[0] == 0:
            self._open = (0, self._last)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the step, and the window if it is full."""
        on_gpu = pl_module.device.type == "cuda"
        steps, start = self._open[0] + 1, self._open[1]
        if steps >= (_WINDOW if on_gpu else 1):
            if on_gpu:
                torch.cuda.synchronize()
            if self._steps_here - (steps - 1) >= _WARM_UP:  # all of the window's steps lie behind the warm-up
                self._windows.append((self._now() - start) / steps)
            steps = 0
        now = self._now()
        self._epoch["seconds"] += now - (self._last or now)
        self._epoch["chips"] += len(batch["filename"]) * trainer.world_size
        self._open, self._last = (steps, start), now
        self._steps_here += 1
        if self._steps_here == _WARM_UP:
            self._memory_warm = memory(pl_module.device)
            reset_peaks(pl_module.device)
        if time.monotonic() - self._written > _WRITE_EVERY:
            self.write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on timing from here: a validation within an epoch is neither waiting for data nor a step."""
        self._last, self._open = self._now(), (0, 0.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the epoch."""
        self._epochs.append(self._epoch)
        self._epoch = {"seconds": 0.0, "waiting": 0.0, "chips": 0.0}
        self._last, self._open = None, (0, 0.0)
        self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the end."""
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring ``run.json`` up to date."""
        self._written = time.monotonic()
        if not trainer.is_global_zero:
            return
        after = memory(pl_module.device)
        self._run.update_record(
            progress={
                "epochs": len(self._epochs),
                "step": trainer.global_step,
                "skipped_steps": skipped_steps(trainer),
            },
            step_seconds=percentiles(self._windows),
            chips_per_second=percentiles([e["chips"] / e["seconds"] for e in self._epochs if e["seconds"]]),
            share_waiting_for_data=_share(self._epochs or [self._epoch]),
            seconds_writing_states=round(self._paused(), 3),
            memory_gib={"with_warm_up": self._memory_warm or after, "after_warm_up": after},
            energy=self._energy(),
        )

    def _now(self) -> float:
        """Seconds on a clock that stands still while a state is written."""
        return time.perf_counter() - self._paused()


def percentiles(values: Sequence[float]) -> dict[str, float | int] | None:
    """Median, 10th and 90th percentile and number of values; None of none."""
    if not values:
        return None
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    median = statistics.median(values)
    return {"median": _short(median), "p10": _short(tenths[0]), "p90": _short(tenths[8]), "n": len(values)}


def memory(device: torch.device) -> dict[str, float]:
    """Peaks in GiB: of the process on a CPU; allocated, reserved and in use on the whole device on a GPU."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB}  # Linux counts in KiB
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak["allocated"] = torch.cuda.max_memory_allocated(device) / _GIB
        peak["reserved"] = torch.cuda.max_memory_reserved(device) / _GIB
        peak["device"] = (total - free) / _GIB
    return {name: round(value, 3) for name, value in peak.items()}


def reset_peaks(device: torch.device) -> None:
    """Let a GPU's peaks begin again at what is in use now; a process's own peak on a CPU cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _share(epochs: Sequence[dict[str, float]]) -> float | None:
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return round(sum(epoch["waiting"] for epoch in epochs) / seconds, 4) if seconds else None


def _short(value: float) -> float:
    return float(f"{value:.5g}")
