"""``floodrepro verify``, ``export`` and ``publish``: judge a run, write its pair and card, upload them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floodrepro import console
from floodrepro.cli.shared import add_format
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import find, fingerprint, read
from floodrepro.run_folder import RunFolder, config_beside, sha256_of, timestamp

if TYPE_CHECKING:
    from floodrepro.publishing.upload import UploadPlan

_VERIFY = """\
A comparison ends in one of three words: equivalent, different (better or worse), undecided. Undecided is no failure.

exit codes: 0 unless a required check is not met; by default a comparison is met if it is not different (worse), and
every other required check if it passed. --require replaces the list; a comparison named in it has to be equivalent.
"""
_EXPORT = """\
The card (README.md) is made of run.json and, once the run was verified, of verification/results.json. It is yours from
then on: --card-only writes a new one beside the pair and sets the old one aside.

  floodrepro export --run runs/first
  floodrepro verify --run runs/first
  floodrepro export --run runs/first --card-only --licence apache-2.0
"""
_PUBLISH = """\
  floodrepro publish --export runs/first/export --repo me/model --dry-run
  floodrepro publish --export runs/first/export --repo me/model --private

--dry-run contacts nobody. Without it the repository's name has to be typed, or --yes given where there is no terminal.
The hub's address is HF_ENDPOINT's; the token is that of 'hf auth login' or HF_TOKEN.
"""


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="what to compare with: a checkpoint, or a chip table (.parquet)"
    )
    parser.add_argument("--reference-name", default="", metavar="NAME", help="what the report calls it")
    parser.add_argument("--split", default="test", metavar="NAME", help="whose chip table is judged (default: test)")
    parser.add_argument(
        "--require", metavar="all|ID,ID,…", help="checks that are required (default: those of thresholds.yaml)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: verification/ of the run folder")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="the chips, if they are not where the recipe says"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-measure", action="store_true", help="judge what is there: no checkpoint is opened, no torch")
    how.add_argument("--report-only", action="store_true", help="write report and figures again from results.json")
    add_format(parser)
    parser.epilog = _VERIFY


def run_verify(args: argparse.Namespace) -> int:
    """Check a run folder, compare it with a reference, and write the report."""
    from floodrepro.verification import results
    from floodrepro.verification.report import write_report

    run = RunFolder.open(args.run)
    output = args.output or run.verification
    found = results.load(output / "results.json") if args.report_only else verify(run, output, args)
    files = write_report(found, output)
    console.emit(found, _verdict_text(found, files[-1]), args.format)
    return 0 if found["summary"]["ok"] else 1


def verify(run: RunFolder, output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing, run all checks, save results.json and return its content.

    Args:
        run: The run folder.
        output: Folder of results.json and evidence.
        args: With the flags of `add_verify_arguments`.

    Raises:
        FloodreproError: Something that was asked for by name is missing, damaged, or cannot be written.
    """
    from floodrepro.verification import battery, results

    required, standard = battery.required_checks(args.require), battery.required_checks(None)
    reference: Path | None = args.reference
    if reference and not reference.is_file():
        raise UsageError("the reference is not found", where=reference, fix="--reference CHECKPOINT, or its .parquet")
    is_table = reference is not None and reference.suffix == ".parquet"
    if args.no_measure and reference and not is_table:
        raise UsageError("--no-measure compares with a chip table", where="--reference", fix="give its .parquet")
    if not args.no_measure:
        if not run.best.is_file():
            raise CheckpointError("checkpoint not found", where=run.best, fix="finish the fit, or --no-measure")
        console.say("loading TerraTorch (10 to 20 s)")
        from floodrepro.verification import measure

        measure.table_of(run, run.best, args.split, args.data_root)
        if reference and not is_table:
            reference = measure.table_of(run, reference, args.split, args.data_root)
        measure.measure_all(run, output / "evidence", args.split, args.data_root)
    console.say("judging")
    evidence = battery.gather(
        run, args.split, reference, output / "evidence", name=args.reference_name, data_root=args.data_root
    )
    checks = battery.run_checks(evidence)
    found = results.summarise(
        evidence, checks, required, timestamp(), standard=standard, by_name=args.require is not None
    )
    results.save(found, output / "results.json")
    return found


def _verdict_text(found: dict[str, Any], html: Path) -> str:
    rows = [["check", "status", "finding"]]
    rows += [[check["title"], check["outcome"] or check["status"], check["finding"]] for check in found["checks"]]
    summary, verdict = found["summary"], found["verdict"]
    lines = [console.columns(rows, right_from=3), "", f"{verdict['word']}: {verdict['sentence']}", verdict["not_shown"]]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    lines += [f"required, and not met: {', '.join(summary['not_met'])}"] if summary["not_met"] else []
    lines += [f"not asked for: {', '.join(summary['left_out'])}"] if summary["left_out"] else []
    return "\n".join([*lines, f"{summary['text']}\nreport  {html}"])


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="a run folder: its best checkpoint and its recipe")
    source.add_argument("--ckpt", type=Path, metavar="FILE", help="a .ckpt, .pt or .safetensors")
    parser.add_argument("--config", metavar="YAML", help="recipe of --ckpt (default: the one beside it)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: export/ in the run folder")
    parser.add_argument("--name", help="stem of both files (default: the run's name)")
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--card-only", action="store_true", help="write the card anew, for a pair that is there")
    card.add_argument("--no-card", action="store_true", help="write the pair alone")
    parser.add_argument(
        "--licence", "--license", metavar="ID", help="of the weights, such as apache-2.0; without it none is stated"
    )
    parser.add_argument("--pue", type=float, metavar="X", help="the data centre's power usage effectiveness")
    parser.add_argument("--pue-source", metavar="TEXT", help="where that figure comes from")
    parser.add_argument("--grid-intensity", type=float, metavar="X", help="of the grid, kg CO2e per kWh")
    parser.add_argument("--grid-source", metavar="TEXT", help="where that figure comes from")
    add_format(parser)
    parser.epilog = _EXPORT


