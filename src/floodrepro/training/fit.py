"""Turn a recipe and chips into a run folder."""

import contextlib
import gc
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn.attention import SDPBackend, sdpa_kernel

from floodrepro import console
from floodrepro.callbacks import ExactResume, NaNGuard, RunRecord
from floodrepro.callbacks.exact_resume import LAST
from floodrepro.data.splits import DataState, check_data
from floodrepro.errors import FloodreproError, Incident, Interrupted, RunFolderError, UsageError
from floodrepro.recipe import check_precision
from floodrepro.run_folder import PARTIAL, RunFolder, sha256_of, timestamp, write_atomically
from floodrepro.system.environment import code_version, environment
from floodrepro.training import layout
from floodrepro.training.checkpoint import load_weights, read_checkpoint
from floodrepro.training.resume import KEY, choose_state, identity, is_done, newest_state
from floodrepro.training.terratorch_cli import RecipeCLI

_ROLLBACK_PRECISION = "bf16-mixed"  # fp32's range, so that what overflowed in fp16 does not
_LOCK_SECONDS = 10  # loader workers outlive a killed parent by seconds


def fit(
    cli: RecipeCLI,
    path: Path,
    *,
    resume: str = "auto",
    ckpt_path: str | None = None,
    weights: Path | None = None,
    allow_changes: bool = False,
    on_overflow: str = "stop",
    save_every: int = 500,
    guard: bool = True,
) -> dict[str, Any]:
    """Train a recipe, or resume a run that was interrupted.

    Args:
        cli: The parsed recipe.
        path: The run folder; it is made if it does not exist.
        resume: "auto" resumes an unfinished run, "never" refuses it.
        ckpt_path: A full state to resume from: a path, or "last".
        weights: A checkpoint whose weights a new run starts from, with a fresh optimizer.
        allow_changes: Resume although data, packages or settings changed; it is recorded.
        on_overflow: "stop", or "rollback": once, resume from the last good state in bf16.
        save_every: Optimizer steps between two full states within an epoch.
        guard: Whether NaNGuard watches.

    Returns:
        The content of ``run.json``; of several processes only the first has it.

    Raises:
        UsageError: The recipe cannot be built or run on this machine, or the run folder is not this run's.
        DataError: Chips are missing.
        Incident: NaNGuard stopped the run.
        Interrupted: A signal stopped the run.
    """
    run = RunFolder(path)
    check_precision(cli.recipe, gpu=torch.cuda.is_available())
    layout.warn_of_wrong_mode(cli.config.trainer)
    data = check_data(cli.recipe, ("train", "val"))
    batch = (cli.recipe["data"].get("init_args") or {}).get("batch_size") or 1
    if data.chips.get("train", batch) < batch:  # the last batch is left out where it is not full
        what = f"{data.chips['train']} training chips do not fill one batch of {batch}"
        raise UsageError(what, fix="--data.init_args.batch_size N")
    if cli.recipe["trainer"].get("fast_dev_run"):
        cli.build()
        with console.stdout_to_stderr():
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        console.say("fast_dev_run: the recipe works; nothing was kept")
        return {"status": "fast_dev_run"}
    now = identity(cli.recipe, data)
    state, changes = choose_state(run, now, resume=resume, ckpt_path=ckpt_path, allow_changes=allow_changes)
    record = run.read_record() if run.record.exists() else {}
    if is_done(cli.recipe, record):
        console.say(f"the run is finished already: {run.path}")
        return record
    resumes = list(record.get("resumes") or [])
    if state is not None:
        resumes.append({"when": timestamp(), "from": state.name, "changes": changes})
    if weights is not None and state is not None:
        raise UsageError("--weights starts a new run, and this one has trained", where=state, fix="give another --name")
    trainer = _build(cli, run, record, random_start=state is not None or weights is not None)
    trainer.callbacks += [_WeightedMeans(), _RunState(run, now), *([NaNGuard()] if guard else [])]
    trainer.callbacks += [RunRecord(write=lambda entries: run.update_record(**entries))]
    trainer.callbacks += [ExactResume(str(run.checkpoints), save_every)]
    if on_overflow == "rollback":
        _refuse_rollback(trainer)
    try:
        with _session(trainer, run, cli, state, _first_entries(trainer, cli, record, data) | {"resumes": resumes}):
            if weights is not None:
                left_out = load_weights(cli.model.model, read_checkpoint(weights), strict=False) or None
                source = {"file": weights.name, "sha256": sha256_of(weights), "left_out": left_out}
                run.update_record(started_from=source)
            _train(trainer, cli, run, state)
            return _finish(trainer, run) if trainer.is_global_zero else {}
    except Incident as incident:
        if trainer.is_global_zero:
            entry = incident.as_dict() | {"when": timestamp()}
            write_atomically(run.path / "incident.json", json.dumps(entry, indent=2) + "\n")
            run.update_record(incidents=[*run.read_record().get("incidents", []), entry])
        if on_overflow != "rollback" or not incident.rolls_back or record.get("rollback"):
            raise
        console.warn(incident.what)
        step = incident.step
    del trainer
    gc.collect()  # the failed step's graph, with all its activations, hangs in a cycle with the traceback
    torch.cuda.empty_cache()
    last = newest_state(run.checkpoints)
    where, before = last.name if last else "the start", cli.recipe["trainer"].get("precision", "32-true")
    entry = {"step": step, "state": where, "precision": [before, _ROLLBACK_PRECISION], "when": timestamp()}
    run.update_record(rollback=entry)  # from now on it chooses the precision
    console.warn(f"rolled back to {where}; the run continues in {_ROLLBACK_PRECISION}. This happens once")
    return fit(
        cli,
        path,
        ckpt_path=ckpt_path,
        weights=None if last else weights,
        allow_changes=allow_changes,
        on_overflow=on_overflow,
        save_every=save_every,
        guard=guard,
    )


