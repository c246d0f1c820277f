"""Run folders as fit, test and verify leave them, made in a moment from nothing but seeds, and what spoils them."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from scipy.special import softmax

from floodrepro import recipe as recipes
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.counting import count
from floodrepro.evaluation.metrics import Counts, scores
from floodrepro.run_folder import RunFolder, sha256_of
from floodrepro.verification import battery, results
from floodrepro.verification.checks import Evidence, SeedRun

DIGESTS = {"train": "d1" * 32, "val": "d2" * 32, "test": "d3" * 32}
CHIPS = {"train": 80, "val": 24}
LOSSES = [0.5, 0.42, 0.36, 0.331, 0.34]  # by epoch
MADE = "2026-03-01T11:00:00+00:00"
OTHER = {"name": "reference.ckpt", "sha256": "4e" * 32}  # the reference's checkpoint


def make_table(
    events: int = 12,
    chips_per_event: int = 8,
    seed: int = 0,
    *,
    world: int = 1,
    likeness: float = 0.95,
    sharpness: float = 1.0,
    **metadata: Any,
) -> ChipTable:
    """A chip table of a classifier that sees Gaussian features and gives the true posterior of 1,024 pixels a chip.

    The last event and every fourth chip are dry. Tables of one `world` and two seeds are two trainings, judged on one
    truth, with the share `likeness` of the features' variance in common. With `sharpness` above 1 they are too sure.
    """
    chips, pixels = events * chips_per_event, 1024
    truth_rng, own_rng = np.random.default_rng(world), np.random.default_rng([world, seed])
    event_of, number = np.divmod(np.arange(chips), chips_per_event)
    wet = (event_of < events - 1) & (number % 4 != 3)
    flood = np.where(wet, np.clip(truth_rng.lognormal(np.log(0.2), 0.5, events)[event_of], 0.05, 0.6), 0.0)
    truth = (truth_rng.random((chips, pixels)) > 1 - flood[:, None]).astype(int)
    common, own = (rng.standard_normal((chips, pixels, 2)) for rng in (truth_rng, own_rng))
    features = np.sqrt(likeness) * common + np.sqrt(1 - likeness) * own + 3 / np.sqrt(2) * np.eye(2)[truth]
    prior = np.bincount(truth.ravel(), minlength=2) / truth.size
    logits = sharpness * (3 / np.sqrt(2) * features + np.log(np.maximum(prior, 1e-9)))
    probability = softmax(logits, axis=2)

    layers = (layer[:, None] for layer in (truth, probability.argmax(axis=2), probability[..., -1]))
    columns = count(*layers, classes=2)
    content = {
        "split": "test",
        "class_names": ["rest", "flood"],
        "protocol": "v0",
        "checkpoint": {"name": "best.ckpt", "sha256": hashlib.sha256(columns["confidence"].tobytes()).hexdigest()},
        "recipe_sha256": recipes.fingerprint(demo_recipe()),
        "recipe_changes": [],
        "inputs": {"means": {"DEM": [141.786]}, "timesteps": [0, 1, 2, 3]},
        "data": {"digests": {"test": DIGESTS["test"]}},
    }
    places = zip(event_of.tolist(), number.tolist(), strict=True)
    ids = [f"EMSR{9001 + event}_1_35TMF_x{413905 + 2560 * n}_y4537585" for event, n in places]
    rows = [(chip, chip.split("_")[0]) for chip in ids]
    return with_counts(ChipTable.of_batches(rows, [columns], content | metadata), columns["counts"])


def with_counts(table: ChipTable, counts: Counts) -> ChipTable:
    """The table of other weights on the same truth, its histogram as it was."""
    assert np.array_equal(counts.sum(axis=2), table.counts.sum(axis=2)), "this would be another truth"
    metrics = {f"test/{name}": value or 0.0 for name, value in scores(counts.sum(axis=0)).items()}
    changed: dict[str, Any] = {"metrics": metrics}
    if not np.array_equal(counts, table.counts):
        changed["checkpoint"] = {"name": "best.ckpt", "sha256": hashlib.sha256(counts.tobytes()).hexdigest()}
    return replace(table, counts=counts, metadata=table.metadata | changed)


def missed(table: ChipTable, share: float, events: list[str] | None = None) -> ChipTable:
    """The table with a share of the hits of flood predicted as class 0 instead, in some events or in all."""
    counts = table.counts.copy()
    hit = np.ones(len(table), bool) if events is None else np.isin(table.events, events)
    lost = np.where(hit, np.rint(share * counts[:, -1, -1]), 0).astype(np.int64)
    counts[:, -1, -1] -= lost
    counts[:, -1, 0] += lost
    return with_counts(table, counts)


def demo_recipe(**overrides: Any) -> recipes.Recipe:
    """The demo's recipe on protocol v0, with top-level keys replaced."""
    recipe = recipes.read_yaml(recipes.find("demo")) | overrides
    recipe["data"]["init_args"]["protocol"] = "v0"
    return recipe


