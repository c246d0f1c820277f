"""The command table, and what the values of flags have to be.

A command NAME is a function ``_NAME(parser)`` in a module that is imported late: it adds its flags, reads them, does
the work, and returns the exit code where that is not always 0.
"""

import argparse
import contextlib
import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from floodrepro import __version__, console
from floodrepro.errors import FloodreproError, UsageError
from floodrepro.system.environment import installing, missing_requirements

# name: (module, one line of help). The module must not import torch or TerraTorch at its top: --help stays instant.
COMMANDS = {
    "fit": ("floodrepro.cli.model", "train a recipe into a run folder; the same command again resumes it"),
    "map": ("floodrepro.cli.map", "map a whole scene, compare a map with a truth, plan a scene"),
    "validate": ("floodrepro.cli.model", "measure a checkpoint on the validation split"),
    "test": ("floodrepro.cli.model", "measure a checkpoint, or masks made by anyone, and leave a chip table"),
    "predict": ("floodrepro.cli.model", "write a flood mask (GeoTIFF) for every chip of a split"),
    "verify": ("floodrepro.cli.publish", "check a run, compare it with a reference, and write its report"),
    "export": ("floodrepro.cli.publish", "write a safetensors + YAML pair that plain TerraTorch loads, and its card"),
    "publish": ("floodrepro.cli.publish", "upload an export to the hub, in one commit; --dry-run looks first"),
    "configs": ("floodrepro.cli.machine", "list the shipped recipes, or print one to change it"),
    "runs": ("floodrepro.cli.machine", "list runs with recipe, status, best score and age"),
    "data": ("floodrepro.cli.data", "get, check, look at and generate chips"),
    "doctor": ("floodrepro.cli.machine", "check whether this machine can do what a recipe needs"),
    "bench": ("floodrepro.cli.machine", "measure speed beside plain TerraTorch, on generated chips"),
    "reproduce": ("floodrepro.cli.reproduce", "every stage from the download to the verdict; --demo at toy size"),
}
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG}
_DISK |= {errno.EEXIST, errno.ENOTDIR}  # a file where a folder is wanted
_SUMMARIES = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
_OVERVIEW = f"""\
usage: floodrepro COMMAND [options]   (floodrepro COMMAND --help tells more)

Re-run, check, trust and use the fine-tuning of TerraMind for flood mapping.

{_SUMMARIES}

examples:
  floodrepro reproduce --demo
  floodrepro data synth --root chips --events 8 --chips 128 --size 64 --protocol v0 --seed 42
  floodrepro fit --config demo --data-root chips --name first --trainer.max_epochs 3
  floodrepro test --ckpt runs/first/checkpoints/best.ckpt

exit codes: 0 done, 1 the work failed, 2 bad usage or config, 3 NaNGuard stopped a fit,
4 map plan: no pass yet, 130 and 143 stopped by a signal"""


class Parser(argparse.ArgumentParser):
    """A parser of the words after a command. It raises mistakes as `UsageError` and never guesses at abbreviations."""

    def __init__(self, prog: str, words: Sequence[str] = (), **kwargs: object) -> None:
        self._words = words
        super().__init__(prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)  # type: ignore[arg-type]
        given = argparse.SUPPRESS if prog.count(" ") > 1 else "text"  # an action keeps what stands before its name
        self.add_argument("--format", choices=("text", "json"), default=given, help="what stdout holds (default: text)")

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage block."""
        raise UsageError(message, fix=f"{self.prog} --help")

    def read(self, *, overrides: bool = False) -> argparse.Namespace:
        """The flags' values. What is no flag has to be an override of a recipe's key, if the command takes `overrides`.

        What is neither is refused at once: TerraTorch's parser needs 10 to 20 s to say so.
        """
        from floodrepro.recipe import SECTIONS  # needs PyYAML, which may be missing

        args, others = self.parse_known_args(self._words)
        sections = [f"--{section}" for section in (*SECTIONS, "print_config") if overrides]
        for word in others:
            section = word.split("=")[0].split(".")[0].rstrip("+")
            if section not in sections and (word.startswith("--") or not overrides):
                close = _closest(section, [*self._option_string_actions, *sections])
                raise UsageError(f"unknown argument '{word}'{close}", fix=f"{self.prog} --help")
        args.overrides = others
        return args


def plain_name(text: str) -> str:
    """The value of --name, which becomes the name of a file or folder and must not lead out of the one it lies in."""
    if Path(text).name != text or text == "..":
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name; another flag says in which folder it lies")
    return text


def existing_file(text: str) -> Path:
    """The value of a flag that names a file to read."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no such file: {text}")
    return Path(text)


