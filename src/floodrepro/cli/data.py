"""Get, check, look at and generate chips: data fetch, weights, audit, stats, show, synth."""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.cli.shared import add_format
from floodrepro.data.protocols import PARTS, PROTOCOLS, SPLITS, TIMESTEPS, Protocol, data_arguments, protocol_of
from floodrepro.errors import DataError, UsageError

_EPILOG = """\
examples:
  floodrepro data fetch --root ImpactMesh-Flood --protocol v1 --sample 64   real chips, about 200 MB
  floodrepro data audit --root ImpactMesh-Flood --protocol v1 --split val
  floodrepro data show EMSR773_1_30SYJ_x715915_y4339925 --root ImpactMesh-Flood --output chip.png
"""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="fetch|weights|audit|stats|show|synth")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        child: argparse.ArgumentParser = actions.add_parser(name, prog=f"{parser.prog} {name}", help=text)
        add_format(child)
        return child

    names = ", ".join(PROTOCOLS)
    fetch = add("fetch", "download the data set, or a sample of its chips, from the hub")
    fetch.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder to fill; it holds one commit")
    fetch.add_argument("--protocol", help=f"{names}: stop before the archives if the data does not fit")
    fetch.add_argument("--revision", default="main", metavar="SHA", help="branch, tag or commit (default: main)")
    fetch.add_argument("--split", metavar="NAMES", help="train,val,test: whose chips (default: all)")
    fetch.add_argument("--modality", metavar="NAMES", help="S2L2A,S1RTC,DEM,MASK: which parts (default: all)")
    fetch.add_argument("--sample", type=int, metavar="N", help="extract N chips in place of fetching the archives")
    fetch.add_argument("--repo", metavar="ID", help="data set repository (default: the protocol's)")
    weights = add("weights", "fetch the backbone's weights, and IBM's checkpoint, into the hub's cache")
    weights.add_argument("--config", required=True, metavar="YAML", help="the recipe that names the backbone")
    weights.add_argument("--reference", type=Path, metavar="FILE", help="where to put IBM's checkpoint")
    audit = add("audit", "read every chip once and list what is wrong")
    audit.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of chips and split/")
    audit.add_argument("--protocol", help=f"{names} (default: the recipe's)")
    audit.add_argument("--config", metavar="YAML", help="recipe: its classes, and the statistics to compare with")
    audit.add_argument("--split", metavar="NAMES", help="split files to read, such as val,test (default: all)")
    audit.add_argument("--limit", type=int, metavar="N", help="chips of each split, at most")
    audit.add_argument("--fraction", type=float, metavar="F", help="share of the chips of each split")
    audit.add_argument("--jobs", type=int, metavar="N", help="processes (default: one a core, up to 32)")
    audit.add_argument("--strict", action="store_true", help="an event in two splits is an error")
    stats = add("stats", "write means and stds of an audit as a layer for fit --config")
    stats.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder that data audit was run on")
    stats.add_argument("--split", default="train", metavar="NAME", help="of which split (default: train)")
    stats.add_argument("--output", type=Path, required=True, metavar="YAML", help="file to write; must be new")
    show = add("show", "draw a chip with its dates, orbits and clouds")
    show.add_argument("chip", help="chip id")
    show.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of chips")
    show.add_argument("--protocol", default="custom", help=f"says how masks are named: {names} (default: custom)")
    show.add_argument("--output", type=Path, required=True, metavar="PNG", help="picture to write; must be new")
    synth = add("synth", "generate chips of plausible events")
    synth.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder to write; must hold no data set")
    synth.add_argument("--events", type=int, default=8, metavar="N", help="events, at least 3 (default: 8)")
    synth.add_argument("--chips", type=int, default=128, metavar="M", help="chips over all events (default: 128)")
    synth.add_argument("--size", type=int, default=64, metavar="PX", help="a chip's edge in pixels (default: 64)")
    synth.add_argument("--protocol", default="v0", help=f"mask classes: {names} (default: v0)")
    synth.add_argument("--seed", type=int, default=42, help="same seed, same bytes (default: 42)")
    synth.add_argument("--layout", default="extracted", help="extracted, or hub: the hub's tars (default: extracted)")
    synth.add_argument("--scene", action="store_true", help="also each event whole, ROOT/scenes/EVENT, to be mapped")
    synth.add_argument(
        "--layout-variant", default="time,quarters", metavar="NAMES", help="how chips are stored, in turn"
    )


