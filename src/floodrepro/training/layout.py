"""Where a recipe's files go, decided when its objects are built. No mathematics here."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from floodrepro import console
from floodrepro.run_folder import RunFolder

_BEST = "terratorch.cli_tools.StateDictAwareModelCheckpoint"  # may stand beside another one that monitors the same
_WRITERS = ("ModelCheckpoint", "EarlyStopping", "LearningRateMonitor")
_RUN_IDS = {"WandbLogger": "id", "MLFlowLogger": "run_id"}  # loggers whose runs live on a server, and the argument


def into_run_folder(config: Namespace, run: RunFolder, *, progress_bar: bool, run_ids: dict[str, str]) -> None:
    """Send the files of a fit into its run folder. What you sent elsewhere stays there.

    A logger or checkpoint moves into the run folder if it names no folder, or one below the recipe's
    ``default_root_dir``. ``best.ckpt`` follows the recipe's own monitor.

    Args:
        config: Parsed config, changed in place.
        run: The run folder.
        progress_bar: Whether Lightning's bar is kept; in a log file it would be noise.
        run_ids: Of an interrupted run's loggers, by class name.
    """
    trainer = config.trainer
    root, trainer.default_root_dir = trainer.default_root_dir, str(run.path)
    for logger in _as_list(trainer.logger):
        name, arguments = logger.class_path.rsplit(".", 1)[-1], _arguments(logger)
        if name in ("CSVLogger", "TensorBoardLogger") and _is_below(arguments.get("save_dir"), root):
            # Lightning writes to save_dir/name/version: empty names leave RunFolder.metrics.
            folder = "" if name == "CSVLogger" else "tensorboard"
            arguments.update(Namespace(save_dir=str(run.path), name=folder, version=""))
        elif name in run_ids and not arguments.get(_RUN_IDS[name]):
            arguments[_RUN_IDS[name]] = run_ids[name]
            if name == "WandbLogger":
                arguments.resume = "allow"
    trainer.callbacks = _as_list(trainer.callbacks)
    if trainer.enable_checkpointing is not False:
        _keep_best(trainer.callbacks, run, root)
    if trainer.enable_model_summary is None:
        trainer.enable_model_summary = False  # a table of five rows; the number of parameters is in the log
    _progress(trainer, keep=progress_bar)


def run_ids_of(loggers: list[Any]) -> dict[str, str]:
    """Run ids of loggers whose runs live on a server, by class name."""
    ids = {type(one).__name__: getattr(one, "run_id", None) or one.version for one in loggers}
    return {name: str(ids[name]) for name in _RUN_IDS if ids.get(name)}


def warn_of_wrong_mode(trainer: Namespace) -> None:
    """Warn of a score whose lowest value is kept, or of a loss whose highest is."""
    for name, monitor, mode in _monitors(_as_list(trainer.callbacks)):
        is_loss = any(word in monitor.lower() for word in ("loss", "error"))
        if is_loss == (mode == "max"):
            console.warn(f"{name} monitors {monitor} with mode: {mode}, which prefers the worst epoch")


def change_precision(config: Namespace, precision: str) -> None:
    """Set the trainer's precision, whatever the recipe says by key or by plugin."""
    config.trainer.precision = precision
    plugins = _as_list(config.trainer.plugins)
    config.trainer.plugins = [p for p in plugins if not str(getattr(p, "class_path", p)).endswith("Precision")]


def without_files(config: Namespace, *, progress_bar: bool) -> None:
    """Let a pass over a split (validate, test, predict) read only: no loggers, no checkpoints, no pretrained weights.

    It runs on one device whatever the training ran on: each chip is measured once, and one process writes.

    Args:
        config: Parsed config, changed in place.
        progress_bar: As in `into_run_folder`.
    """
    trainer = config.trainer
    if str(trainer.devices) not in ("1", "auto"):
        console.say(f"a pass runs on one device: devices {trainer.devices} is for training")
    trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"
    trainer.logger = trainer.enable_checkpointing = False
    trainer.callbacks = [c for c in _as_list(trainer.callbacks) if not c.class_path.endswith(_WRITERS)]
    _progress(trainer, keep=progress_bar)
    forget_pretrained_weights(config)


def forget_pretrained_weights(config: Namespace) -> None:
    """Build the backbone from random weights: a checkpoint will replace them all, and none is worth a download."""
    model_args: dict[str, Any] | None = config.model.init_args.get("model_args")
    if model_args and model_args.get("backbone_pretrained"):
        model_args["backbone_pretrained"] = False


def _keep_best(callbacks: list[Namespace], run: RunFolder, root: str | None) -> None:
    """Let the recipe's checkpoint write ``best.ckpt``, or add one where it writes elsewhere or keeps several."""
    _, monitor, mode = [*_monitors(callbacks), ("", "val/loss", "min")][0]
    best = None
    for callback in callbacks:
        arguments = _arguments(callback)
        if not callback.class_path.endswith("ModelCheckpoint") or not _is_below(arguments.get("dirpath"), root):
            continue
        arguments.dirpath = str(run.checkpoints)
        arguments.enable_version_counter = False  # an epoch that runs again writes the same file, no -v1
        keeps_one = arguments.get("monitor") == monitor and arguments.get("save_top_k") == 1
        if best is None and keeps_one and not arguments.get("save_last"):
            best = callback
            arguments.filename = run.best.stem
    if best is None:
        arguments = Namespace(monitor=monitor, mode=mode, save_top_k=1, save_weights_only=True, filename=run.best.stem)
        arguments.update(Namespace(dirpath=str(run.checkpoints), enable_version_counter=False))
        callbacks.append(Namespace(class_path=_BEST, init_args=arguments))


def _monitors(callbacks: list[Namespace]) -> list[tuple[str, str, str]]:
    """Class, score and mode of the callbacks that choose by a score, checkpoints first."""
    found = []
    for ending in ("ModelCheckpoint", "EarlyStopping"):
        for callback in callbacks:
            monitor, mode = (_arguments(callback).get(key) for key in ("monitor", "mode"))
            if callback.class_path.endswith(ending) and monitor:
                found.append((callback.class_path.rsplit(".", 1)[-1], monitor, mode or "min"))
    return found


def _arguments(node: Namespace) -> Namespace:
    """The arguments of a class in a recipe; it may have been named without any."""
    if node.get("init_args") is None:
        node.init_args = Namespace()
    arguments: Namespace = node.init_args
    return arguments


def _is_below(folder: str | None, root: str | None) -> bool:
    if folder is None:
        return True
    return root is not None and Path(folder).absolute().is_relative_to(Path(root).absolute())


def _progress(trainer: Namespace, *, keep: bool) -> None:
    if not keep:
        trainer.callbacks = [c for c in _as_list(trainer.callbacks) if not c.class_path.endswith("ProgressBar")]
        trainer.enable_progress_bar = False


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list) else [value]
