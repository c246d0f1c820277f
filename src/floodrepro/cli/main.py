"""The command table. A command NAME is two functions of a module that is imported when called.

They are ``add_NAME_arguments(parser)`` and ``run_NAME(args)``; a module of one command may leave the NAME out.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from floodrepro import __version__, console
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.system.environment import missing_requirements

# name: (module, one line of help). The module must not import torch or TerraTorch at its top: --help stays instant.
COMMANDS = {
    "fit": ("floodrepro.cli.fit", "train a recipe into a run folder"),
    "map": ("floodrepro.cli.map", "map a whole scene, compare a map with a truth, plan a scene"),
    "validate": ("floodrepro.cli.evaluate", "measure a checkpoint on the validation split"),
    "test": ("floodrepro.cli.evaluate", "measure a checkpoint on the test split"),
    "predict": ("floodrepro.cli.evaluate", "write a flood mask (GeoTIFF) for every chip of a split"),
    "verify": ("floodrepro.cli.publish", "check a run, compare it with a reference, and write its report"),
    "export": ("floodrepro.cli.publish", "write a safetensors + YAML pair that plain TerraTorch loads"),
    "publish": ("floodrepro.cli.publish", "upload an export to the hub, in one commit; --dry-run looks first"),
    "configs": ("floodrepro.cli.runs", "list, show or copy the shipped recipes"),
    "runs": ("floodrepro.cli.runs", "list runs with recipe, status, best score and age"),
    "data": ("floodrepro.cli.data", "get and check data sets: data fetch, data audit, data synth"),
    "doctor": ("floodrepro.cli.doctor", "check whether this machine can do what a recipe needs"),
    "bench": ("floodrepro.cli.bench", "measure speed beside plain TerraTorch"),
    "reproduce": ("floodrepro.cli.reproduce", "every stage from the download to the verdict; --demo at toy size"),
}
_TAKES_OVERRIDES = ("fit", "validate", "test", "predict", "doctor", "reproduce")

EXAMPLES = """\
examples:
  floodrepro reproduce --demo
  floodrepro configs ls
  floodrepro data synth --root chips --events 8 --chips 128 --size 64 --protocol v0 --seed 42
  floodrepro fit --config demo --data-root chips --name first --trainer.max_epochs 3
  floodrepro test --ckpt runs/first/checkpoints/best.ckpt
  floodrepro export --run runs/first

exit codes: 0 done, 1 the work failed, 2 bad usage or config, 3 NaNGuard stopped a fit,
4 map plan: no pass yet, 130 and 143 stopped by a signal
"""


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake as a `UsageError` and never guesses at abbreviations."""

    def __init__(self, prog: str, **kwargs: object) -> None:
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage block."""
        raise UsageError(message, fix=f"{self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of the process where None.

    Returns:
        Exit code: 0 done, 1 the work failed, 2 bad usage or config, 3 NaNGuard stopped a fit, 128 + a signal's number.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return console.run(lambda: _name_missing_packages(arguments))


def _name_missing_packages(arguments: list[str]) -> int:
    try:
        return _dispatch(arguments)
    except ModuleNotFoundError as error:
        if missing := missing_requirements():  # as after `pip install --no-deps`
            what = f"floodrepro's dependencies are not all installed: {', '.join(missing)} missing"
            raise FloodreproError(what, fix=f"{sys.executable} -m pip install floodrepro") from error
        raise


def _dispatch(arguments: list[str]) -> int:
    if not sys.platform.startswith("linux"):
        raise UsageError(f"floodrepro runs on Linux only, and this is {sys.platform}", fix="use Linux, WSL 2 or Docker")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"floodrepro {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        later = [word for word in rest if word in COMMANDS]
        if name.startswith("-") and later:
            ordered = " ".join([later[0], *(word for word in arguments if word != later[0])])
            raise UsageError("the command comes first", where=name, fix=f"floodrepro {ordered}")
        raise UsageError(f"unknown command '{name}'{_closest(name, COMMANDS)}", fix="floodrepro --help")
    from floodrepro.recipe import SECTIONS  # needs PyYAML, which may be missing

    module, _ = COMMANDS[name]
    command = importlib.import_module(module)
    run = getattr(command, f"run_{name}", None) or command.run
    parser = Parser(f"floodrepro {name}", description=run.__doc__ if run.__name__ != "run" else command.__doc__)
    (getattr(command, f"add_{name}_arguments", None) or command.add_arguments)(parser)
    takes_overrides = name in _TAKES_OVERRIDES
    _refuse_unknown_flags(rest, _flags(parser), SECTIONS if takes_overrides else (), parser.prog)
    try:
        args, overrides = parser.parse_known_args(rest)
        if overrides and not takes_overrides:
            raise UsageError(f"unexpected argument '{overrides[0]}'", fix=f"{parser.prog} --help")
        args.overrides = overrides
        return int(run(args))
    except FloodreproError:  # a stop by a signal is a SystemExit too
        raise
    except SystemExit as done:  # argparse and jsonargparse leave this way after they have printed help
        return int(done.code or 0)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """All flags of a command, those of its actions included."""
    flags: list[str] = []
    for action in parser._actions:
        flags += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for child in action.choices.values() for flag in _flags(child)]
    return flags


def _refuse_unknown_flags(arguments: list[str], flags: list[str], sections: Sequence[str], prog: str) -> None:
    """Refuse a flag that is neither the command's nor, where it takes overrides, begins with a section of a recipe.

    TerraTorch's parser would refuse it too, after an import of 10 to 20 s.
    """
    takes_value = False
    for token in arguments:
        flag = token.split("=", 1)[0]
        if token.startswith("--"):
            section = flag[2:].split(".", 1)[0].rstrip("+")
            if flag not in flags and section not in sections and not (sections and section == "print_config"):
                known = [*flags, *(f"--{section}" for section in sections)]
                fix = f"{prog} --help"
                raise UsageError(f"unknown flag '{flag}'{_closest(flag.split('.', 1)[0], known)}", fix=fix)
            takes_value = "=" not in token and flag not in flags and not flag.endswith(("help", "print_config"))
        else:
            takes_value = False
    if takes_value:
        raise UsageError(f"'{arguments[-1]}' needs a value", fix=f"{prog} --help")


def _closest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def _overview() -> str:
    rows = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: floodrepro COMMAND [options]   (floodrepro COMMAND --help tells more)\n\n"
        f"Re-run, check, trust and use the fine-tuning of TerraMind for flood mapping.\n\n{rows}\n\n{EXAMPLES}"
    )
