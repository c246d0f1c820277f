"""Turn a recipe and chips into a run folder."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.presence import check_data
from floodrepro.errors import Incident, UsageError
from floodrepro.heap import keep_freed_memory, release_memory
from floodrepro.recipe import check_precision
from floodrepro.run_folder import RunFolder, sha256_of, timestamp, write_atomically
from floodrepro.system.energy import EnergyMeter
from floodrepro.system.energy_sources import Gpu, find_sources
from floodrepro.system.environment import code_version, environment
from floodrepro.training.cheaper import apply_speed_options
from floodrepro.training.checkpoint_files import newest_whole
from floodrepro.training.determinism import plain_attention, undetermined_operations
from floodrepro.training.full_state import FullState
from floodrepro.training.guard import Guard
from floodrepro.training.recipe_cli import RecipeCLI
from floodrepro.training.recorder import Recorder
from floodrepro.training.resume import begin, follow, identity, read_step
from floodrepro.training.starting_point import record_starting_point
from floodrepro.training.stopping import Interrupted, StopRequest
from floodrepro.training.wiring import change_precision, into_run_folder

_ROLLBACK_PRECISION = "bf16-mixed"  # fp32's range, so that what overflowed in fp16 does not


@dataclass(frozen=True)
class FitOptions:
    """How a fit goes on, stops and watches itself; none of it changes the mathematics of a run that goes well.

    Args:
        resume: "auto" goes on with a run that is there and unfinished, "never" refuses it, a path goes on from that
            full state.
        resume_anyway: Go on although recipe, data or code changed; recorded.
        on_overflow: "stop", or "rollback": go on from the last good state in bf16, once.
        save_every: Optimizer steps between two full states within an epoch.
        guard: Whether the guard watches.
        compiled: torch.compile the network; may change roundings, as the next two.
        channels_last: Lay convolutions out by pixel.
        fused: Let AdamW update all weights in one kernel.
        alone: Refuse to train in several processes, which would not know the run that follows this one.
    """

    resume: str = "auto"
    resume_anyway: bool = False
    on_overflow: str = "stop"
    save_every: int = 500
    guard: bool = True
    compiled: bool = False
    channels_last: bool = False
    fused: bool = False
    alone: bool = False

    def numerics(self) -> dict[str, bool]:
        """The options that may change roundings: a resumed run has to have the same."""
        return {"compiled": self.compiled, "channels_last": self.channels_last, "fused": self.fused}


@dataclass(frozen=True)
class FitResult:
    """What a fit left behind.

    Args:
        run: The run folder.
        recipe_sha256: Fingerprint of the resolved recipe.
        epochs: Number of epochs that were run.
        best_epoch: Epoch of ``best.ckpt``, counted from 0; None if no checkpoint was written.
        best_val_loss: Its val/loss.
        best_metrics: All that was measured in its validation, by TerraTorch's names.
        seconds: Wall-clock seconds spent in fitting.
    """

    run: RunFolder
    recipe_sha256: str
    epochs: int
    best_epoch: int | None
    best_val_loss: float | None
    best_metrics: dict[str, float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON types."""
        return {
            "run": str(self.run.path),
            "checkpoint": str(self.run.best) if self.best_epoch is not None else None,
            "recipe_sha256": self.recipe_sha256,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
            "best_metrics": self.best_metrics,
            "seconds": round(self.seconds, 1),
        }


class EpochLines(Callback):
    """One line on stderr after each epoch: losses, flood IoU and the time that it took."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time: a run that is resumed in an epoch does not start it again."""
        self._start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line; Lightning has validated by now."""
        names = ("train/loss", "val/loss", "val/mIoU", "val/IoU_1")
        shown = [f"{n} {float(trainer.callback_metrics[n]):.4f}" for n in names if n in trainer.callback_metrics]
        seconds = time.monotonic() - self._start
        console.say(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(shown)}  {seconds:.1f} s")


class WeightedMeans(Callback):
    """Means over processes with different numbers of chips, as one process would compute them.

    Lightning 2.6.1 averages the number of chips over processes as an integer: (2 + 1) / 2 becomes 1, and val/loss, by
    which the best checkpoint is chosen, half as large again.
    """

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count in floating point from the first batch on."""
        if trainer.world_size > 1:
            for metric in trainer.fit_loop.epoch_loop.val_loop._results.values():
                if metric.is_tensor and metric.meta.is_mean_reduction:
                    metric.cumulated_batch_size = metric.cumulated_batch_size.double()


