"""Split files, subsets, and the look at a recipe's data: what is wrong is named, and what can be used is used."""

import json
import shutil
from pathlib import Path

import pytest

from floodrepro.data.protocols import DATA_MODULE, PROTOCOLS, event_of, protocol_of
from floodrepro.data.splits import FETCH_NOTE, check_data, choose_chips, read_events
from floodrepro.data.synth import generate
from floodrepro.errors import DataError, UsageError


def recipe_of(root: Path, **changes: object) -> dict:
    splits = {f"{name}_split": str(split(root, name)) for name in ("train", "val", "test")}
    arguments = {"protocol": "v0", "data_root": str(root / "data"), **splits, **changes}
    return {"data": {"class_path": DATA_MODULE, "init_args": arguments}}


def split(root: Path, name: str) -> Path:
    return root / "split" / f"impactmesh_flood_{name}.txt"


def ids_of(root: Path, name: str) -> list[str]:
    return list(read_events(split(root, name)))


def test_blank_lines_and_a_byte_order_mark_are_passed_over_and_a_second_column_is_the_event(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffEMSR1_1\n\n  EMSR2_1 \r\n\n".encode())
    assert list(read_events(tmp_path / "a.txt")) == ["EMSR1_1", "EMSR2_1"]
    (tmp_path / "a.csv").write_text("chip,event\nNYC_12,Ida\nBonn_1,Ahr\nplain_7\n")
    assert read_events(tmp_path / "a.csv") == {"NYC_12": "Ida", "Bonn_1": "Ahr", "plain_7": "plain"}


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"a_1\nb_1\na_1\n", "listed twice: a_1"), (b"\n", "names no chip"), (b"\xff\xfe\x00", "cannot be read")],
)
def test_faulty_split_file_is_named(tmp_path, content, named):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=named) as error:
        read_events(tmp_path / "a.txt")
    assert "a.txt" in str(error.value.where)


def test_part_of_the_data_is_whole_events_where_they_fit_and_the_same_each_time():
    events = {f"E{event}_{n}": f"E{event}" for event in range(10) for n in range(7)}
    kept = choose_chips(events, fraction=0.4)
    assert len(kept) == 28
    assert sorted({list(kept.values()).count(event) for event in kept.values()}) == [7]
    assert kept == choose_chips(dict(reversed(events.items())), fraction=0.4)
    assert list(kept) == [chip for chip in events if chip in kept]
    assert len(choose_chips(events, limit=10)) == 10
    assert len(choose_chips(events, limit=10, fraction=0.9)) == 10
    events = {f"large_{n}": "large" for n in range(50)} | {f"small{n}_1": f"small{n}" for n in range(20)}
    assert "large" not in choose_chips(events, limit=20).values()  # larger than what is wanted: taken last
    assert list(choose_chips(events, limit=25).values()).count("large") == 5
    for wrong in ({"limit": 0}, {"fraction": 0.0}, {"fraction": 1.5}):
        with pytest.raises(UsageError):
            choose_chips(events, **wrong)


def test_digest_of_a_split_depends_on_its_own_files_and_not_on_folders_or_tars(own_chips, tmp_path):
    before = check_data(recipe_of(own_chips), ("train", "val", "test")).digests
    hub = tmp_path / "hub"
    generate(hub, events=6, chips=18, size=32, protocol="v0", seed=1, layout="hub")
    for part in ("S2L2A", "S1RTC", "DEM", "MASK"):
        (hub / "test" / f"{part}.tar").unlink()
    found = check_data(recipe_of(hub), ("train", "val"))
    assert found.digests == {name: before[name] for name in ("train", "val")}
    assert found.chips == {"train": 12, "val": 3}
    with (own_chips / "data" / "DEM" / f"{ids_of(own_chips, 'val')[0]}_DEM.tif").open("ab") as file:
        file.write(b"\0")
    after = check_data(recipe_of(own_chips), ("train", "val")).digests
    assert {name: after[name] == before[name] for name in after} == {"train": True, "val": False}


