"""Where a recipe's files go and which callbacks run, decided when the objects are built. No mathematics here."""

from typing import Any

from jsonargparse import Namespace

from floodrepro.run_folder import RunFolder

_WHOLE_FILES = "floodrepro.training.checkpoint_files.WholeCheckpointIO"
_BEST_WEIGHTS = "floodrepro.training.checkpoint_files.BestWeights"
_WRITERS = ("ModelCheckpoint", "BestWeights", "EarlyStopping", "LearningRateMonitor")


def into_run_folder(config: Namespace, run: RunFolder, *, progress_bar: bool, resumed_step: int | None = None) -> None:
    """Send logs and checkpoints of a fit into its run folder, whatever paths the recipe names.

    Args:
        config: Parsed config, changed in place.
        run: Where everything goes.
        progress_bar: Whether Lightning's bar is kept; in a log file it would be noise.
        resumed_step: The optimizer step that a resumed run goes on from.
    """
    trainer = config.trainer
    trainer.default_root_dir = str(run.path)
    plugins = _as_list(trainer.plugins)
    if not any(str(getattr(plugin, "class_path", plugin)).endswith("CheckpointIO") for plugin in plugins):
        trainer.plugins = [*plugins, Namespace(class_path=_WHOLE_FILES, init_args=Namespace())]
    for logger in _as_list(trainer.logger):
        arguments = logger.init_args
        if logger.class_path.endswith("CSVLogger"):
            # Lightning writes to save_dir/name/version/metrics.csv: empty names leave RunFolder.metrics.
            arguments.update(Namespace(save_dir=str(run.path), name="", version=""))
        elif logger.class_path.endswith("TensorBoardLogger"):
            arguments.update(Namespace(save_dir=str(run.path), name="tensorboard", version=""))
            if resumed_step is not None:
                logger.dict_kwargs = {"purge_step": resumed_step}  # what was logged after the state comes again
        elif "save_dir" in arguments:
            arguments.save_dir = str(run.path)
    trainer.callbacks = _as_list(trainer.callbacks)
    if trainer.enable_checkpointing is not False and not any(_keeps_the_best(c) for c in trainer.callbacks):
        trainer.callbacks.append(_best_weights())
    for callback in trainer.callbacks:
        if _is_checkpoint(callback):
            arguments = callback.init_args
            arguments.dirpath = str(run.checkpoints)
            arguments.save_last = None  # last.ckpt is the full state's
            arguments.enable_version_counter = False  # an epoch that is run again writes the same file again, no -v1
            if _keeps_the_best(callback):
                arguments.filename = run.best.stem
            elif arguments.save_top_k != 1 and "{" not in (arguments.get("filename") or "{"):
                arguments.filename += "-{epoch}"  # each would be written over the one before
    _progress(trainer, keep=progress_bar)


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
    trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"
    trainer.logger = False
    trainer.enable_checkpointing = False
    trainer.callbacks = [c for c in _as_list(trainer.callbacks) if not c.class_path.endswith(_WRITERS)]
    _progress(trainer, keep=progress_bar)
    forget_pretrained_weights(config)


def forget_pretrained_weights(config: Namespace) -> None:
    """Build the backbone from random weights: a checkpoint will replace them all, and none is worth a download."""
    model_args: dict[str, Any] | None = config.model.init_args.get("model_args")
    if model_args and model_args.get("backbone_pretrained"):
        model_args["backbone_pretrained"] = False


def _is_checkpoint(callback: Namespace) -> bool:
    return bool(callback.class_path.endswith(("ModelCheckpoint", "BestWeights")))


def _keeps_the_best(callback: Namespace) -> bool:
    """Whether it keeps the one checkpoint of the lowest val/loss: the best of a run folder."""
    if not _is_checkpoint(callback):
        return False
    arguments = callback.init_args
    return (arguments.get("monitor"), arguments.get("mode"), arguments.get("save_top_k")) == ("val/loss", "min", 1)


def _best_weights() -> Namespace:
    """The checkpoint of a recipe that names none such; Lightning's own default would keep the last epoch."""
    arguments = Namespace(monitor="val/loss", mode="min", save_top_k=1, save_weights_only=True)
    return Namespace(class_path=_BEST_WEIGHTS, init_args=arguments)


def _progress(trainer: Namespace, *, keep: bool) -> None:
    if not keep:
        trainer.callbacks = [c for c in _as_list(trainer.callbacks) if not c.class_path.endswith("ProgressBar")]
        trainer.enable_progress_bar = False


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list) else [value]