def fit(
    cli: RecipeCLI,
    path: Path,
    options: FitOptions = FitOptions(),
    report: Callable[[FitResult], None] = lambda result: None,
    watch: Sequence[Callback] = (),
) -> FitResult:
    """Train a recipe, or go on with a run that was interrupted.

    Args:
        cli: The parsed recipe.
        path: The run folder, made if it is not there.
        options: How it goes on, stops and watches itself.
        watch: Further callbacks, called last.
        report: Called with the result before the run is marked as finished: the mark is the last thing that happens.

    Returns:
        What was left behind.

    Raises:
        UsageError: The recipe cannot be built or run on this machine, or the run folder is not this run's.
        DataError: Chips are missing.
        Incident: The guard stopped the run.
        Interrupted: The process was told to stop.
    """
    check_precision(cli.recipe, gpu=torch.cuda.is_available())
    if options.on_overflow == "rollback" and torch.cuda.is_available() and not _has_bf16():
        raise UsageError("this GPU has no bf16, which a rollback goes on in", fix="--on-overflow stop")
    data = check_data(cli.recipe, ("train", "val"))
    batch = (cli.recipe["data"].get("init_args") or {}).get("batch_size") or 1
    if data.chips.get("train", batch) < batch:  # the last batch is left out where it is not full
        raise UsageError(
            f"{data.chips['train']} training chips do not fill one batch of {batch}",
            fix="--data.init_args.batch_size N",
        )
    code = code_version()
    now = identity(cli.recipe, recipes.fingerprint(cli.recipe), data.digest, code, options.numerics())
    if console.follows():  # one of several processes: the first one writes the record
        run = RunFolder(path)
        return _train_to_the_end(cli, run, now, follow(run, options.resume), options, watch)
    run = RunFolder(path) if path.exists() else RunFolder.create(path)
    with run.locked():
        state = begin(run, now, options.resume, anyway=options.resume_anyway)
        run.update_record(
            status="running",
            ended=None,
            reason=None,
            process=os.getpid(),
            chips=data.chips,
            data_digest=data.digest,
            data_warnings=list(data.warnings),
            code=now["code"],
            numerics=now["numerics"],
            options=asdict(options),
        )
        console.say(f"recipe sha256 {now['recipe_sha256'][:12]}…, chips {data.chips}, into {run.path}")
        try:
            result = _train_to_the_end(cli, run, now, state, options, watch)
        except BaseException as error:
            run.update_record(status="failed" if not isinstance(error, Interrupted) else "interrupted", **_end(error))
            raise
        report(result)
        kept = {k: v for k, v in result.as_dict().items() if k not in ("run", "seconds")}
        weights = sha256_of(run.best) if run.best.is_file() else None
        run.update_record(status="finished", checkpoint_sha256=weights, **_end(None), **kept)
    return result


def _train_to_the_end(
    cli: RecipeCLI,
    run: RunFolder,
    now: dict[str, Any],
    state: Path | None,
    options: FitOptions,
    watch: Sequence[Callback],
) -> FitResult:
    """Train; after an incident go on in bf16 where that is wanted and was not done before."""
    start = time.monotonic()
    while True:
        try:
            trainer = _train(cli, run, now, state, options, watch)
            return _result(run, now["recipe_sha256"], trainer, time.monotonic() - start)
        except Incident as incident:
            if console.follows():
                raise
            entry = incident.as_dict() | {"when": timestamp()}
            write_atomically(run.path / "incident.json", json.dumps(entry, indent=2) + "\n")
            record = run.read_record()
            run.update_record(incidents=[*record.get("incidents", []), entry])
            if options.on_overflow != "rollback" or incident.kind == "collapse" or record.get("rollback"):
                raise
            own = newest_whole(run.checkpoints)
            state = own or (state if state and state.is_file() else None)  # none of its own yet: what it began with
            rollback = {
                "step": incident.step,
                "state": own.name if own else f"{state.name}, which the run was started from" if state else "the start",
                "precision": [cli.recipe["trainer"].get("precision", "32-true"), _ROLLBACK_PRECISION],
                "when": entry["when"],
            }
            run.update_record(rollback=rollback)
            console.warn(f"{incident.what}")
            console.warn(f"rolled back to {rollback['state']}; the run goes on in {_ROLLBACK_PRECISION}, this once")


