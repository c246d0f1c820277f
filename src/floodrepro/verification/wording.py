"""How the figures of results.json are written in a report: one place for both of its forms."""

import math
import re
from collections.abc import Mapping
from typing import Any

NOTHING = "\N{EN DASH}"  # where there is no figure
_WAYS = {"counter": "energy counter", "power": "power over time", "tdp": "upper estimate from the TDP", "none": "none"}


def number(value: Any) -> str:
    """A cell: text as it is, whole numbers in full, others to four digits, very small and large ones to three."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if size == 0:
        return "0"
    if not 1e-3 <= size < 1e9:
        return f"{value:.3g}"
    if size <= 1:
        return f"{value:.4f}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(size)))}f}"


def figure(value: Any, unit: str) -> str:
    """A figure with its unit; percentage points to two digits after the point."""
    text = f"{value:.2f}" if unit in ("pp", "%") and isinstance(value, float) else number(value)
    return f"{text} {unit}".strip() if value is not None else NOTHING


def interval(value: Mapping[str, Any]) -> str:
    """The interval of a check's value, with level and method."""
    if value["low"] is None and value["high"] is None:
        return NOTHING
    ends = " to ".join(_end(value[end], value) for end in ("low", "high"))
    level = f"{100 * value['level']:g} %" if value["level"] is not None else ""
    detail = ", ".join(part for part in (level, value["method"]) if part)
    return f"{ends} ({detail})" if detail else ends


def _end(end: float | None, value: Mapping[str, Any]) -> str:
    """One end of an interval, without its unit, on its side of the margin that the check asks for."""
    margin = re.search(r"±([\d.]+)", value["threshold"])
    if end is not None and margin and value["unit"] == "pp":
        return f"{end:.{digits_beside(end, float(margin[1]), 2)}f}"
    return figure(end, value["unit"]).removesuffix(f" {value['unit']}")


def digits_beside(value: float, margin: float, least: int) -> int:
    """Digits after the point that keep the text on the same side of ±margin, and of zero, as the figure.

    Args:
        value: The figure.
        margin: In its unit.
        least: Digits that there are in any case; more than 5 there never are.
    """
    for digits in range(least, 5):
        size = abs(float(f"{value:.{digits}f}"))
        if (size < margin) == (abs(value) < margin) and size != margin and (size == 0) == (value == 0):
            return digits
    return 5


def behind(value: Mapping[str, Any]) -> str:
    """Events and chips behind a check's value."""
    counts = ((value["n_events"], "events"), (value["n_chips"], "chips"))
    return ", ".join(f"{number(n)} {what}" for n, what in counts if n is not None) or NOTHING


def shown_columns(check: Mapping[str, Any]) -> dict[str, bool]:
    """Which columns the table of a check's values needs; one with nothing in it is left out."""
    values = check["values"]
    return {
        "interval": any(interval(value) != NOTHING for value in values),
        "behind": any(behind(value) != NOTHING for value in values),
        "asked": any(value["threshold"] or value["ok"] is not None for value in values),
    }


def key_figure(check: Mapping[str, Any]) -> str:
    """What the overview has of a check: its reason, or for a pass the first number that something is asked of."""
    if check["reason"]:
        return str(check["reason"])
    numbers = [value for value in check["values"] if isinstance(value["value"], int | float)]
    first = next((value for value in numbers if value["ok"] is not None), numbers[0] if numbers else None)
    return f"{first['name']}: {figure(first['value'], first['unit'])}" if first else NOTHING


def run_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run was, label and text, as far as its record has it."""
    environment = run.get("environment") or {}
    code, progress = environment.get("code") or {}, run.get("progress") or {}
    torch, numerics = environment.get("torch") or {}, environment.get("numerics") or {}
    accelerator, cpu = environment.get("accelerator") or {}, environment.get("cpu") or {}
    dirty = {True: "with changes", False: "clean", None: "cleanness not known"}[code.get("dirty")]
    trained_there = on_gpu(run)
    device = accelerator.get("name") if trained_there else cpu.get("model")
    facts = [
        ("status", _joined(run.get("status"), run.get("reason"))),
        ("checkpoint", _pairs(run.get("checkpoint"))),
        ("recipe sha256", run.get("recipe_sha256")),
        ("data digest", run.get("data_digest")),
        ("protocol", run.get("protocol")),
        ("chips", _pairs(run.get("chips"))),
        ("seed", run.get("seed")),
        ("declared runs", ", ".join(f"{one['seed']} ({one['status']})" for one in run.get("seeds") or [])),
        ("epochs", run.get("epochs")),
        ("best epoch, from 0", run.get("best_epoch")),
        ("best val/loss", run.get("best_val_loss")),
        ("optimizer steps", _left_out(progress)),
        ("started", run.get("started")),
        ("ended", run.get("ended")),
        ("device", _joined(device, _times(accelerator.get("count"), trained_there))),
        ("precision", numerics.get("precision")),
        ("commit", f"{code['commit']} ({dirty})" if code.get("commit") else None),
        ("source sha256", (run.get("code") or {}).get("source_sha256")),
        ("torch", _joined(torch.get("version"), torch.get("build"), torch.get("rocm"))),
        ("packages", _pairs(environment.get("packages"))),
        ("seconds a step", _spread(run.get("step_seconds"))),
        ("chips per second", _spread(run.get("chips_per_second"))),
        ("peak memory after warm-up, GiB", _pairs((run.get("memory_gib") or {}).get("after_warm_up"))),
        ("energy", "; ".join(_energy(one) for one in run.get("energy") or [])),
    ]
    return [(label, number(text)) for label, text in facts if text not in (None, "")]


def on_gpu(record: Mapping[str, Any]) -> bool:
    """Whether a GPU trained. That there is one, or that torch is built for one, does not say so; its memory does."""
    return "allocated" in ((record.get("memory_gib") or {}).get("after_warm_up") or {})


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _pairs(mapping: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {number(value)}" for key, value in (mapping or {}).items())


def _times(count: Any, trained_there: bool) -> str:
    return f"{count} in the machine" if trained_there and count else ""


def _left_out(progress: Mapping[str, Any]) -> str:
    skipped = progress.get("skipped_steps")
    note = f", {number(skipped)} of them left out by the loss scaler" if skipped else ""
    return f"{number(progress['step'])}{note}" if "step" in progress else ""


def _spread(times: Mapping[str, Any] | None) -> str:
    if not times:
        return ""
    low, high = number(times["p10"]), number(times["p90"])
    return f"median {number(times['median'])}, 10th to 90th percentile {low} to {high}, n {number(times['n'])}"


def _energy(one: Mapping[str, Any]) -> str:
    method = str(one.get("method"))
    return f"{figure(one.get('kWh'), 'kWh')} ({_WAYS.get(method, method)})"
