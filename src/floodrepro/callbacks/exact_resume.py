"""A run that was killed or stopped resumes to the same bits as one that never was, in any TerraTorch recipe.

Lightning saves model, optimizer, schedulers, loops and callbacks. It lacks the generators, and its resuming is exact
from two moments only: before a training batch that opens no epoch, and before a validation. `ExactResume` saves there,
and at the start of an epoch, from where it lets Lightning begin the epoch anew.
"""

import math
import multiprocessing.util
import os
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from floodrepro.errors import CheckpointError, Interrupted, UsageError

_KEY = "exact_resume"  # of what is added to Lightning's checkpoint
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGREE_EVERY = 10  # batches: asking all processes costs a round trip


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there: written beside their place, flushed to the disk, then renamed.

    A ``last.ckpt`` leaves the one before it as ``previous.ckpt``. `ExactResume` brings it along; without that callback
    a recipe names it as ``trainer.plugins: [floodrepro.callbacks.AtomicCheckpointIO]``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; raises `CheckpointError` where the disk does not take it."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if target.name == LAST and target.exists():
                target.replace(target.with_name(PREVIOUS))
            partial.replace(target)
            folder = os.open(target.parent, os.O_RDONLY)
            os.fsync(folder)  # fsync(2): of the file alone it does not keep the name
            os.close(folder)
        except (OSError, RuntimeError) as error:  # torch's own, in whose context stands what the disk says
            partial.unlink(missing_ok=True)
            said = error if isinstance(error, OSError) else error.__context__ or error
            what = f"the checkpoint cannot be written: {said}"
            fix = "free some disk, if it is full, and resume: the one before is whole"
            raise CheckpointError(what, where=target, fix=fix) from error


