"""A recipe merged by TerraTorch's own command-line class, the objects it describes, and where their files go."""
# ruff: noqa: E402

import difflib
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from floodrepro import console, recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder

# lightly and albumentations read these at import, and would otherwise ask the network for newer versions.
os.environ.update(LIGHTLY_DID_VERSION_CHECK="True", NO_ALBUMENTATIONS_UPDATE="1")

import torch

# terratorch 1.2.7 sets the float32 matmul precision and the root logger at import: both are put back below.
_matmul_precision, _root = torch.get_float32_matmul_precision(), logging.getLogger()
_root_level, _root_handlers = _root.level, [*_root.handlers]
with warnings.catch_warnings(), console.stdout_to_stderr():
    warnings.simplefilter("ignore")  # deprecations inside the libraries' own modules
    from terratorch.cli_tools import BaseTask, MyLightningCLI, MyTrainer, import_custom_modules

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchmetrics import MetricCollection

from floodrepro.data.datamodule import FloodDataModule

torch.set_float32_matmul_precision(_matmul_precision)
_root.setLevel(_root_level)
_root.handlers[:] = _root_handlers
# Warnings of every run that nobody can act on: the recipe's optimizer replaces the task's own, which is what a recipe
# is for; deprecations between the libraries; metrics that torchmetrics has already summed over all processes, or
# computes in the sanity check; and folders that a resumed run finds as it left them.
for _message in (
    r".*configure_optimizers` will be overridden by",
    r"[\s\S]*(was deprecated in v4\.|JsonargparseDeprecationWarning)",
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
    r"It is recommended to use `self\.log\(",
    r".*method of metric .* was called before the ``update`` method",
    r"(Experiment logs|Checkpoint) directory .* exists and is not empty",
):
    warnings.filterwarnings("ignore", message=_message)
# Lightning says which accelerators there are, the seed, and an advertisement. RunRecord says what matters.
for _name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_COUNT_OR_SHARE = re.compile(r"trainer\.(limit_\w+_batches|overfit_batches)")
# What constructors raise; the last one is Lightning's.
_REFUSALS: tuple[type[Exception], ...] = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)
_REFUSALS += (AssertionError, MisconfigurationException)
_BROKEN_METRIC = "Boundary_mIoU"  # depends on the batch size where pixels are ignored (terratorch 1.2.7)
_BEST = "terratorch.cli_tools.StateDictAwareModelCheckpoint"  # may stand beside another one that monitors the same
_OF_TRAINING = ("ModelCheckpoint", "EarlyStopping", "LearningRateMonitor", "ProgressBar")
_RUN_IDS = {"WandbLogger": "id", "MLFlowLogger": "run_id"}  # loggers whose runs live on a server, and the argument


