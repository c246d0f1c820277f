"""The audit: healthy data passes, every planted fault is found and named, and a killed audit goes on."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import zarr

from conftest import CHIPS
from floodrepro.data import audit as audits
from floodrepro.data import survey as surveys
from floodrepro.data.audit import MANIFEST, PARTIAL, audit
from floodrepro.data.chips import open_source
from floodrepro.data.names import EVENT, LABEL_DIR, S2_BANDS, SPLITS, SUFFIXES, TIMESTEPS, split_file
from floodrepro.data.presence import check_data
from floodrepro.data.survey import expected_chips, make_survey, quick_audit
from floodrepro.data.synth import generate
from floodrepro.data.totals import Statistics
from floodrepro.errors import DataError, UsageError

PUBLISHED = "terramind_v1_base_impactmesh_flood_amd"
REAL = "FLOODREPRO_REAL_CHIPS"


@pytest.fixture(scope="module")
def v1_chips(tmp_path_factory):
    """Twelve chips of three events, protocol v1, with the lists that v1 has beside its test split."""
    root = tmp_path_factory.mktemp("v1") / "ImpactMesh-Flood"
    generate(root, events=3, chips=12, size=64, protocol="v1", seed=3)
    return root


@pytest.fixture
def own_v1(v1_chips, tmp_path):
    return Path(shutil.copytree(v1_chips, tmp_path / "v1"))


def split_path(root, split):
    return root / "split" / split_file(split)


def chips_of(root, *splits):
    return [chip for split in splits or SPLITS for chip in split_path(root, split).read_text().split()]


def path_of(root, chip, part):
    return root / "data" / part / f"{chip}{SUFFIXES[part]}"


def edit_zarr(path, change):
    """Open a chip's zarr, let *change* alter the group, and write the ZIP anew."""
    with zipfile.ZipFile(path) as archive:
        store = {name: archive.read(name) for name in archive.namelist()}
    change(zarr.open_group(store, mode="r+"))
    zarr.consolidate_metadata(store)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(store):
            archive.writestr(name, bytes(store[name]))
    path.write_bytes(buffer.getvalue())


def set_bands(group, values, **options):
    options = {"chunks": (1, *values.shape[1:]), "fill_value": None, "overwrite": True} | options
    group.array("bands", values, **options).attrs.put({"_ARRAY_DIMENSIONS": ["time", "band", "y", "x"]})


def edit_bands(path, change):
    edit_zarr(path, lambda group: set_bands(group, change(group["bands"][:])))


def swap(values, one, other, axis):
    order = list(range(values.shape[axis]))
    order[one], order[other] = other, one
    return np.take(values, order, axis)


def write_tif(path, values, **profile):
    with rasterio.open(path) as source:
        profile = {**source.profile, "dtype": values.dtype.name, **profile}
    with rasterio.open(path, "w", **profile) as target:
        target.write(values, 1)


def read_tif(path):
    with rasterio.open(path) as source:
        return source.read(1)


def deep(root, protocol="v0", **options):
    return audit(root, protocol, deep=True, jobs=1, **options)


def found(manifest, severity="error"):
    """(check, file or chip, message) of each finding of a severity."""
    findings = manifest["findings"]
    return [(f["check"], f["file"] or f["chip"], f["message"]) for f in findings if f["severity"] == severity]


def only(manifest, severity="error"):
    [finding] = found(manifest, severity)
    return finding


# Healthy data


@pytest.mark.parametrize("protocol", ["v0", "v1", "v1-binary"])
def test_healthy_data_passes_quick_and_deep(protocol, chips, v1_chips):
    root = chips if protocol == "v0" else v1_chips
    for manifest in (audit(root, protocol), deep(root, protocol)):
        assert found(manifest) == []
        assert [check for check, _, _ in found(manifest, "warning")] == ["counts"]
        assert [check for check, _, _ in found(manifest, "info")] == ["seen-events"] * (protocol != "v0")
    assert not (root / PARTIAL).exists()


def test_manifest_on_disk_is_what_is_returned_and_counts_what_lies_there(own_chips):
    manifest = deep(own_chips, statistics=Statistics.of(PUBLISHED))
    assert json.loads((own_chips / MANIFEST).read_text()) == manifest
    assert (manifest["schema"], manifest["protocol"], manifest["layout"]) == (1, "v0", "extracted")
    chips, bands = chips_of(own_chips, "train"), manifest["deep"]["bands"]["train"]
    assert manifest["splits"]["train"]["chips"] == len(chips) == manifest["deep"]["chips"]["train"]
    assert manifest["splits"]["train"]["expected"] == 57_067
    masks = np.stack([read_tif(path_of(own_chips, chip, LABEL_DIR)) for chip in chips])
    assert manifest["deep"]["class_shares"]["train"]["flood"] == pytest.approx((masks[masks >= 0] == 1).mean())
    assert manifest["deep"]["missing_shares"]["train"][LABEL_DIR] == pytest.approx((masks == -1).mean())
    source = open_source(own_chips)
    s2 = np.stack([source.read_bands(chip, "S2L2A") for chip in chips]).astype(np.float64)
    s2[s2 == -9999] = np.nan
    s1 = np.stack([source.read_bands(chip, "S1RTC") for chip in chips]).astype(np.float64)
    for modality, values in (("S2L2A", s2), ("S1RTC", s1)):
        assert bands[modality]["mean"] == pytest.approx(np.nanmean(values, (0, 1, 3, 4)).tolist())
        assert bands[modality]["std"] == pytest.approx(np.nanstd(values, (0, 1, 3, 4)).tolist())
        assert bands[modality]["count"] == np.isfinite(values).sum((0, 1, 3, 4)).tolist()
    published = Statistics.of(PUBLISHED)
    z = (np.array(bands["S1RTC"]["mean"]) - published.means["S1RTC"]) / published.stds["S1RTC"]
    assert manifest["deep"]["compared"]["bands"]["S1RTC"]["z"] == pytest.approx(z.tolist())
    assert manifest["deep"]["flood_change"]["mean_db"] < -3


