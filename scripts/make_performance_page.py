#!/usr/bin/env python3
"""Print docs/performance.md from verification/benchmarks/*.json, and from nothing else.

    scripts/make_performance_page.py > docs/performance.md
    scripts/make_performance_page.py FOLDER

A file is called <bench>-<anything>.json, where <bench> is train, test, data or guard: what `floodrepro bench <bench>
--output FILE` wrote. A file of another device becomes a part of the page without a change here. Standard library only.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "verification" / "benchmarks"
INTRODUCTION = """\
# Performance

Written by `scripts/make_performance_page.py` from the files in `verification/benchmarks`; change those, not this page.
Ratios come from sides that took turns on one machine, warm-up left out. Other machines give other figures:
`floodrepro bench train --output FILE` and its like measure yours.
"""
TITLES = {
    "train": ("Training", "`floodrepro bench train`: a step, beside plain TerraTorch."),
    "test": ("Testing", "`floodrepro bench test`: a test pass, beside TerraTorch's own test loop."),
    "data": ("Reading chips", "`floodrepro bench data`: what a loader worker does, beside stock impactmesh."),
    "guard": ("The guard", "`floodrepro bench guard`: what the watch over losses, gradients and weights costs."),
}
AIM_SPEED, AIM_SHARE = 2.0, 0.4  # of training on a GPU, stated before anything was measured

Result = dict[str, Any]


def main(folder: Path) -> str:
    """The page, from the files of a folder."""
    results: dict[str, list[tuple[str, Result]]] = {kind: [] for kind in TITLES}
    for file in sorted(folder.glob("*.json")):
        kind = file.stem.split("-")[0]
        if kind not in TITLES:
            raise SystemExit(f"{file}: a benchmark's name begins with one of {', '.join(TITLES)}")
        results[kind].append((file.name, json.loads(file.read_text(encoding="utf-8"))))
    every = [result for entries in results.values() for _, result in entries]
    devices = sorted({str(result["device"]) for result in every if "device" in result})
    scope = f"Measured on: {', '.join(devices)}. Nothing is claimed for any other device."
    if not any(result.get("device_type") == "gpu" for result in every):
        scope += " No GPU is among them: how fast this is on one is not known."
    parts = [INTRODUCTION, scope + "\n"]
    for kind, (title, line) in TITLES.items():
        if results[kind]:
            parts.append(f"## {title}\n\n{line}\n")
            parts += [f"### `{name}`\n\n{about(result)}\n\n{BODIES[kind](result)}" for name, result in results[kind]]
    return "\n".join(parts)


def about(result: Result) -> str:
    """On what, when and how it was measured."""
    words = [str(result[key]) for key in ("device", "config") if key in result]
    words += [f"{result['chip_pixels']} px chips"] if "chip_pixels" in result else []
    words += [f"batch of {result['batch_size']}"] if "batch_size" in result else []
    words += [str(result["precision"])] if "precision" in result else []
    threads = result.get("threads", result.get("torch_threads"))
    words += [f"{threads} CPU thread(s)"] if threads else []
    load = result.get("load_average", result.get("workers", {}).get("load_average"))
    words += [f"load average {load:.1f}"] if load is not None else []
    words += [f"torch {result['versions']['torch']}"] if "versions" in result else []
    words += [str(result["when"])[:10]] if "when" in result else []
    head = f"{', '.join(words)}. " if words else ""
    return f"{head}{result['what'][0].upper()}{result['what'][1:]}."


def train(result: Result) -> str:
    """Speed, share of the device's matmul rate, memory and loss of each side; then where a step's time goes."""
    rows = [["", "chips/s", "p10 to p90", "model TFLOP/s", "of the matmul rate", "peak GiB", "loss differs by"]]
    for name, rate in result["chips_per_second"].items():
        tflops, share = result["model_tflops"][name], result["share_of_matmul_rate"][name]
        loss = result["loss_difference"].get(name)
        peak = ", ".join(f"{kind} {value:.2f}" for kind, value in result["peak_memory_gib"][name].items())
        cells = [figure(rate["median"]), span(rate, "p10", "p90"), figure(tflops), f"{share:.0%}", peak]
        rows.append([name, *cells, "other chips" if loss is None else figure(loss)])
    matmul, spread = result["matmul_tflops"], result["loss_spread_of_first"]
    first = next(iter(result["chips_per_second"]))
    lines = [
        table(rows),
        f"One chip's forward pass is {figure(result['forward_gflop_per_chip'])} GFLOP, a step three times that. This "
        f"device multiplies {matmul['edge']} x {matmul['edge']} {matmul['dtype']} matrices at "
        f"{figure(matmul['median'])} TFLOP/s, measured. The loss is that of step 20 from the same weights and chips, "
        f"beside {first}'s, whose own runs differ by {'-' if spread is None else figure(spread)}.",
        ratios(result),
        shares(result["seconds"], "step"),
    ]
    lines += [f"{name} failed here: {why}" for name, why in result.get("failed", {}).items()]
    if result.get("device_type") == "gpu":
        lines.append(aims(result))
    return "\n\n".join(lines) + "\n"


def aims(result: Result) -> str:
    """What was aimed at on a GPU, and whether it was reached."""
    rows = [["aim", "measured", ""]]
    for name, ratio in result["ratios"].items():
        ours = name.split(" / ")[0]
        difference, spread = result["loss_difference"].get(ours), result["loss_spread_of_first"]
        if difference is None or spread is None:
            continue
        share = result["share_of_matmul_rate"][ours]
        rows += [
            [f"{ours}: {AIM_SPEED:g} times as fast", figure(ratio["median"]), reached(ratio["median"] >= AIM_SPEED)],
            [f"{ours}: {AIM_SHARE:.0%} of the matmul rate", f"{share:.0%}", reached(share >= AIM_SHARE)],
            [f"{ours}: no more memory", f"{ratio['memory']:.2f} times", reached(ratio["memory"] <= 1)],
            [f"{ours}: loss within {figure(spread)}", figure(difference), reached(difference <= spread)],
        ]
    return table(rows)


def reached(yes: bool) -> str:
    """In a word."""
    return "reached" if yes else "not reached"


def test(result: Result) -> str:
    """Speed and memory of both sides, and where a batch's time goes."""
    after = ", ".join(f"{name} {figure(s)} s" for name, s in result["seconds_after_the_last_batch"].items())
    lines = [
        rates(result["chips_per_second"]),
        ratios(result),
        shares(result["seconds"], "batch"),
        f"The largest difference between the sides' metrics is {result['largest_difference_of_metrics']:.1e}. "
        f"After the last batch, once a pass: {after} (metrics, the checkpoint's checksum, writing the table).",
    ]
    return "\n\n".join(lines) + "\n"


