"""Protocols other than v0, trained for a few steps on generated chips; a new one is an entry and a recipe."""

import json
from pathlib import Path

import pytest
import yaml

from floodrepro import recipe as recipes
from floodrepro.data.protocols import PROTOCOLS, Protocol
from floodrepro.data.splits import read_events
from floodrepro.data.synth import generate
from floodrepro.evaluation.chip_table import read_table

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


@pytest.mark.parametrize("protocol", ["v1", "v1_binary"])
def test_recipe_trains_on_v1_data_and_tests_on_its_splits(cli, v1_chips, tmp_path: Path, protocol):
    name = f"terramind_v1_tiny_impactmesh_flood_{protocol}"
    fitted = cli("fit", "--config", name, "--data-root", v1_chips, "--runs-root", tmp_path, *TINY, *SHORT)
    assert fitted.code == 0, fitted.err
    flags = ("--format", "json", "--data.init_args.num_workers=0")
    tested = cli("test", "--ckpt", tmp_path / name / "checkpoints" / "best.ckpt", *flags)
    assert tested.code == 0, tested.err
    metrics = json.loads(tested.out)["metrics"]
    if protocol == "v1_binary":
        assert {"test/IoU_0", "test/IoU_1"} <= set(metrics)
        assert "test/IoU_2" not in metrics
        return
    tables = {split: read_table(Path(path)) for split, path in json.loads(tested.out)["tables"].items()}
    assert set(tables) == {"test", "seen_events", "holdout"}
    for split, table in tables.items():
        assert {f"test/{split}/IoU_{k}" for k in range(3)} <= set(metrics)
        name = split if split == "test" else f"test_{split}"
        listed = read_events(v1_chips / "split" / f"impactmesh_flood_{name}.txt")
        assert set(table.events) == set(listed.values())
    parts = tables["seen_events"].counts.sum(axis=0) + tables["holdout"].counts.sum(axis=0)
    assert (parts == tables["test"].counts.sum(axis=0)).all()  # each chip was seen once


# ImpactMesh-Fire, with the statistics of impactmesh 0.1.2 (impactmesh_datamodule.datasets_stats["fire"]).
FIRE = Protocol(
    name="fire",
    title="ImpactMesh-Fire, two classes",
    class_names=("rest", "burned"),
    label_map=(0, 1),
    mask_suffix="_annotation_wildfire.tif",
    hazard="fire",
    means={
        "S2L2A": (801.3, 861.7, 991.6, 1019.7, 1366.4, 2000.2, 2255.3, 2354.9, 2481.8, 2747.9, 2185.8, 1495.2),
        "S1RTC": (-9.838, -15.465),
        "DEM": (412.745,),
    },
    stds={
        "S2L2A": (1960.5, 1732.9, 1494.8, 1384.5, 1385.1, 1309.4, 1322.6, 1352.4, 1336.4, 2379.4, 1145.6, 992.0),
        "S1RTC": (3.505, 3.422),
        "DEM": (354.58,),
    },
)


def test_a_new_protocol_is_one_entry_and_one_recipe(cli, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "fire", FIRE)
    root, run = tmp_path / "chips", tmp_path / "runs" / "burn"
    small = ("--events", "5", "--chips", "15", "--size", "32")
    made = cli("data", "synth", "--root", root, "--protocol", "fire", *small)
    assert made.code == 0, made.err
    assert len(list((root / "data" / "MASK").glob("*_annotation_wildfire.tif"))) == 15
    audited = cli("data", "audit", "--root", root, "--protocol", "fire", "--jobs", "1", "--format", "json")
    assert audited.code == 0, audited.out
    assert "error" not in {finding["severity"] for finding in json.loads(audited.out)["findings"]}
    recipe = recipes.read_yaml(recipes.find("demo"))
    data = recipe["data"]["init_args"] | {"protocol": "fire", "data_root": str(root / "data"), "batch_size": 4}
    data |= {key: {m: list(v) for m, v in getattr(FIRE, key).items()} for key in ("means", "stds")}
    splits = {"train": "train", "val": "val", "test": "test", "predict": "test"}
    data |= {f"{key}_split": str(root / "split" / FIRE.split_file(split)) for key, split in splits.items()}
    recipe["data"]["init_args"] = data
    (tmp_path / "burn.yaml").write_text(yaml.safe_dump(recipe))
    for command in (
        ("fit", "--config", tmp_path / "burn.yaml", "--runs-root", run.parent, "--name", "burn", *SHORT),
        ("test", "--ckpt", run / "checkpoints" / "best.ckpt"),
        ("verify", "--run", run, "--no-measure", "--require", "identities"),
        ("export", "--run", run),
    ):
        outcome = cli(*command)
        assert outcome.code == 0, outcome.err
    exported = yaml.safe_load(next((run / "export").glob("*.yaml")).read_text())
    assert exported["data"]["dict_kwargs"] == {"disaster_type": "fire"}
    for path in (run / "verification" / "report.md", next((run / "export").glob("*.md"))):
        text = path.read_text()
        assert "burned" in text
        assert "flood" not in text.lower().replace("floodrepro", "")