def run_data(args: argparse.Namespace) -> int:
    """Get, check, look at and generate chips."""
    actions = {"fetch": _fetch, "weights": _weights, "audit": _audit, "stats": _stats, "show": _show, "synth": _synth}
    return actions[args.action](args)


def _fetch(args: argparse.Namespace) -> int:
    from floodrepro.data.fetch import fetch

    rules = _protocol(args.protocol or "v1-binary")
    splits, parts = _names(args.split, "--split", SPLITS), _names(args.modality, "--modality", PARTS)
    repo = args.repo or rules.repo
    if repo is None:
        raise UsageError(f"protocol {rules.name} names no data set on the hub", fix="--repo ID")
    report = fetch(
        args.root,
        repo,
        revision=args.revision,
        splits=splits or SPLITS,
        parts=parts or PARTS,
        protocol=args.protocol,
        sample=args.sample,
    )
    counts = ", ".join(f"{count:,} {split}" for split, count in report.chips.items())
    size = sum(report.files.values()) / 1e9
    text = f"{repo}@{report.commit}\nversion {report.version}: {counts}\n{len(report.files)} files, {size:.2f} GB"
    console.emit(report.as_dict(), f"{text}\n{args.root}", args.format)
    return 0


def _weights(args: argparse.Namespace) -> int:
    import shutil

    from floodrepro.data.weights import REFERENCE, backbone_weights, fetch_file

    model = (recipes.read_yaml(recipes.find(args.config)).get("model") or {}).get("init_args", {}).get(
        "model_args"
    ) or {}
    found = {}
    backbone = backbone_weights(str(model.get("backbone"))) if model.get("backbone_pretrained") else None
    if backbone is not None:
        found["backbone"] = str(fetch_file(backbone))
    if args.reference is not None and not args.reference.exists():
        args.reference.parent.mkdir(parents=True, exist_ok=True)
        partial = args.reference.with_name(f".{args.reference.name}.partial")
        shutil.copyfile(fetch_file(REFERENCE), partial)
        partial.replace(args.reference)
    if args.reference is not None:
        found["reference"] = str(args.reference)
    console.emit(found, "\n".join(f"{name}: {path}" for name, path in found.items()) or "none needed", args.format)
    return 0


def _audit(args: argparse.Namespace) -> int:
    from floodrepro.data.audit import FIGURES, audit

    recipe = recipes.read_yaml(recipes.find(args.config)) if args.config else {}
    if not args.protocol and not args.config:
        raise UsageError("say what the data should be", fix=f"--protocol {'|'.join(PROTOCOLS)}, or --config YAML")
    rules = _protocol(args.protocol) if args.protocol and args.protocol != "custom" else protocol_of(recipe)
    given = data_arguments(recipe)
    means, stds = given.get("means") or rules.means, given.get("stds") or rules.stds
    with console.progress("chips read") as progress:
        manifest = audit(
            args.root,
            rules,
            splits=_names(args.split, "--split"),
            limit=args.limit,
            fraction=args.fraction,
            jobs=args.jobs,
            strict=args.strict,
            statistics=(dict(means), dict(stds)) if means else None,
            progress=progress,
        )
    rows = [["split", "chips", "events"]]
    rows += [[split, f"{c['chips']:,}", f"{c['events']:,}"] for split, c in manifest["splits"].items()]
    lines = [f"{f['severity']}: {f['check']} ({f['count']}): {f['message']}" for f in manifest["findings"]]
    tail = f"figures by split, event and timestep: {args.root / FIGURES}"
    console.emit(manifest, "\n".join([console.columns(rows), *(lines or ["nothing found"]), tail]), args.format)
    if errors := [finding for finding in manifest["findings"] if finding["severity"] == "error"]:
        raise DataError(f"the audit found {len(errors)} kinds of errors", where=args.root, fix="see the list above")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from floodrepro.data.audit import MANIFEST

    path = args.root / MANIFEST
    if not path.is_file():
        raise UsageError(
            "there is no audit", where=path, fix=f"floodrepro data audit --root {args.root} --protocol NAME"
        )
    bands = json.loads(path.read_text(encoding="utf-8"))["bands"].get(args.split)
    if not bands:
        raise UsageError(f"the audit read no chip of {args.split}", where=path, fix="--split NAME")
    values = {f"{key}s": {name: found[key] for name, found in bands.items()} for key in ("mean", "std")}
    layer = {"data": {"init_args": values}}
    _refuse_existing(args.output)
    args.output.write_text(yaml.safe_dump(layer, sort_keys=False, default_flow_style=None, width=200), encoding="utf-8")
    console.emit(layer, f"{args.output}: use it as floodrepro fit --config RECIPE --config {args.output}", args.format)
    return 0