def run_export(args: argparse.Namespace) -> int:
    """Write a safetensors + YAML pair that plain TerraTorch loads, and its model card."""
    from floodrepro.publishing.carbon import factors_of

    factors = factors_of(args)
    run = RunFolder.open(args.run) if args.run else RunFolder.of_checkpoint(args.ckpt)
    checkpoint = args.ckpt or RunFolder(args.run).best
    if not checkpoint.is_file():
        raise CheckpointError("checkpoint not found", where=checkpoint, fix="finish the fit, or give --ckpt FILE")
    output = args.output or (run.export if run else None)
    if output is None:
        raise UsageError("the checkpoint lies in no run folder", where=checkpoint, fix="--output DIR")
    recipe = read(find(args.config) if args.config else config_beside(checkpoint))
    if run and not args.no_card and fingerprint(recipe) != fingerprint(read(run.recipe)):
        raise UsageError("--config is another recipe than the run's", where=args.config, fix="leave it out")
    name = args.name or (run.path.resolve().name if run else checkpoint.stem)
    home = run if run and checkpoint.resolve() == run.best.resolve() else None
    found: dict[str, Any] = {}
    if not args.no_card:  # before anything is written
        from floodrepro.publishing.card import read_records, write_card

        read_records(home, recipe, sha256_of(checkpoint))
    if not args.card_only:
        console.say("loading torch")
        from floodrepro.publishing.export import export

        pair = export(checkpoint, recipe, output, name)
        found = {"weights": str(pair.path), "config": str(pair.config), "sha256": pair.sha256}
    if not args.no_card:
        card = write_card(output, name, checkpoint, recipe, home, licence=args.licence, factors=factors)
        found |= {"card": str(card), "licence": args.licence}
        if home and not home.results.is_file():
            console.say("nothing was verified yet: floodrepro verify --run DIR, then export --card-only")
        if not args.licence:
            console.say("the card states no licence: choose one with --licence ID, or write it into the card")
    text = "\n".join(f"{key:<8} {value}" for key, value in found.items() if value)
    console.emit(found, text, args.format)
    return 0


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--export", type=Path, required=True, metavar="DIR", help="what floodrepro export wrote")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    parser.add_argument(
        "--branch", "--revision", default="main", metavar="NAME", help="made if it is not there (default: main)"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded where, and stop")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--force", action="store_true", help="publish although a required check is not met")
    add_format(parser)
    parser.epilog = _PUBLISH


def run_publish(args: argparse.Namespace) -> int:
    """Upload an export to a repository on the hub: weights, YAML, card and results, in one commit."""
    from floodrepro.publishing.upload import make_plan, upload

    plan = make_plan(args.export, args.repo, branch=args.branch, private=args.private)
    if args.dry_run:
        end = f"it would be refused without --force: {plan.objection}" if plan.objection else "nothing was sent"
        console.emit(plan.as_dict(), f"{_listing(plan)}\n{end}", args.format)
        return 0
    if plan.objection and not args.force:
        raise CheckpointError(
            f"this model is not published: {plan.objection}", where=plan.folder, fix="mend that, or --force"
        )
    for line in _listing(plan).splitlines():
        console.say(line)
    if not args.yes:
        _ask(plan.repo)
    with console.stdout_to_stderr():
        address = upload(plan)
    console.emit(plan.as_dict() | {"commit": address}, f"uploaded {len(plan.files)} files: {address}", args.format)
    return 0


def _listing(plan: "UploadPlan") -> str:
    visible = "private" if plan.private else "public if it is new"
    rows = [["file", "bytes", "sha256"]]
    rows += [[name, f"{(plan.folder / name).stat().st_size:,}", digest] for name, digest in plan.files.items()]
    lines = [
        f"from      {plan.folder}",
        f"to        {plan.endpoint}/{plan.repo}  (branch {plan.branch}, {visible})",
        f"verdict   {plan.verdict or 'none'}",
        f"licence   {plan.licence or 'none: write one into the card, or export --card-only --licence ID'}",
        *([f"against   {plan.objection}"] if plan.objection else []),
        console.columns(rows),
    ]
    return "\n".join([*lines, *([f"not uploaded: {', '.join(plan.left_out)}"] if plan.left_out else [])])


def _ask(repo: str) -> None:
    """Have the repository's name typed.

    Raises:
        UsageError: There is no terminal to ask on, or something else was typed.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("there is no terminal to ask on", fix="--yes, or --dry-run to look first")
    console.say(f"type {repo} to upload these files")
    if sys.stdin.readline().strip() != repo:
        raise UsageError("that is another name: nothing was uploaded", fix="the same command again")
