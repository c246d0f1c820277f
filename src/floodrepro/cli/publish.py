"""``floodrepro verify``, ``export`` and ``publish``: judge a run, write its pair and card, upload them."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.cli.shared import add_format, plain_name
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import find, fingerprint, read_yaml
from floodrepro.run_folder import RunFolder, config_beside, refuse_code, sha256_of, timestamp

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
    add, parser.epilog = parser.add_argument, _VERIFY
    add("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    add("--reference", type=Path, metavar="FILE", help="compare with: a checkpoint, or a chip table (.parquet)")
    add("--reference-name", default="", metavar="NAME", help="what the report calls it")
    add("--split", default="test", metavar="NAME", help="whose chip table is judged (default: test)")
    add("--require", metavar="all|ID,ID,…", help="checks that are required (default: those of checks.yaml)")
    add("--output", type=Path, metavar="DIR", help="default: verification/ of the run folder")
    add("--data-root", type=Path, metavar="DIR", help="the chips, if they are not where the recipe says")
    add("--trust-code", action="store_true", help="run the code that a recipe names (custom_modules_path)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-measure", action="store_true", help="judge what is there: no checkpoint is opened, no torch")
    how.add_argument("--report-only", action="store_true", help="write report and figures again from results.json")
    add_format(parser)


def run_verify(args: argparse.Namespace) -> int:
    """Check a run folder, compare it with a reference, and write the report."""
    from floodrepro.verification import battery, report, results

    run = RunFolder.open(args.run)
    output = args.output or run.verification
    if args.report_only:
        found = results.load(output / "results.json")
    else:
        battery.required_checks(args.require)  # refuses an unknown id before anything is measured
        place, names = output / "evidence", {"name": args.reference_name, "data_root": args.data_root}
        reference = _measure(run, place, args)
        console.say("judging")
        evidence = battery.gather(run, args.split, reference, place, **names)
        try:
            found = results.summarise(evidence, battery.run_checks(evidence), args.require, timestamp())
            report.render(found, {})
        except battery.DAMAGED as error:  # judge without what someone has edited: what needs it fails
            damaged: Any = dict.fromkeys(
                ("record", battery.MEASURED), ("fail", f"the record is damaged: {error!r:.200}")
            )
            evidence = replace(evidence, record={}, measured={}, absent={**evidence.absent, **damaged})
            found = results.summarise(evidence, battery.run_checks(evidence), args.require, timestamp())
    page = report.write_report(found, output)
    rows = [["check", "status", "finding"]]
    rows += [[check["title"], check["outcome"] or check["status"], check["finding"]] for check in found["checks"]]
    summary, verdict = found["summary"], found["verdict"]
    lines = [console.columns(rows, right_from=3), "", f"{verdict['word']}: {verdict['sentence']}", verdict["not_shown"]]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    lines += [report.required_sentence(found), summary["text"], f"report  {page}"]
    console.emit(found, "\n".join(lines), args.format)
    return 0 if summary["ok"] else 1


def _measure(run: RunFolder, evidence: Path, args: argparse.Namespace) -> Path | None:
    """Measure what is missing, and return the reference's chip table."""
    reference: Path | None = args.reference
    if reference and not reference.is_file():
        raise UsageError("the reference is not found", where=reference, fix="--reference CHECKPOINT, or its .parquet")
    if args.no_measure:
        if reference and reference.suffix != ".parquet":
            raise UsageError("--no-measure compares with a chip table", where="--reference", fix="give its .parquet")
        return reference
    if not run.best.is_file():
        raise CheckpointError("checkpoint not found", where=run.best, fix="finish the fit, or --no-measure")
    other = RunFolder.of_checkpoint(reference) if reference else None
    for config in [run.recipe, *run.export.glob("*.yaml"), *([other.recipe] if other else [])]:
        if not args.trust_code:
            refuse_code(config, "--trust-code")
    console.say("loading TerraTorch (10 to 20 s)")
    from floodrepro.verification import measure

    measure.table_of(run, run.best, args.split, args.data_root)
    if reference and reference.suffix != ".parquet":
        reference = measure.table_of(run, reference, args.split, args.data_root)
    measure.measure_all(run, evidence, args.split, args.data_root)
    return reference


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add, parser.epilog = parser.add_argument, _EXPORT
    source, card = parser.add_mutually_exclusive_group(required=True), parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, metavar="DIR", help="a run folder: its best checkpoint and its recipe")
    source.add_argument("--ckpt", type=Path, metavar="FILE", help="a .ckpt, .pt or .safetensors")
    add("--config", metavar="YAML", help="recipe of --ckpt (default: the one beside it)")
    add("--output", type=Path, metavar="DIR", help="default: export/ in the run folder")
    add("--name", type=plain_name, help="stem of both files (default: the run's name)")
    card.add_argument("--card-only", action="store_true", help="write the card anew, for a pair that is there")
    card.add_argument("--no-card", action="store_true", help="write the pair alone")
    add("--licence", "--license", metavar="ID", help="of the weights, such as apache-2.0; without it none is stated")
    pair = ("X", "SOURCE")
    add("--pue", nargs=2, metavar=pair, help="the data centre's power usage effectiveness, and where it comes from")
    add("--grid", nargs=2, metavar=pair, help="the grid's kg CO2e per kWh, and where it comes from")
    add_format(parser)