def data(result: Result) -> str:
    """Chips per second of each reader, with workers too."""
    workers = result.get("workers", {})
    every = result["chips_per_second"] | {f"workers: {k}": v for k, v in workers.get("chips_per_second", {}).items()}
    pairs = result["ratios"] | {k: v for k, v in workers.items() if isinstance(v, dict) and "median" in v}
    return f"{rates(every)}\n\n{ratios({'ratios': pairs})}\n"


def guard(result: Result) -> str:
    """Its share of a step."""
    share, limit, ratio = result["share_of_a_step"], result["limit"], result["ratio"]
    seconds = "; ".join(f"{name} {figure(value)} s" for name, value in result["step_seconds"].items())
    return f"{share:.2%} of a step is the guard's (limit {limit:.0%}); steps with / without: {ratio:.3f}. {seconds}.\n"


BODIES = {"train": train, "test": test, "data": data, "guard": guard}


def rates(chips_per_second: dict[str, dict[str, float]]) -> str:
    """Chips per second, a row each."""
    rows = [["", "chips/s", "p10 to p90"]]
    return table(rows + [[name, figure(r["median"]), span(r, "p10", "p90")] for name, r in chips_per_second.items()])


def ratios(result: Result) -> str:
    """How many times as fast, a row each."""
    rows = [["", "times as fast", "smallest to largest", "memory"]]
    for name, ratio in result["ratios"].items():
        memory = f"{ratio['memory']:.2f} times" if "memory" in ratio else ""
        rows.append([name, figure(ratio["median"]), span(ratio, "min", "max"), memory])
    return table(rows if any(row[3] for row in rows[1:]) else [row[:3] for row in rows])


def shares(seconds: dict[str, dict[str, float]], of: str) -> str:
    """Where the time goes: seconds of each part and its share of their sum."""
    rows = [[f"a {of}'s seconds", *next(iter(seconds.values()))]]
    for name, parts in seconds.items():
        total = sum(parts.values())
        rows.append([name, *(f"{figure(value)} ({value / total:.1%})" for value in parts.values())])
    most = {max(parts, key=lambda part: parts[part]) for parts in seconds.values()}
    where = f"{most.pop()}, on every side" if len(most) == 1 else f"{' or '.join(sorted(most))}, by side"
    return f"Where the time goes: most of a {of} is {where}.\n\n{table(rows)}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown, the first as their head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def span(values: dict[str, float], low: str, high: str) -> str:
    """From the one to the other."""
    return f"{figure(values[low])} to {figure(values[high])}"


def figure(value: float) -> str:
    """Three significant digits, or all of those before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    sys.stdout.write(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