def test_digest_is_of_names_and_sizes_whatever_the_layout_and_depth(chips, own_chips, tmp_path):
    generate(tmp_path / "hub", **CHIPS, layout="hub")
    quick, whole, tars = audit(own_chips, "v0"), deep(own_chips), deep(tmp_path / "hub")
    assert quick["digest"] == whole["digest"] == tars["digest"] == quick_audit(chips, "v0").digest
    assert tars["layout"] == "tars"
    assert tars["deep"]["content_digest"] == whole["deep"]["content_digest"]
    assert tars["deep"]["bands"] == whole["deep"]["bands"]
    dem = path_of(own_chips, chips_of(own_chips)[0], "DEM")
    write_tif(dem, read_tif(dem) + 1)
    changed = deep(own_chips)
    assert changed["digest"] == quick["digest"], "as large as before"
    assert changed["deep"]["content_digest"] != whole["deep"]["content_digest"]
    dem.write_bytes(dem.read_bytes() + b"\0")
    longer = quick_audit(own_chips, "v0").digest
    split_path(own_chips, "test").write_text("\n".join(chips_of(own_chips, "test")[1:]) + "\n")
    digests = {quick["digest"], longer, quick_audit(own_chips, "v0").digest}
    assert len(digests) == 3


def test_one_job_and_two_jobs_give_the_same_manifest(chips):
    assert deep(chips) == audit(chips, "v0", deep=True, jobs=2)


# Names


def test_counts_that_are_not_the_published_ones_are_a_warning(chips):
    check, _, message = only(audit(chips, "v0"), "warning")
    assert check == "counts"
    counts = [len(chips_of(chips, split)) for split in SPLITS]
    assert message.endswith("(train {} of 57,067, val {} of 9,028, test {} of 14,556)".format(*counts))
    assert expected_chips("v1-binary") == expected_chips("v1") == {"train": 19_448, "val": 2_171, "test": 2_959}


@pytest.mark.parametrize("part", SUFFIXES)
def test_missing_part_is_named(own_chips, part):
    chip = chips_of(own_chips, "val")[0]
    path_of(own_chips, chip, part).unlink()
    assert only(audit(own_chips, "v0")) == ("missing-part", chip, f"it has no {part}")
    assert found(deep(own_chips)) == [("missing-part", chip, f"it has no {part}")]


def test_link_that_leads_nowhere_is_a_missing_part(own_chips):
    path = one_file(own_chips, "DEM")
    path.unlink()
    path.symlink_to(own_chips / "moved.tif")
    assert only(deep(own_chips))[0] == "missing-part"


def test_chips_that_no_split_names_are_a_warning(own_chips):
    chips = chips_of(own_chips, "test")
    split_path(own_chips, "test").write_text("\n".join(chips[1:]) + "\n")
    manifest = deep(own_chips)
    assert found(manifest) == []
    message = {check: message for check, _, message in found(manifest, "warning")}["unlisted"]
    assert message == f"no split names 1 of the chips on disk, such as {chips[0]}"
    assert manifest["deep"]["chips"]["unlisted"] == 1


def test_blank_line_is_named(own_chips):
    chips = chips_of(own_chips, "train")
    split_path(own_chips, "train").write_text("\n".join([*chips[:2], "", *chips[2:]]) + "\n")
    assert only(audit(own_chips, "v0")) == (
        *("blank-line", split_file("train")),
        "line 3 is blank: impactmesh takes it for a chip",
    )


@pytest.mark.parametrize("line", ["EMSR686_35TMF_x1_y2", "EMSR686_1_35TMF_x413905_y4537585.tif", "photo.jpg"])
def test_id_out_of_pattern_is_named(own_chips, line):
    with split_path(own_chips, "val").open("a") as file:
        file.write(f"{line}\n")
    check, file, message = only(audit(own_chips, "v0"))
    assert (check, file) == ("chip-id", split_file("val"))
    assert repr(line) in message


def test_space_around_an_id_is_no_fault(own_chips):
    before = audit(own_chips, "v0")
    split_path(own_chips, "val").write_text("".join(f" {chip} \r\n" for chip in chips_of(own_chips, "val")))
    assert audit(own_chips, "v0") == before
    assert check_data(recipe_of(own_chips), ["val"]).digest == before["digest"]


def test_byte_order_mark_is_named(own_chips):
    path = split_path(own_chips, "val")
    path.write_text(path.read_text(), encoding="utf-8-sig")
    check, file, message = only(audit(own_chips, "v0"))
    assert (check, file) == ("split-file", path.name)
    assert "byte order mark" in message
    with pytest.raises(DataError, match="byte order mark") as error:
        check_data(recipe_of(own_chips), ["val"])
    assert len(error.value.report().splitlines()) == 3


def test_chip_twice_in_a_split_is_named(own_chips):
    chips = chips_of(own_chips, "train")
    split_path(own_chips, "train").write_text("\n".join([*chips, chips[0]]) + "\n")
    check, _, message = only(audit(own_chips, "v0"))
    assert check == "listed-twice"
    assert message == f"{chips[0]} is in lines 1 and {len(chips) + 1}"