def test_event_in_two_splits_is_a_warning_or_where_asked_an_error_and_a_chip_in_two_is_one(own_chips):
    moved = ids_of(own_chips, "train")[0]
    train = [chip for chip in ids_of(own_chips, "train") if chip != moved]
    split(own_chips, "train").write_text("\n".join(train))
    with split(own_chips, "val").open("a") as file:
        file.write(f"{moved}\n")
    [warning] = check_data(recipe_of(own_chips), ("train", "val")).warnings
    assert event_of(moved) in warning
    assert check_data(recipe_of(own_chips), ("test",)).warnings == []
    with pytest.raises(DataError, match=event_of(moved)):
        check_data(recipe_of(own_chips, strict=True), ("train", "val"))
    with split(own_chips, "test").open("a") as file:
        file.write(f"{train[0]}\n")
    with pytest.raises(DataError, match=train[0]):
        check_data(recipe_of(own_chips), ("train", "val"))


def test_unknown_chip_and_missing_part_are_named_and_only_what_is_read_is_needed(own_chips):
    chip = ids_of(own_chips, "val")[0]
    (own_chips / "data" / "S1RTC" / f"{chip}_S1RTC.zarr.zip").unlink()
    with pytest.raises(DataError, match=f"1 of 3 chips of val have no S1RTC file: {chip}"):
        check_data(recipe_of(own_chips), ("val",))
    assert check_data(recipe_of(own_chips, modalities=["S2L2A"]), ("val",)).chips == {"val": 3}
    shutil.rmtree(own_chips / "data" / "MASK")
    recipe = recipe_of(own_chips, predict_split=str(split(own_chips, "test")))
    assert check_data(recipe, ("predict",)).chips == {"predict": 3}
    with pytest.raises(DataError, match="MASK"):
        check_data(recipe, ("test",))


def test_limit_holds_for_several_test_splits_together(tmp_path):
    generate(tmp_path / "a", events=5, chips=15, size=32, protocol="v1", seed=1)
    tests = {name: str(split(tmp_path / "a", f"test{tail}")) for name, tail in (("test", ""), ("holdout", "_holdout"))}
    recipe = recipe_of(tmp_path / "a", protocol="v1", test_split=tests, fraction=0.5)
    found = check_data(recipe, ("test",)).chips
    assert found["test"] == 3 >= found.get("holdout", 0)


def test_own_chips_of_any_name_and_classes_are_custom(own_chips):
    for file in (own_chips / "split").iterdir():
        file.write_text(file.read_text().replace("EMSR9", "NYC-9"))
    for file in list((own_chips / "data").rglob("EMSR*")):
        file.rename(file.with_name(file.name.replace("EMSR9", "NYC-9").replace("annotation_flood", "label")))
    names = ["bare", "crop", "wet"]
    recipe = recipe_of(own_chips, protocol="custom", class_names=names, mask_suffix="_label.tif")
    assert check_data(recipe, ("train", "val", "test")).chips == {"train": 12, "val": 3, "test": 3}
    found = protocol_of(recipe)
    assert (found.hazard, list(found.class_names), found.positive_class) == ("wet", names, 2)


def test_commit_of_the_fetch_or_the_command_that_generated_chips_is_in_the_state(own_chips):
    (own_chips / FETCH_NOTE).write_text(json.dumps({"repo": "a/b", "commit": "0" * 40}))
    state = check_data(recipe_of(own_chips), ("val",))
    assert state.commit == "0" * 40 and str(state.generated).startswith("floodrepro data synth --events")
    assert {"train", "val", "test"} <= state.events.keys()
    for damaged in ("", "[]", "{}"):
        (own_chips / FETCH_NOTE).write_text(damaged)
        assert check_data(recipe_of(own_chips), ("val",)).commit is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": "v2"}, "v2"),
        ({"label_map": [0, 0, 1]}, "label_map"),
        ({"class_names": ["a", "b"]}, "class_names"),
        ({"val_split": None}, "names no val split"),
        ({}, "the model has 4 classes, protocol v0 2"),
    ],
)
def test_recipe_without_a_split_or_with_keys_of_another_protocol_is_refused(chips, changes, named):
    model = {} if changes else {"model": {"init_args": {"model_args": {"num_classes": 4}}}}
    with pytest.raises(UsageError, match=named):
        check_data(recipe_of(chips, **changes) | model, ("val",))


def test_every_protocol_fits_together():
    for name, protocol in PROTOCOLS.items():
        assert (protocol.name, set(protocol.label_map)) == (name, set(range(len(protocol.class_names))))
    assert PROTOCOLS["v1-binary"].label_map == (0, 0, 1)  # its recipe is v0's but for this: see test_recipes.py
