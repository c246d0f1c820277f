"""Get, check, look at and generate chips: data fetch, weights, audit, stats, show, synth."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from floodrepro import console, recipe as recipes
from floodrepro.cli import main
from floodrepro.data.protocols import PARTS, PROTOCOLS, SPLITS, protocol_of
from floodrepro.errors import DataError, UsageError
from floodrepro.run_folder import replacing, write_atomically

_EPILOG = """\
examples:
  floodrepro data fetch --root ImpactMesh-Flood --protocol v1 --sample 64   real chips, about 200 MB
  floodrepro data show EMSR773_1_30SYJ_x715915_y4339925 --root ImpactMesh-Flood --output chip.png
"""


def _data(parser: main.Parser) -> None:
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="fetch|weights|audit|stats|show|synth")

    def action(run: Callable[[argparse.Namespace], None], text: str, root: str) -> Callable[..., argparse.Action]:
        name = run.__name__.removeprefix("_")
        child: argparse.ArgumentParser = actions.add_parser(name, help=text)
        child.set_defaults(act=run)
        if root:
            child.add_argument("--root", type=Path, required=True, metavar="DIR", help=root)
        return child.add_argument

    drawn = [name for name, rules in PROTOCOLS.items() if rules.class_names]
    add = action(_fetch, "download the data set, or a sample of its chips, from the hub", "folder for one commit of it")
    add("--protocol", choices=drawn, help="stop before the archives if the data does not fit")
    add("--revision", default="main", metavar="SHA", help="branch, tag or commit (default: main)")
    add("--split", type=main.listed, default=SPLITS, metavar="NAMES", help="as train,val (default: all)")
    add("--modality", type=main.listed, default=PARTS, metavar="NAMES", help="as DEM,MASK (default: all)")
    add("--sample", type=main.between(1, 10**6, int), metavar="N", help="extract N chips, fetch no archive")
    add("--repo", metavar="ID", help="data set repository (default: the protocol's)")
    add = action(_weights, "fetch the backbone's weights, and IBM's checkpoint, into the hub's cache", "")
    add("--config", required=True, metavar="YAML", help="the recipe that names the backbone")
    add("--reference", type=Path, metavar="FILE", help="where to put IBM's checkpoint")
    add = action(_audit, "read every chip once and list what is wrong", "folder of chips and split/")
    add("--protocol", choices=PROTOCOLS, help="default: the recipe's")
    add("--config", metavar="YAML", help="the recipe that says which classes there are")
    add("--split", type=main.listed, metavar="NAMES", help="as val,test_holdout (default: train,val,test)")
    add("--limit", type=int, metavar="N", help="chips of each split, at most")
    add("--fraction", type=float, metavar="F", help="share of the chips of each split")
    add("--jobs", type=int, metavar="N", help="threads (default: one a core, up to 16)")
    add = action(_stats, "write means and stds of an audit as a layer for fit --config", "folder that was audited")
    add("--split", default="train", metavar="NAME", help="of which split (default: train)")
    add("--output", type=main.new_file, required=True, metavar="YAML", help="file to write; must be new")
    add = action(_show, "draw a chip with its dates, orbits and clouds", "folder of chips")
    add("chip", help="chip id")
    add("--protocol", choices=PROTOCOLS, default="custom", help="says how masks are named (default: custom)")
    add("--output", type=main.new_file, required=True, metavar="PNG", help="picture to write; must be new")
    add = action(_synth, "generate chips of plausible events", "folder to write; must hold no data set")
    add("--events", type=int, default=8, metavar="N", help="events, at least 3 (default: 8)")
    add("--chips", type=int, default=128, metavar="M", help="chips over all events (default: 128)")
    add("--size", type=int, default=64, metavar="PX", help="a chip's edge in pixels (default: 64)")
    add("--protocol", choices=drawn, default="v0", help="mask classes (default: v0)")
    add("--seed", type=int, default=42, help="same seed, same bytes (default: 42)")
    add("--layout", choices=("extracted", "hub"), default="extracted", help="hub: the hub's tars")
    add("--scene", action="store_true", help="also each event whole, ROOT/scenes/EVENT, to be mapped")
    add("--layout-variant", type=main.listed, default=["time", "quarters"], help="storage, in turn")
    args = parser.read()
    args.act(args)


def _fetch(args: argparse.Namespace) -> None:
    from floodrepro.data.fetch import fetch

    repo = str(args.repo or PROTOCOLS[args.protocol or "v1-binary"].repo)
    chosen = {"revision": args.revision, "splits": args.split, "parts": args.modality}
    report = fetch(args.root, repo, protocol=args.protocol, sample=args.sample, **chosen)
    counts = ", ".join(f"{count:,} {split}" for split, count in report["chips"].items())
    files = f"{len(report['files'])} files, {sum(report['files'].values()) / 1e9:.2f} GB"
    text = f"{repo}@{report['commit']}\nversion {report['version']}: {counts}\n{files}\n{args.root}"
    console.emit(report, text, args.format)


def _weights(args: argparse.Namespace) -> None:
    from floodrepro.data.weights import REFERENCE, backbone_weights, fetch_file, model_args

    found = {}
    if backbone := backbone_weights(model_args(recipes.read_yaml(recipes.find(args.config)))):
        found["backbone"] = str(fetch_file(backbone))
    if args.reference is not None:
        if not args.reference.exists():
            args.reference.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.reference) as partial:
                shutil.copyfile(fetch_file(REFERENCE), partial)
        found["reference"] = str(args.reference)
    console.emit(found, "\n".join(f"{name}: {path}" for name, path in found.items()) or "none needed", args.format)


def _audit(args: argparse.Namespace) -> None:
    from floodrepro.data.audit import audit

    if args.protocol in (None, "custom") and not args.config:
        raise UsageError("say what the data should be", fix=f"--protocol {'|'.join(PROTOCOLS)}, or --config YAML")
    recipe = recipes.read_yaml(recipes.find(args.config)) if args.config else {}
    rules = protocol_of(recipe) if args.protocol in (None, "custom") else PROTOCOLS[args.protocol]
    manifest = audit(args.root, rules, splits=args.split, limit=args.limit, fraction=args.fraction, jobs=args.jobs)
    rows = [["split", "chips", "events"]]
    rows += [[split, f"{c['chips']:,}", f"{c['events']:,}"] for split, c in manifest["splits"].items()]
    lines = [f"{f['severity']}: {f['check']} ({f['count']}): {f['message']}" for f in manifest["findings"]]
    tail = f"figures by split, event and timestep: {args.root / manifest['figures']}"
    console.emit(manifest, "\n".join([console.columns(rows), *(lines or ["nothing found"]), tail]), args.format)
    if errors := [finding for finding in manifest["findings"] if finding["severity"] == "error"]:
        raise DataError(f"the audit found {len(errors)} kinds of errors", where=args.root, fix="see the list above")


def _stats(args: argparse.Namespace) -> None:
    from floodrepro.data.audit import MANIFEST

    path = args.root / MANIFEST
    try:
        bands = json.loads(path.read_text(encoding="utf-8"))["bands"][args.split]
        values = {f"{key}s": {name: found[key] for name, found in bands.items()} for key in ("mean", "std")}
        if not bands:
            raise LookupError(args.split)
    except (OSError, ValueError, LookupError, TypeError) as error:
        fix = f"floodrepro data audit --root {args.root} --protocol NAME, of all chips"
        raise UsageError(f"there is no audit of all chips of {args.split}", where=path, fix=fix) from error
    layer = {"data": {"init_args": values}}
    write_atomically(args.output, yaml.safe_dump(layer, sort_keys=False, default_flow_style=None, width=200))
    console.emit(layer, f"{args.output}: use it as floodrepro fit --config RECIPE --config {args.output}", args.format)


def _show(args: argparse.Namespace) -> None:
    from floodrepro.data.audit import draw_chip
    from floodrepro.data.chips import Chips

    facts = draw_chip(Chips(args.root, PROTOCOLS[args.protocol]), args.chip, args.output)
    lines = [f"{part} {key}: {value}" for part, held in facts.items() for key, value in held.items()]
    text = "\n".join([args.chip, *lines, str(args.output)])
    console.emit({"chip": args.chip, **facts, "picture": str(args.output)}, text, args.format)


def _synth(args: argparse.Namespace) -> None:
    from floodrepro.data.synth import generate

    chosen = {name: getattr(args, name) for name in ("events", "chips", "size", "protocol", "seed", "layout")}
    report = generate(args.root, variants=args.layout_variant, scenes=args.scene, **chosen)
    rows = [["split", "events", "chips"]]
    rows += [[split, report["events"][split], count] for split, count in report["chips"].items()]
    console.emit(report, f"{console.columns(rows)}\n{args.root}", args.format)