def _build(cli: RecipeCLI, run: RunFolder, record: dict[str, Any], *, random_start: bool) -> Any:
    """Build the recipe's objects for this run folder and return the trainer."""

    def wire(config: Namespace) -> None:
        layout.into_run_folder(config, run, progress_bar=sys.stderr.isatty(), run_ids=record.get("loggers") or {})
        if record.get("rollback"):
            layout.change_precision(config, _ROLLBACK_PRECISION)
        if random_start:
            layout.forget_pretrained_weights(config)

    cli.build(wire)
    return cli.trainer


def _refuse_rollback(trainer: Any) -> None:
    if trainer.world_size > 1:
        raise UsageError("a rollback needs a run of one process", fix="--on-overflow stop")
    # torch would let older GPUs emulate it.
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError("this GPU has no bf16, which a rollback continues in", fix="--on-overflow stop")


def _first_entries(trainer: Any, cli: RecipeCLI, record: dict[str, Any], data: DataState) -> dict[str, Any]:
    """What ``run.json`` holds of a run that begins or resumes."""
    return {
        "started": record.get("started") or timestamp(),
        **{"status": "running", "ended": None, "reason": None, "command": ["floodrepro", *sys.argv[1:]]},
        "length": {key: cli.recipe["trainer"].get(key) for key in ("max_epochs", "max_steps")},
        "seed": cli.config.seed_everything,
        "data": data.as_dict(),
        "batch_size": getattr(cli.datamodule, "batch_size", None),
        "processes": trainer.world_size,
        "code": code_version(),
        "environment": environment(str(trainer.precision)),
    }


@contextlib.contextmanager
def _session(
    trainer: Any, run: RunFolder, cli: RecipeCLI, state: Path | None, entries: dict[str, Any]
) -> Iterator[None]:
    """Hold the run folder and keep ``run.json`` and ``log.txt`` while a run trains; the first process does."""
    with contextlib.ExitStack() as held:
        error: FloodreproError | None = None
        try:
            if trainer.is_global_zero:
                RunFolder.create(run.path)
                held.enter_context(FileLock(run.lock, timeout=_LOCK_SECONDS))
                chosen_here = state is not None and state.parent == run.checkpoints
                if (run.checkpoints / LAST).exists() and not chosen_here:  # written since the state was chosen
                    what, fix = "another fit has trained in this folder meanwhile", "run the same command again"
                    raise RunFolderError(what, where=run.path, fix=fix)
                held.enter_context(console.log_to(run.log))
                for orphan in run.path.glob(f".*{PARTIAL}"):  # a killed process left it half written
                    orphan.unlink()
                run.update_record(recipe_sha256=run.save_recipe(cli.recipe), **entries)
        except Timeout:
            fix = "wait until it is done, or give another --name"
            error = RunFolderError("another fit is running in this folder", where=run.path, fix=fix)
        except OSError as failure:
            error = RunFolderError(f"the run folder cannot be written: {failure}", where=run.path)
        except FloodreproError as refusal:
            error = refusal
        _agree(trainer, error)
        _tell(trainer, cli, entries)
        try:
            yield
        except BaseException as failure:
            if trainer.is_global_zero:
                status = "interrupted" if isinstance(failure, Interrupted) else "failed"
                what = failure.what if isinstance(failure, FloodreproError) else str(failure)
                with contextlib.suppress(OSError):  # a full disk must not replace the error that it caused
                    run.update_record(status=status, ended=timestamp(), reason=f"{type(failure).__name__}: {what}")
            raise


