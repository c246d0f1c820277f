"""Write a safetensors + YAML pair that plain TerraTorch loads, and its model card."""

import argparse
from pathlib import Path

from floodrepro import console
from floodrepro.cli.shared import add_format
from floodrepro.errors import CheckpointError, UsageError
from floodrepro.recipe import Recipe, find, fingerprint, read
from floodrepro.run_folder import RunFolder, config_beside

_EPILOG = """\
The card (README.md) is made of run.json and, once the run was verified, of verification/results.json, which is copied
beside it. A run may be exported first and verified later:

  floodrepro export --run runs/first
  floodrepro verify --run runs/first
  floodrepro export --run runs/first --card-only

--card-only leaves the pair as it is and writes a new card in place of one that floodrepro wrote and nobody edited: the
card's last line holds the sha256 of its text. A run that is not finished, or whose records contradict each other, gets
no card; --no-card exports its pair all the same.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--pue", type=float, metavar="X", help="the data centre's power usage effectiveness")
    parser.add_argument("--pue-source", metavar="TEXT", help="where that figure comes from")
    parser.add_argument("--grid-intensity", type=float, metavar="X", help="of the grid, kg CO2e per kWh")
    parser.add_argument("--grid-source", metavar="TEXT", help="where that figure comes from")
    add_format(parser)
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from floodrepro.publishing.carbon import factors

    given = factors(args.pue, args.pue_source, args.grid_intensity, args.grid_source)
    folder = RunFolder.open(args.run) if args.run else RunFolder.of_checkpoint(args.ckpt)
    checkpoint = args.ckpt or RunFolder(args.run).best
    if not checkpoint.is_file():
        raise CheckpointError("checkpoint not found", where=checkpoint, fix="finish the fit, or give --ckpt FILE")
    output = args.output or (folder.export if folder else None)
    if output is None:
        raise UsageError("the checkpoint lies in no run folder", where=checkpoint, fix="--output DIR")
    recipe = read(find(args.config) if args.config else config_beside(checkpoint))
    name = args.name or (folder.path.resolve().name if folder else checkpoint.stem)
    if args.no_card:
        report, text = _export(checkpoint, recipe, output, name, None)
        console.emit(report, text, args.format)
        return 0
    if args.config and folder and fingerprint(recipe) != (trained := fingerprint(read(folder.recipe))):
        raise UsageError(
            f"--config is another recipe (sha256 {fingerprint(recipe)[:12]}…) than the run's ({trained[:12]}…)",
            where=find(args.config),
            fix="leave it out; --no-card exports the pair without a card",
        )
    from floodrepro.publishing.bundle import RESULTS, refuse_card, refuse_edited
    from floodrepro.publishing.make_card import add_card, records_of

    (refuse_edited if args.card_only else refuse_card)(output)
    records = records_of(folder, checkpoint, recipe)
    report, text = {}, ""
    if not args.card_only:
        report, text = _export(checkpoint, recipe, output, name, records.data_digest)
    elif (pair := (output / f"{name}.safetensors", output / f"{name}.yaml"))[0].is_file() and pair[1].is_file():
        console.say("loading torch")
        from floodrepro.publishing.export import refuse_other_pair

        refuse_other_pair(checkpoint, recipe, *pair)
    card = add_card(output, name, checkpoint, records, given)
    if records.record is not None and records.results is None:
        console.say("the card says that nothing was verified: floodrepro verify --run DIR, then export --card-only")
    report |= {"card": str(card), "results": str(output / RESULTS) if records.results else None}
    console.emit(report, f"{text}\ncard     {card}".lstrip(), args.format)
    return 0


def _export(
    checkpoint: Path, recipe: Recipe, output: Path, name: str, data_digest: str | None
) -> tuple[dict[str, object], str]:
    """Write the pair; the result as JSON types and as text."""
    console.say("loading torch")
    from floodrepro.publishing.export import export

    result = export(checkpoint, recipe, output, name, data_digest)
    return result.as_dict(), (
        f"weights  {result.weights}  ({result.tensors} tensors, {result.parameters:,} values)\n"
        f"config   {result.config}\nsha256   {result.sha256}"
    )
