"""The one place that prints: data on stdout, everything else on stderr."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from floodrepro.errors import FloodreproError

DEBUG_VARIABLE = "FLOODREPRO_DEBUG"
FORMATS = ("text", "json")


def say(text: str) -> None:
    """Tell the user what is going on (stderr); of several processes of one run the first one does."""
    if follows():
        return
    print(f"floodrepro: {text}", file=sys.stderr, flush=True)


def follows() -> bool:
    """Whether this is one of several processes of a run, and not the first."""
    return rank() != 0


def rank() -> int:
    """This process's place in a run of several, 0 for the first: torchrun's word, Lightning's own, or Slurm's."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ:  # any but the first process of the first node follows
        return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))
    return int(os.environ.get("SLURM_PROCID", 0))


def warn(text: str) -> None:
    """Tell the user of something that may change what a figure means (stderr)."""
    say(f"warning: {text}")


def emit(data: Mapping[str, Any], text: str, output_format: str) -> None:
    """Print a result on stdout: *text* for a reader, or *data* as one JSON document for a script."""
    print(json.dumps(data, indent=2) if output_format == "json" else text, flush=True)


def columns(rows: Sequence[Sequence[str]], *, right_from: int = 1) -> str:
    """Lay rows out in columns; those from *right_from* on are figures and stand to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i >= right_from else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that shows how far a loop has come on stderr.

    On a terminal one line is redrawn; in a log a line is written at every tenth.
    """
    live = sys.stderr.isatty()
    shown = -1

    def update(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // max(total, 1)
        if live:
            print(f"\rfloodrepro: {label} {done}/{total}", end="", file=sys.stderr, flush=True)
        elif tenth > shown:
            say(f"{label} {done}/{total}")
        shown = max(shown, tenth)

    yield update
    if live and shown >= 0:
        print(file=sys.stderr)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what libraries print (progress bars, metric tables) to stderr, so that stdout holds data only."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def run(main: Callable[[], int]) -> int:
    """Call *main* and turn what it raises into at most three lines on stderr and an exit code."""
    try:
        return main()
    except FloodreproError as error:
        _debug()
        print(error.report(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return 130  # 128 + SIGINT, the shell's convention
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`); give the interpreter's last flush somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the last resort: whatever a library raised still ends in three lines, not a traceback
        _debug()
        detail = str(error).strip().splitlines()
        unexpected = FloodreproError(
            f"{type(error).__name__}: {detail[0] if detail else 'no message'}",
            fix=f"{DEBUG_VARIABLE}=1 before the command shows where it happened",
        )
        print(unexpected.report(), file=sys.stderr)
        return unexpected.exit_code


def _debug() -> None:
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        traceback.print_exc()
