"""Evidence of a healthy run, made up from nothing but seeds, and what spoils it.

A table comes from pixels that are drawn, classified and counted, so that its counts, histograms and sums belong
together. A spoiled one is made by `make_table` with other arguments, by `with_counts`, or by `dataclasses.replace`.
"""

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from floodrepro import recipe as recipes
from floodrepro.evaluation.chip_table import BINS, ChipTable
from floodrepro.evaluation.metrics import Counts, scores
from floodrepro.run_folder import RECORD_SCHEMA, RunFolder
from floodrepro.verification.check import Evidence, SeedRun

ROOT = Path(__file__).parents[1]
CLASS_NAMES = {
    "v0": ["rest", "flood"],
    "v1-binary": ["rest", "flood"],
    "v1": ["no water", "permanent water", "flood water"],
}
DIGEST = "d1" * 32
VERSIONS = {"floodrepro": "0.1.0", "torch": "2.14.1", "lightning": "2.6.1", "terratorch": "1.2.7", "numpy": "2.4.0"}


def thresholds() -> dict[str, Any]:
    """The repository's own thresholds, by check id."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "verification" / "thresholds.yaml").read_text(encoding="utf-8"))
    return content


def make_table(
    events: int = 12,
    chips_per_event: int = 8,
    seed: int = 0,
    *,
    world: int = 1,
    protocol: str = "v0",
    pixels: int = 1024,
    dry_events: int = 1,
    skill: float = 3.0,
    likeness: float = 0.95,
    sharpness: float = 1.0,
    flood_bias: float = 0.0,
    ignored: float = 0.02,
    **metadata: Any,
) -> ChipTable:
    """A chip table of a classifier that sees Gaussian features and gives the true posterior of all pixels.

    Args:
        events: Number of events, the last `dry_events` of them without flood.
        chips_per_event: Every fourth chip of an event is dry.
        seed: Of the model: tables of one world and two seeds are two trainings, judged on the same truth.
        world: Seed of the truth.
        protocol: v0, v1-binary or v1 (three classes).
        pixels: Pixels of a chip.
        dry_events: Events without flood.
        skill: Distance of two classes' features in their standard deviations: 3 gives a flood IoU of about 0.75.
        likeness: Share of the features' variance that all models of a world have in common.
        sharpness: Factor of the logits; above 1 probabilities are over-confident, predictions stay as they are.
        flood_bias: Added to flood's logit; -50 never predicts flood, +50 always.
        ignored: Share of ignored pixels.
        metadata: Replaces entries of the metadata.
    """
    names = CLASS_NAMES[protocol]
    classes, chips = len(names), events * chips_per_event
    truth_rng, own_rng = np.random.default_rng(world), np.random.default_rng([world, seed])
    event_of, number = np.divmod(np.arange(chips), chips_per_event)
    wet = (event_of < events - dry_events) & (number % 4 != 3)
    flood = np.where(wet, np.clip(truth_rng.lognormal(np.log(0.2), 0.5, events)[event_of], 0.05, 0.6), 0.0)
    others = (1 - flood)[:, None] * ([0.85, 0.15] if classes == 3 else [1.0])
    shares = np.cumsum(np.column_stack([others, flood]), axis=1)
    truth = (truth_rng.random((chips, pixels, 1)) > shares[:, None, :-1]).sum(axis=2)  # (N, P)
    counted = truth_rng.random((chips, pixels)) >= ignored

    scale = skill / np.sqrt(2)
    common, own = truth_rng.standard_normal((chips, pixels, classes)), own_rng.standard_normal((chips, pixels, classes))
    features = np.sqrt(likeness) * common + np.sqrt(1 - likeness) * own + scale * np.eye(classes)[truth]
    prior = np.bincount(truth.ravel(), minlength=classes) / truth.size
    logits = sharpness * (scale * features + np.log(np.maximum(prior, 1e-9)))
    logits[..., -1] += flood_bias
    probability = np.exp(logits - logits.max(axis=2, keepdims=True))
    probability /= probability.sum(axis=2, keepdims=True)
    return _tabulate(chip_ids(events, chips_per_event), truth, counted, probability, protocol, metadata)


def chip_ids(events: int, chips_per_event: int) -> list[str]:
    """Ids of generated chips, event by event."""
    return [
        f"EMSR{9001 + event}_1_35TMF_x{413905 + 2560 * number}_y4537585"
        for event in range(events)
        for number in range(chips_per_event)
    ]


def _tabulate(
    chips: list[str],
    truth: npt.NDArray[np.int64],
    counted: npt.NDArray[np.bool_],
    probability: npt.NDArray[np.float64],
    protocol: str,
    metadata: Mapping[str, Any],
) -> ChipTable:
    """Count truth (N, P), the pixels counted (N, P) and probabilities (N, P, K)."""
    rows, classes = len(chips), probability.shape[2]
    counts = np.zeros((rows, classes, classes), np.int64)
    histogram = np.zeros((rows, classes, classes, BINS), np.int64)
    confidence = np.zeros((rows, classes, BINS))
    squared_error = np.zeros((rows, classes))
    row = np.broadcast_to(np.arange(rows)[:, None], truth.shape)[counted]
    true, given = truth[counted], probability[counted]
    np.add.at(counts, (row, true, given.argmax(axis=1)), 1)
    for k in range(classes):
        bins = np.minimum((given[:, k] * BINS).astype(int), BINS - 1)
        np.add.at(histogram, (row, true, k, bins), 1)
        np.add.at(confidence, (row, k, bins), given[:, k])
        np.add.at(squared_error, (row, k), (given[:, k] - (true == k)) ** 2)
    content = {
        "split": "test",
        "class_names": CLASS_NAMES[protocol],
        "protocol": protocol,
        "checkpoint": {"name": "best.ckpt", "sha256": hashlib.sha256(confidence.tobytes()).hexdigest()},
        "recipe_sha256": recipes.fingerprint(demo_recipe()),
        "recipe_changes": [],
        "inputs": {"modalities": ["S2L2A", "DEM"], "means": {"DEM": [141.786]}, "timesteps": [0, 1, 2, 3]},
        "data_digest": DIGEST,
        "precision": "32-true",
        "device": "cpu",
        "versions": VERSIONS,
        "speed": {"seconds": 4.0, "chips_per_second": round(rows / 4.0, 3)},
        "made": "2026-01-02T04:00:00+00:00",
    }
    table = ChipTable(
        np.array(chips, dtype=np.str_),
        counts,
        (~counted).sum(axis=1).astype(np.int64),
        histogram,
        confidence,
        squared_error,
        content | dict(metadata),
    )
    return with_counts(table, counts)


def declared(seed: int, **options: Any) -> SeedRun:
    """A finished run of several that were declared together, of the demo's recipe with this seed."""
    options = {"recipe_sha256": recipes.fingerprint(demo_recipe(seed_everything=seed))} | options
    return SeedRun(seed, "finished", make_table(seed=seed, **options), f"seed-{seed}")