def run_export(args: argparse.Namespace) -> int:
    """Write a safetensors + YAML pair that plain TerraTorch loads, and its model card."""
    from floodrepro.publishing.card import factors_of, read_records, write_card

    factors = factors_of(args.pue, args.grid)
    run = RunFolder.open(args.run) if args.run else RunFolder.of_checkpoint(args.ckpt)
    checkpoint = args.ckpt or RunFolder(args.run).best
    if not checkpoint.is_file():
        raise CheckpointError("checkpoint not found", where=checkpoint, fix="finish the fit, or give --ckpt FILE")
    output = args.output or (run.export if run else None)
    if output is None:
        raise UsageError("the checkpoint lies in no run folder", where=checkpoint, fix="--output DIR")
    recipe = read_yaml(find(args.config) if args.config else run.recipe if run else config_beside(checkpoint))
    if run and not args.no_card and fingerprint(recipe) != fingerprint(read_yaml(run.recipe)):
        raise UsageError("--config is another recipe than the run's", where=args.config, fix="leave it out")
    name = args.name or (run.path.resolve().name if run else checkpoint.stem)
    home = run if run and checkpoint.resolve() == run.best.resolve() else None
    found: dict[str, Any] = {}
    if not args.no_card:
        read_records(home, recipe, sha256_of(checkpoint))  # what refuses a card does so before anything is written
    if not args.card_only:
        console.say("loading torch")
        from floodrepro.publishing.export import export

        pair = export(checkpoint, recipe, output, name)
        found = {"weights": str(pair.path), "config": str(pair.config), "sha256": pair.sha256}
    if not args.no_card:
        card = write_card(output, name, checkpoint, recipe, home, licence=args.licence, factors=factors)
        found |= {"card": str(card), "licence": args.licence}
        if home is None:
            console.say("the weights were not compared with the recipe's model: floodrepro test --ckpt FILE does so")
        if home and not home.results.is_file():
            console.say("nothing was verified yet: floodrepro verify --run DIR, then export --card-only")
        if not args.licence:
            console.say("the card states no licence: choose one with --licence ID, or write it into the card")
    text = "\n".join(f"{key:<8} {value}" for key, value in found.items() if value)
    console.emit(found, text, args.format)
    return 0


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add, parser.epilog = parser.add_argument, _PUBLISH
    add("--export", type=Path, required=True, metavar="DIR", help="what floodrepro export wrote")
    add("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    add("--branch", "--revision", default="main", metavar="NAME", help="made if it is not there (default: main)")
    add("--private", action="store_true", help="make the repository private; refuse a public one")
    add("--dry-run", action="store_true", help="list what would be uploaded where, and stop")
    add("--yes", action="store_true", help="do not ask")
    add("--force", action="store_true", help="publish although a required check is not met")
    add_format(parser)


def run_publish(args: argparse.Namespace) -> int:
    """Upload an export to a repository on the hub: weights, YAML, card and results, in one commit."""
    from floodrepro.publishing.upload import make_plan, upload

    plan = make_plan(args.export, args.repo, branch=args.branch, private=args.private)
    visible = "private" if args.private else "public if it is new"
    lines = {
        "from": plan["folder"],
        "to": f"{plan['endpoint']}/{plan['repo']}  (branch {plan['branch']}, {visible})",
        "verdict": plan["verdict"] or "none",
        "licence": plan["licence"] or "none: write one into the card, or export --card-only --licence ID",
        "against": plan["objection"] and f"{plan['objection']} Refused without --force.",
        "left out": ", ".join(plan["left_out"]),
    }
    rows = [["file", "bytes", "sha256"]]
    rows += [[name, f"{(args.export / name).stat().st_size:,}", digest] for name, digest in plan["files"].items()]
    listing = "\n".join([*(f"{key:<8} {text}" for key, text in lines.items() if text), console.columns(rows)])
    if args.dry_run:
        console.emit(plan, listing, args.format)
        return 0
    if plan["objection"] and not args.force:
        what, fix = f"this model is not published: {plan['objection']}", "mend that, or --force"
        raise CheckpointError(what, where=args.export, fix=fix)
    for line in listing.splitlines():
        console.say(line)
    if not args.yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError("there is no terminal to ask on", fix="--yes, or --dry-run to look first")
        console.say(f"type {args.repo} to upload these files")
        if sys.stdin.readline().strip() != args.repo:
            raise UsageError("that is another name: nothing was uploaded", fix="the same command again")
    with console.stdout_to_stderr():
        address = upload(plan)
    console.emit(plan | {"commit": address}, f"uploaded {len(plan['files'])} files: {address}", args.format)
    return 0