def _train(
    cli: RecipeCLI,
    run: RunFolder,
    now: dict[str, Any],
    state: Path | None,
    options: FitOptions,
    watch: Sequence[Callback],
) -> Trainer:
    """Build the recipe's objects and fit them, from a state if there is one."""
    rolled_back = run.record.exists() and "rollback" in run.read_record()
    step = read_step(state) if state else None

    def wire(config: Namespace) -> None:
        into_run_folder(config, run, progress_bar=sys.stderr.isatty(), resumed_step=step)
        if rolled_back:
            change_precision(config, _ROLLBACK_PRECISION)
        if options.fused and config.get("optimizer") is None:
            raise UsageError("--fused, and the recipe names no optimizer", fix="leave it out, or add an optimizer")
        if options.fused:
            config.optimizer.init_args.fused = True

    keep_freed_memory()
    cli.build(wire)
    release_memory()  # now that nothing but cycles holds the objects of an attempt before this one
    apply_speed_options(cli.model, compiled=options.compiled, channels_last=options.channels_last)
    trainer = cli.trainer
    if options.on_overflow == "rollback" and trainer.world_size > 1:
        raise UsageError("a rollback needs a run of one process", fix="--on-overflow stop, and --resume by hand")
    lead = trainer.is_global_zero
    batch = getattr(cli.datamodule, "batch_size", None)
    if trainer.world_size > 1 and options.alone:
        raise UsageError(
            f"several seeds in one call, and each would train in {trainer.world_size} processes",
            fix="a call a seed with --index, or --trainer.devices 1",
        )
    if trainer.world_size > 1 and batch:
        console.warn(
            f"{trainer.world_size} processes with {batch} chips each: a step sees {batch * trainer.world_size}"
        )
    if lead:
        surroundings = environment(str(trainer.precision))
        run.update_record(
            processes=trainer.world_size, batch_size=batch, environment=surroundings, seed=cli.config.seed_everything
        )
        if state is None:
            record_starting_point(cli.model, run.starting_point)
    guard = Guard() if options.guard else None
    device = trainer.strategy.root_device
    meter = EnergyMeter(find_sources(Gpu.of_torch(device.index or 0) if device.type == "cuda" else None))
    # One entry for each session of the run: figures of different methods must not be added.
    earlier = run.read_record().get("energy", []) if lead else []
    with StopRequest() as stop:
        check = guard.check if guard else lambda *_: None
        own = state is not None and state.parent.resolve() == run.checkpoints.resolve()
        keeper = FullState(run, now, stop, options.save_every, check, own=own)
        recorder = Recorder(run, lambda: keeper.seconds, lambda: [*earlier, meter.reading()])
        trainer.callbacks += [*([guard] if guard else []), recorder, keeper, EpochLines(), WeightedMeans(), *watch]
        meter.start()
        try:
            with (
                console.stdout_to_stderr(),
                plain_attention(device, wanted=torch.are_deterministic_algorithms_enabled()),
                undetermined_operations() as undetermined,
            ):
                trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(state) if state else None)
        except SIGTERMException as error:  # told to stop before the first step
            raise Interrupted(signal.SIGTERM, run.path, "nothing was trained since the last state") from error
        except SystemExit as error:  # Lightning's answer to a second signal, or to one before ours were installed
            number = stop.signal_number or signal.SIGINT
            raise Interrupted(number, run.path, "at once, without saving the steps since the last state") from error
        finally:
            energy = meter.stop()
            if lead:
                run.update_record(energy=[*earlier, energy], undetermined_operations=sorted(undetermined))
        if undetermined:
            console.warn(f"no deterministic form exists of {', '.join(sorted(undetermined))}: runs may differ in bits")
    return cast(Trainer, trainer)


def _has_bf16() -> bool:
    """Whether the GPU computes in bf16 itself; torch would have older ones emulate it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _end(error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {"ended": timestamp(), "reason": "the recipe's end was reached"}
    return {"ended": timestamp(), "reason": f"{type(error).__name__}: {error}"}


def _result(run: RunFolder, digest: str, trainer: Trainer, seconds: float) -> FitResult:
    """Read the best epoch from the file itself: the only source that cannot disagree with the weights in it."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    best = next((c for c in callbacks if c.best_model_path and Path(c.best_model_path).name == run.best.name), None)
    if best is None or best.best_model_score is None:
        return FitResult(run, digest, trainer.current_epoch, None, None, {}, seconds)
    epoch = torch.load(run.best, map_location="cpu", weights_only=True, mmap=True)["epoch"]
    score = float(best.best_model_score)
    return FitResult(run, digest, trainer.current_epoch, epoch, score, _measured(run, epoch, score), seconds)


def _measured(run: RunFolder, epoch: int, loss: float) -> dict[str, float]:
    """The row of metrics.csv that has a val/loss; an epoch may have been validated several times."""
    rows = [row for row in run.read_metrics() if row.get("epoch") == str(epoch) and row.get("val/loss")]
    nearest = sorted(rows, key=lambda row: abs(float(row["val/loss"]) - loss))[:1]
    return {name: float(value) for row in nearest for name, value in row.items() if name.startswith("val/") and value}
