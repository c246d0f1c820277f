"""Fetch ImpactMesh-Flood from the Hugging Face hub, one commit a folder, and go on where a stopped fetch ended."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_format
from floodrepro.errors import UsageError

DEFAULT_REPO = "ibm-esa-geospatial/ImpactMesh-Flood"
QUICK = 2**30  # bytes that are hashed in a moment: a log needs no lines for them
REDRAW = 0.2  # seconds between two states of the line on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder to fill, or to go on with")
    parser.add_argument("--revision", metavar="SHA", help="branch, tag or commit (default: main); one commit a folder")
    parser.add_argument(
        "--split", action="append", metavar="NAMES", help="train,val,test: whose archives (default: all)"
    )
    parser.add_argument(
        "--modality", action="append", metavar="NAMES", help="S2L2A,S1RTC,DEM,MASK: which archives (default: these)"
    )
    parser.add_argument("--protocol", help="v0, v1 or v1-binary: stop before the archives if the data cannot give it")
    parser.add_argument(
        "--repo", default=DEFAULT_REPO, metavar="ID", help=f"data set repository (default: {DEFAULT_REPO})"
    )
    parser.add_argument("--verify", action="store_true", help="hash every file that is here, the unchanged ones too")
    add_format(parser)
    parser.epilog = (
        "The split files are always fetched. A stopped fetch goes on with the same command; files of a plain\n"
        "'hf download' are adopted. HF_HUB_OFFLINE=1 checks what is here, HF_ENDPOINT names another hub,\n"
        "HF_TOKEN opens private repositories.\n"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from floodrepro.data.fetch import fetch, size_text
    from floodrepro.data.hub import Hub
    from floodrepro.data.hub_layout import PARTS
    from floodrepro.data.names import SPLITS

    with _progress() as progress:
        report = fetch(
            args.root,
            Hub(args.repo),
            revision=args.revision,
            splits=_listed(args.split, "--split") or SPLITS,
            modalities=_listed(args.modality, "--modality") or PARTS,
            protocol=args.protocol,
            verify=args.verify,
            progress=progress,
        )
    ways = list(report.came.values())
    told = [f"{ways.count(way)} {way} ({size_text(report.size(way))})" for way in sorted(set(ways))]
    text = f"{report.ledger.where}\n{report.version}\n{len(ways)} files: {', '.join(told)}\n{args.root}"
    console.emit(report.as_dict(), text, args.format)
    return 0


def _listed(values: list[str] | None, flag: str) -> list[str]:
    """A comma list, given once or several times, each name once."""
    found = [name.strip() for value in values or () for name in value.split(",")]
    if "" in found:
        raise UsageError(f"{flag} holds an empty name", fix=f"{flag} NAME,NAME")
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, str, int, int], None]]:
    """Show bytes done on stderr: one line redrawn on a terminal, a line at every tenth in a log."""
    from floodrepro.data.fetch import size_text

    live = sys.stderr.isatty()
    tenths: dict[str, int] = {}
    drawn = 0.0

    def update(work: str, path: str, done: int, total: int) -> None:
        nonlocal drawn
        tenth = 10 * done // max(total, 1)
        shown = tenths.get(work, -1)
        if tenth < shown:  # another round, such as the archives after the split files
            shown = -1
        text = f"{work} {path}: {size_text(done)} of {size_text(total)}"
        if live and (done == total or time.monotonic() > drawn + REDRAW):
            drawn = time.monotonic()
            print(f"\r\x1b[Kfloodrepro: {text}", end="", file=sys.stderr, flush=True)
        elif not live and tenth > shown and (work == "fetching" or total > QUICK):
            console.say(text)
        tenths[work] = tenth

    try:
        yield update
    finally:
        if drawn:
            print(file=sys.stderr)