def with_counts(table: ChipTable, counts: Counts) -> ChipTable:
    """The table of other weights on the same truth. Histograms and TerraTorch's metrics follow the counts."""
    assert np.array_equal(counts.sum(axis=2), table.counts.sum(axis=2)), "this would be another truth"
    metrics = {f"test/{name}": value for name, value in scores(counts.sum(axis=0)).items()}
    changed = {"metrics": metrics}
    histogram = table.histogram.copy()
    for place in np.argwhere(counts != table.counts):
        histogram[tuple(place)] = _moved(histogram[tuple(place)], int((counts - table.counts)[tuple(place)]))
    if not np.array_equal(counts, table.counts):
        changed["checkpoint"] = {"name": "best.ckpt", "sha256": hashlib.sha256(histogram.tobytes()).hexdigest()}
    return replace(table, counts=counts, histogram=histogram, metadata=table.metadata | changed)


def _moved(histogram: npt.NDArray[np.int64], more: int) -> npt.NDArray[np.int64]:
    """A histogram (B,) with so many more pixels called its class, fewer if negative: the farthest change sides."""
    if more > 0:
        return _moved(histogram[::-1], -more)[::-1]
    from_top = histogram[::-1]
    taken = np.clip(-more - (from_top.cumsum() - from_top), 0, from_top)
    return (from_top - taken)[::-1] + taken


def missed(
    table: ChipTable, share: float, events: list[str] | None = None, k: int = -1, alarms: float = 1.0
) -> ChipTable:
    """The table with a share of the hits of class k (flood) predicted as class 0 instead, in some events or in all.

    Of the pixels of class 0 that are predicted as class k a share of `alarms` is kept.
    """
    counts = table.counts.copy()
    hit = np.ones(len(table), bool) if events is None else np.isin(table.events, events)
    lost = np.where(hit, np.rint(share * counts[:, k, k]), 0).astype(np.int64)
    counts[:, k, k] -= lost
    counts[:, k, 0] += lost
    silent = np.where(hit, np.rint((1 - alarms) * counts[:, 0, k]), 0).astype(np.int64)
    counts[:, 0, k] -= silent
    counts[:, 0, 0] += silent
    return with_counts(table, counts)


def all_ignored(table: ChipTable) -> ChipTable:
    """The table of the same chips if every pixel had been ignored."""
    nothing = {name: np.zeros_like(getattr(table, name)) for name in ("histogram", "confidence", "squared_error")}
    ignored = table.ignored + table.counts.sum(axis=(1, 2))
    return with_counts(
        replace(table, counts=np.zeros_like(table.counts), ignored=ignored, **nothing), np.zeros_like(table.counts)
    )


def demo_recipe(**overrides: Any) -> recipes.Recipe:
    """The demo's recipe, with top-level keys replaced."""
    return recipes.read(ROOT / "configs" / "demo.yaml") | overrides


