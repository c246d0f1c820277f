"""What commands print: data on stdout, everything else on stderr."""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from floodrepro.errors import FloodreproError

_SECRET = "(?i:api_?key|token|secret|passw(?:or)?d|credentials?)"
_MASKS = (
    (rf"({_SECRET}['\"]?[=:] ?|--\S*{_SECRET} )[^\s'\"]+", r"\1***"),
    (r"(?<=://)[^\s/?#'\"]*@", ""),  # user and password
    (r"(\w+://[^\s?#'\"<>]*)[?#][^\s'\"<>]*", r"\1"),  # queries: signatures stand there
    (r"(?<=[\w/])[?][^\s'\"<>]*=[^\s'\"<>]*", ""),
)
LOG_EVERY = 30.0  # seconds between two lines of progress in a log


def say(text: str) -> None:
    """Print a message on stderr; of several processes of one run only the first does."""
    if not _is_follower():
        print(f"floodrepro: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr: something that may change what a figure means."""
    say(f"warning: {text}")


def emit(data: Mapping[str, Any], text: str, output_format: str) -> None:
    """Print a result on stdout: *text* for a reader, or *data* as one JSON document for a script."""
    if not _is_follower():
        print(json.dumps(data, indent=2) if output_format == "json" else text, flush=True)


def columns(rows: Sequence[Sequence[object]], *, right_from: int = 1) -> str:
    """Lay rows out in columns; those from *right_from* on are figures and stand to the right, None as "-"."""
    texts = [[f"{c:.6f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row] for row in rows]
    texts = [[re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text) for text in row] for row in texts]  # a terminal obeys them
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    formats = [f"{'<' if i < right_from else '>'}{width}" for i, width in enumerate(widths)]
    return "\n".join("  ".join(map(format, row, formats)).rstrip() for row in texts)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that shows on stderr how far a loop has come, if it is no short one.

    On a terminal one line is redrawn; in a log a line is written every half minute.
    """
    from tqdm import tqdm  # an installation without dependencies has to reach the message that names them

    every, desc = 0.2 if sys.stderr.isatty() else LOG_EVERY, f"floodrepro: {label}"
    with tqdm(desc=desc, file=sys.stderr, mininterval=every, delay=every, disable=_is_follower()) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def stdout_to_stderr() -> contextlib.AbstractContextManager[object]:
    """Send what libraries print (progress bars, metric tables) to stderr, so that stdout holds data only."""
    return contextlib.redirect_stdout(sys.stderr)


def public(entry: Any, key: str = "") -> Any:
    """A text, or all texts of a record, without secrets: values of such keys, users and queries of links."""
    if isinstance(entry, Mapping):
        return {name: public(value, str(name)) for name, value in entry.items()}
    if isinstance(entry, list):  # the value of a flag is the next word
        flags = [str(word) if str(word).startswith("--") else "" for word in ["", *entry]]
        return [public(value, flag) for flag, value in zip(flags, entry, strict=False)]
    if not isinstance(entry, str):
        return entry
    for pattern, left in _MASKS:
        entry = re.sub(pattern, left, entry)
    return "***" if re.search(f"{_SECRET}$", key) else entry


class _Log:
    """A stream that also writes whole lines to a file; a progress bar's control codes stay out of it."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text:
            with contextlib.suppress(OSError):  # of a full disk, whose first error is the one to tell
                self._file.write(text)
                self._file.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what goes to stderr to a file as well, and the traceback of an error that ends the block."""
    file = path.open("a", encoding="utf-8")
    with contextlib.redirect_stderr(_Log(sys.stderr, file)):
        try:
            yield
        except BaseException as error:
            ours = isinstance(error, FloodreproError)
            with contextlib.suppress(OSError):
                file.write(f"floodrepro: error: {error}\n" if ours else traceback.format_exc())
            raise
        finally:
            with contextlib.suppress(OSError):
                file.close()


def _is_follower() -> bool:
    """Whether this is one of several processes of a run and not the first, as far as Lightning knows by now."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    rank = getattr(lightning.rank_zero_only, "rank", None) if lightning else None
    return int(os.environ.get("LOCAL_RANK", 0) if rank is None else rank) != 0
