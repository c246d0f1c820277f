"""The report: report.md, report.html and figures, from results.json and, for the chips, `evidence/panels.png` alone.

The HTML is the Markdown in a page that loads nothing. The same input gives the same bytes; torch is not needed.
"""

import base64
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import markdown
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from floodrepro.data.protocols import PROTOCOLS
from floodrepro.run_folder import replacing
from floodrepro.verification.checks import NOTHING, number
from floodrepro.verification.figures import png

PICTURE = "panels.png"
_FOLDER = Path(__file__).parent
_MARKUP = re.compile(r"([\\`*_\[\]|])")
_WORST_FIRST = ("fail", "undecided", "skip", "pass")


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write results.json, report.md, report.html and figures/*.png into a folder and return the HTML page.

    `evidence/panels.png` in the folder is the picture of chips, if there is one.
    """
    figures = draw(results, folder / "evidence" / PICTURE)
    text = render(results, figures)
    title = "Verification of {name}, a model that maps {class_name}".format(**results["run"])
    pages = {
        "results.json": json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": text,
        "report.html": to_html(text, figures, title),
    }
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in (figures | {name: page.encode() for name, page in pages.items()}).items():
        with replacing(folder / name) as partial:
            partial.write_bytes(content)
    return folder / "report.html"


def draw(results: Mapping[str, Any], picture: Path) -> dict[str, bytes]:
    """The figures as PNGs by their path below the report's folder; the picture of chips, if there is one."""
    plots = [plot for check in results["checks"] for plot in check["plots"] if plot["kind"] != "panels"]
    figures = {figure_path(plot): png(plot) for plot in [results["forest"], *plots] if plot["series"]}
    return figures | ({f"figures/{PICTURE}": picture.read_bytes()} if picture.is_file() else {})


def render(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """report.md as text, with the figures that are given."""
    checks = sorted(results["checks"], key=lambda check: _WORST_FIRST.index(check["status"]))
    return fill_in(
        _FOLDER / "report.md.j2",
        results=results,
        checks=checks,
        plots={plot["name"]: plot for check in checks for plot in check["plots"]},
        figures=figures,
        figure_path=figure_path,
        facts=list(run_facts(results["run"], results["reference"]).items()),
    )


def to_html(text: str, figures: Mapping[str, bytes], title: str) -> str:
    """A report's Markdown as one page, with its figures inside."""
    body = markdown.markdown(text, extensions=["tables", "md_in_html"])
    for name, content in figures.items():
        uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        body = body.replace(f'src="{name}"', f'class="{Path(name).stem}" src="{uri}"')
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def fill_in(template: Path, **values: Any) -> str:
    """A template's text with these values; one that it names and that is not given raises."""
    environment = Environment(
        loader=FileSystemLoader(template.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": md, "number": number}
    environment.globals |= {"table": table, "score_table": score_table}
    return environment.get_template(template.name).render(**values)


def figure_path(plot: Mapping[str, Any]) -> str:
    """Where a plot's picture lies below the report's folder; results of others cannot name another place."""
    return "figures/" + re.sub(r"[^A-Za-z0-9_-]", "_", plot["name"]) + ".png"


def score(value: float | None) -> str:
    """A score from 0 to 1, four digits after the point; a dash where it is undefined."""
    return NOTHING if value is None else f"{value:.4f}"


def md(text: Any) -> str:
    """Text for a line or a cell of Markdown: neither markup nor HTML in it counts."""
    line = " ".join(str(text).split())
    return _MARKUP.sub(r"\\\1", escape(line, quote=False))


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ("", ""), rule: str = "---") -> str:
    """A Markdown table without the columns, from the third on, that are empty; `rule` aligns all but the first."""
    kept = [n for n in range(len(head)) if n < 2 or any(row[n] != "" for row in rows)]
    lines = [[md(number(line[n])) for n in kept] for line in (head, *rows)]
    lines.insert(1, ["---", *[rule] * (len(kept) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def score_table(scores: Mapping[str, Any]) -> str:
    """The scores of results.json as a Markdown table, a column a model, and what each column is of."""
    if not scores["rows"]:
        return "There is no chip table, so there are no scores."
    rows = [[row["label"], *map(score, row["values"])] for row in scores["rows"]]
    sources = [f"- {md(column['label'])}: {md(column['source'])}" for column in scores["columns"]]
    made = f"- all scores are made by `{scores['code']}`; a dash: undefined (0/0)"
    return "\n".join([table(rows, ["score", *(one["label"] for one in scores["columns"])], "---:"), "", *sources, made])


def run_facts(run: Mapping[str, Any], other: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What a run was and how to repeat it, text by label, as far as results.json or run.json has it."""
    environment, progress, data = (run.get(key) or {} for key in ("environment", "progress", "data"))
    code, loss = environment.get("code") or {}, (run.get("best_metrics") or {}).get("val/loss")
    packages, memory = environment.get("packages") or {}, (run.get("memory_gib") or {}).get("after_warm_up") or {}
    named = ("python", "torch", "terratorch", "lightning", "impactmesh", "torchgeo", "floodrepro")
    held = {key: ", ".join(f"{n:,} {of}" for of, n in (data.get(key) or {}).items()) for key in ("chips", "events")}
    started, ended = (datetime.fromisoformat(run[key]) if run.get(key) else None for key in ("started", "ended"))
    apart = "; no event of test is in train" if {"train", "test"} <= (data.get("events") or {}).keys() else ""
    rate, waiting = run.get("chips_per_second"), run.get("share_waiting_for_data") or 0
    skipped, batch = progress.get("skipped_steps"), run.get("batch_size") or 0
    # That there is a GPU does not say that it trained; its memory in the record does.
    part = environment.get("accelerator" if "allocated" in memory else "cpu") or {}
    device, processes = part.get("name") or part.get("model") or "", run.get("processes") or 1
    commit = f"commit {code['commit']}" if code.get("commit") else f"source sha256 {code.get('source_sha256')}"
    commit += " with changes" if code.get("dirty") else ""
    protocol, split = PROTOCOLS.get(run.get("protocol") or ""), run.get("split") or "test"
    # A flag's value follows it. The folders of absolute paths are not told.
    given = dict(itertools.pairwise(part for word in run.get("command") or [] for part in word.split("=", 1)))
    folder = given.get("--data-root") or (protocol.folder if protocol else "DIR")
    root, judged = shlex.quote(folder), f" --split {shlex.quote(split)}"
    name = "" if split == "map" else run.get("name")  # docs/verification.md has the commands of maps
    home = shlex.quote(f"{given.get('--runs-root', 'runs')}/{name}")
    source = f"floodrepro data fetch --revision {data['commit']}" if data.get("commit") else data.get("generated")
    compare = f" --reference FILE --reference-name {shlex.quote(other['name'])}" if other else ""
    facts = {
        "command: data": f"{source} --root {root}" if source else "",
        "command: fit": shlex.join(run.get("command") or []),
        "command: test": f"floodrepro test --ckpt {home}/checkpoints/best.ckpt{judged}" if name else "",
        "command: export": f"floodrepro export --run {home} --no-card" if name else "",
        "command: verify": f"floodrepro verify --run {home}{judged}{compare}" if name else "",
        "reference (FILE)": other and f"{other['name']}: {other.get('detail') or 'its table does not say what it is'}",
        "reference sha256": other and ((other.get("checkpoint") or {}).get("sha256") or "not known"),
        "model": "; ".join(run.get("model") or []),
        "device": f"{processes} x {device}" if processes > 1 else device,
        "precision": (environment.get("numerics") or {}).get("precision"),
        "chips": held["chips"],
        "events": held["events"] + ("" if data.get("warnings") else apart),
        "epochs": progress.get("epochs"),
        "epoch of the weights": run["best_epoch"] + 1 if run.get("best_epoch") is not None else "",
        "val/loss of that epoch": score(loss),
        "steps": number(progress.get("step")) + (f", {skipped:,} skipped by the loss scaler" if skipped else ""),
        "chips in a step": f"{processes * batch}, {batch} in each process" if processes > 1 else "",
        "seed": run.get("seed"),
        "from start to end": ended - started if started and ended else "",
        "speed": f"{rate['median']:g} chips/s (median epoch), {waiting:.0%} of the time waiting" if rate else "",
        "peak memory": ", ".join(f"{name} {value:g} GiB" for name, value in memory.items()),
        "versions": ", ".join(f"{name} {packages[name]}" for name in named if name in packages),
        "code": f"floodrepro {code.get('floodrepro')}, {commit}" if code else "",
        "data revision": data.get("commit") or ("" if source else "not recorded"),
        "protocol": f"{protocol.name} (layout and classes: {protocol.title.partition(':')[0]})" if protocol else "",
        **{f"data digest, {split}": digest for split, digest in (data.get("digests") or {}).items()},
        "recipe sha256": run.get("recipe_sha256"),
        "checkpoint sha256": (run.get("checkpoint") or {}).get("sha256"),
    }
    return {label: str(text) for label, text in facts.items() if text not in (None, "", NOTHING)}