def test_part_twice_in_the_archives_is_named(tmp_path):
    generate(tmp_path, events=3, chips=3, size=32, protocol="v0", seed=1, layout="hub")
    shutil.copy(tmp_path / "val" / "DEM.tar", tmp_path / "val" / "DEM_2.tar")
    [chip] = chips_of(tmp_path, "val")
    check, _, message = only(audit(tmp_path, "v0"))
    assert check == "duplicate-part"
    assert chip in message
    assert "DEM" in message


@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_event_in_two_splits_is_named(own_chips, one, other):
    chips = chips_of(own_chips, one)
    moved = chips.pop()
    split_path(own_chips, one).write_text("\n".join(chips) + "\n")
    with split_path(own_chips, other).open("a") as file:
        file.write(f"{moved}\n")
    check, _, message = only(audit(own_chips, "v0"))
    assert check == "event-overlap"
    assert message.startswith(f"event {moved.split('_')[0]} is in {one} (")
    assert f"and in {other} (1)" in message
    assert message.endswith("all its chips have to be in one split")


def move_to_val(root, *events):
    """Let the first chip of some events of train be one of val."""
    chips = chips_of(root, "train")
    moved = [next(chip for chip in chips if chip.startswith(f"{event}_")) for event in events]
    split_path(root, "train").write_text("".join(f"{chip}\n" for chip in chips if chip not in moved))
    with split_path(root, "val").open("a") as file:
        file.writelines(f"{chip}\n" for chip in moved)


def publish(root, monkeypatch):
    """Take the number of chips that a folder has for those of the published data."""
    counts = {split: len(chips_of(root, split)) for split in SPLITS}
    monkeypatch.setattr(surveys, "expected_chips", lambda _: counts)


def recipe_of(root):
    files = {f"{split}_split": str(split_path(root, split)) for split in SPLITS}
    return {"data": {"init_args": {"data_root": str(root), "label_map": [0, 1], **files}}}


def test_events_in_two_of_the_published_splits_are_one_warning_and_a_fit_may_go_on(own_chips, monkeypatch, capsys):
    events = sorted({chip.split("_")[0] for chip in chips_of(own_chips, "train")})[:2]
    move_to_val(own_chips, *events)
    manifest = audit(own_chips, "v0")
    assert [check for check, _, _ in found(manifest)] == ["event-overlap"] * 2
    assert only(manifest, "warning")[0] == "counts"
    with pytest.raises(DataError, match="event-overlap"):
        check_data(recipe_of(own_chips), ["train", "val"])
    publish(own_chips, monkeypatch)
    message = "2 events lie in train and in val of the published splits, which are used as they are: " + ", ".join(
        events
    )
    manifest = audit(own_chips, "v0")
    assert found(manifest) == []
    assert only(manifest, "warning") == ("event-overlap", None, message)
    capsys.readouterr()
    assert check_data(recipe_of(own_chips), ["train", "val"]).warnings == (message,)
    assert message in capsys.readouterr().err
    with split_path(own_chips, "test").open("a") as file:
        file.write(f"{chips_of(own_chips, 'train')[0]}\n")
    publish(own_chips, monkeypatch)
    assert only(audit(own_chips, "v0"))[0] == "split-overlap", "published or not"


def test_data_without_overlap_has_no_warnings_for_a_record(chips):
    assert check_data(recipe_of(chips), ["test"]).warnings == ()


def test_chip_in_two_splits_is_named(own_chips):
    chip = chips_of(own_chips, "train")[0]
    with split_path(own_chips, "test").open("a") as file:
        file.write(f"{chip}\n")
    errors = {check: (subject, message) for check, subject, message in found(audit(own_chips, "v0"))}
    assert errors["split-overlap"] == (chip, "it is in train and in test")


def test_seen_events_that_v1_declares_are_a_note_and_others_an_error(own_v1):
    seen = chips_of(own_v1, "test_seen_events")
    check, _, message = only(audit(own_v1, "v1"), "info")
    assert check == "seen-events"
    assert seen[0].split("_")[0] in message
    split_path(own_v1, "test_seen_events").unlink()
    assert only(audit(own_v1, "v1"))[0] == "event-overlap"


def test_declared_seen_chip_in_train_itself_is_still_an_error(own_v1):
    [seen] = chips_of(own_v1, "test_seen_events")
    with split_path(own_v1, "train").open("a") as file:
        file.write(f"{seen}\n")
    errors = found(audit(own_v1, "v1"))
    assert {(check, subject) for check, subject, _ in errors} == {("split-overlap", seen)}


def test_holdout_event_in_train_is_an_error(own_v1):
    holdout = chips_of(own_v1, "test_holdout")
    split_path(own_v1, "test").write_text("\n".join(chips_of(own_v1, "test_seen_events")) + "\n")
    with split_path(own_v1, "train").open("a") as file:
        file.write(f"{holdout[0]}\n")
    assert {check for check, _, _ in found(audit(own_v1, "v1"))} == {"split-overlap", "event-overlap"}


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\n"])
def test_split_file_that_is_missing_empty_or_no_text_is_named(own_chips, content):
    path = split_path(own_chips, "val")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert only(audit(own_chips, "v0"))[:2] == ("split-file", path.name)


