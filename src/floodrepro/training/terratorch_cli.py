"""A recipe, its layers and overrides merged by TerraTorch's own command-line class, and the objects it describes."""
# ruff: noqa: E402

import contextlib
import datetime
import difflib
import logging
import os
import re
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.recipe import Recipe

# lightly and albumentations read these at import, and would otherwise ask the network for newer versions.
os.environ.update(LIGHTLY_DID_VERSION_CHECK="True", NO_ALBUMENTATIONS_UPDATE="1")

import torch

# terratorch 1.2.7 sets the float32 matmul precision and the root logger at import: both are put back below.
_matmul_precision, _root = torch.get_float32_matmul_precision(), logging.getLogger()
_root_level, _root_handlers = _root.level, [*_root.handlers]
with warnings.catch_warnings(), console.stdout_to_stderr():
    warnings.simplefilter("ignore")  # deprecations inside the libraries' own modules
    from terratorch.cli_tools import BaseTask, CustomWriter, MyLightningCLI, MyTrainer, import_custom_modules

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torchmetrics import Metric, MetricCollection

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

__all__ = ["CustomWriter", "RecipeCLI"]  # TerraTorch's names come from here: what imports them first must be quiet

_COUNT_OR_SHARE = re.compile(r"trainer\.(limit_\w+_batches|overfit_batches)")
_BROKEN_METRIC = "Boundary_mIoU"  # depends on the batch size where pixels are ignored (terratorch 1.2.7)
_SHOWN_LINES = 12


class RecipeCLI(MyLightningCLI):  # type: ignore[misc]  # terratorch ships no types
    """TerraTorch's LightningCLI in two steps: the merged recipe first; the objects only when you ask for them.

    ``terratorch test --ckpt_path`` replaces the whole ``model:`` section by what the checkpoint remembers (Lightning
    2.6.1, ``_parse_ckpt_path``). With ``run=False`` this does not happen: the config decides.

    Args:
        configs: YAML files in layers; later ones win, key by key.
        overrides: Command-line overrides in jsonargparse's syntax, ``--trainer.max_epochs 3``; they win over the files.

    Attributes:
        recipe: What files and overrides say, without any default of a library.

    Raises:
        UsageError: The parser refuses the recipe.
        SystemExit: ``overrides`` ask for help, such as ``--print_config`` or ``--trainer.help``, which is then printed.
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
            trainer_defaults={"callbacks": []},
            parser_kwargs={"exit_on_error": False},
            run=False,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add TerraTorch's arguments, and let the trainer's limits be read as whole numbers before shares.

        typing keeps one of ``int | float`` and ``float | int`` for both, by which some library wrote first: with
        jsonargparse 4.53, 1, one batch, would become 1.0, all of them.
        """
        super().add_arguments_to_parser(parser)
        for action in parser._actions:
            if _COUNT_OR_SHARE.fullmatch(action.dest):
                action._typehint = int | float | None

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Merge files and overrides into ``recipe``, then let the parser add its defaults in ``config``."""
        contents = [recipes.read_yaml(path) for path in self._configs]
        where = " ".join([*map(str, self._configs), *self._overrides])
        modules = [c["custom_modules_path"] for c in contents if c.get("custom_modules_path")]
        modules += [value for key, value in _pairs(self._overrides) if key == "custom_modules_path"]
        if modules and not Path(modules[-1]).is_dir():
            fix = "name the folder of your modules"
            raise UsageError("custom_modules_path is no folder", where=modules[-1], fix=fix)
        import_custom_modules(modules[-1] if modules else None)  # TerraTorch looks for the key below a subcommand only
        given = {key for content in contents for key in content} | {o[2:].split(".")[0] for o in self._overrides}
        for section in {"model", "data"} - given:
            raise UsageError(f"the recipe has no section '{section}'", where=where, fix="floodrepro configs show demo")
        if "--trainer.help" in self._overrides:  # the parser has such help for classes that can be chosen only
            trainer = ArgumentParser(prog="floodrepro fit")
            trainer.add_class_arguments(MyTrainer, "trainer")
            trainer.print_help()
            raise SystemExit(0)
        arguments = [token for path in self._configs for token in ("--config", str(path))] + self._overrides
        help_is_asked_for = any(re.match(r"--(print_config|[\w.]*help)\b", token) for token in self._overrides)
        try:
            merged = parser.parse_args(arguments, defaults=help_is_asked_for)
            _read_untyped_values(merged, self._overrides)
            merged.pop("config", None)
            self.recipe: Recipe = yaml.safe_load(parser.dump(merged, skip_unset=False, skip_validation=True))
            self.config = parser.parse_object(merged)
        except ArgumentError as error:
            raise _refusal(str(error), parser, contents, where) from error

    def _set_seed(self) -> None:
        """Wait for `build`."""

    def instantiate_classes(self) -> None:
        """Wait for `build`."""

    def build(self, wire: Callable[[Namespace], None] | None = None, *, trim: bool = True) -> None:
        """Seed everything and build model, data module and trainer as ``model``, ``datamodule`` and ``trainer``.

        Args:
            wire: Changes the parsed config first: where files go, which callbacks run. ``recipe`` stays as it is.
            trim: Whether metrics are made cheaper; their values stay.

        Raises:
            UsageError: A constructor refuses a value.
        """
        if wire is not None:
            wire(self.config)
        refusals = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError)
        try:
            with console.stdout_to_stderr():
                super()._set_seed()
                super().instantiate_classes()
                if trim:
                    trim_metrics(self.model, labels_known=isinstance(self.datamodule, FloodDataModule))
        except (*refusals, MisconfigurationException) as error:  # the last is what Lightning's own constructors raise
            raise UsageError(
                f"the recipe does not build: {type(error).__name__}: {_last_lines(str(error))}",
                where=", ".join(map(str, self._configs)),
                fix="check model_args: only TerraTorch's model factory knows which values it takes",
            ) from error


def trim_metrics(task: Any, *, labels_known: bool) -> None:
    """Drop the metric that means nothing, and spare the others their search for values that cannot occur.

    torchmetrics 1.9 sorts each batch's pixels on the device and waits for it, only to see that labels and predictions
    are classes. Predictions are an argmax; labels are classes where the data module checks them.

    Args:
        task: TerraTorch task, changed in place.
        labels_known: Whether each mask value is a class or the ignore index for sure.
    """
    for collection in [module for module in task.modules() if isinstance(module, MetricCollection)]:
        if _BROKEN_METRIC in collection._modules:
            del collection[_BROKEN_METRIC]
            collection._init_compute_groups()
        for metric in collection.modules():
            if labels_known and isinstance(metric, Metric) and hasattr(metric, "validate_args"):
                object.__setattr__(metric, "validate_args", False)


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and text of each override, written ``--key value`` or ``--key=value``."""
    tokens = iter(overrides)
    for token in tokens:
        key, equals, value = token.removeprefix("--").partition("=")
        yield key, value if equals else next(tokens, "")