class RecipeCLI(MyLightningCLI):  # type: ignore[misc]  # terratorch ships no types
    """TerraTorch's LightningCLI in two steps: the merged recipe first; the objects only when you ask for them.

    ``terratorch test --ckpt_path`` replaces the whole ``model:`` section by what the checkpoint remembers (Lightning
    2.6.1, ``_parse_ckpt_path``). With ``run=False`` this does not happen: the config decides.

    Args:
        configs: YAML files in layers; later ones win, key by key.
        overrides: Command-line overrides in jsonargparse's syntax, ``--trainer.max_epochs 3``; they win over the files.

    Attributes:
        recipe: What files and overrides say, without any default of a library.
        config: The same with all defaults. What is changed here before `build` is built, and ``recipe`` stays.

    Raises:
        UsageError: The parser refuses the recipe.
        SystemExit: ``overrides`` ask for help, such as ``--print_config``, which is printed.
    """

    def __init__(self, configs: Sequence[Path], overrides: Sequence[str] = ()) -> None:
        self._configs, self._overrides = list(configs), list(overrides)
        # The arguments of terratorch.cli_tools.build_lightning_cli, which leaves no way to pass a subclass.
        super().__init__(
            model_class=BaseTask,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_class=MyTrainer,
            trainer_defaults={"callbacks": [], "enable_model_summary": False},
            parser_kwargs={"exit_on_error": False},
            run=False,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add TerraTorch's, and let limits be read as whole numbers before shares: jsonargparse 4.53 makes 1 1.0."""
        super().add_arguments_to_parser(parser)
        for action in parser._actions:
            if _COUNT_OR_SHARE.fullmatch(action.dest):
                action._typehint = int | float | None

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Merge files and overrides into ``recipe``, then let the parser add its defaults in ``config``."""
        contents = [recipes.read_yaml(path) for path in self._configs]
        folded = recipes.fold(contents, self._overrides)
        code = folded.get("custom_modules_path")
        if code and not Path(str(code)).is_dir():
            raise UsageError("there is no such folder of modules", where=f"custom_modules_path: {code}")
        import_custom_modules(code)  # TerraTorch looks below a subcommand only
        if "--trainer.help" in self._overrides:  # the parser has such help for classes that can be chosen only
            trainer = ArgumentParser(prog="floodrepro fit")
            trainer.add_class_arguments(MyTrainer, "trainer")
            trainer.print_help()
            raise SystemExit(0)
        arguments = [token for path in self._configs for token in ("--config", str(path))] + self._overrides
        help_is_asked_for = any(re.match(r"--(print_config|[\w.]*help)\b", token) for token in self._overrides)
        try:
            merged = parser.parse_args(arguments, defaults=help_is_asked_for)
            _type_values(merged, self._overrides)
            merged.pop("config", None)
            self.recipe: Recipe = yaml.safe_load(parser.dump(merged, skip_unset=False, skip_validation=True))
            self.config = parser.parse_object(merged)
        except ArgumentError as error:
            raise _refusal(str(error), parser, folded, [*self._configs, *self._overrides]) from error

    def _set_seed(self) -> None:
        """Wait for `build`."""

    instantiate_classes = _set_seed

    def build(self) -> None:
        """Seed everything and build model, data module and trainer as ``model``, ``datamodule`` and ``trainer``.

        Raises:
            UsageError: A constructor refuses a value, or the recipe asks for fp16 and would run on a CPU.
        """
        accelerator, precision = str(self.config.trainer.accelerator), str(self.config.trainer.precision)
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
        if on_cpu and precision in ("16", "16-mixed", "16-true"):
            what = "fp16 does not run on a CPU: Lightning would quietly use bf16 in its place"
            where = f"trainer.precision: {precision}, trainer.accelerator: {accelerator}"
            raise UsageError(what, where=where, fix="--precision fp32 (slower) or --precision bf16")
        try:
            with console.stdout_to_stderr():
                super()._set_seed()
                super().instantiate_classes()
                _trim_metrics(self.model, labels_known=isinstance(self.datamodule, FloodDataModule))
        except _REFUSALS as error:
            raise UsageError(
                f"the recipe does not build: {type(error).__name__}: {_last_lines(str(error))}",
                where=", ".join(map(str, self._configs)),
                fix="check model_args: only TerraTorch's model factory knows which values it takes",
            ) from error


def into_run_folder(config: Namespace, run: RunFolder, run_ids: Mapping[str, str]) -> dict[str, Any]:
    """Send the files of a fit into its run folder; ``best.ckpt`` follows the recipe's own monitor.

    A logger or checkpoint stays where it is if it names a folder that is not below the recipe's ``default_root_dir``.
    The config is changed in place; `run_ids` is what `run_ids_of` gave when the run was interrupted.

    Returns:
        The ``monitor`` that chooses the best epoch, and its ``mode``; None without checkpoints.
    """
    trainer = config.trainer
    root, trainer.default_root_dir = trainer.default_root_dir, str(run.path)
    for logger in _as_list(trainer.logger):
        name, arguments = logger.class_path.rsplit(".", 1)[-1], logger.get("init_args") or Namespace()
        if name in ("CSVLogger", "TensorBoardLogger") and _is_below(arguments.get("save_dir"), root):
            # Lightning writes to save_dir/name/version: empty names leave RunFolder.metrics.
            folder = "" if name == "CSVLogger" else "tensorboard"
            arguments.update(Namespace(save_dir=str(run.path), name=folder, version=""))
        elif name in run_ids and not arguments.get(_RUN_IDS[name]):
            arguments[_RUN_IDS[name]] = run_ids[name]
            if name == "WandbLogger":
                arguments.resume = "allow"
    trainer.callbacks = _as_list(trainer.callbacks)
    if not sys.stderr.isatty():  # elsewhere Lightning's progress bars are noise
        trainer.callbacks = [one for one in trainer.callbacks if not one.class_path.endswith("ProgressBar")]
        trainer.enable_progress_bar = False
    monitors = []  # of checkpoints first: the first one chooses the best epoch
    for kind in ("ModelCheckpoint", "EarlyStopping"):
        for arguments in _arguments(trainer.callbacks, kind):
            if monitor := arguments.get("monitor"):
                monitors.append((monitor, mode := arguments.get("mode") or "min"))
                if any(word in monitor.lower() for word in ("loss", "error")) == (mode == "max"):
                    console.warn(f"{kind} monitors {monitor} with mode: {mode}, which prefers the worst epoch")
    if trainer.enable_checkpointing is False:
        return {"monitor": None, "mode": None}
    # The recipe's own checkpoint writes best.ckpt; one is added where it writes elsewhere or keeps several.
    monitor, mode = [*monitors, ("val/loss", "min")][0]
    place = Namespace(dirpath=str(run.checkpoints), enable_version_counter=False)  # written again, no -v1 beside it
    own = [one for one in _arguments(trainer.callbacks, "ModelCheckpoint") if _is_below(one.get("dirpath"), root)]
    fitting = [one for one in own if one.get("monitor") == monitor and one.get("save_top_k") == 1]
    best = next((one for one in fitting if not one.get("save_last")), None)
    if best is None:
        best = Namespace(monitor=monitor, mode=mode, save_top_k=1, save_weights_only=True)
        trainer.callbacks.append(Namespace(class_path=_BEST, init_args=best))
    for arguments in [*own, best]:
        arguments.update(place)
    best.filename = run.best.stem
    return {"monitor": monitor, "mode": mode}


def run_ids_of(loggers: list[Any]) -> dict[str, str]:
    """Run ids of loggers whose runs live on a server, by class name."""
    ids = {type(one).__name__: getattr(one, "run_id", None) or one.version for one in loggers}
    return {name: str(ids[name]) for name in _RUN_IDS if ids.get(name)}


def without_files(config: Namespace) -> None:
    """Let a pass over a split (validate, test, predict) read only: no loggers, no checkpoints, no pretrained weights.

    It runs on one device: each chip is measured once, and one process writes. The config is changed in place.
    """
    trainer = config.trainer
    if str(trainer.devices) not in ("1", "auto"):
        console.say(f"a pass runs on one device: devices {trainer.devices} is for training")
    trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"
    trainer.logger = trainer.enable_checkpointing = trainer.enable_progress_bar = False
    trainer.callbacks = [one for one in _as_list(trainer.callbacks) if not one.class_path.endswith(_OF_TRAINING)]
    forget_pretrained_weights(config)


def forget_pretrained_weights(config: Namespace) -> None:
    """Build the backbone from random weights: a checkpoint will replace them all, and none is worth a download."""
    model_args: dict[str, Any] | None = config.model.init_args.get("model_args")
    for key in ("backbone_pretrained", "backbone_ckpt_path"):
        if model_args and model_args.get(key):
            model_args[key] = False if key == "backbone_pretrained" else None


def _arguments(callbacks: list[Namespace], kind: str) -> list[Namespace]:
    return [one.get("init_args") or Namespace() for one in callbacks if one.class_path.endswith(kind)]


def _is_below(folder: str | None, root: str | None) -> bool:
    return folder is None or (root is not None and Path(folder).absolute().is_relative_to(Path(root).absolute()))


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list) else [value]


def _trim_metrics(task: Any, *, labels_known: bool) -> None:
    """Drop the metric that means nothing, and spare others a search for labels that sorts pixels and waits for it."""
    for collection in [module for module in task.modules() if isinstance(module, MetricCollection)]:
        if _BROKEN_METRIC in collection._modules:
            del collection[_BROKEN_METRIC]
            collection._init_compute_groups()
        for metric in collection.modules() if labels_known else ():
            if "validate_args" in vars(metric):
                vars(metric)["validate_args"] = False


def _type_values(merged: Namespace, overrides: Sequence[str]) -> None:
    """Type overrides in bare dicts, such as model_args, as YAML does: jsonargparse leaves "false", which is true."""
    for key, value in recipes.pairs(overrides):
        parent, _, leaf = key.rpartition(".")
        node = merged.get(parent) if parent in merged else None
        if type(node) is dict and isinstance(node.get(leaf), str):
            node[leaf] = value


def _refusal(message: str, parser: Any, recipe: Recipe, given: Sequence[object]) -> UsageError:
    """The parser's own last lines, and the nearest known key for each of the user's keys that they object to."""

    def words(recipe: Recipe) -> set[str]:
        return {part for key, _ in recipes.leaves(recipe) for part in key.split(".")}

    known = {part for action in parser._actions for part in action.dest.split(".")}
    known = known.union(*(words(recipes.read_yaml(path)) for path in recipes.shipped().values()))
    shown = _last_lines(message)
    unknown = [word for word in sorted(words(recipe) - known) if re.search(rf"\b{re.escape(word)}\b", shown)]
    close = {word: difflib.get_close_matches(word, known, n=1) for word in unknown}
    hints = [f"did you mean '{found[0]}' instead of '{word}'?" for word, found in close.items() if found]
    fix = " ".join(hints) or "'floodrepro configs show demo' prints a recipe that works"
    return UsageError(f"the recipe is refused: {shown}", where=" ".join(map(str, given)), fix=fix)


def _last_lines(message: str) -> str:
    return " ".join([line for line in message.splitlines() if line.strip() and "Given value:" not in line][-12:])
