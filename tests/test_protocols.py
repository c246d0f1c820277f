"""The other two protocols, trained for a few steps on generated v1 data and tested on all their splits."""

import json
from pathlib import Path

import pytest

from floodrepro.data.synth import generate
from floodrepro.evaluation.chip_table import read

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")
TINY = (
    "--model.init_args.model_args.backbone_pretrained=false",
    *("--precision", "fp32", "--data.init_args.batch_size=2"),
)


@pytest.fixture(scope="module")
def v1_chips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("v1") / "ImpactMesh-Flood"
    generate(root, events=5, chips=20, size=32, protocol="v1", seed=2)
    return root


def events_of(root: Path, split: str) -> set[str]:
    lines = (root / "split" / f"impactmesh_flood_{split}.txt").read_text().split()
    return {line.split("_")[0] for line in lines}


def test_generated_v1_tests_on_seen_and_on_held_out_events(v1_chips):
    assert events_of(v1_chips, "test_seen_events") == events_of(v1_chips, "train")
    assert events_of(v1_chips, "test_holdout").isdisjoint(events_of(v1_chips, "train") | events_of(v1_chips, "val"))
    assert events_of(v1_chips, "test") == events_of(v1_chips, "test_seen_events") | events_of(v1_chips, "test_holdout")


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("protocol", ["v1", "v1_binary"])
def test_recipe_trains_on_v1_data_and_tests_on_its_splits(cli, v1_chips, tmp_path: Path, size, protocol):
    name = f"terramind_v1_{size}_impactmesh_flood_{protocol}"
    # The base model takes seconds a chip.
    less, some = (
        ((), ()) if size == "tiny" else (("--trainer.limit_train_batches=1",), ("--trainer.limit_test_batches=1",))
    )
    fitted = cli("fit", "--config", name, "--data-root", v1_chips, "--runs-root", tmp_path, *TINY, *SHORT, *less)
    assert fitted.code == 0, fitted.err
    flags = ("--format", "json", "--data.init_args.num_workers=0", *some)
    tested = cli("test", "--ckpt", tmp_path / name / "checkpoints" / "best.ckpt", *flags)
    assert tested.code == 0, tested.err
    metrics = json.loads(tested.out)["metrics"]
    if protocol == "v1":
        tables = {split: read(Path(path)) for split, path in json.loads(tested.out)["tables"].items()}
        assert {f"test/test/IoU_{k}" for k in range(3)} <= set(metrics)
        if some:
            return
        assert set(tables) == {"test", "seen_events", "holdout"}
        for split, table in tables.items():
            assert {f"test/{split}/IoU_{k}" for k in range(3)} <= set(metrics)
            assert set(table.events) == events_of(v1_chips, "test" if split == "test" else f"test_{split}")
        parts = tables["seen_events"].counts.sum(axis=0) + tables["holdout"].counts.sum(axis=0)
        assert (parts == tables["test"].counts.sum(axis=0)).all()  # each chip was seen once
    else:
        assert {"test/IoU_0", "test/IoU_1"} <= set(metrics)
        assert "test/IoU_2" not in metrics


def test_v0_recipe_on_v1_data_is_an_error_that_names_the_way_out(cli, v1_chips, tmp_path: Path):
    name = "terramind_v1_tiny_impactmesh_flood"
    workers = ("--data.init_args.num_workers=0",)
    outcome = cli("fit", "--config", name, "--data-root", v1_chips, "--runs-root", tmp_path, *TINY, *SHORT, *workers)
    assert outcome.code == 1
    assert "which the label map does not know" in outcome.err
    assert "v1-binary" in outcome.err