def test_quick_audit_raises_what_a_training_must_not_ignore(own_chips):
    clean = quick_audit(own_chips, "v0")
    clean.raise_for_errors(own_chips)
    assert clean.chips == {split: len(chips_of(own_chips, split)) for split in SPLITS}
    for chip in chips_of(own_chips, "val")[:2]:
        path_of(own_chips, chip, "DEM").unlink()
    with pytest.raises(DataError, match=r"missing-part: .* it has no DEM \(and 1 more\)") as error:
        quick_audit(own_chips, "v0").raise_for_errors(own_chips)
    assert error.value.fix
    files = {"test": split_path(own_chips, "test")}
    only_test = quick_audit(own_chips / "data", "v0", split_files=files, source=open_source(own_chips))
    assert only_test.errors == []
    assert list(only_test.chips) == ["test"]


def test_unknown_protocol_and_an_empty_folder_are_refused(chips, tmp_path):
    with pytest.raises(UsageError, match="v2"):
        quick_audit(chips, "v2")
    with pytest.raises(DataError, match=r"no chips|empty"):
        quick_audit(tmp_path, "v0")
    with pytest.raises(UsageError, match="--jobs is 0"):
        audit(chips, "v0", deep=True, jobs=0)


# Files


def one_file(root, part, split="train"):
    return path_of(root, chips_of(root, split)[1], part)


@pytest.mark.parametrize("part", SUFFIXES)
def test_truncated_file_is_named_and_the_run_goes_on(own_chips, part):
    path = one_file(own_chips, part)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    manifest = deep(own_chips)
    check, file, message = only(manifest)
    assert (check, file) == ("damaged", path.name)
    assert message.startswith("cannot be read: ")
    assert sum(manifest["deep"]["chips"].values()) == 18


@pytest.mark.parametrize("modality", ["S2L2A", "S1RTC"])
def test_flipped_byte_in_a_chunk_is_found_and_the_chunk_named(own_chips, modality):
    path = one_file(own_chips, modality)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("bands/2.0.0.0")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.file_size // 2] ^= 1
    path.write_bytes(content)
    check, file, message = only(deep(own_chips))
    assert (check, file) == ("damaged", path.name)
    assert "bands/2.0.0.0" in message


def test_file_that_may_not_be_read_is_named(own_chips, monkeypatch):
    path = one_file(own_chips, "DEM")
    read = Path.read_bytes

    def refuse(self):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    check, file, message = only(deep(own_chips))
    assert (check, file) == ("damaged", path.name)
    assert "Permission denied" in message


def test_missing_chunk_array_or_metadata_is_named(own_chips):
    for name, reason in (("bands/1.0.0.0", "1 of its 4 chunks"), (".zmetadata", "zmetadata"), ("bands/", "no array")):
        path = one_file(own_chips, "S1RTC")
        whole = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(path, "w") as target:
            for entry in archive.namelist():
                content = archive.read(entry)
                if entry == ".zmetadata" and name == "bands/":
                    document = json.loads(content)
                    kept = {key: value for key, value in document["metadata"].items() if not key.startswith(name)}
                    content = json.dumps(document | {"metadata": kept})
                if not entry.startswith(name):
                    target.writestr(entry, content)
        check, file, message = only(deep(own_chips))
        assert (check, file) == ("damaged", path.name)
        assert reason in message
        path.write_bytes(whole)


@pytest.mark.parametrize(("modality", "dtype"), [("S2L2A", "float32"), ("S1RTC", "float32"), ("S2L2A", "uint16")])
def test_zarr_of_another_dtype_is_named(own_chips, modality, dtype):
    path = one_file(own_chips, modality)
    edit_bands(path, lambda values: values.astype(dtype))
    check, file, message = only(deep(own_chips))
    assert (check, file) == ("dtype", path.name)
    assert f"its values are {dtype}" in message


@pytest.mark.parametrize(("part", "dtype"), [("DEM", "float32"), (LABEL_DIR, "uint8")])
def test_raster_of_another_dtype_is_named(own_chips, part, dtype):
    path = one_file(own_chips, part)
    write_tif(path, read_tif(path).clip(0).astype(dtype), nodata=None)
    assert only(deep(own_chips))[:2] == ("dtype", path.name)


def test_three_timesteps_or_one_band_less_is_named(own_chips):
    first, second = (path_of(own_chips, chip, "S2L2A") for chip in chips_of(own_chips, "train")[:2])
    edit_bands(first, lambda values: values[:3])
    edit_bands(second, lambda values: values[:, :11])
    errors = found(deep(own_chips))
    assert [(check, file) for check, file, _ in errors] == [("shape", first.name), ("shape", second.name)]
    assert "(3, 12, 32, 32) instead of (4, 12, H, W)" in errors[0][2]


def test_parts_of_unlike_size_and_chips_of_unlike_size_are_named(own_chips, tmp_path):
    chip = chips_of(own_chips, "train")[0]
    edit_bands(path_of(own_chips, chip, "S1RTC"), lambda values: values[..., :16, :16])
    shapes = [message for check, subject, message in found(deep(own_chips)) if check == "shape" and subject == chip]
    assert shapes == ["its parts are not squares of one size: S2L2A 32 x 32, S1RTC 16 x 16, DEM 32 x 32, MASK 32 x 32"]
    generate(tmp_path / "small", events=3, chips=3, size=64, protocol="v0", seed=1)
    for part in SUFFIXES:
        shutil.copy(path_of(tmp_path / "small", chips_of(tmp_path / "small")[0], part), own_chips / "data" / part)
    assert any(
        "chips differ in size" in message and "1 of 64 px" in message for _, _, message in found(deep(own_chips))
    )


