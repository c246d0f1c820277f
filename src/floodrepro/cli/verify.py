"""Run the battery of checks over a run folder and write its report."""

import argparse
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.cli.shared import add_format
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.run_folder import RunFolder, timestamp

RESULTS = "results.json"  # in --output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="what to compare with: a checkpoint, or its chip table (.parquet)",
    )
    parser.add_argument("--reference-name", default="", metavar="NAME", help="what the report calls it")
    parser.add_argument("--split", default="test", metavar="NAME", help="whose chip table is judged (default: test)")
    parser.add_argument(
        "--require",
        metavar="all|ID,ID,…",
        help="checks that have to pass for exit code 0; a skipped one did not (default: those of thresholds.yaml)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: verification/ of the run folder")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="the chips, if they are not where the recipe says"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-measure", action="store_true", help="judge what is there: no checkpoint is opened, no torch")
    how.add_argument("--report-only", action="store_true", help="write report and figures again from results.json")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    folder = RunFolder.open(args.run)
    output = args.output or folder.verification
    if args.report_only:
        from floodrepro.verification import results
        from floodrepro.verification.report import write_report

        found = results.load(output / RESULTS)
        files = write_report(found, output)
    else:
        found, files = verify(
            folder,
            args.reference,
            output,
            split=args.split,
            require=args.require,
            name=args.reference_name,
            data_root=args.data_root,
            measure=not args.no_measure,
        )
    html = next(file for file in files if file.suffix == ".html")
    console.emit(found, _text(found, html), args.format)
    return 0 if found["summary"]["ok"] else 1


def verify(
    run: RunFolder,
    reference: Path | None,
    output: Path,
    *,
    split: str = "test",
    require: str | None = None,
    name: str = "",
    data_root: Path | None = None,
    measure: bool = True,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure what is missing, run all checks, and write results and report.

    Args:
        run: The run folder.
        reference: A checkpoint, or its chip table.
        output: Folder of results.json, report and evidence.
        split: Whose chip table is judged.
        require: Ids with commas, "all", or None for those of thresholds.yaml.
        name: What to call the reference.
        data_root: Where the chips are, if not where the recipe says.
        measure: Whether checkpoints are opened; else only what is there is judged.

    Returns:
        The content of results.json, and the files of the report.

    Raises:
        FloodreproError: Something that was asked for by name is missing, damaged, or cannot be written.
    """
    from floodrepro.verification import battery, results
    from floodrepro.verification.references import load_thresholds
    from floodrepro.verification.report import write_report

    thresholds = load_thresholds()
    required = battery.required_checks(require, thresholds)
    if reference and not reference.is_file():
        raise UsageError("the reference is not found", where=reference, fix="--reference CHECKPOINT, or its .parquet")
    table = reference if reference and reference.suffix == ".parquet" else None
    if measure:
        table = _measure(run, reference if table is None else None, output / "evidence", split, data_root) or table
    elif reference and table is None:
        raise UsageError("--no-measure compares with a chip table", where="--reference", fix="give its .parquet")
    console.say("judging")
    evidence = battery.gather(run, split, table, output / "evidence", name=name, data_root=data_root)
    found = results.summarise(evidence, battery.run_checks(evidence), required, timestamp(), thresholds["required"])
    results.save(found, output / RESULTS)
    return found, write_report(found, output)


def _measure(run: RunFolder, reference: Path | None, folder: Path, split: str, data_root: Path | None) -> Path | None:
    """Test what has no chip table yet and gather what needs torch; returns the reference checkpoint's table."""
    if not run.best.is_file():
        raise CheckpointError("checkpoint not found", where=run.best, fix="finish the fit, or --no-measure")
    console.say("loading TerraTorch (10 to 20 s)")
    from floodrepro.publishing.evidence import Measurement

    measurement = Measurement(run, folder, split, data_root)
    measurement.table_of(run.best)
    table = measurement.table_of(reference) if reference else None
    measurement.measure()
    return table


def _text(found: dict[str, Any], html: Path) -> str:
    """What was shown, a line a check, and where to read on."""
    rows = [["check", "status", "reason"]]
    rows += [[check["title"], check["status"], check["reason"]] for check in found["checks"]]
    required = found["summary"]["required_not_passed"]
    missing = f"\nrequired, and not passed: {', '.join(required)}" if required else ""
    warnings = "".join(f"\nwarning: {warning}" for warning in found["warnings"])
    verdict = " ".join(found["verdict"]["sentences"])
    table = console.columns(rows, right_from=len(rows[0]))
    return f"{table}\n\n{verdict}{warnings}\n\n{found['summary']['text']}{missing}\nreport  {html}"