def metrics_rows(epochs: int = 8, steps: int = 12) -> list[dict[str, str]]:
    """Rows of metrics.csv of a run that learns: val/loss falls, then the learning rate once, then val/loss again."""
    rows, losses = [], [0.5, 0.42, 0.36, 0.33, 0.331, 0.332, 0.31, 0.312]
    losses = [*losses, *(0.31 - 0.001 * n for n in range(epochs - len(losses)))][:epochs]
    for epoch, loss in enumerate(losses):
        last = str((epoch + 1) * steps - 1)
        rate = "0.0001" if epoch < 6 else "5e-05"
        flood, rest = 0.8 - loss, 0.97 - 0.1 * loss
        base = {"epoch": str(epoch), "step": last}
        rows.append(base | {"train/loss": repr(loss + 0.02)})
        rows.append(
            base
            | {"val/loss": repr(loss), "val/IoU_0": repr(rest), "val/IoU_1": repr(flood)}
            | {"val/mIoU": repr((rest + flood) / 2)}
        )
        rows.append(base | {"lr-AdamW": rate, "train/grad_norm": repr(loss), "train/grad_norm_max": repr(2 * loss)})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{column: row.get(column, "") for column in columns} for row in rows]


def make_record(rows: list[dict[str, str]], recipe: recipes.Recipe, **entries: Any) -> dict[str, Any]:
    """What run.json holds after a finished run on a CPU whose metrics.csv has these rows."""
    validated = [row for row in rows if row["val/loss"]]
    best = min(validated, key=lambda row: float(row["val/loss"]))
    steps = int(validated[-1]["step"]) + 1
    off = {"compiled": False, "channels_last": False, "fused": False}
    memory = {"process": 1.81}
    return {
        "schema": RECORD_SCHEMA,
        "started": "2026-01-02T03:00:00+00:00",
        "status": "finished",
        "process": 4242,
        "command": ["floodrepro", "fit", "--config", "demo"],
        "recipe_sha256": recipes.fingerprint(recipe),
        "chips": {"train": 80, "val": 24},
        "data_digest": DIGEST,
        "code": {**VERSIONS, "impactmesh": "0.1.2", "source_sha256": "5c" * 32},
        "numerics": off,
        "options": off
        | {"resume": "auto", "resume_anyway": False, "on_overflow": "stop", "save_every": 500, "guard": True},
        "resumes": [],
        "environment": {
            "packages": {"python": "3.11.9", **VERSIONS},
            "code": {"commit": "4f" * 20, "dirty": False, "note": None},
            "torch": {"version": "2.14.1+cpu", "build": "cpu", "build_version": None, "rocm": None, "cudnn": None},
            "accelerator": {"count": 0, "name": None, "memory_gib": None, "drivers": {}},
            "numerics": {"precision": "32-true", "deterministic_algorithms": False},
            "cpu": {"model": "x86_64", "capability": "AVX2", "logical_cores": 2, "torch_threads": 2},
            "host": {"os": "Linux", "kernel": "Linux 6.1", "libc": "glibc 2.36"},
            "variables": {},
        },
        "seed": recipe["seed_everything"],
        "progress": {"epochs": len(validated), "step": steps, "skipped_steps": 0},
        "step_seconds": {"median": 0.52, "p10": 0.49, "p90": 0.6, "n": steps - 10},
        "chips_per_second": {"median": 14.8, "p10": 14.1, "p90": 15.2, "n": len(validated)},
        "share_waiting_for_data": 0.03,
        "seconds_writing_states": 1.2,
        "memory_gib": {"with_warm_up": memory, "after_warm_up": memory},
        "energy": [{"joules": 2700.0, "kWh": 0.00075, "method": "tdp", "note": ""}],
        "incidents": [],
        "undetermined_operations": [],
        "ended": "2026-01-02T03:10:00+00:00",
        "reason": "max_epochs reached",
        "checkpoint": "checkpoints/best.ckpt",
        "epochs": len(validated),
        "best_epoch": int(best["epoch"]),
        "best_val_loss": float(best["val/loss"]),
        "best_metrics": {key: float(value) for key, value in best.items() if key.startswith("val/")},
        **entries,
    }


def healthy(tmp_path: Path, **options: Any) -> Evidence:
    """Evidence on which every check of the tables passes, with its run folder on the disk.

    Args:
        tmp_path: The run folder is made in it.
        options: Of `make_table`, for the run's table and for the reference's, whose seeds are 42 and 43.
    """
    recipe, rows = demo_recipe(), metrics_rows()
    record = make_record(rows, recipe)
    run = RunFolder.create(tmp_path / "runs" / "healthy")
    run.save_recipe(recipe)
    run.record.write_text(json.dumps(record, indent=2), encoding="utf-8")
    with run.metrics.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Evidence(
        run=run,
        record=record,
        recipe=recipe,
        metrics=rows,
        table=make_table(seed=42, **options),
        reference=make_table(seed=43, **options, checkpoint={"name": "reference.ckpt", "sha256": "4e" * 32}),
        reference_name="reference.ckpt",
        reference_record=make_record(rows, recipe),
        reference_metrics=rows,
        audit={
            "schema": 1,
            "protocol": "v0",
            "layout": "extracted",
            "splits": {"train": {"chips": 80, "events": 10, "expected": 57_067}},
            "digest": DIGEST,
            "findings": [],
            "deep": None,
        },
        thresholds=thresholds(),
    )