# Values


def test_class_2_under_v0_is_an_error_that_names_the_chip(own_chips, v1_chips):
    path = one_file(own_chips, LABEL_DIR)
    mask = read_tif(path)
    mask[:2, :3] = 2
    write_tif(path, mask)
    assert only(deep(own_chips)) == ("mask-values", path.name, "it holds 2 on 6 pixels; protocol v0 knows -1, 0, 1")
    named = {file for check, file, _ in found(deep(v1_chips, "v0")) if check == "mask-values"}
    flooded = {c for c in chips_of(v1_chips) if (read_tif(path_of(v1_chips, c, LABEL_DIR)) == 2).any()}
    assert named == {f"{chip}{SUFFIXES[LABEL_DIR]}" for chip in flooded}


def test_v0_masks_under_v1_are_an_error(chips):
    assert ("classes", "no mask holds a pixel of class 2 (flood water)") in {
        (check, message.split(":")[0]) for check, _, message in found(deep(chips, "v1"))
    }


def test_swapped_radar_bands_are_named(own_chips):
    path = one_file(own_chips, "S1RTC")
    edit_bands(path, lambda values: values[:, ::-1])
    check, file, message = only(deep(own_chips))
    assert (check, file) == ("band-order", path.name)
    assert message.startswith("vv and vh are swapped")


def test_radar_bands_swapped_in_one_timestep_are_named(own_chips):
    path = one_file(own_chips, "S1RTC")

    def swap_after(values):
        values[3] = values[3, ::-1]
        return values

    edit_bands(path, swap_after)
    assert "vv and vh are swapped (after)" in only(deep(own_chips))[2]


@pytest.mark.parametrize(("one", "other"), [("B02", "B08"), ("B04", "B11"), ("B8A", "B12")])
def test_swapped_optical_bands_of_a_data_set_are_an_error(own_chips, one, other):
    for chip in chips_of(own_chips):
        path = path_of(own_chips, chip, "S2L2A")
        edit_bands(path, lambda values: swap(values, S2_BANDS.index(one), S2_BANDS.index(other), 1))
    check, _, message = only(deep(own_chips))
    assert check == "band-order"
    assert message.startswith(f"S2L2A bands {one} and {other} look exchanged in 6 of 6 events")


def test_swapped_optical_bands_of_one_event_are_an_error_and_of_one_chip_a_warning(own_chips):
    event = chips_of(own_chips, "val")[0].split("_")[0]
    for chip in chips_of(own_chips, "val"):
        if chip.startswith(event):
            edit_bands(path_of(own_chips, chip, "S2L2A"), lambda values: swap(values, 1, 7, 1))
    assert f"B02 and B08 look exchanged in 1 of 6 events ({event})" in only(deep(own_chips))[2]
    alone = path_of(own_chips, chips_of(own_chips, "train")[0], "S2L2A")
    edit_bands(alone, lambda values: swap(values, 1, 7, 1))
    warnings = [(file, text) for check, file, text in found(deep(own_chips), "warning") if check == "band-order"]
    assert (alone.name, "its bands B02 and B08 look exchanged") in warnings


def test_bands_that_their_own_names_say_are_in_another_order_are_named(own_chips):
    path = one_file(own_chips, "S2L2A")
    names = [*S2_BANDS[1:], S2_BANDS[0]]
    edit_zarr(path, lambda group: group["band"].__setitem__(slice(None), np.array(names)))
    check, file, message = only(deep(own_chips))
    assert (check, file) == ("band-order", path.name)
    assert message.startswith("its bands are in the order b02, b03")


def test_linear_backscatter_is_named(own_chips):
    path = one_file(own_chips, "S1RTC")
    edit_bands(path, lambda values: (10 ** (values.astype(np.float64) / 10)).astype(np.float16))
    check, file, message = only(deep(own_chips))
    assert (check, file) == ("linear", path.name)
    assert message.startswith("it is linear, not in dB: 0.0% of its values are negative")


def test_infinite_backscatter_is_named(own_chips):
    path = one_file(own_chips, "S1RTC")

    def zero_power(values):
        values[0, 1, 3, :5] = -np.inf
        return values

    edit_bands(path, zero_power)
    assert only(deep(own_chips)) == ("infinite", path.name, "5 of its values are infinite")


@pytest.mark.parametrize(
    ("order", "severity"), [((1, 0, 2, 3), "error"), ((0, 1, 3, 2), "error"), ((0, 0, 2, 3), "warning")]
)
def test_timesteps_out_of_order_are_named(own_chips, order, severity):
    path = one_file(own_chips, "S2L2A")

    def shuffle(group):
        times = group.attrs["datetime"].split(";")
        group.attrs["datetime"] = ";".join(times[i] for i in order)

    edit_zarr(path, shuffle)
    assert ("timesteps", path.name) in {finding[:2] for finding in found(deep(own_chips), severity)}


def test_number_of_times_is_checked(own_chips):
    path = one_file(own_chips, "S1RTC")
    edit_zarr(path, lambda group: group.attrs.update(datetime="2020-01-01T00:00:00"))
    assert only(deep(own_chips))[:2] == ("timesteps", path.name)


def test_exchanged_event_and_before_have_no_flood_signature(own_chips):
    for chip in chips_of(own_chips):
        edit_bands(path_of(own_chips, chip, "S1RTC"), lambda values: swap(values, EVENT, EVENT - 1, 0))
    check, _, message = only(deep(own_chips))
    assert check == "flood-signature"
    assert message.startswith("VV changes by +")


