"""The full state of a run: saved so that a resumed run ends with the same bits as one that was never interrupted.

Lightning 2.6.1 saves model, optimizer, schedulers, loops and callbacks. Missing, and kept here: the generators, the
epoch's running sums (what ``self.log`` and torchmetrics have gathered so far), and metrics.csv up to the step.

Lightning goes on exactly from two moments only, and there alone a state is saved: before a training batch that does not
open an epoch, and before a validation. Both were tried against an uninterrupted run, bit by bit.
"""

import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torchmetrics import Metric, MetricCollection

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.run_folder import RunFolder
from floodrepro.training.checkpoint_files import LAST
from floodrepro.training.stopping import Interrupted, StopRequest

KEY = "floodrepro"  # of what is added to Lightning's checkpoint
_SCHEMA = 1


class FullState(Callback):
    """Saves ``checkpoints/last.ckpt`` before every validation, every N steps, when asked to stop, and at the end.

    Args:
        run: The run folder.
        identity: What a resumed run has to have in common with this one; goes into the file.
        stop: Asked before each batch whether the process was told to stop.
        every_n_steps: Optimizer steps between two states within an epoch.
        check: Called with trainer and module before anything is saved; raises if the state is bad.
        own: Whether a state that is loaded is this run's own, not one that a new run is started from.
    """

    def __init__(
        self,
        run: RunFolder,
        identity: Mapping[str, Any],
        stop: StopRequest,
        every_n_steps: int,
        check: Callable[[Trainer, LightningModule], None],
        *,
        own: bool = True,
    ) -> None:
        self._run, self._identity, self._stop, self._every = run, dict(identity), stop, every_n_steps
        self._check, self._own = check, own
        self._stopping = False
        self._moment: str | None = None
        self._restored: dict[str, Any] | None = None
        self._saved_step = -1
        self.seconds = 0.0  # spent in saving by this process

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put back what was saved, once; save where it is time; stop where that was asked for."""
        self._restore(trainer, pl_module)
        step = trainer.global_step
        between_validations = batch_idx > 0 and batch_idx % (trainer.val_check_batch or math.inf) != 0
        possible = between_validations and batch_idx % trainer.accumulate_grad_batches == 0
        self._stopping = self._stop.agreed(trainer) or self._stopping  # several processes agree every few batches only
        due = self._stopping or step - max(self._saved_step, 0) >= self._every
        if possible and step != self._saved_step and due:
            self._save(trainer, "batch")
        # In the middle of an accumulation, or of an epoch's first batch, nothing can be saved: the next batch will do.
        if self._stopping and step in (0, self._saved_step):
            raise self._interrupted()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning, which has installed its own handlers by now."""
        self._stop.listen()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save: from here a killed run goes on with the validation, whatever the kill hits in it."""
        if trainer.sanity_checking:
            return
        self._restore(trainer, pl_module)
        # Gradients that are being accumulated are in no state: a run that is killed here repeats their batches.
        accumulating = trainer.fit_loop.epoch_loop._should_accumulate()
        if self._saved_step != trainer.global_step and not accumulating:
            self._save(trainer, "validation")

    def on_validation_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Stop where that was asked for: the state from before the validation is on the disk already.

        Several processes may have different numbers of batches here and cannot ask each other: they stop after it.
        """
        if not trainer.sanity_checking and trainer.world_size == 1 and self._stop.agreed(trainer):
            raise self._interrupted()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let plateau schedulers step: Lightning 2.6.1 leaves them out in an epoch that it resumed into."""
        trainer.fit_loop._restarting = False  # its setter would say True where max_steps is set

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end."""
        self._save(trainer, "end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give metrics.csv back to a run that had nothing left to do, in which no other hook was called."""
        if self._restored is not None and trainer.is_global_zero:
            _put_back_metrics(trainer, self._restored["metrics_csv"])

    def _interrupted(self) -> Interrupted:
        saved = "the state is saved" if (self._run.checkpoints / LAST).exists() else "before the first state was due"
        return Interrupted(self._stop.signal_number, self._run.path, saved)

    def _save(self, trainer: Trainer, moment: str) -> None:
        self._check(trainer, trainer.lightning_module)
        start = time.perf_counter()
        self._moment, self._saved_step = moment, trainer.global_step
        try:
            trainer.save_checkpoint(self._run.checkpoints / LAST, weights_only=False)
        finally:
            self._moment = None
            self.seconds += time.perf_counter() - start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add to Lightning's checkpoint; other full checkpoints that a recipe may ask for stay Lightning's own."""
        if self._moment is None:
            return
        for logger in trainer.loggers:
            logger.save()
        metrics_csv = self._run.metrics.read_bytes().decode() if self._run.metrics.is_file() else ""
        fit_loop = checkpoint["loops"]["fit_loop"]
        validated = dict(fit_loop["epoch_loop.val_loop.batch_progress"]["total"])
        _settle_progress(fit_loop, self._moment)
        checkpoint[KEY] = {
            "schema": _SCHEMA,
            "moment": self._moment,
            "identity": self._identity,
            "metrics_csv": metrics_csv,
            "validated": validated,  # what settling has written over
            "should_stop": trainer.should_stop,
            "ranks": _of_all_ranks(trainer, _rank_state(trainer, pl_module, sums=self._moment != "end")),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was added until the first batch, when nothing draws from a generator any more."""
        self._restored = checkpoint.get(KEY)
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if state and isinstance(callback, ModelCheckpoint) and callback.dirpath:
                _relocate(state, Path(callback.dirpath))
                # ModelCheckpoint 2.6.1 saves this score and does not load it.
                callback.current_score = state.get("current_score")
        if self._restored and self._own:  # an early stop is no one's state in Lightning 2.6.1
            trainer.should_stop = self._restored["should_stop"]

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        if len(state["ranks"]) != trainer.world_size:
            raise UsageError(
                f"the state is one of {len(state['ranks'])} processes, this run has {trainer.world_size}",
                where=self._run.path,
                fix="go on with as many devices: other numbers see other chips in each step",
            )
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            _put_back_metrics(trainer, state["metrics_csv"])
        apply_changes(trainer, recipes.differences(state["identity"]["recipe"], self._identity["recipe"]))
        _put_back(trainer, pl_module, state["ranks"][trainer.global_rank])
        if state["moment"] == "batch":
            # Lightning takes the first batch after a resume for an epoch's first, and would drop the sums.
            trainer._logger_connector._first_loop_iter = False
        elif state["moment"] == "validation":
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.load_state_dict(state["validated"])
        console.say(f"going on from step {trainer.global_step}, epoch {trainer.current_epoch + 1}")


def _settle_progress(fit_loop: dict[str, Any], moment: str) -> None:
    """Leave Lightning's counters as its resuming reads them rightly; at the end of training they already are."""
    if moment == "batch":
        # The batch whose turn it is counts as not begun: it will be fetched again.
        for counts in ("total", "current"):
            tracker = fit_loop["epoch_loop.batch_progress"][counts]
            tracker["ready"] = tracker["completed"]
    elif moment == "validation":
        # "Interrupted in its first batch": with nothing begun Lightning would leave the validation out.
        total = fit_loop["epoch_loop.val_loop.batch_progress"]["total"]
        total.update(ready=1, started=1, processed=0, completed=0)


def _rank_state(trainer: Trainer, pl_module: LightningModule, *, sums: bool) -> dict[str, Any]:
    """Generators and, where there are any, running sums of this process, as tensors and plain values."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        # Of this process's device alone: the run may go on where fewer are seen.
        "cuda": [torch.cuda.get_rng_state(pl_module.device)] if pl_module.device.type == "cuda" else [],
        "logged": {k: _logged(m) for k, m in _results(trainer).items() if sums and m.is_tensor and not m.has_reset},
        "metrics": {
            name: {"count": metric._update_count, "state": {key: getattr(metric, key) for key in metric._defaults}}
            for name, metric in _metrics(pl_module)
            if sums and metric._update_count
        },
    }


def _put_back(trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any]) -> None:
    for key, saved in state["logged"].items():
        _results(trainer)[key] = _logged_again(trainer, saved)
    metrics = dict(_metrics(pl_module))
    for name, saved in state["metrics"].items():
        for key, value in saved["state"].items():
            # A copy each: metrics of one compute group shared their tensors, and add to them in place.
            own = [_own(v, pl_module) for v in value] if isinstance(value, list) else _own(value, pl_module)
            setattr(metrics[name], key, own)
        metrics[name]._update_count = saved["count"]
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and pl_module.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], pl_module.device)


def _own(value: torch.Tensor, pl_module: LightningModule) -> torch.Tensor:
    return value.detach().clone().to(pl_module.device)


def _results(trainer: Trainer) -> dict[str, _ResultMetric]:
    """What ``self.log`` has gathered in this training epoch."""
    return cast(dict[str, _ResultMetric], trainer.fit_loop.epoch_loop._results)


def _metrics(pl_module: LightningModule) -> list[tuple[str, Metric]]:
    for module in pl_module.modules():
        if isinstance(module, MetricCollection):
            # torchmetrics 1.9 updates one metric of each compute group; the others are stale until they are asked for.
            module.items(copy_state=False)
    return [(name, module) for name, module in pl_module.named_modules() if isinstance(module, Metric)]


def _logged(metric: _ResultMetric) -> dict[str, Any]:
    meta = {f.name: getattr(metric.meta, f.name) for f in fields(_Metadata) if f.name not in ("reduce_fx", "_sync")}
    sync = metric.meta.sync
    return {
        "meta": meta | {"reduce_fx": metric.meta.reduce_fx.__name__},
        "sync": {"_should": sync.should, "rank_zero_only": sync.rank_zero_only, "_op": sync.op},
        "state": {key: getattr(metric, key) for key in metric._defaults},
        "count": metric._update_count,
        "step_value": metric._forward_cache,
    }


def _logged_again(trainer: Trainer, saved: Mapping[str, Any]) -> _ResultMetric:
    meta = _Metadata(**saved["meta"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, **saved["sync"])
    metric = _ResultMetric(meta, is_tensor=True)
    for key, value in saved["state"].items():
        setattr(metric, key, value)
    metric._forward_cache = saved["step_value"]
    metric._update_count = saved["count"]
    return metric.to(trainer.strategy.root_device)


def _of_all_ranks(trainer: Trainer, state: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.world_size == 1:
        return [state]
    gathered: list[Any] = [None] * trainer.world_size
    # From a GPU's memory they would arrive in that of the same GPU, on which only its own process has business.
    torch.distributed.all_gather_object(gathered, move_data_to_device(state, "cpu"))
    return gathered


def _put_back_metrics(trainer: Trainer, text: str) -> None:
    """Give the CSV logger the rows up to the state; it has removed the file, and rows after the state come again."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            writer = logger.experiment
            writer.metrics = []
            writer.metrics_keys = text.split("\n", 1)[0].strip().split(",") if text else []
            Path(writer.metrics_file_path).write_bytes(text.encode())  # as it was, with csv's line ends


def _relocate(state: dict[str, Any], folder: Path) -> None:
    """Let the best checkpoint be found where the run folder lies now: Lightning forgets it if the path is another.

    It shall forget one that is not there: a state of another run can know of a best that this run never had.

    Args:
        state: Of a ModelCheckpoint.
        folder: As the callback has it: absolute, without links; any other spelling is another path to Lightning.
    """
    before = state["dirpath"]

    def moved(path: str) -> str:
        return str(folder / os.path.relpath(path, before)) if path else path

    best = moved(state["best_model_path"])
    if not best or Path(best).is_file():
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = moved(state[key])
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
        state["dirpath"] = str(folder)
    else:
        state.update(best_model_path="", dirpath="")


def apply_changes(trainer: Trainer, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Let a changed recipe win over what the optimizer's and the schedulers' states have brought back.

    Args:
        trainer: With both states loaded.
        changed: By key of the recipe, the value before and now.
    """
    for key, (_, now) in changed.items():
        section, _, name = key.partition(".init_args.")
        if section == "optimizer":
            for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
                if name in group:
                    group[name] = now
        schedulers = [entry.scheduler for entry in trainer.lr_scheduler_configs]
        if section == "lr_scheduler":
            for scheduler in schedulers:
                if hasattr(scheduler, name):
                    setattr(scheduler, name, now)
        if key.startswith("trainer.callbacks.") and name == "patience":
            for callback in trainer.early_stopping_callbacks:
                callback.patience = now
        if key == "optimizer.init_args.lr":
            for scheduler in schedulers:
                if hasattr(scheduler, "base_lrs"):
                    scheduler.base_lrs = [now] * len(scheduler.base_lrs)