class ExactResume(Callback):
    """Saves full states, puts generators back, and stops in good order on SIGTERM and SIGINT.

    In a recipe::

        trainer:
          callbacks:
            - class_path: floodrepro.callbacks.ExactResume
              init_args: {dirpath: runs/mine/checkpoints, every_n_steps: 500}

    Resume with ``terratorch fit --config mine.yaml --ckpt_path runs/mine/checkpoints/last.ckpt``.

    States are saved before each validation, at the end of an epoch without one, every N steps, when a signal stops the
    run, and at the end. Within an epoch that needs a sampler with an attribute ``starts_mid_epoch = True`` that leaves
    out the batches behind it; with any other, states are saved at the end of each epoch only. Training metrics of an
    epoch that was resumed in its middle cover the part after the resume.

    A signal raises `floodrepro.errors.Interrupted`, which also plain ``terratorch fit`` leaves with exit code 128 + the
    signal's number. A second one stops at once. Loader workers that are forked leave signals to the training process.

    Args:
        dirpath: Folder of ``last.ckpt`` and ``previous.ckpt``; ``checkpoints`` below ``default_root_dir`` if None.
        every_n_steps: Optimizer steps between two states within an epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_steps: int = 500) -> None:
        self._dirpath, self._folder, self._every = dirpath, Path(), every_n_steps
        self._mid_epoch = False  # whether the data can be taken up in the middle of an epoch
        self._signal = 0
        self._moment = ""  # of the state that is being saved
        self._state: dict[str, Any] | None = None  # that was loaded and waits to be put back
        self._saved = -1  # step of the newest state

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be resumed exactly, before anything is trained."""
        if stage != "fit" or trainer.fast_dev_run:
            trainer.callbacks = [one for one in trainer.callbacks if one is not self]
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            kind = type(trainer.strategy).__name__
            raise UsageError(f"ExactResume does not know {kind}", fix="--trainer.strategy auto or ddp")
        self._folder = Path(self._dirpath or Path(trainer.default_root_dir, "checkpoints")).resolve()
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a recipe's own plugin stays
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        multiprocessing.util.register_after_fork(self, _shield_worker)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to write over states of another run, or beside somebody else who writes ``last.ckpt``."""
        last = self._folder / LAST
        others = [one for one in trainer.checkpoint_callbacks if getattr(one, "save_last", None)]
        if any(Path(one.dirpath or "").resolve() == self._folder for one in others):
            what = f"a ModelCheckpoint with save_last and ExactResume both write {LAST}"
            raise UsageError(what, where=last, fix="leave save_last out: the state of ExactResume holds more")
        if trainer.ckpt_path is None and last.exists():
            fix = f"--ckpt_path {last} to resume it, or another dirpath for a new run"
            raise UsageError("a full state is there already", where=last, fix=fix)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals over from Lightning, and find out from where this data module can be resumed."""
        if threading.current_thread() is threading.main_thread():  # Python refuses it elsewhere
            for number in _SIGNALS:
                signal.signal(number, self._remember)  # Lightning gives the handlers back that were there before
        self._signal = signal.SIGTERM if trainer.received_sigterm else 0
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        self._mid_epoch = getattr(sampler, "starts_mid_epoch", False) and pl_module.automatic_optimization
        if self._mid_epoch:  # Lightning cannot know
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        elif trainer.is_global_zero:
            what = "the order of this data module cannot be taken up in the middle of an epoch"
            _say(f"{what}: full states are saved at the end of each epoch only, and a resumed run is exact from there")
        if self._state is not None and self._state["moment"] == "epoch":
            trainer.fit_loop.restarting = False  # it begins an epoch like any other
            trainer.fit_loop._resuming_from_checkpoint = False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Save the end of an epoch that no validation has saved."""
        self._restore(trainer, pl_module)
        if trainer.current_epoch and self._saved != trainer.global_step:
            self._save(trainer, "epoch")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save where it is time; stop where that was asked for."""
        self._restore(trainer, pl_module)
        step = trainer.global_step
        stop = self._signal if trainer.world_size == 1 else 0
        if trainer.world_size > 1 and batch_idx % _AGREE_EVERY == 0:  # all processes stop together
            number = torch.tensor(self._signal, device=trainer.strategy.root_device)
            stop = int(trainer.strategy.reduce(number, reduce_op="max"))
            self._signal = self._signal or stop  # one that came meanwhile counts the next time
        due = stop or step - max(self._saved, 0) >= self._every
        # Not from an epoch's first batch, nor in the middle of an accumulation, nor behind a validation: of one without
        # any batch Lightning calls no hook, and it would take the step for one whose validation is to come.
        total = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        since = batch_idx if trainer.check_val_every_n_epoch is not None else total
        validated = since % (trainer.val_check_batch or math.inf) == 0
        exact = self._mid_epoch and batch_idx > 0 and not validated and batch_idx % trainer.accumulate_grad_batches == 0
        if due and exact and step != self._saved:
            self._save(trainer, "batch")
        if stop and (step in (0, self._saved) or not self._mid_epoch):  # else the next batch will do
            raise self._interrupted()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Save: from here a killed run resumes with the validation, whatever the kill hits in it."""
        if trainer.sanity_checking:
            return
        self._restore(trainer, pl_module)
        loop = trainer.fit_loop.epoch_loop
        exact = self._mid_epoch or loop._num_ready_batches_reached()
        # Gradients that are being accumulated are in no state, and from the last of max_steps Lightning would leave the
        # validation out: a run that is killed here repeats the batches since the state before.
        exact = exact and not loop._should_accumulate() and trainer.global_step != trainer.max_steps
        if exact and self._saved != trainer.global_step:
            self._save(trainer, "validation")

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        """Stop where that was asked for. Several processes may have different numbers of batches: they stop later."""
        kept = self._saved == trainer.global_step or not self._mid_epoch
        if self._signal and kept and trainer.world_size == 1:
            raise self._interrupted()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the end."""
        self._save(trainer, "epoch")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add to Lightning's checkpoint; those of other callbacks stay Lightning's own."""
        if not self._moment:
            return
        name, keys, *rest = np.random.get_state()
        on_gpu = pl_module.device.type == "cuda"
        generators = {  # tensors and plain values
            "python": random.getstate(),
            "numpy": (name, np.asarray(keys).tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(pl_module.device) if on_gpu else None,  # of this process's device alone
        }
        ranks = [generators] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, generators)
        loops = checkpoint["loops"]["fit_loop"]
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        validated = loops["epoch_loop.val_loop.batch_progress"]["total"]
        added = {"moment": self._moment, "should_stop": trainer.should_stop, "validated": {**validated}, "ranks": ranks}
        checkpoint[_KEY] = added
        if self._moment == "validation":  # "interrupted in its first batch": else Lightning would leave it out
            validated.update(ready=1, started=1, processed=0, completed=0)
            return
        begins = batches if self._moment == "batch" else epochs
        for counts in (begins["total"], begins["current"]):  # what is about to begin has not begun
            counts["ready"] = counts["completed"]
        if self._moment == "epoch":
            batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what was added until it can be put back; let the best checkpoints be found again."""
        self._state = state = checkpoint.get(_KEY)
        if state is None:
            _say("warning: this checkpoint holds no generators: the run will differ from an uninterrupted one")
            return
        if len(state["ranks"]) != trainer.world_size:
            what = f"the state is one of {len(state['ranks'])} processes, this run has {trainer.world_size}"
            raise UsageError(what, fix="resume with as many devices: otherwise each step sees other chips")
        if state["moment"] == "epoch":  # an early stop is in no state of Lightning's
            trainer.should_stop = state["should_stop"]
        best = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        names = [(callback.dirpath, callback.filename) for callback in best]
        for callback, name in zip(best, names, strict=True):
            if names.count(name) == 1:  # an epoch that runs again writes its file again, no -v1 beside it
                callback._enable_version_counter = False
            if scores := checkpoint["callbacks"].get(callback.state_key):
                callback.current_score = scores["current_score"]  # Lightning saves it and does not load it
                _move(scores, Path(str(callback.dirpath)))

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            raise Interrupted(number, self._folder, "at once, without the steps since the last state")
        self._signal = number
        name = signal.Signals(number).name  # print() must not be interrupted by itself
        os.write(2, f"floodrepro: {name}: stopping after this batch, twice stops at once\n".encode())

    def _interrupted(self) -> Interrupted:
        saved = f"the state of step {self._saved} is saved" if self._saved >= 0 else "no state was saved yet"
        return Interrupted(self._signal, self._folder, saved)

    def _save(self, trainer: Any, moment: str) -> None:
        before = trainer.strategy.checkpoint_io
        self._moment, trainer.strategy.checkpoint_io = moment, AtomicCheckpointIO()  # whatever a recipe's plugin does
        try:
            trainer.save_checkpoint(self._folder / LAST, weights_only=False)
            self._saved = trainer.global_step
        finally:
            self._moment, trainer.strategy.checkpoint_io = "", before

    def _restore(self, trainer: Any, pl_module: Any) -> None:
        # Lightning leaves plateau schedulers out in an epoch that it resumed into. Where max_steps is set, the property
        # would be True whatever it is given.
        trainer.fit_loop._restarting = False
        state, self._state = self._state, None
        if state is None:
            return
        self._saved, mine = trainer.global_step, state["ranks"][trainer.global_rank]
        if state["moment"] == "validation":
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.load_state_dict(state["validated"])
        random.setstate(mine["python"])
        np.random.set_state(mine["numpy"])
        torch.set_rng_state(mine["torch"])
        if mine["cuda"] is not None and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"], pl_module.device)
        if trainer.is_global_zero:
            _say(f"resuming at step {trainer.global_step}, epoch {trainer.current_epoch + 1}")


def _move(state: dict[str, Any], folder: Path) -> None:
    """Let a ModelCheckpoint of a run folder that was moved find its files: else Lightning forgets all scores."""
    if (folder / Path(state["best_model_path"]).name).is_file():  # else it is the best of another run
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = state[key].replace(state["dirpath"], str(folder), 1)
        moved = {path.replace(state["dirpath"], str(folder), 1): s for path, s in state["best_k_models"].items()}
        state |= {"dirpath": str(folder), "best_k_models": moved}


def _say(text: str) -> None:
    print(f"floodrepro: {text}", file=sys.stderr, flush=True)


def _shield_worker(_: ExactResume) -> None:
    """Let a forked loader worker obey the training process alone, and die with it.

    A signal to the whole process group would kill the workers, and torch then ends the training wherever it is. And a
    worker of torch whose parent is killed while it starts takes init for its parent and stays for ever.
    """
    parent = getattr(multiprocessing.parent_process(), "pid", None)

    def obey_parent() -> None:
        told = None
        while os.getppid() == parent and (told is None or told.si_pid != parent):
            told = signal.sigtimedwait({signal.SIGTERM}, 2)  # seconds
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=obey_parent, daemon=True).start()