def test_masks_of_other_chips_have_no_flood_signature(own_chips, own_v1):
    for root, flood in ((own_chips, 1), (own_v1, 2)):
        for chip in chips_of(root):
            mask = read_tif(path_of(root, chip, LABEL_DIR))
            write_tif(path_of(root, chip, LABEL_DIR), np.where(mask < 0, mask, flood - mask).astype(np.int8))
    assert only(deep(own_v1, "v1"))[0] == "flood-signature"
    warnings = {check: message for check, _, message in found(deep(own_chips), "warning")}
    assert "may belong to other images" in warnings["flood-signature"], "of v0 nobody knows what the change should be"


@pytest.mark.parametrize("part", ["DEM", LABEL_DIR])
def test_raster_in_another_crs_is_named(own_chips, part):
    path = one_file(own_chips, part)
    write_tif(path, read_tif(path), crs="EPSG:4326")
    check, file, message = only(deep(own_chips))
    assert (check, file) == ("crs", path.name)
    assert "its CRS is EPSG:4326" in message


@pytest.mark.parametrize("modality", ["S2L2A", "S1RTC"])
def test_zarr_in_another_crs_is_named(own_chips, modality):
    path = one_file(own_chips, modality)
    edit_zarr(path, lambda group: group.attrs.update(proj_code="EPSG:32601"))
    assert only(deep(own_chips))[:2] == ("crs", path.name)


def edit_attributes(path, **change):
    edit_zarr(path, lambda group: group.attrs.update({name: value(group.attrs) for name, value in change.items()}))


JOINED = {
    "proj_code": lambda attributes: ";".join([attributes["proj_code"]] * len(TIMESTEPS)),
    "proj_bbox": lambda attributes: ";".join([attributes["proj_bbox"]] * len(TIMESTEPS)),
}


@pytest.mark.parametrize(
    "box",
    [
        JOINED["proj_bbox"],
        lambda attributes: ";".join([str([float(edge) for edge in attributes["proj_bbox"].split(";")])] * 4),
        lambda attributes: [[float(edge) for edge in attributes["proj_bbox"].split(";")]] * 4,
        lambda attributes: [float(edge) for edge in attributes["proj_bbox"].split(";")],
    ],
)
def test_code_and_box_of_each_timestep_raise_no_warning(own_chips, box):
    for chip in chips_of(own_chips):
        for modality in ("S2L2A", "S1RTC"):
            edit_attributes(path_of(own_chips, chip, modality), **JOINED | {"proj_bbox": box})
    manifest = deep(own_chips)
    assert found(manifest) == []
    assert [check for check, _, _ in found(manifest, "warning")] == ["counts"]


def test_timestep_with_another_code_or_a_box_elsewhere_is_named(own_chips):
    code, box, odd = (path_of(own_chips, chip, "S1RTC") for chip in chips_of(own_chips, "train")[:3])
    edit_attributes(code, proj_code=lambda attributes: ";".join([attributes["proj_code"]] * 3 + ["EPSG:32601"]))
    edit_attributes(box, proj_bbox=lambda attributes: ";".join([attributes["proj_bbox"]] * 3 + ["0;0;10;10"]))
    edit_attributes(odd, proj_bbox=lambda attributes: ";".join([attributes["proj_bbox"]] * 3))
    manifest = deep(own_chips)
    assert [finding[:2] for finding in found(manifest)] == [("crs", code.name), ("grid", box.name)]
    assert found(manifest)[0][2].startswith("its timesteps lie in EPSG:32601 and EPSG:")
    assert ("grid", odd.name) in [finding[:2] for finding in found(manifest, "warning")]


def test_part_that_lies_elsewhere_is_named(own_chips):
    dem, s1 = one_file(own_chips, "DEM"), one_file(own_chips, "S1RTC", "val")
    with rasterio.open(dem) as source:
        a, b, left, *rest = source.transform
        moved = rasterio.Affine(a, b, left + 30, *rest[:3])
    write_tif(dem, read_tif(dem), transform=moved)
    edit_zarr(s1, lambda group: group["y"].__setitem__(slice(None), group["y"][:] - 640))
    errors = {(check, file): message for check, file, message in found(deep(own_chips))}
    assert errors[("grid", dem.name)] == "it lies 30 m beside the other parts"
    assert ("grid", s1.name) in errors
    assert {file for _, file in errors} == {dem.name, s1.name}


def test_statistics_far_off_are_a_warning_with_its_figure(chips):
    manifest = deep(chips, statistics=Statistics.of(PUBLISHED))
    warnings = [message for check, _, message in found(manifest, "warning") if check == "statistics"]
    assert found(manifest) == []
    assert [message.split(":")[0] for message in warnings] == ["S2L2A", "S1RTC", "DEM"]
    assert all("z of the mean" in message and PUBLISHED in message for message in warnings)
    bands = manifest["deep"]["bands"]["train"]
    own = Statistics("own", {m: b["mean"] for m, b in bands.items()}, {m: b["std"] for m, b in bands.items()})
    assert [check for check, _, _ in found(deep(chips, statistics=own), "warning")] == ["counts"]


# Going on


