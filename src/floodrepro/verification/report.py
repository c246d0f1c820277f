"""The report of a battery: report.md, report.html and figures, from results.json and nothing but it.

The panels alone need more than numbers; their pixels lie in `evidence/panels.npz` beside it. The same input gives the
same bytes. Neither torch nor a GPU is needed.
"""

import base64
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from floodrepro.errors import RunFolderError, TableError
from floodrepro.run_folder import write_atomically
from floodrepro.verification import wording
from floodrepro.verification.figure_panels import ARRAYS, panels_png
from floodrepro.verification.figures import png

_TEMPLATES = {"report.md": "report.md.j2", "report.html": "report.html.j2"}
# What Markdown reads as more than text; a pipe would end a table's cell.
_MARKDOWN = re.compile(r"([\\`*\[\]|])")


def write_report(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.md, report.html and figures/*.png.

    Args:
        results: The content of results.json.
        folder: Where they go; `evidence/panels.npz` in it holds the panels' pixels, if there are any.

    Returns:
        The files that were written.

    Raises:
        RunFolderError: The folder cannot be written.
        TableError: `evidence/panels.npz` is damaged.
    """
    figures = draw(results, folder / "evidence" / "panels.npz")
    written = []
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in figures.items():
            written.append(folder / name)
            written[-1].write_bytes(content)
        for name, text in render(results, figures).items():
            written.append(folder / name)
            write_atomically(written[-1], text)
    except OSError as error:
        raise RunFolderError(
            f"the report cannot be written: {error.strerror}", where=folder, fix="--output DIR puts it elsewhere"
        ) from error
    return written


def draw(results: Mapping[str, Any], panels: Path) -> dict[str, bytes]:
    """The figures as PNGs by their path below the report's folder."""
    figures = {}
    for check in results["checks"]:
        for plot in check["plots"]:
            if plot["kind"] != "panels":
                figures[figure_path(check, plot)] = png(plot)
            elif panels.is_file():
                figures[figure_path(check, plot)] = panels_png(_read_panels(panels))
    return figures


def render(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> dict[str, str]:
    """report.md and report.html as text, by name; a figure that is not given is said to be missing."""
    environment = Environment(
        loader=PackageLoader("floodrepro.verification", "templates"),
        # By the name's middle, for select_autoescape() looks at its end alone, which is .j2 for both.
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": wording.number, "interval": wording.interval, "behind": wording.behind}
    environment.filters |= {"key_figure": wording.key_figure, "md": _markdown, "score": _score}
    context = {
        "results": results,
        "facts": wording.run_facts(results["run"]),
        "figure": wording.figure,
        "figure_path": figure_path,
        "shown_columns": wording.shown_columns,
        "uris": {name: f"data:image/png;base64,{base64.b64encode(data).decode()}" for name, data in figures.items()},
        "marks": {"pass": "✓", "fail": "✗", "skip": "○"},
        "partial": _partial(results),
    }
    return {name: environment.get_template(template).render(context) for name, template in _TEMPLATES.items()}


def figure_path(check: Mapping[str, Any], plot: Mapping[str, Any]) -> str:
    """Where a plot's picture lies below the report's folder: results of someone else cannot name another place."""
    return "figures/" + re.sub(r"[^A-Za-z0-9_-]", "_", f"{check['id']}-{plot['name']}") + ".png"


def _partial(results: Mapping[str, Any]) -> str:
    """What a partial report says at its top; empty for a whole one."""
    if not results["summary"]["partial"]:
        return ""
    skipped = [check["id"] for check in results["checks"] if check["status"] == "skip"]
    made = {check["id"] for check in results["checks"]}
    absent = [id_ for id_ in results["summary"]["required"] if id_ not in made]
    parts = [f"{len(skipped)} of {len(made)} checks were skipped ({', '.join(skipped)})"] if skipped else []
    parts += [f"required checks were not made ({', '.join(absent)})"] if absent else []
    return f"Partial report: {'; '.join(parts)}. What was not checked was not passed."


def _score(value: float | None) -> str:
    """A score of the table, 0 to 1, four digits after the point."""
    return wording.NOTHING if value is None else f"{value:.4f}"


def _markdown(text: Any) -> str:
    """Text for a line or a cell of Markdown: neither markup nor HTML in it counts."""
    line = " ".join(str(text).split())
    return _MARKDOWN.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _read_panels(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TableError(
            f"the panels' pixels cannot be read: {error}",
            where=path,
            fix="floodrepro verify --run DIR makes them again",
        ) from error