def declared(seed: int, **options: Any) -> SeedRun:
    """A finished run of several that were declared together, of the demo's recipe with this seed."""
    digest = {"recipe_sha256": recipes.fingerprint(demo_recipe(seed_everything=seed))}
    return SeedRun(seed, "finished", make_table(seed=seed, **digest | options), f"seed-{seed}")


def make_record(recipe: recipes.Recipe, **entries: Any) -> dict[str, Any]:
    """What run.json holds after a finished run on one GPU."""
    return {
        "started": "2026-03-01T10:00:00+00:00",
        "ended": "2026-03-01T10:30:00+00:00",
        "status": "finished",
        "command": ["/home/me/bin/floodrepro", "fit", "--config", "demo"],
        "recipe_sha256": recipes.fingerprint(recipe),
        "data": {"protocol": "v0", "chips": CHIPS, "digests": DIGESTS, "warnings": [], "commit": "da7a" * 10},
        "seed": recipe["seed_everything"],
        "processes": 1,
        "batch_size": 8,
        "environment": {
            "accelerator": {"count": 1, "name": "AMD Instinct MI300X"},
            "numerics": {"precision": "16-mixed"},
            "cpu": {"model": "a CPU"},
            "code": {"floodrepro": "0.1", "source_sha256": "5c" * 32, "commit": "4f" * 20, "dirty": False},
        },
        "progress": {"epochs": len(LOSSES), "step": 50, "skipped_steps": 3},
        "memory_gib": {"after_warm_up": {"process": 2.25, "allocated": 30.5}},
        "energy": [{"kWh": 0.0085, "method": "power", "note": "sampled power of a device", "devices": 1}],
        "best_epoch": LOSSES.index(min(LOSSES)),
        "best_metrics": {"val/loss": min(LOSSES)},
    } | entries


def make_run(
    path: Path, *, recipe: recipes.Recipe | None = None, table: ChipTable | None = None, **changes: Any
) -> RunFolder:
    """A finished and tested run of the demo recipe without weights, its record changed as given."""
    run, recipe = RunFolder(path), recipe or demo_recipe()
    run.checkpoints.mkdir(parents=True)
    run.save_recipe(recipe)
    run.best.write_bytes(path.name.encode())  # only its hash is looked at
    rows = [f"{epoch},9,{loss},,\n{epoch},9,,{loss},\n,9,,,0.0001" for epoch, loss in enumerate(LOSSES)]
    run.metrics.write_text("\n".join(["epoch,step,val/loss,train/loss,lr-AdamW", *rows]))
    run.update_record(**make_record(recipe, **changes))
    table = table or make_table(6, 3)
    own = {"checkpoint": {"name": "best.ckpt", "sha256": sha256_of(run.best)}}
    own |= {"recipe_sha256": recipes.fingerprint(recipe)}
    chip_table.write_table(replace(table, metadata=table.metadata | own), run.evaluation / "test" / "best.parquet")
    return run


def gather(run: RunFolder) -> Evidence:
    """All evidence of a run without a reference, as verify reads it."""
    return battery.gather(run, "test", None, run.verification / "evidence")


def sound_evidence(runs: Path) -> Evidence:
    """A sound run, one of three that were declared together, a reference, and everything measured."""
    found = gather(make_run(runs / "seed-42", table=make_table(seed=42)))
    names = ("weights", "exported_pair", "panels")
    measured = {name: {"status": "pass", "finding": "as it should be"} for name in names}
    measured["panels"] |= {"plots": [{"name": "panels", "kind": "panels", "caption": "A row a chip"}]}
    return replace(
        found,
        seeds=[declared(seed) for seed in (42, 44, 45)],
        reference=make_table(seed=43, checkpoint=OTHER, detail="a U-Net trained on radar"),
        reference_name="IBM's model",
        measured=measured,
    )


def figure_of(check: dict[str, Any], start: str) -> dict[str, Any]:
    """The figure of a check whose name starts so."""
    return next(value for value in check["values"] if value["name"].startswith(start))


def summarise(evidence: Evidence, required: str | None = None) -> dict[str, Any]:
    """The content of results.json."""
    return results.summarise(evidence, required, MADE)


def keep(found: dict[str, Any], run: RunFolder) -> dict[str, Any]:
    """Write results.json of a run, and return it."""
    run.verification.mkdir(exist_ok=True)
    run.results.write_text(json.dumps(found), encoding="utf-8")
    return found


def write_pair(run: RunFolder) -> Path:
    """An exported pair of a run's checkpoint, of a few numbers, and its YAML; returns the weights."""
    run.export.mkdir(exist_ok=True)
    pair, recipe = run.export / "mine.safetensors", recipes.read_yaml(run.recipe)
    metadata = {"source_sha256": sha256_of(run.best), "recipe_sha256": recipes.fingerprint(recipe)}
    save_file({"model.a": np.arange(6.0)}, pair, metadata)
    pair.with_suffix(".yaml").write_text(recipes.to_yaml(recipe), encoding="utf-8")
    return pair