KILLED = """
import os, signal, sys
from pathlib import Path
from floodrepro.data import audit

append, seven = audit._Partial.append, iter(range(7))

def tear_the_eighth(self, line):
    if next(seven, None) is None:
        self._file.write(line.encode()[:100])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, line)

audit._Partial.append = tear_the_eighth
if __name__ == "__main__":
    audit.audit(Path(sys.argv[1]), "v0", deep=True, jobs=int(sys.argv[2]))
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_audit_goes_on_to_the_same_manifest_and_leaves_no_process(own_chips, tmp_path, jobs, capsys):
    whole = deep(own_chips)
    (own_chips / MANIFEST).unlink()
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen(
        [sys.executable, script, own_chips, str(jobs)], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    _, said = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, said
    _wait_for_end_of_group(killed.pid)
    assert (own_chips / PARTIAL).exists()
    assert not (own_chips / MANIFEST).exists()
    capsys.readouterr()
    assert deep(own_chips) == whole
    assert "going on with a stopped audit: 7 of 18 chips are done" in capsys.readouterr().err
    assert not (own_chips / PARTIAL).exists()


def _wait_for_end_of_group(group):
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers outlive their parent")


def interrupted(root, monkeypatch, protocol="v0", chips=7):
    """Leave an audit after some chips, as Ctrl-C would."""
    with monkeypatch.context() as patch:
        calls = iter(range(chips))
        check = audits._check

        def stop(*arguments):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return check(*arguments)

        patch.setattr(audits, "_check", stop)
        with pytest.raises(KeyboardInterrupt):
            deep(root, protocol)
    return root / PARTIAL


def read_again(root, capsys, **options):
    capsys.readouterr()
    manifest = deep(root, **options)
    said = capsys.readouterr().err
    done = int(said.split("going on with a stopped audit: ")[1].split()[0]) if "going on" in said else 0
    return manifest, 18 - done


def test_chip_that_changed_or_was_damaged_is_read_again(own_chips, monkeypatch, capsys):
    first, second, *_ = sorted(chips_of(own_chips))
    damaged = path_of(own_chips, first, "S2L2A")
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(len(whole)))
    interrupted(own_chips, monkeypatch)
    damaged.write_bytes(whole)  # fetched again, and as large as it was
    edit_bands(path_of(own_chips, second, "S1RTC"), lambda values: values[:, ::-1])
    manifest, read = read_again(own_chips, capsys)
    assert read == 18 - 7 + 2
    assert [file for _, file, _ in found(manifest)] == [f"{second}{SUFFIXES['S1RTC']}"]


def test_chip_with_a_finding_that_could_be_read_is_not_read_again(own_chips, monkeypatch, capsys):
    first, *_ = sorted(chips_of(own_chips))
    edit_bands(path_of(own_chips, first, "S1RTC"), lambda values: values[:, ::-1])
    interrupted(own_chips, monkeypatch)
    manifest, read = read_again(own_chips, capsys)
    assert read == 18 - 7
    assert [file for _, file, _ in found(manifest)] == [f"{first}{SUFFIXES['S1RTC']}"]


def test_worker_that_is_killed_ends_the_audit_with_an_error_and_loses_nothing(own_chips, capsys):
    def kill_a_worker(done, _total):
        if done == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(DataError, match="worker process of the audit died"):
        audit(own_chips, "v0", deep=True, jobs=2, progress=kill_a_worker)
    assert 0 < read_again(own_chips, capsys)[1] <= 18 - 3


def test_partial_result_of_another_protocol_or_no_json_is_not_gone_on_with(own_chips, monkeypatch, capsys):
    interrupted(own_chips, monkeypatch, "v1")
    assert read_again(own_chips, capsys)[1] == 18
    (own_chips / PARTIAL).write_bytes(b"\x00\xff not ours\n")
    assert read_again(own_chips, capsys)[1] == 18


def test_no_resume_starts_anew(own_chips, monkeypatch, capsys):
    interrupted(own_chips, monkeypatch)
    assert read_again(own_chips, capsys, resume=False)[1] == 18


def test_two_audits_of_one_folder_do_not_mix(own_chips):
    survey = make_survey(own_chips, "v0", None, None)
    with audits._Partial(own_chips, survey, resume=True), pytest.raises(DataError, match="another audit"):
        deep(own_chips)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_said_and_the_audit_goes_on(own_chips, monkeypatch, capsys, number):
    whole = deep(own_chips)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert deep(own_chips) == deep(own_chips) == whole
    assert capsys.readouterr().err.count("has no locks") == 1


def test_lock_that_fails_for_another_reason_is_not_called_another_audit(own_chips, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        deep(own_chips)


@pytest.mark.parametrize(("cores", "jobs"), [(2, 2), (384, 32)])
def test_as_many_jobs_as_there_are_cores_to_run_on_but_not_hundreds(monkeypatch, cores, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert audits.default_jobs() == jobs


def test_folder_that_cannot_be_written_is_said_and_the_result_returned(own_chips, monkeypatch, capsys):
    open_, whole = Path.open, deep(own_chips)
    (own_chips / MANIFEST).unlink()

    def refuse(self, mode="r", *arguments, **options):
        if self.name == PARTIAL:
            raise OSError(30, "Read-only file system")
        return open_(self, mode, *arguments, **options)

    def refuse_write(_path, _text):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(audits, "write_atomically", refuse_write)
    assert deep(own_chips) == whole
    assert capsys.readouterr().err.count("Read-only file system") == 2
    assert not (own_chips / MANIFEST).exists()


# The command


def test_command_prints_a_summary_and_ends_with_0_for_healthy_data(chips, cli):
    outcome = cli("data", "audit", "--root", chips, "--protocol", "v0", "--deep", "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert "train S2L2A mean: " in outcome.out
    assert "VV from before to event on" in outcome.out
    assert "0 errors, 4 warnings, 0 notes" in outcome.out
    assert "chips read 18/18" in outcome.err


@pytest.mark.parametrize(
    ("protocol", "recipe"), [("v0", "amd"), ("v1", "v1"), ("v1-binary", "v1_binary")], ids=lambda value: value
)
def test_statistics_are_compared_with_those_of_the_protocols_recipe(own_chips, own_v1, cli, protocol, recipe):
    root = own_chips if protocol == "v0" else own_v1
    outcome = cli(*("data", "audit", "--root", root, "--protocol", protocol, "--deep", "--jobs", 1, "--format", "json"))
    manifest = json.loads(outcome.out)
    assert manifest["deep"]["compared"]["recipe"] == f"terramind_v1_base_impactmesh_flood_{recipe}"
    messages = [message for check, _, message in found(manifest, "warning") if check == "statistics"]
    assert messages
    expected = "expected: v1-binary keeps v0's statistics on purpose"
    assert all((expected in message) is (protocol == "v1-binary") for message in messages)


def test_command_ends_with_1_and_lists_errors_first(own_chips, cli):
    chip = chips_of(own_chips, "test")[0]
    path_of(own_chips, chip, "DEM").unlink()
    outcome = cli("data", "audit", "--root", own_chips, "--protocol", "v0")
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines.index(f"error: missing-part: {chip}: it has no DEM") < next(
        i for i, line in enumerate(lines) if line.startswith("warning: counts")
    )
    assert outcome.report[0] == "floodrepro: error: the audit found 1 error"
    assert len(outcome.report) <= 3


def test_command_gives_json_and_shortens_text_only(own_chips, cli):
    for chip in chips_of(own_chips):
        path_of(own_chips, chip, LABEL_DIR).unlink()
    text = cli("data", "audit", "--root", own_chips, "--protocol", "v0").out
    assert text.count("it has no MASK") == 10
    assert "error: missing-part: and 8 more; data-manifest.json lists all" in text
    outcome = cli("data", "audit", "--root", own_chips, "--protocol", "v0", "--format", "json")
    assert len(found(json.loads(outcome.out))) == 18
    assert json.loads(outcome.out) == json.loads((own_chips / MANIFEST).read_text())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--protocol", "v2"], "v2"),
        (["--protocol", "v0", "--config", PUBLISHED], "quick"),
        (["--protocol", "v0", "--deep", "--config", "nowhere"], "not found"),
        (["--protocol", "v0", "--deep", "--jobs", "0"], "--jobs"),
        ([], "--protocol"),
    ],
)
def test_command_refuses_bad_usage(chips, cli, flags, reason):
    outcome = cli("data", "audit", "--root", chips, *flags)
    assert outcome.code == 2
    assert reason in outcome.report[0]


def test_command_line_needs_no_numpy_and_audit_no_torch():
    code = (
        "import sys, floodrepro.cli.data; assert 'numpy' not in sys.modules;"
        "import floodrepro.data.audit; assert not {'torch', 'terratorch', 'impactmesh'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# Real imagery


@pytest.fixture
def real(tmp_path):
    """Three chips of 224 px that hold real scenes, each repeated over four timesteps; water as flood."""
    if REAL not in os.environ:
        pytest.skip(f"{REAL} names no folder of real scenes")
    folder = Path(os.environ[REAL])
    generate(tmp_path, events=3, chips=3, size=224, protocol="v0", seed=1)
    scenes = sorted(path.name for path in (folder / "S2L2A").glob("*.tif"))
    assert len(scenes) == 3
    for chip, scene in zip(chips_of(tmp_path), scenes, strict=True):
        for modality, dtype in (("S2L2A", np.int16), ("S1RTC", np.float16)):
            with rasterio.open(folder / modality / scene) as source:
                image = source.read()[..., :224, :224].astype(dtype)
            edit_bands(path_of(tmp_path, chip, modality), lambda _, image=image: np.stack([image] * 4))
        for part, name in (("DEM", "DEM"), (LABEL_DIR, "LULC")):
            values = read_tif(folder / name / scene)[:224, :224]
            write_tif(path_of(tmp_path, chip, part), (values == 1).astype(np.int8) if part == LABEL_DIR else values)
    return tmp_path


def test_real_imagery_raises_no_false_alarm(real):
    manifest = deep(real, statistics=Statistics.of(PUBLISHED))
    # Repeated over four timesteps, nothing changes at the event.
    assert [check for check, _, _ in found(manifest)] == ["flood-signature"]
    assert {check for check, _, _ in found(manifest, "warning")} <= {"counts", "statistics"}


def test_faults_in_real_imagery_are_found(real):
    first, second, third = chips_of(real)
    edit_bands(path_of(real, first, "S1RTC"), lambda values: values[:, ::-1])
    edit_bands(path_of(real, second, "S1RTC"), lambda v: (10 ** (v.astype(np.float64) / 10)).astype(np.float16))
    for chip in (first, second, third):
        edit_bands(path_of(real, chip, "S2L2A"), lambda values: swap(values, 1, 7, 1))
    errors = found(deep(real))
    assert ("band-order", f"{first}{SUFFIXES['S1RTC']}") in {error[:2] for error in errors}
    assert ("linear", f"{second}{SUFFIXES['S1RTC']}") in {error[:2] for error in errors}
    assert any("S2L2A bands B02 and B08 look exchanged in 3 of 3 events" in message for _, _, message in errors)
