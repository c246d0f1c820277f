"""Turn a recipe and chips into a run folder: check, build, hold the folder, choose where to start, train, record."""

import contextlib
import gc
import math
import re
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.nn.attention import SDPBackend, sdpa_kernel

from floodrepro import console, errors, recipe as recipes
from floodrepro.callbacks import ExactResume, NaNGuard, RunRecord
from floodrepro.callbacks.exact_resume import LAST, PREVIOUS
from floodrepro.data.splits import DataState, check_data
from floodrepro.run_folder import RunFolder, sha256_of, timestamp
from floodrepro.system.environment import environment
from floodrepro.training import terratorch_cli
from floodrepro.training.checkpoint import load_weights, read_checkpoint

_ROLLBACK_PRECISION = "bf16-mixed"  # fp32's range, so that what overflowed in fp16 does not
_LOCK_SECONDS = 10  # loader workers outlive a killed parent by seconds
_KEY = "floodrepro"  # under which a full state keeps the run's identity
_PACKAGES = ("torch", "lightning", "terratorch", "torchmetrics", "timm", "segmentation-models-pytorch", "numpy")
# What a resumed run may have changed: its place, how long it lasts and what it prints.
_MAY_CHANGE = re.compile(
    r"trainer\.(callbacks.*|plugins.*|profiler.*|log_every_n_steps|(max|min)_\w+|num_sanity_val_steps)"
    rf"|predict_output_dir|output_file_prefix|out_dtype|deploy_config_file|custom_modules_path|{recipes.PLACE.pattern}"
)


