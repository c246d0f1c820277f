"""The report: report.md, report.html and figures, from results.json and nothing else.

The HTML is the Markdown in a page that loads nothing. Only the picture of chips is taken from `evidence/panels.png`.
The same input gives the same bytes, and neither torch nor a GPU is needed.
"""

import base64
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

from floodrepro.errors import RunFolderError
from floodrepro.run_folder import write_atomically
from floodrepro.verification.checks import NOTHING, number
from floodrepro.verification.checks.run import device_of
from floodrepro.verification.figures import png

PICTURE = "panels.png"
_FOLDER = Path(__file__).parent
_MARKUP = re.compile(r"([\\`*_\[\]|])")
_WORST_FIRST = ("fail", "undecided", "skip", "pass")


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write results.json, report.md, report.html and figures/*.png into a folder and return the HTML page.

    `evidence/panels.png` in the folder is the picture of chips, if there is one.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    figures = draw(results, folder / "evidence" / PICTURE)
    text = render(results, figures)
    page = to_html(text, figures, f"Verification of {results['run']['name']}")
    whole = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, picture in figures.items():
            (folder / name).write_bytes(picture)
        for name, content in (("results.json", whole), ("report.md", text), ("report.html", page)):
            write_atomically(folder / name, content)
    except OSError as error:
        what = f"the report cannot be written: {error.strerror}"
        raise RunFolderError(what, where=folder, fix="--output DIR puts it elsewhere") from error
    return folder / "report.html"


def draw(results: Mapping[str, Any], picture: Path) -> dict[str, bytes]:
    """The figures as PNGs by their path below the report's folder; the picture of chips, if there is one."""
    plots = [plot for check in results["checks"] for plot in check["plots"] if plot["kind"] != "panels"]
    figures = {figure_path(plot): png(plot) for plot in [results["forest"], *plots] if plot["series"]}
    return figures | ({f"figures/{PICTURE}": picture.read_bytes()} if picture.is_file() else {})


def render(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """report.md as text; a figure that is not given is said to be missing."""
    checks = sorted(results["checks"], key=lambda check: _WORST_FIRST.index(check["status"]))
    other = results["reference"] or {}
    weights = (other.get("checkpoint") or {}).get("sha256") or "not known"
    facts = [*run_facts(results["run"]), *([("reference", f"{other['name']}, sha256 {weights}")] if other else [])]
    return fill_in(
        _FOLDER / "report.md.j2",
        results=results,
        checks=checks,
        plots={plot["name"]: plot for check in checks for plot in check["plots"]},
        figures=figures,
        figure_path=figure_path,
        required=required_sentence(results),
        facts=[*facts, *how_to_reproduce(results["run"])],
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
    environment.filters |= {"md": md, "score": score, "number": number}
    environment.globals |= {"table": table}
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


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ("", "")) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(md(number(cell)) for cell in line)} |" for line in lines)


def required_sentence(results: Mapping[str, Any]) -> str:
    """What became of the required checks; the report and the model card have the same sentence."""
    summary, checks = results["summary"], {check["id"]: check for check in results["checks"]}
    met = [checks[name] for name in summary["required"] if name not in summary["not_met"]]
    compared = [check for check in met if check["outcome"] or check["status"] != "pass"]
    parts = {
        "Required and not met": [checks[name]["title"] for name in summary["not_met"]],
        "Required comparisons": [f"{check['title']} ({check['outcome'] or 'not made'})" for check in compared],
        "The list of required checks was shortened; not asked for": [
            checks[name]["title"] for name in summary["left_out"]
        ],
    }
    found = [f"{label}: {', '.join(names)}." for label, names in parts.items() if names]
    passed = len(met) - len(compared)
    return " ".join([*found, *([f"{passed} required checks passed."] if passed else [])])


def run_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run was, label and text, as far as its record has it; the model card has the same."""
    environment, progress, data = (run.get(key) or {} for key in ("environment", "progress", "data"))
    packages, events = environment.get("packages") or {}, data.get("events") or {}
    named = ("python", "torch", "terratorch", "lightning", "impactmesh", "torchgeo", "floodrepro")
    apart = "; no event of test is in train" if {"train", "test"} <= events.keys() and not data.get("warnings") else ""
    started, ended = (datetime.fromisoformat(run[key]) if run.get(key) else None for key in ("started", "ended"))
    memory = (run.get("memory_gib") or {}).get("after_warm_up") or {}
    loss = (run.get("best_metrics") or {}).get("val/loss")
    rate, skipped = run.get("chips_per_second"), progress.get("skipped_steps")

    def by_split(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{count:,} {split}" for split, count in counts.items())

    facts = {
        "model": "; ".join(run.get("model") or []),
        "device": device_of(run) if environment else "",
        "precision": (environment.get("numerics") or {}).get("precision"),
        "chips": by_split(data.get("chips") or {}),
        "events": by_split(events) + apart,
        "epochs": progress.get("epochs"),
        "epoch of the weights": run["best_epoch"] + 1 if run.get("best_epoch") is not None else "",
        "val/loss of that epoch": score(loss) if loss is not None else "",
        "steps": number(progress.get("step")) + (f", {skipped:,} skipped by the loss scaler" if skipped else ""),
        "seed": run.get("seed"),
        "from start to end": ended - started if started and ended else "",
        "speed": f"{rate['median']:g} chips/s (median epoch)" if rate else "",
        "peak memory": ", ".join(f"{name} {value:g} GiB" for name, value in memory.items()),
        "versions": ", ".join(f"{name} {packages[name]}" for name in named if name in packages),
    }
    return [(label, str(text)) for label, text in facts.items() if text not in (None, "")]


def how_to_reproduce(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Code, data and command of a run, and the hashes of what it left; the model card has the same."""
    data, code = run.get("data") or {}, (run.get("environment") or {}).get("code") or {}
    commit = f"commit {code['commit']}" if code.get("commit") else f"source sha256 {code.get('source_sha256')}"
    changed = " with changes" if code.get("dirty") else ""
    origin = f"generated by {data['generated']}" if data.get("generated") else data.get("commit") or "not recorded"
    return [
        ("code", f"floodrepro {code.get('floodrepro')}, {commit}{changed}" if code else "not recorded"),
        ("data revision", f"{origin}, protocol {run.get('protocol')}"),
        *((f"data digest, {split}", digest) for split, digest in (data.get("digests") or {}).items()),
        ("command", shlex.join(run.get("command") or []) or "not recorded"),
        ("recipe sha256", run.get("recipe_sha256") or "not recorded"),
        ("checkpoint sha256", (run.get("checkpoint") or {}).get("sha256") or "not tested"),
    ]
