"""Get and check data sets: data fetch downloads ImpactMesh-Flood, data audit checks it, data synth generates chips."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli import data_audit, data_fetch
from floodrepro.cli.shared import add_format


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="fetch|audit|synth")
    fetch = actions.add_parser("fetch", prog=f"{parser.prog} fetch", help="download the data set from the hub")
    data_fetch.add_arguments(fetch)
    audit = actions.add_parser("audit", prog=f"{parser.prog} audit", help="check a data set against its protocol")
    data_audit.add_arguments(audit)
    synth = actions.add_parser("synth", prog=f"{parser.prog} synth", help="generate chips of plausible flood scenes")
    synth.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder to write; must hold no data set")
    synth.add_argument("--events", type=int, default=8, metavar="N", help="flood events, at least 3 (default: 8)")
    synth.add_argument("--chips", type=int, default=128, metavar="M", help="chips over all events (default: 128)")
    synth.add_argument("--size", type=int, default=64, metavar="PX", help="a chip's edge in pixels (default: 64)")
    synth.add_argument("--protocol", default="v0", help="mask classes: v0 or v1 (default: v0)")
    synth.add_argument("--seed", type=int, default=42, help="same seed, same bytes (default: 42)")
    synth.add_argument("--layout", default="extracted", help="extracted, or hub: the hub's tars (default: extracted)")
    add_format(synth)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.action == "fetch":
        return data_fetch.run(args)
    if args.action == "audit":
        return data_audit.run(args)
    from floodrepro.data.synth import generate

    with console.progress("chips") as progress:
        report = generate(
            args.root,
            events=args.events,
            chips=args.chips,
            size=args.size,
            protocol=args.protocol,
            seed=args.seed,
            layout=args.layout,
            progress=progress,
        )
    rows = [["split", "events", "chips"]]
    rows += [[split, str(report.events[split]), str(count)] for split, count in report.chips.items()]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in report.class_shares.items())
    text = f"{console.columns(rows)}\n{shares}; ignored {report.ignored_share:.1%}\n{report.root}"
    console.emit(report.as_dict(), text, args.format)
    return 0