def fit(
    cli: terratorch_cli.RecipeCLI,
    path: Path,
    *,
    ckpt_path: str | None = None,
    weights: Path | None = None,
    allow_changes: bool = False,
    on_overflow: str = "stop",
    save_every: int = 500,
) -> dict[str, Any]:
    """Train a recipe, or resume a run that was interrupted.

    Args:
        cli: The parsed recipe.
        path: The run folder; it is made if it does not exist.
        ckpt_path: A full state that a new run begins with; "last", the run's own, is resumed from anyway.
        weights: A checkpoint whose weights a new run starts from, with a fresh optimizer.
        allow_changes: Resume although data, packages or settings changed; it is recorded.
        on_overflow: "stop", or "rollback": once, resume from the last good state in bf16.
        save_every: Optimizer steps between two full states within an epoch.

    Returns:
        The content of ``run.json``; of several processes only the first has it.

    Raises:
        UsageError, DataError, CheckpointError, RunFolderError: Recipe, chips, a state or the run folder cannot be used.
        Incident: NaNGuard stopped the run.
        Interrupted: A signal stopped the run.
    """
    data = check_data(cli.recipe, ("train", "val"))
    if cli.recipe["trainer"].get("fast_dev_run"):
        _build(cli, data)
        _train(cli, None)
        console.say("fast_dev_run: the recipe works; nothing was kept")
        return {"status": "fast_dev_run"}
    run = RunFolder(path)
    record = run.read_record()
    if not run.record.is_file() and {*path.glob("[!.]*")} - {run.log, run.recipe}:  # of one that was killed as it began
        raise errors.UsageError("the folder exists and holds no run", where=path, fix="give another --name")
    chosen_by = terratorch_cli.into_run_folder(cli.config, run, record.get("loggers") or {})
    if record.get("rollback"):
        cli.config.trainer.precision = _ROLLBACK_PRECISION
    ckpt_path = None if ckpt_path == "last" else ckpt_path  # a run's own state is taken up in any case
    if weights is not None or ckpt_path is not None or (run.checkpoints / LAST).exists():
        terratorch_cli.forget_pretrained_weights(cli.config)
    _build(cli, data)
    trainer: Any = cli.trainer  # which knows whether this process is the first
    if on_overflow == "rollback" and trainer.world_size > 1:
        raise errors.UsageError("a rollback needs a run of one process", fix="--on-overflow stop")
    with contextlib.ExitStack() as held:
        with _agreeing(trainer, run):
            if trainer.is_global_zero:
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(run.lock, timeout=_LOCK_SECONDS))
                held.enter_context(console.log_to(run.log))
            record = run.read_record()  # again: another fit may have trained until now
            finished, wanted = record.get("status") == "finished", cli.recipe["trainer"]
            length = recipes.read_yaml(run.recipe)["trainer"] if finished else wanted
            finished &= all(_limit(wanted, key) <= _limit(length, key) for key in ("max_epochs", "max_steps"))
            finished &= wanted.get("max_time") == length.get("max_time")
            common = {"chosen_by": chosen_by, "data": dict(data.digests)}
            now, state, changes = _choose_state(cli.recipe, common, run, ckpt_path, allow_changes=allow_changes)
            if state is None and record.get("status") == "finished" and not finished:
                what = "the full state that this run ended with is gone: it cannot be extended"
                raise errors.UsageError(what, where=run.checkpoints, fix="give another --name")
            trainer.callbacks += [_WeightedMeans(), _RunState(run, now), NaNGuard(), RunRecord(write=run.update_record)]
            trainer.callbacks += [ExactResume(str(run.checkpoints), save_every)]
            entries: dict[str, Any] = {"started": record.get("started") or timestamp(), **chosen_by}
            if state is None:
                entries["started_from"] = None  # what a fit that was killed before its first state has noted
            else:
                resumed = {"when": timestamp(), "from": state.name, "changes": changes}
                entries["resumes"] = [*record.get("resumes", []), resumed]
            source = sha256_of(weights) if weights is not None else None
            if weights is not None and state is None:
                left_out = load_weights(cli.model.model, read_checkpoint(weights), strict=False) or None
                entries["started_from"] = {"file": weights.name, "sha256": source, "left_out": left_out}
            elif source not in (None, (record.get("started_from") or {}).get("sha256")):
                what = "--weights starts a new run, and this one has trained"
                raise errors.UsageError(what, where=state, fix="give another --name")
            if trainer.is_global_zero and not finished:
                _begin(cli, run, data, entries)
        if finished:
            console.say(f"the run is finished already: {path}")
            return record
        try:
            _train(cli, state)
            chips = {name: _of_all(trainer, name) for name in ("failed_chips", "odd_chips")}
            return _finish(run, chips) if trainer.is_global_zero else {}
        except BaseException as failure:
            if trainer.is_global_zero:
                _record_failure(run, failure)
            may_roll_back = on_overflow == "rollback" and not record.get("rollback")
            if not may_roll_back or not isinstance(failure, errors.Incident) or not failure.rolls_back:
                raise
            console.warn(failure.what)
            rollback = {"step": failure.entry["step"], "precision": [str(trainer.precision), _ROLLBACK_PRECISION]}
    del trainer
    gc.collect()  # the failed step's graph, with all its activations, hangs in a cycle with the traceback
    torch.cuda.empty_cache()
    last = newest_state(run.checkpoints)
    where, weights = (last.name, None) if last else ("the start", weights)
    run.update_record(rollback=rollback | {"state": where, "when": timestamp()})  # it chooses the precision from now on
    console.warn(f"rolled back to {where}; the run continues in {_ROLLBACK_PRECISION}. This happens once")
    return fit(cli, path, ckpt_path=ckpt_path, weights=weights, allow_changes=allow_changes, save_every=save_every)


def _limit(trainer: recipes.Recipe, key: str) -> float:
    return math.inf if trainer.get(key) in (None, -1) else float(trainer[key])


def _build(cli: terratorch_cli.RecipeCLI, data: DataState) -> None:
    cli.build()
    if data.chips.get("val", cli.trainer.world_size) < cli.trainer.world_size:
        raise errors.UsageError("there are fewer validation chips than devices", fix="--trainer.devices 1")
    batch = (getattr(cli.datamodule, "batch_size", None) or 1) * cli.trainer.world_size
    if data.chips.get("train", batch) < batch:  # the last batch is left out where it is not full
        what = f"{data.chips['train']} training chips do not fill one batch of {batch}"
        raise errors.UsageError(what, fix="--data.init_args.batch_size N")