def new_file(text: str) -> Path:
    """The value of a flag that names a file to write: nothing is there yet, but its folder is."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already and is not overwritten")
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return Path(text)


def listed(text: str) -> list[str]:
    """The value of a flag that takes a list with commas."""
    return [name.strip() for name in text.split(",")]


def between(least: float, most: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """What reads a number of a range."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:  # NaN is not
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number from {least:,.0f} to {most:,.0f}")

    return number


def add_checkpoint(parser: "argparse._ActionsContainer", *, required: bool = False) -> None:
    """Add --ckpt, by Lightning's name too."""
    names, what = ("--ckpt", "--ckpt_path"), "a .ckpt, .pt or .safetensors, such as runs/NAME/checkpoints/best.ckpt"
    parser.add_argument(*names, type=existing_file, required=required, metavar="FILE", help=what)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of *argv*, by default the process's, and return its exit code; --help lists the codes.

    An error that floodrepro raised on purpose takes at most three lines on stderr. Any other keeps its traceback.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout:  # None where it was closed (`>&-`)
            sys.stdout.flush()  # what print kept back fails here, and not when the interpreter ends
        return code
    except FloodreproError as error:
        failure = error
    except SystemExit as done:  # argparse and jsonargparse leave this way after they have printed help
        if isinstance(done.code, str):  # as a recipe's own code may
            print(done.code, file=sys.stderr)
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        console.say("interrupted")
        return 130  # 128 + SIGINT, the shell's convention
    except BrokenPipeError:  # the reader of our stdout went away (`| head`): let the last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last resort: a bug of ours, of a library or of the user's own code
        if isinstance(error, ModuleNotFoundError) and (missing := missing_requirements()):  # `pip install --no-deps`
            what = f"{error}; floodrepro's dependencies are not all installed: {', '.join(missing)} missing"
            failure = FloodreproError(what, fix=installing("floodrepro"))
        elif isinstance(error, OSError) and error.errno in _DISK and error.filename:
            failure = FloodreproError(f"a file cannot be used: {error.strerror}", where=error.filename)
        else:
            traceback.print_exc()
            fix = "if it is not your own code, report it together with the traceback"
            failure = FloodreproError(f"unexpected {type(error).__name__}; the traceback is above", fix=fix)
    print(f"floodrepro: error: {failure}", file=sys.stderr)
    return failure.exit_code


def _dispatch(arguments: list[str]) -> int:
    if not sys.platform.startswith("linux"):
        raise UsageError(f"floodrepro runs on Linux only, and this is {sys.platform}", fix="use Linux, WSL 2 or Docker")
    name, rest = arguments[0] if arguments else "--help", arguments[1:]
    if name in ("-h", "--help", "-V", "--version"):
        print(_OVERVIEW if name in ("-h", "--help") else f"floodrepro {__version__}")
        return 0
    if name not in COMMANDS:
        later = next((word for word in rest if word in COMMANDS), None)
        if name.startswith("-") and later:
            ordered = " ".join([later, *(word for word in arguments if word != later)])
            raise UsageError("the command comes first", where=name, fix=f"floodrepro {ordered}")
        raise UsageError(f"unknown command '{name}'{_closest(name, COMMANDS)}", fix="floodrepro --help")
    module, summary = COMMANDS[name]
    command = getattr(importlib.import_module(module), f"_{name}")
    return command(Parser(f"floodrepro {name}", rest, description=summary)) or 0


def _closest(word: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""
