"""The command table. A command NAME is two functions of a module that is imported when called.

They are ``add_NAME_arguments(parser)`` and ``run_NAME(args)``; a module of one command may leave the NAME out.
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from floodrepro import __version__, console
from floodrepro.errors import UsageError

# name: (module, one line of help). The module must not import torch or TerraTorch at its top: --help stays instant.
COMMANDS = {
    "fit": ("floodrepro.cli.fit", "train a recipe into a run folder"),
    "validate": ("floodrepro.cli.validate", "measure a checkpoint on the validation split"),
    "test": ("floodrepro.cli.test", "measure a checkpoint on the test split"),
    "predict": ("floodrepro.cli.predict", "write a flood mask (GeoTIFF) for every chip of a split"),
    "verify": ("floodrepro.cli.verify", "run the battery of checks over a run folder and write its report"),
    "export": ("floodrepro.cli.export", "write a safetensors + YAML pair that plain TerraTorch loads"),
    "publish": ("floodrepro.cli.publish", "upload an export to the hub, in one commit; --dry-run looks first"),
    "configs": ("floodrepro.cli.configs", "list, show or copy the shipped recipes"),
    "data": ("floodrepro.cli.data", "get and check data sets: data fetch, data audit, data synth"),
    "doctor": ("floodrepro.cli.doctor", "look at this machine before a run does: what hurts, and what to do"),
    "bench": ("floodrepro.cli.bench", "measure speed as ratios: bench data, train, test, guard"),
    "reproduce": ("floodrepro.cli.reproduce", "the whole path, from the download to the verdict; --demo at toy size"),
}

EXAMPLES = """\
examples:
  floodrepro reproduce --demo
  floodrepro configs ls
  floodrepro data synth --root chips --events 8 --chips 128 --size 64 --protocol v0 --seed 42
  floodrepro fit --config demo --data-root chips --name first --trainer.max_epochs 3
  floodrepro test --ckpt runs/first/checkpoints/best.ckpt
  floodrepro export --run runs/first

exit codes: 0 done, 1 the work failed, 2 bad usage or config, 3 the guard stopped a fit, 130 and 143 told to stop
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
        Exit code: 0 done, 1 the work failed, 2 bad usage or config, 3 the guard stopped a fit, 128 + a signal's number.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return console.run(lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"floodrepro {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UsageError(f"unknown command '{name}'{_closest(name, COMMANDS)}", fix="floodrepro --help")
    module_name, _ = COMMANDS[name]
    command = importlib.import_module(module_name)
    run = getattr(command, f"run_{name}", None) or command.run
    parser = Parser(f"floodrepro {name}", description=run.__doc__ if run.__name__ != "run" else command.__doc__)
    (getattr(command, f"add_{name}_arguments", None) or command.add_arguments)(parser)
    _refuse_unknown_flags(arguments[1:], _flags(parser), getattr(command, "OVERRIDE_SECTIONS", ()), parser.prog)
    try:
        args, overrides = parser.parse_known_args(arguments[1:])
    except SystemExit as done:  # argparse leaves this way after --help
        return int(done.code or 0)
    _refuse_stray_arguments(overrides, parser.prog)
    if overrides and not getattr(command, "OVERRIDE_SECTIONS", ()):  # a flag of another of its actions
        raise UsageError(f"'{overrides[0]}' is no flag of this action", fix=f"{parser.prog} --help")
    args.overrides = overrides
    return int(run(args))


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    """All flags of a command, those of its actions included."""
    flags: list[str] = []
    for action in parser._actions:
        flags += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for child in action.choices.values() for flag in _flags(child)]
    return flags


def _refuse_unknown_flags(arguments: list[str], flags: list[str], sections: Sequence[str], prog: str) -> None:
    """Refuse a flag that is neither the command's nor, where it takes overrides, opens with a section of a recipe.

    argparse would first complain about required flags, and a misspelt one is both unknown and missing.
    """
    for token in arguments:
        flag = token.split("=", 1)[0]
        if token.startswith("--") and flag not in flags and flag[2:].split(".", 1)[0].rstrip("+") not in sections:
            known = [*flags, *(f"--{section}" for section in sections)]
            raise UsageError(f"unknown flag '{flag}'{_closest(flag.split('.', 1)[0], known)}", fix=f"{prog} --help")


def _refuse_stray_arguments(overrides: list[str], prog: str) -> None:
    takes_value = False
    for token in overrides:
        if not token.startswith("--") and not takes_value:
            raise UsageError(f"unexpected argument '{token}'", fix=f"{prog} --help")
        takes_value = token.startswith("--") and "=" not in token
    if takes_value:
        raise UsageError(f"'{overrides[-1]}' needs a value", fix=f"{prog} --help")


def _closest(word: str, known: Sequence[str] | dict[str, tuple[str, str]]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def _overview() -> str:
    rows = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: floodrepro COMMAND [options]   (floodrepro COMMAND --help tells more)\n\n"
        f"Re-run, check and trust the fine-tuning of TerraMind for flood mapping.\n\n{rows}\n\n{EXAMPLES}"
    )
