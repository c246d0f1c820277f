"""``floodrepro verify``, ``export`` and ``publish``: judge a run, write its pair and card, upload them."""

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from floodrepro import console
from floodrepro.cli import main
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import find, read_yaml, to_yaml
from floodrepro.run_folder import RunFolder, config_beside, refuse_code, sha256_of, timestamp

_VERIFY = """\
A comparison ends in one of three words: equivalent, different (better or worse), undecided. Undecided is no failure.
exit codes: 0 unless a required check is not met; by default a comparison is met if it is not different (worse), and
every other required check if it passed. --require replaces the list; a comparison named in it has to be equivalent.
"""
_EXPORT = """\
The card (README.md) is made of run.json and, once the run was verified, of verification/results.json. It is yours from
then on: --card-only writes a new one beside the pair and sets the old one aside.
  floodrepro export --run runs/first --card-only --licence apache-2.0
"""
_PUBLISH = """\
  floodrepro publish --export runs/first/export --repo me/model --dry-run
The hub's address is HF_ENDPOINT's; the token is that of 'hf auth login' or HF_TOKEN. --dry-run contacts nobody.
"""


def _verify(parser: main.Parser) -> int:
    add, parser.epilog = parser.add_argument, _VERIFY
    add("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    add("--reference", type=main.existing_file, metavar="FILE", help="a checkpoint, or a chip table (.parquet)")
    add("--reference-name", default="", metavar="NAME", help="what the report calls it")
    add("--split", default="test", metavar="NAME", help="whose chip table is judged (default: test)")
    add("--require", metavar="all|ID,ID,…", help="checks that are required (default: those of checks.yaml)")
    add("--output", type=Path, metavar="DIR", help="default: verification/ of the run folder")
    add("--data-root", type=Path, metavar="DIR", help="the chips, if they are not where the recipe says")
    add("--trust-code", action="store_true", help="run the code that a recipe names (custom_modules_path)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no-measure", action="store_true", help="judge what is there: no checkpoint is opened, no torch")
    how.add_argument("--report-only", action="store_true", help="write report and figures again from results.json")
    args = parser.read()
    from floodrepro.verification import battery, report, results

    run = RunFolder.open(args.run)
    output = args.output or run.verification
    if args.report_only:
        found = results.load(output / "results.json")
    else:
        battery.required_checks(args.require)  # refuses an unknown id before anything is measured
        evidence, reference = output / "evidence", args.reference
        if not args.no_measure:
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
        console.say("judging")
        gathered = battery.gather(run, args.split, reference, evidence, args.reference_name, args.data_root)
        try:
            found = results.summarise(gathered, args.require, timestamp())
            report.render(found, {})
        except battery.DAMAGED as error:  # judge without what someone has edited: what needs it fails
            traceback.print_exc()
            said: Any = ("fail", f"the record is damaged: {error!r:.200}")
            absent = {**gathered.absent, "record": said, battery.MEASURED: said}
            gathered = replace(gathered, record={}, measured={}, absent=absent)
            found = results.summarise(gathered, args.require, timestamp())
    page = report.write_report(found, output)
    rows = [["check", "status", "finding"]]
    rows += [[check["title"], check["outcome"] or check["status"], check["finding"]] for check in found["checks"]]
    verdict, summary = found["verdict"], found["summary"]
    lines = [console.columns(rows, right_from=3), "", f"{verdict['word']}: {verdict['sentence']}", verdict["not_shown"]]
    lines += [*(f"warning: {warning}" for warning in found["warnings"]), summary["text"], f"report  {page}"]
    console.emit(found, "\n".join(lines), args.format)
    return 0 if summary["ok"] else 1


def _export(parser: main.Parser) -> None:
    add, parser.epilog = parser.add_argument, _EXPORT
    source, how = parser.add_mutually_exclusive_group(required=True), parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, metavar="DIR", help="a run folder: its best checkpoint and its recipe")
    main.add_checkpoint(source)
    add("--config", metavar="YAML", help="recipe of --ckpt (default: the one beside it)")
    add("--output", type=Path, metavar="DIR", help="default: export/ in the run folder")
    add("--name", type=main.plain_name, help="stem of both files (default: the run's name)")
    how.add_argument("--card-only", action="store_true", help="write the card anew, for a pair that is there")
    how.add_argument("--no-card", action="store_true", help="write the pair alone")
    add("--licence", "--license", metavar="ID", help="of the weights, such as apache-2.0; without it none is stated")
    factor = ("X", "SOURCE")
    add("--pue", nargs=2, metavar=factor, help="the data centre's power usage effectiveness, and where it comes from")
    add("--grid", nargs=2, metavar=factor, help="the grid's kg CO2e per kWh, and where it comes from")
    args = parser.read()
    from floodrepro.publishing.card import factors_of, read_records, write_card

    factors = factors_of(args.pue, args.grid)
    run = RunFolder.open(args.run) if args.run else RunFolder.of_checkpoint(args.ckpt)
    checkpoint = args.ckpt or RunFolder(args.run).best
    if not checkpoint.is_file():
        raise CheckpointError("checkpoint not found", where=checkpoint, fix="finish the fit, or give --ckpt FILE")
    output = args.output or (run.export if run else None)
    if output is None:
        raise UsageError("the checkpoint lies in no run folder", where=checkpoint, fix="--output DIR")
    recipe = read_yaml(find(args.config) if args.config else config_beside(checkpoint))
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
        pair_file = output / f"{name}.safetensors"
        card = write_card(pair_file, checkpoint, recipe, home, args.licence or "", factors)
        found |= {"card": str(card), "licence": args.licence}
    lines = [f"{key:<8} {value or 'none: choose one with --licence ID'}" for key, value in found.items()]
    console.emit(found, "\n".join(lines), args.format)


def _publish(parser: main.Parser) -> None:
    add, parser.epilog = parser.add_argument, _PUBLISH
    add("--export", type=Path, required=True, metavar="DIR", help="what floodrepro export wrote")
    add("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    add("--branch", "--revision", default="main", metavar="NAME", help="made if it is not there (default: main)")
    add("--private", action="store_true", help="make the repository private; refuse a public one")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--dry-run", action="store_true", help="list what would be uploaded where, and stop")
    how.add_argument("--yes", action="store_true", help="upload it")
    add("--force", action="store_true", help="publish although a required check is not met")
    args = parser.read()
    from floodrepro.publishing.upload import make_plan, upload

    plan = make_plan(args.export, args.repo, branch=args.branch, private=args.private)
    if args.yes:
        if plan["objection"] and not args.force:
            what, fix = f"this model is not published: {plan['objection']}", "mend that, or --force"
            raise CheckpointError(what, where=args.export, fix=fix)
        with console.stdout_to_stderr():
            plan["commit"] = upload(plan)
    console.emit(plan, to_yaml(plan), args.format)
