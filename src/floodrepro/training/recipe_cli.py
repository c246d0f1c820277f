"""A recipe, its overrides folded in by TerraTorch's own command-line class, and the objects that it describes."""

import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.recipe import Recipe
from floodrepro.training.importing import import_terratorch

import_terratorch()

from jsonargparse import Namespace  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from terratorch.cli_tools import BaseTask, CustomWriter, MyLightningCLI, MyTrainer  # noqa: E402

from floodrepro.data.datamodule import FloodDataModule  # noqa: E402
from floodrepro.training.cheaper import trim_metrics  # noqa: E402
from floodrepro.training.recipe_problems import describe, list_problems  # noqa: E402

__all__ = ["CustomWriter", "RecipeCLI"]  # TerraTorch's names come from here: what imports them first must be quiet


_COUNT_OR_SHARE = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("overfit_batches", "val_check_interval"),
)

_WITHOUT_EFFECT = re.compile(r"--(model\.init_args\.(?:lr|optimizer|optimizer_hparams))\b")


class RecipeCLI(MyLightningCLI):  # type: ignore[misc]  # terratorch ships no types
    """TerraTorch's LightningCLI in two steps: first the recipe, checked and folded; the objects only when asked for.

    ``terratorch test --ckpt_path`` replaces the whole ``model:`` section by what the checkpoint remembers (Lightning
    2.6.1, ``_parse_ckpt_path``). Built with ``run=False`` nothing of the kind happens: the config is what counts.

    Args:
        configs: YAML files, later ones win.
        overrides: Command-line overrides in jsonargparse's syntax, ``--trainer.max_epochs 3``; they win over the files.

    Attributes:
        recipe: What the files and the overrides say, and nothing else: no library default is written into it.
    """

    def __init__(self, configs: Sequence[Path], overrides: Sequence[str] = ()) -> None:
        self._configs = list(configs)
        self._overrides = list(overrides)
        self._building = False
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

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Fold files and overrides into ``recipe``, then let the parser add its defaults in ``config``."""
        raw = {path: recipes.read(path) for path in self._configs}
        problems = [problem for path in raw for problem in list_problems(parser, raw[path])]
        files = ", ".join(str(path) for path in self._configs)
        given = {key for content in raw.values() for key in content} | {o[2:].split(".")[0] for o in self._overrides}
        problems += [f"the section '{name}' is missing" for name in ("model", "data") if name not in given]
        if "optimizer" in given:  # Lightning takes it in place of what the task would make of these
            tokens = [found for token in self._overrides if (found := _WITHOUT_EFFECT.match(token))]
            problems += [f"{found[1]} has no effect: the section 'optimizer' decides" for found in tokens]
        if problems:
            raise _report(problems, files)
        arguments = [token for path in self._configs for token in ("--config", str(path))] + self._overrides
        try:
            folded = parser.parse_args(arguments, defaults=False)
            _read_untyped_values(folded, self._overrides)
            folded.pop("config", None)
            text = parser.dump(folded, skip_unset=False, skip_validation=True)
            self.recipe: Recipe = yaml.safe_load(text)
            self.config = parser.parse_object(folded)
            self._counts = _counts(raw.values(), self._overrides)
            for key, value in self._counts.items():
                self.recipe["trainer"][key] = self.config.trainer[key] = value
        except ArgumentError as error:
            raise _report([describe(str(error))], "command line" if self._overrides else files) from error

    def _set_seed(self) -> None:
        if self._building:
            super()._set_seed()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Hand on limits as they were given: the parser would turn them again."""
        given = {key: self.config.trainer[key] for key in self._counts}
        return super().instantiate_trainer(**given | kwargs)

    def instantiate_classes(self) -> None:
        """Do nothing until `build` asks for the objects."""
        if self._building:
            super().instantiate_classes()

    def build(self, wire: Callable[[Namespace], None] | None = None, *, trim: bool = True) -> None:
        """Seed everything and build model, data module and trainer as ``model``, ``datamodule`` and ``trainer``.

        Args:
            wire: Changes the parsed config first: where files go, which callbacks run. It must leave alone what is
                computed, for ``recipe`` has been saved by then.
            trim: Whether metrics are made cheaper; their values stay.

        Raises:
            UsageError: A value that only the constructors could judge.
        """
        if wire is not None:
            wire(self.config)
        self._building = True
        try:
            with console.stdout_to_stderr():
                super()._set_seed()
                self.instantiate_classes()
                if trim:
                    trim_metrics(self.model, labels_known=isinstance(self.datamodule, FloodDataModule))
        except (
            *(TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError),
            MisconfigurationException,  # what Lightning's own constructors raise; a plain Exception
        ) as error:
            raise UsageError(
                f"the recipe does not build: {type(error).__name__}: {_core(str(error))}",
                where=", ".join(str(path) for path in self._configs),
                fix="FLOODREPRO_DEBUG=1 shows where; model_args is checked by TerraTorch's model factory only",
            ) from error


def _core(message: str) -> str:
    """What a constructor said, without the whole recipe that jsonargparse 4.53 repeats around it."""
    said = re.search(r"Errors:\s*- (.*?)\s*- Expected a <class", message, re.DOTALL)
    return " ".join((said[1] if said else message).split())[:400]


def _counts(contents: Iterable[Recipe], overrides: Sequence[str]) -> dict[str, int]:
    """The trainer's limits that were given as whole numbers, the last word for each.

    Typed int | float, they come out of jsonargparse 4.53 as either, by which of the two unions some library happened to
    write first (typing keeps one for both): 1, one batch, would become 1.0, all of them.
    """
    given: dict[str, Any] = {}
    for content in contents:
        given |= {key: value for key, value in (content.get("trainer") or {}).items() if key in _COUNT_OR_SHARE}
    tokens = iter(overrides)
    for token in tokens:
        key, equals, value = token.removeprefix("--trainer.").partition("=")
        if token.startswith("--trainer.") and key in _COUNT_OR_SHARE:
            given[key] = _yaml_value(value if equals else next(tokens, ""))
    return {key: value for key, value in given.items() if type(value) is int}


def _read_untyped_values(folded: Namespace, overrides: Sequence[str]) -> None:
    """Give overrides inside untyped dicts the type that YAML would give them.

    jsonargparse 4.53 leaves ``--model.init_args.model_args.backbone_pretrained false`` as the string "false", which is
    true: TerraTorch types model_args as a bare dict.
    """
    tokens = iter(overrides)
    for token in tokens:
        key, equals, value = token.removeprefix("--").partition("=")
        text = value if equals else next(tokens, "")
        node: Any = folded
        *parents, leaf = key.rstrip("+").split(".")
        for name in parents:
            node = node.get(name) if isinstance(node, dict | Namespace) else None
        if type(node) is dict and node.get(leaf) == text:
            node[leaf] = _yaml_value(text)


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as a string
        except ValueError:
            return value
    return value


def _report(problems: Sequence[str], where: str) -> UsageError:
    if len(problems) == 1:
        return UsageError(problems[0], where=where, fix="'floodrepro configs show demo' prints a recipe that works")
    numbered = "; ".join(f"({i}) {problem}" for i, problem in enumerate(problems, 1))
    return UsageError(f"{len(problems)} problems: {numbered}", where=where, fix="mend them all, then run it again")