@contextlib.contextmanager
def _agreeing(trainer: Any, run: RunFolder) -> Iterator[None]:
    """Let a refusal of one process end all: those that torchrun or srun started wait for each other."""
    error: errors.FloodreproError | None = None
    try:
        yield
    except OSError as failure:
        what = f"the run folder cannot be written: {failure}"
        what = "another fit is running in this folder" if isinstance(failure, Timeout) else what
        error = errors.RunFolderError(what, where=run.path, fix="wait until it is done, or --name, or --runs-root DIR")
    except errors.FloodreproError as refusal:
        error = refusal
    if trainer.world_size > 1 and not isinstance(trainer.strategy.cluster_environment, LightningEnvironment):
        trainer.strategy.setup_environment()
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, str(error) if error else None)
        error = error or next((errors.UsageError(text) for text in everyone if text), None)
    if error is not None:
        raise error


def _choose_state(
    recipe: recipes.Recipe, common: dict[str, Any], run: RunFolder, ckpt_path: str | None, *, allow_changes: bool
) -> tuple[dict[str, Any], Path | None, list[str]]:
    """What all parts of a run have in common, the state to resume from, and what changed since: by files alone."""
    kept = {key: value for key, value in recipes.leaves(recipe) if not _MAY_CHANGE.fullmatch(key)}
    now = common | {"recipe": kept, "packages": {name: version(name) for name in _PACKAGES}}
    state = newest_state(run.checkpoints) or (Path(ckpt_path) if ckpt_path else None)
    if state is None:
        return now, None, []
    try:
        before = torch.load(state, map_location="cpu", weights_only=True, mmap=True)[_KEY]["identity"]
    except Exception as error:  # torch.load raises what zipfile, pickle and the system raise
        what = "there is no full state here that a run can resume from"
        fix = "give checkpoints/last.ckpt of a run, or start from the weights alone: --weights FILE"
        raise errors.CheckpointError(what, where=state, fix=fix) from error
    found = recipes.differences(common | before, now)  # a state of before 0.2.0 does not say what chose the best epoch
    changes = [f"{key.removeprefix('recipe.')}: {old!r} became {new!r}" for key, (old, new) in found.items()]
    fixed = [line for line in changes if line.startswith(("model.", "optimizer.", "lr_scheduler."))]
    if changes and (fixed or not allow_changes):
        hint = f"--weights {state} starts from its weights alone" if fixed else "or --resume-anyway, which is recorded"
        what = f"this would not be the same run{errors.name_three(':', fixed or changes)}"
        raise errors.UsageError(what, where=state, fix=f"undo the change, or give another --name; {hint}")
    return now, state, changes


def newest_state(folder: Path) -> Path | None:
    """The newest full state of which every byte is as it was written; None where none was written yet.

    A damaged one is renamed, with a warning. Raises `CheckpointError` where all are damaged.
    """
    found = [path for path in (folder / LAST, folder / PREVIOUS) if path.exists()]
    whole = next((path for path in found if _is_whole(path)), None)
    if found and whole is None:
        raise errors.CheckpointError("the full state is damaged", where=found[0], fix="start under another --name")
    if whole is not None and whole != found[0]:  # else it would become the previous one
        with contextlib.suppress(FileNotFoundError):  # another process of this run was faster
            aside = found[0].replace(found[0].with_name(f"{LAST}.damaged"))
            console.warn(f"{found[0]} is damaged and was renamed to {aside.name}; {PREVIOUS} is used instead")
    return whole


def _is_whole(state: Path) -> bool:
    with contextlib.suppress(zipfile.BadZipFile, EOFError, OSError), zipfile.ZipFile(state) as archive:
        return archive.testzip() is None  # checksums: a file of torch.save is a ZIP archive
    return False


def _begin(cli: terratorch_cli.RecipeCLI, run: RunFolder, data: DataState, entries: dict[str, Any]) -> None:
    trainer, batch = cli.trainer, getattr(cli.datamodule, "batch_size", None)
    entries |= {"status": "running", "ended": None, "reason": None, "command": ["floodrepro", *sys.argv[1:]]}
    entries |= {"recipe_sha256": run.save_recipe(cli.recipe), "seed": cli.config.seed_everything}
    entries |= {"data": vars(data), "batch_size": batch, "processes": trainer.world_size}
    run.update_record(**entries, environment=environment(str(trainer.precision)))
    parameters = sum(parameter.numel() for parameter in cli.model.parameters())
    console.say(f"{parameters:,} parameters, chips {data.chips}")
    if trainer.world_size > 1 and batch:
        of = f"{trainer.world_size} processes with {batch} chips each"
        console.warn(f"{of}: the global batch is {batch * trainer.world_size}")
    elif (devices := torch.cuda.device_count()) > trainer.world_size:
        console.say(f"{devices} GPUs are here, one is used; --trainer.devices {devices} multiplies the global batch")


