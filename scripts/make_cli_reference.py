#!/usr/bin/env python3
"""Print docs/cli.md, made from the parsers of the commands: the page cannot say anything that the program does not.

    .venv/bin/python scripts/make_cli_reference.py > docs/cli.md

tests/test_docs.py compares the two.
"""

import argparse
import importlib
import sys
import textwrap
from collections.abc import Iterator

from floodrepro.cli.main import COMMANDS, EXAMPLES, Parser
from floodrepro.recipe import SECTIONS

_HEAD = """\
# The command line

<!-- Made by scripts/make_cli_reference.py from the parsers: do not edit, run it again. -->

`floodrepro COMMAND --help` prints the same. Flags are never abbreviated. Results go to stdout, everything else to
stderr; an error is at most three lines (what, where, what to do), and `FLOODREPRO_DEBUG=1` adds the traceback.
"""
_OVERRIDES = (
    "{} take overrides as well: any key of the recipe by its path, such as `--trainer.max_epochs 3`. A path begins "
    "with one of {}."
)


def page() -> str:
    """The whole page."""
    commands = {name: importlib.import_module(module) for name, (module, _) in COMMANDS.items()}
    rows = [f"| [`{name}`](#floodrepro-{name}) | {summary} |" for name, (_, summary) in COMMANDS.items()]
    blocks = [_HEAD, "\n".join(["| command | what it does |", "|---|---|", *rows]), f"```text\n{EXAMPLES.strip()}\n```"]
    for name, command in commands.items():
        parser = Parser(f"floodrepro {name}")
        command.add_arguments(parser)
        blocks += [f"## floodrepro {name}", command.__doc__ or "", *_parser(parser)]
    taking = [f"`{name}`" for name, command in commands.items() if hasattr(command, "OVERRIDE_SECTIONS")]
    sections = ", ".join(f"`{section}`" for section in SECTIONS)
    overrides = _OVERRIDES.format(f"{', '.join(taking[:-1])} and {taking[-1]}", sections)
    blocks += ["## Overrides", textwrap.fill(overrides, 120, break_on_hyphens=False)]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _parser(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The flags of a command, or of each of its actions; then what the help ends with."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    nested = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    rows = [_row(parser, action) for action in actions if action not in nested]
    if rows:
        yield "\n".join(["| argument | meaning |", "|---|---|", *rows])
    for group in parser._mutually_exclusive_groups:
        names = ", ".join(f"`{action.option_strings[0]}`" for action in group._group_actions)
        yield f"{'Exactly' if group.required else 'At most'} one of {names}."
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```"
    for action in nested:
        for (name, child), choice in zip(action.choices.items(), action._choices_actions, strict=True):
            yield f"### {parser.prog} {name}"
            yield f"{choice.help}."
            yield from _parser(child)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or action.dest
    value = "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest.upper())
    takes_value = action.nargs != 0 and bool(action.option_strings)
    text = f"{names} {value}" if takes_value else names
    # Python 3.11 and 3.12 add "(default: True)" to the help of --x/--no-x by themselves.
    action.help = (action.help or "").removesuffix(" (default: %(default)s)")
    meaning = parser._get_formatter()._expand_help(action) if action.help else ""
    if not meaning and action.default is not None:
        meaning = f"default: {action.default}"
    required = action.required and bool(action.option_strings)
    return _cells(f"`{text}`", "; ".join(part for part in ("required" if required else "", meaning) if part))


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.stdout.write(page())
