"""What a stage is, and what stages share: commands in this process, and files by their hashes."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.cli.main import COMMANDS, Parser
from floodrepro.cli.reproduction.plan import Plan
from floodrepro.run_folder import sha256_of

Command = list[str]


@dataclass(frozen=True)
class Stage:
    """One step of the path.

    Args:
        commands: What it runs, one after the other.
        inputs: What decides, beside the commands, whether it has to be done again.
        outputs: What it leaves, by name, as short texts that change with it.
        cost: Expected time and disk, in words.
        work: Does it; the commands, unless something else is to be done between them. Returns an exit code.
        left_out: Why there is nothing to do at all; empty where there is.
    """

    commands: Callable[[Plan], list[Command]]
    inputs: Callable[[Plan], dict[str, Any]]
    outputs: Callable[[Plan], dict[str, str | None]]
    cost: Callable[[Plan], str]
    work: Callable[[Plan, list[Command]], int] = lambda plan, commands: max(map(call, commands), default=0)
    left_out: Callable[[Plan], str] = lambda plan: ""


def call(command: Command) -> int:
    """Run a command line of floodrepro in this process; what it prints on stdout goes to stderr."""
    _, name, *arguments = command
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(f"floodrepro {name}")
    module.add_arguments(parser)
    args, overrides = parser.parse_known_args(arguments)
    args.overrides = overrides
    with console.stdout_to_stderr():
        return int(module.run(args))


def digest(path: Path) -> str | None:
    """A file's sha256, computed once as long as it stays as it is; None where there is none."""
    return _sha256(path, path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


@cache
def _sha256(path: Path, modified: int, size: int) -> str:
    return sha256_of(path)


def digests(paths: Sequence[Path]) -> dict[str, str | None]:
    """The same of several files, by path."""
    return {str(path): digest(path) for path in paths}