def _show(args: argparse.Namespace) -> int:
    import zarr

    from floodrepro.data.chips import Chips, unzip

    source = Chips(args.root, _protocol(args.protocol))
    _refuse_existing(args.output)
    facts: dict[str, Any] = {"chip": args.chip}
    for part in ("S2L2A", "S1RTC"):
        if source.has(args.chip, part):
            group = zarr.open_group(unzip(source.read(args.chip, part)), mode="r")
            facts[part] = {
                key: str(group.attrs[key])
                for key in ("datetime", "sat_orbit_state", "sat_relative_orbit", "eo_cloud_cover")
                if key in group.attrs
            }
            if "cloud_mask" in group:
                shares = group["cloud_mask"][...].astype(bool).mean(axis=(1, 2))
                facts[part]["cloud"] = ";".join(f"{share:.0%}" for share in shares)
    _draw(source, args.chip, facts, args.output)
    lines = [f"{part} {key}: {value}" for part in facts if part != "chip" for key, value in facts[part].items()]
    console.emit(facts | {"picture": str(args.output)}, "\n".join([args.chip, *lines, str(args.output)]), args.format)
    return 0


def _draw(source: Any, chip: str, facts: dict[str, Any], path: Path) -> None:
    """A picture of the optical images, the radar before and at the event, and the mask."""
    import numpy as np
    from matplotlib.figure import Figure

    panels: list[tuple[str, Any, dict[str, Any]]] = []
    if source.has(chip, "S2L2A"):
        dates = facts["S2L2A"].get("datetime", "").split(";")
        for step, image in enumerate(source.bands(chip, "S2L2A")[:, [3, 2, 1]]):
            date = dates[step][:10] if step < len(dates) else "no date"
            panels.append((f"{TIMESTEPS[step]} {date}", np.clip(image.transpose(1, 2, 0) / 3000, 0, 1), {}))
    if source.has(chip, "S1RTC"):
        for step, image in zip((1, 2), source.bands(chip, "S1RTC")[1:3, 0].astype(np.float32), strict=True):
            panels.append((f"VV {TIMESTEPS[step]}, dB", image, {"cmap": "gray", "vmin": -25, "vmax": 0}))
    if source.has(chip, "MASK"):
        panels.append(("mask", source.raster(chip, "MASK"), {"cmap": "viridis", "vmin": -1, "vmax": 2}))
    figure = Figure(figsize=(3 * len(panels), 3.4), layout="constrained")
    for axes, (title, image, options) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(image, interpolation="nearest", **options)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    figure.suptitle(chip, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _synth(args: argparse.Namespace) -> int:
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
            variants=args.layout_variant.split(","),
            progress=progress,
        )
    if args.scene:
        from floodrepro.data.scenes import write_scenes

        write_scenes(args.root)
    rows = [["split", "events", "chips"]]
    rows += [[split, str(report.events[split]), str(count)] for split, count in report.chips.items()]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in report.class_shares.items())
    text = f"{console.columns(rows)}\n{shares}; ignored {report.ignored_share:.1%}\n{report.root}"
    console.emit(report.as_dict(), text, args.format)
    return 0


def _protocol(name: str) -> Protocol:
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol is {name!r}, expected one of {', '.join(PROTOCOLS)}", fix="--protocol v1-binary")
    return PROTOCOLS[name]


def _names(text: str | None, flag: str, known: tuple[str, ...] = ()) -> list[str] | None:
    """A list with commas; None where it is not given."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if strange := [name for name in names if not name or (known and name not in known)]:
        raise UsageError(f"{flag} holds {strange[0]!r}", fix=f"{flag} {','.join(known) or 'NAME,NAME'}")
    return names


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UsageError("the file is there already and is not overwritten", where=path, fix="--output of a new file")
