"""Protocols other than v0, trained for a few steps on generated chips; a new one is an entry and a recipe."""

import json
from pathlib import Path

import yaml

from floodrepro import recipe as recipes
from floodrepro.data.protocols import PROTOCOLS, Protocol
from floodrepro.data.splits import read_events
from floodrepro.data.synth import generate
from floodrepro.evaluation.chip_table import read_table
from floodrepro.publishing.export import with_stock_data

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")
TINY = ("--model.init_args.model_args.backbone_pretrained=false", "--precision=fp32", "--data.init_args.batch_size=2")
FIRE = Protocol(
    name="fire",
    title="ImpactMesh-Fire, two classes",
    class_names=("rest", "burned"),
    label_map=(0, 1),
    mask_suffix="_annotation_wildfire.tif",
    hazard="fire",
    repo="ibm-esa-geospatial/ImpactMesh-Fire",
    recipe="burn.yaml",
)


def test_recipe_of_v1_trains_on_its_data_and_tests_on_its_splits(cli, tmp_path: Path):
    chips, name = tmp_path / "ImpactMesh-Flood", "terramind_v1_tiny_impactmesh_flood_v1"
    generate(chips, events=5, chips=20, size=32, protocol="v1", seed=2)
    cli("fit", "--config", name, "--data-root", chips, "--runs-root", tmp_path, *TINY, *SHORT).ok()
    flags = ("--format", "json", "--data.init_args.num_workers=0")
    tested = cli("test", "--ckpt", tmp_path / name / "checkpoints" / "best.ckpt", *flags).ok()
    metrics = json.loads(tested.out)["metrics"]
    tables = {split: read_table(Path(path)) for split, path in json.loads(tested.out)["tables"].items()}
    assert set(tables) == {"test", "seen_events", "holdout"}
    for split, table in tables.items():
        name = split if split == "test" else f"test_{split}"
        assert {f"{name.replace('_', '/', 1)}/IoU_{k}" for k in range(3)} <= set(metrics)
        assert set(table.events) == set(read_events(chips / "split" / f"impactmesh_flood_{name}.txt").values())


def test_a_new_protocol_is_one_entry_and_one_recipe(cli, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "fire", FIRE)
    root, run = tmp_path / "chips", tmp_path / "runs" / "burn"
    small = ("--events", "5", "--chips", "15", "--size", "32", "--scene")
    cli("data", "synth", "--root", root, "--protocol", "fire", *small).ok()
    assert len(list((root / "data" / "MASK").glob("*_annotation_wildfire.tif"))) == 15
    audited = cli("data", "audit", "--root", root, "--protocol", "fire", "--jobs", "1", "--format", "json").ok()
    assert "error" not in {finding["severity"] for finding in json.loads(audited.out)["findings"]}
    bands = json.loads(audited.out)["bands"]["train"]
    recipe = recipes.read_yaml(recipes.find("demo"))
    data = recipe["data"]["init_args"] | {"protocol": "fire", "data_root": str(root / "data"), "batch_size": 4}
    data |= {f"{key}s": {m: found[key] for m, found in bands.items()} for key in ("mean", "std")}
    splits = {"train": "train", "val": "val", "test": "test", "predict": "test"}
    data |= {f"{key}_split": str(root / "split" / FIRE.split_file(split)) for key, split in splits.items()}
    recipe["data"]["init_args"] = data
    monkeypatch.chdir(tmp_path)
    (tmp_path / FIRE.recipe).write_text(yaml.safe_dump(recipe))
    planned = cli("reproduce", "--config", FIRE.recipe, "--dry-run", "--format", "json").ok()
    commands = json.loads(planned.out)["commands"]
    assert ("reference" in commands, commands["fetch"][3]) == (False, "ImpactMesh-Fire")
    for command in (
        ("fit", "--config", tmp_path / "burn.yaml", "--runs-root", run.parent, "--name", "burn", *SHORT),
        ("test", "--ckpt", run / "checkpoints" / "best.ckpt"),
        ("verify", "--run", run, "--no-measure", "--require", "identities"),
        ("export", "--run", run),
    ):
        cli(*command).ok()
    exported = yaml.safe_load(next((run / "export").glob("*.yaml")).read_text())
    assert exported["data"]["dict_kwargs"] == {"disaster_type": "fire"}
    own = data | {"protocol": "custom", "class_names": ["rest", "burned"], "mask_suffix": FIRE.mask_suffix}
    stock = with_stock_data(recipe | {"data": recipe["data"] | {"init_args": own}})
    assert stock["data"]["dict_kwargs"] == {"disaster_type": "fire"}
    assert exported["data"]["init_args"]["data_root"] == "ImpactMesh-Fire/data"
    assert "`ImpactMesh-Fire/data`" in next((run / "export").glob("*.md")).read_text()
    for path in (run / "verification" / "report.md", next((run / "export").glob("*.md"))):
        text = path.read_text()
        assert "burned" in text
        assert "flood" not in text.lower().replace("floodrepro", "")