def _train(cli: terratorch_cli.RecipeCLI, state: Path | None) -> None:
    trainer = cli.trainer
    attention: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if trainer.strategy.root_device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        attention = sdpa_kernel(SDPBackend.MATH)  # the backward passes of torch's other kernels add in no fixed order
    try:
        with console.stdout_to_stderr(), attention:
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(state) if state else None)
    except MisconfigurationException as error:
        raise errors.UsageError(str(error), where="trainer") from error
    except SystemExit as error:  # Lightning's answer to Ctrl-C before ExactResume listens
        raise error if isinstance(error, errors.Interrupted) else KeyboardInterrupt from error


def _record_failure(run: RunFolder, failure: BaseException) -> None:
    what = failure.what if isinstance(failure, errors.FloodreproError) else str(failure)
    status = "interrupted" if isinstance(failure, errors.Interrupted | KeyboardInterrupt) else "failed"
    found: dict[str, Any] = {"status": status, "ended": timestamp(), "reason": f"{type(failure).__name__}: {what}"}
    with contextlib.suppress(OSError):  # a full disk must not replace the error that it caused
        if isinstance(failure, errors.Incident):
            found["incidents"] = [*run.read_record().get("incidents", []), failure.entry | {"when": timestamp()}]
        run.update_record(**found)


def _of_all(trainer: Any, name: str) -> dict[str, str]:
    """Chips that the data modules of all processes have named, and why."""
    everyone = [dict(getattr(trainer.datamodule, name, {}))] * trainer.world_size
    if torch.distributed.is_initialized():  # with ddp_fork, those that trained have ended by now
        torch.distributed.all_gather_object(everyone, everyone[0])
    return {chip: why for chips in everyone for chip, why in chips.items()}


def _finish(run: RunFolder, chips: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Write what came out; the mark of a finished run is the last thing that happens."""
    found: dict[str, Any] = {"best_epoch": None}
    if run.best.is_file():
        # The file itself is the only source that cannot disagree with the weights in it.
        best = torch.load(run.best, map_location="cpu", weights_only=True, mmap=True)
        rows = [row for row in run.read_metrics() if row.get("step") == str(best["global_step"] - 1)]
        scores = {key: float(text) for row in rows for key, text in row.items() if key.startswith("val/") and text}
        found |= {"best_epoch": best["epoch"], "best_metrics": scores, "checkpoint_sha256": sha256_of(run.best)}
    found |= {name: named for name, named in chips.items() if named}
    run.update_record(status="finished", ended=timestamp(), **found)
    return run.read_record()


class _RunState(Callback):
    """Adds to every full state the run's identity, and ``metrics.csv``: Lightning's logger deletes it on a resume."""

    def __init__(self, run: RunFolder, now: dict[str, Any]) -> None:
        self._run, self._now, self._rows = run, now, list[dict[str, str]]()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()
        checkpoint[_KEY] = {"identity": self._now, "metrics": self._run.read_metrics()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._rows = checkpoint[_KEY]["metrics"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, CSVLogger) and Path(logger.log_dir) == self._run.metrics.parent:
                logger.experiment.metrics += self._rows

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:  # now, for a run that is killed has no end
            self._run.update_record(loggers=terratorch_cli.run_ids_of(trainer.loggers))


class _WeightedMeans(Callback):
    """Lightning 2.6.1 averages numbers of chips over processes as integers, and val/loss chooses the best epoch."""

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.world_size > 1:
            for metric in trainer.fit_loop.epoch_loop.val_loop._results.values():
                if metric.is_tensor and metric.meta.is_mean_reduction:
                    metric.cumulated_batch_size = metric.cumulated_batch_size.double()