def _read_untyped_values(merged: Namespace, overrides: Sequence[str]) -> None:
    """Give overrides inside untyped dicts the type that YAML would give them.

    jsonargparse 4.53 leaves ``--model.init_args.model_args.backbone_pretrained false`` as the string "false", which is
    true, and makes ``null`` the string "None": TerraTorch types model_args as a bare dict.
    """
    for key, text in _pairs(overrides):
        parent, _, leaf = key.rpartition(".")
        node = merged.get(parent) if parent in merged else None
        if type(node) is dict and isinstance(node.get(leaf), str):
            with contextlib.suppress(yaml.YAMLError, ValueError):
                value = yaml.safe_load(text)
                value = float(value) if isinstance(value, str) else value  # YAML 1.1 reads 1e-4 as text
                if not isinstance(value, datetime.date):  # a date stays text
                    node[leaf] = value


def _refusal(message: str, parser: Any, contents: Sequence[Recipe], where: str) -> UsageError:
    """The parser's own last lines, and the nearest known key for each of the user's keys that they object to."""
    known = {part for action in parser._actions for part in action.dest.split(".")}
    for path in recipes.shipped().values():
        known |= _words(recipes.read_yaml(path))
    given = {part for content in contents for part in _words(content)}
    given |= {part for key in re.findall(r"--([\w.]+)", where) for part in key.split(".")}
    shown = _last_lines(message)
    unknown = sorted(word for word in given - known if re.search(rf"\b{re.escape(word)}\b", shown))
    close = {word: difflib.get_close_matches(word, known, n=1) for word in unknown}
    hints = [f"did you mean '{found[0]}' instead of '{word}'?" for word, found in close.items() if found]
    fix = " ".join(hints) or "'floodrepro configs show demo' prints a recipe that works"
    return UsageError(f"the recipe is refused: {shown}", where=where, fix=fix)


def _words(recipe: Recipe) -> set[str]:
    return {part for key, _ in recipes.leaves(recipe) for part in key.split(".")}


def _last_lines(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip() and "Given value:" not in line]
    return " ".join(lines[-_SHOWN_LINES:])
