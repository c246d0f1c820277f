"""Check a data set against its protocol: names and sizes in seconds, and with --deep every chip's pixels."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.cli.shared import add_format
from floodrepro.errors import DataError, UsageError

CONFIGS = {
    "v0": "terramind_v1_base_impactmesh_flood_amd",
    "v1": "terramind_v1_base_impactmesh_flood_v1",
    "v1-binary": "terramind_v1_base_impactmesh_flood_v1_binary",
}
SEVERITIES = ("error", "warning", "info")
SHOWN = 10  # findings of one check that the text lists; the manifest and --format json hold all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of chips and split/")
    parser.add_argument("--protocol", required=True, help="what the data should be: v0, v1 or v1-binary")
    parser.add_argument("--deep", action="store_true", help="read every chip, not only names and sizes")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that read chips (default: one a core, up to 32)"
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="recipe whose means and stds a deep audit compares with (default: the base recipe of the protocol)",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with a deep audit that was stopped (default: --resume)",
    )
    add_format(parser)
    parser.epilog = (
        "The result is also written to DIR/data-manifest.json. Exit code 1 if there is any error; a warning is none.\n"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.config and not args.deep:
        raise UsageError("--config is compared with pixels, which a quick audit does not read", fix="--deep")
    from floodrepro.data.audit import audit
    from floodrepro.data.totals import Statistics

    # `audit` refuses a protocol that is not among them.
    config = args.config or CONFIGS.get(args.protocol, CONFIGS["v0"])
    statistics = Statistics.of(config) if args.deep else None
    with console.progress("chips read") as progress:
        manifest = audit(
            args.root,
            args.protocol,
            deep=args.deep,
            statistics=statistics,
            jobs=args.jobs,
            resume=args.resume,
            progress=progress,
        )
    console.emit(manifest, _text(manifest), args.format)
    errors = [finding for finding in manifest["findings"] if finding["severity"] == "error"]
    if errors:
        raise DataError(
            f"the audit found {len(errors)} {'error' if len(errors) == 1 else 'errors'}",
            where=args.root,
            fix="see the findings above" if args.deep else "see the findings above; --deep reads the pixels as well",
        )
    return 0


def _text(manifest: dict[str, Any]) -> str:
    """The manifest for a reader: counts, figures, findings."""
    rows = [["split", "chips", "published", "events"]]
    for split, counts in manifest["splits"].items():
        published = "-" if counts["expected"] is None else f"{counts['expected']:,}"
        rows.append([split, f"{counts['chips']:,}", published, f"{counts['events']:,}"])
    blocks = [f"{manifest['protocol']}, {manifest['layout']}", console.columns(rows)]
    if manifest["deep"]:
        blocks.append(_deep_text(manifest["deep"]))
    findings = sorted(manifest["findings"], key=lambda finding: SEVERITIES.index(finding["severity"]))
    kinds = Counter(finding["severity"] for finding in findings)
    blocks.append(f"{kinds['error']} errors, {kinds['warning']} warnings, {kinds['info']} notes")
    shown: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        kind = (finding["severity"], finding["check"])
        shown[kind] += 1
        if shown[kind] <= SHOWN:
            blocks.append(_line(finding))
    for (severity, check), count in shown.items():
        if count > SHOWN:
            blocks.append(f"{severity}: {check}: and {count - SHOWN} more; data-manifest.json lists all")
    return "\n".join([*blocks, f"digest {manifest['digest']}"])


def _line(finding: dict[str, Any]) -> str:
    from floodrepro.data.moments import Finding

    return Finding(**finding).line()


def _deep_text(deep: dict[str, Any]) -> str:
    lines = []
    for split, chips in deep["chips"].items():
        shares = ", ".join(f"{name} {share:.1%}" for name, share in deep["class_shares"][split].items())
        missing = ", ".join(f"{part} {share:.1%}" for part, share in deep["missing_shares"][split].items())
        lines.append(f"{split}: {chips:,} chips read; {shares}; without data {missing}")
    for modality, compared in ((deep["compared"] or {}).get("bands") or {}).items():
        bands = deep["bands"]["train"][modality]
        for name in ("mean", "std"):
            lines.append(f"train {modality} {name}: {' '.join(f'{value:.1f}' for value in bands[name])}")
        lines.append(f"  z of the mean: {' '.join(f'{z:+.2f}' for z in compared['z'])}")
    change = deep["flood_change"]
    lines.append(f"VV from before to event on {change['pixels']:,} flood pixels: {change['mean_db']:+.2f} dB")
    return "\n".join(lines)