def _agree(trainer: Any, error: FloodreproError | None) -> None:
    """Let a refusal of one process end all of them: those that torchrun or srun started wait for each other."""
    if trainer.world_size > 1 and not isinstance(trainer.strategy.cluster_environment, LightningEnvironment):
        trainer.strategy.setup_environment()
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, str(error) if error else None)
        error = error or next((UsageError(text) for text in everyone if text), None)
    if error is not None:
        raise error


def _tell(trainer: Any, cli: RecipeCLI, entries: dict[str, Any]) -> None:
    """Say what is about to be trained."""
    parameters = sum(parameter.numel() for parameter in cli.model.parameters())
    console.say(f"{parameters:,} parameters, chips {entries['data']['chips']}")
    processes, batch = trainer.world_size, entries["batch_size"]
    if processes > 1 and batch:
        console.warn(f"{processes} processes with {batch} chips each: the global batch is {batch * processes}")
    elif (devices := torch.cuda.device_count()) > 1:
        console.say(f"{devices} GPUs are here, one is used; --trainer.devices {devices} multiplies the global batch")


def _train(trainer: Any, cli: RecipeCLI, run: RunFolder, state: Path | None) -> None:
    """Call Lightning."""
    on_gpu = trainer.strategy.root_device.type == "cuda"
    deterministic = on_gpu and torch.are_deterministic_algorithms_enabled()
    # The backward passes of torch's attention kernels add in no fixed order.
    attention = sdpa_kernel(SDPBackend.MATH) if deterministic else contextlib.nullcontext()
    try:
        with console.stdout_to_stderr(), attention:
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(state) if state else None)
    except MisconfigurationException as error:
        raise UsageError(f"Lightning refuses the recipe: {error}", where=run.recipe) from error
    except SIGTERMException as error:
        raise Interrupted(signal.SIGTERM, run.path, "nothing was trained since the last state") from error
    except Interrupted:  # a SystemExit too
        raise
    except SystemExit as error:  # Lightning's answer to Ctrl-C before ExactResume listens
        raise Interrupted(signal.SIGINT, run.path, "the steps since the last state are lost") from error
    finally:
        if trainer.is_global_zero:
            run.update_record(loggers=layout.run_ids_of(trainer.loggers))


def _finish(trainer: Any, run: RunFolder) -> dict[str, Any]:
    """Write what came out; the mark of a finished run is the last thing that happens."""
    found: dict[str, Any] = {"monitor": None, "mode": None, "best_epoch": None, "best_val_loss": None}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.filename == run.best.stem:
            found |= {"monitor": callback.monitor, "mode": callback.mode}
    if run.best.is_file():
        # The file itself is the only source that cannot disagree with the weights in it.
        best = torch.load(run.best, map_location="cpu", weights_only=True, mmap=True)
        rows = [row for row in run.read_metrics() if row.get("step") == str(best["global_step"] - 1)]
        values = {k: float(v) for row in rows for k, v in row.items() if k.startswith("val/") and v}
        found |= {"best_epoch": best["epoch"], "best_val_loss": values.get("val/loss"), "best_metrics": values}
        found["checkpoint_sha256"] = sha256_of(run.best)
    for name in ("failed_chips", "odd_chips"):  # left out by --skip-damaged; with odd radar values
        if chips := getattr(trainer.datamodule, name, None):
            found[name] = dict(chips)
    run.update_record(status="finished", ended=timestamp(), **found)
    return run.read_record()


class _RunState(Callback):
    """Adds to every full state the run's identity, and ``metrics.csv``: Lightning's logger deletes it on a resume."""

    def __init__(self, run: RunFolder, now: dict[str, Any]) -> None:
        self._run, self._now, self._rows = run, now, list[dict[str, str]]()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()
        checkpoint[KEY] = {"identity": self._now, "metrics": self._run.read_metrics()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._rows = checkpoint[KEY]["metrics"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, CSVLogger) and Path(logger.log_dir) == self._run.metrics.parent:
                logger.experiment.metrics += self._rows


class _WeightedMeans(Callback):
    """Means over processes with different numbers of chips, as one process would compute them.

    Lightning 2.6.1 averages the number of chips over processes as an integer: (2 + 1) / 2 becomes 1, and val/loss, by
    which the best checkpoint is chosen, half as large again.
    """

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.world_size > 1:
            for metric in trainer.fit_loop.epoch_loop.val_loop._results.values():
                if metric.is_tensor and metric.meta.is_mean_reduction:
                    metric.cumulated_batch_size = metric.cumulated_batch_size.double()
