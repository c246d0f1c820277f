"""``floodrepro test --masks``: anybody's masks become a chip table like any model's.

H, W = rows and columns of a chip.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio import DatasetReader
from rasterio.coords import disjoint_bounds
from rasterio.transform import rowcol, xy
from rasterio.warp import transform as project
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from floodrepro import console
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import (
    IGNORE_INDEX,
    LABEL_DIR,
    SPLITS,
    data_arguments,
    protocol_of,
    uses_flood_data_module,
)
from floodrepro.data.splits import check_data
from floodrepro.errors import DataError, UsageError
from floodrepro.evaluation.chip_table import ChipTable, TableBuilder
from floodrepro.recipe import Recipe
from floodrepro.run_folder import timestamp

LEFT_OUT = "none"  # in --values: a value that means no data
_SUFFIXES = (".tif", ".tiff", ".vrt")
_ADVICE = "give GeoTIFFs named after chips (CHIP.tif, CHIP_pred.tif), or rasters that cover them"


def tabulate_masks(
    recipe: Recipe,
    masks: Sequence[Path],
    chips: Mapping[str, str],
    *,
    name: str,
    split: str = "test",
    scale: float | None = None,
    values: Mapping[int, int | None] | None = None,
) -> ChipTable:
    """Count masks against the truth of a split.

    A pixel of a chip takes the value of the mask's pixel in which its centre lies, whatever CRS the mask is in. Where
    a mask has no data, or none covers the chip, the pixel is not counted; `unseen` says how many these are.

    Args:
        recipe: Says where the chips are and what their classes are.
        masks: Files, or folders of files: one per chip, named after it, or rasters that cover several chips.
        chips: Chip ids of the split and the event of each.
        name: What the table is called in reports.
        split: Its name.
        scale: For masks of probabilities of the positive class: the value that means 1. None for masks of classes.
        values: Class of each value of the masks; None leaves a value out. By default a value is a class.

    Raises:
        UsageError: The recipe has another data module, or probabilities are given for more than two classes.
        DataError: A file cannot be read, holds values that are not known, or no mask covers any chip.
    """
    protocol, arguments = protocol_of(recipe), data_arguments(recipe)
    classes, positive = len(protocol.class_names), protocol.positive_class
    if not uses_flood_data_module(recipe):
        raise UsageError("masks are compared on chips of floodrepro's own data module", where="data.class_path")
    if scale is not None and classes != 2:
        raise UsageError(f"the protocol has {classes} classes: masks of probabilities need two", fix="give classes")
    data = check_data(recipe, (split if split in SPLITS else "test",))
    source, files = Chips(Path(arguments["data_root"]), protocol), _raster_files(masks)
    by_chip = _named_after_chips(files, chips, "prob" if scale is not None else "pred")
    known = dict(values) if values else {k: k for k in range(classes)}
    builder = TableBuilder(classes, positive)
    with contextlib.ExitStack() as stack, console.progress("chips") as show:
        large = [] if by_chip else [stack.enter_context(_open(file)) for file in files]
        for done, (chip, event) in enumerate(chips.items(), 1):
            truth = read_truth(source, chip)
            with contextlib.ExitStack() as own, rasterio.open(source.path(chip, LABEL_DIR)) as grid:
                rasters = [own.enter_context(_open(by_chip[chip]))] if chip in by_chip else large
                found, there = _on_chip(rasters, grid, values)
            if scale is None:
                prediction, there = _classes_of(found, there, known, chip)
                builder.add(chip, event, truth, prediction, there)
            else:
                probability = _probability(found, scale, chip)
                prediction = np.where(probability > 0.5, positive, 1 - positive)
                builder.add(chip, event, truth, prediction, there, probability)
            show(done, len(chips))
    table = builder.table(
        {
            "split": split,
            "class_names": list(protocol.class_names),
            "positive_class": positive,
            "protocol": protocol.name,
            "predictor": {"kind": "masks", "name": name},
            "detail": f"{'classes' if scale is None else 'probabilities'} from {len(files)} rasters, nearest pixel",
            "checkpoint": None,
            "data": data.as_dict(),
            "metrics": {},
            "made": timestamp(),
        }
    )
    with _open(files[0]) as first:
        _tell_unseen(table, masks[0], zero=values is None and first.nodata == 0)
    return table


def parse_values(text: str, class_names: Sequence[str]) -> dict[int, int | None]:
    """What ``--values 1=flood,0=rest,255=none`` says: the class of each value, None for no data.

    Raises:
        UsageError: It does not parse, or names a class that the recipe does not have.
    """
    found: dict[int, int | None] = {}
    for part in text.split(","):
        value, equals, label = (piece.strip() for piece in part.partition("="))
        if label in class_names:
            place: int | None = list(class_names).index(label)
        elif label == LEFT_OUT:
            place = None
        elif label.isdigit() and int(label) < len(class_names):
            place = int(label)
        else:
            known = ", ".join([*class_names, LEFT_OUT])
            raise UsageError(f"--values names {label!r}, the classes are {known}", fix="--values 1=flood,0=rest")
        if not equals or not value.lstrip("-").isdigit():
            raise UsageError(f"--values has {part!r}, expected VALUE=CLASS", fix="--values 1=flood,0=rest")
        found[int(value)] = place
    return found


def read_truth(source: Chips, chip: str) -> npt.NDArray[np.int64]:
    """A chip's mask (H, W) as classes, IGNORE_INDEX kept.

    Raises:
        DataError: The mask is missing, damaged, or holds a value that the protocol does not know.
    """
    mask, labels = source.raster(chip, LABEL_DIR), source.protocol.label_map
    unknown = sorted(set(np.unique(mask).tolist()) - {IGNORE_INDEX, *range(len(labels))})
    if unknown:
        raise DataError(
            f"the mask of {chip} holds {unknown}, expected {IGNORE_INDEX} to {len(labels) - 1}",
            where=source.root,
            fix="take the recipe of this data's protocol",
        )
    return np.where(mask == IGNORE_INDEX, IGNORE_INDEX, np.array(labels)[np.maximum(mask, 0)])


def _tell_unseen(table: ChipTable, where: Path, *, zero: bool) -> None:
    """Say how much of the truth no mask covers, and raise if that is all of it."""
    unseen, counted = int(table.unseen.sum()), int(table.counts.sum())
    if not counted:
        raise DataError(f"no mask covers any of the {len(table)} chips", where=where, fix=_ADVICE)
    if unseen:
        hint = "; no-data is 0 in these files, --values 0=rest,1=flood counts zeros as rest" if zero else ""
        console.warn(
            f"{100 * unseen / (unseen + counted):.2g} % of the pixels have no mask and are not counted, "
            f"{int((table.unseen > 0).sum())} of {len(table)} chips are not whole{hint}"
        )


def _open(file: Path) -> DatasetReader:
    try:
        dataset = rasterio.open(file)
    except rasterio.errors.RasterioError as error:
        raise DataError(f"a mask cannot be read: {error}", where=file) from error
    if dataset.count != 1:
        raise DataError(f"a mask has {dataset.count} bands, expected 1", where=file, fix="gdal_translate -b 1")
    return dataset


def _raster_files(masks: Sequence[Path]) -> list[Path]:
    files = [
        file
        for place in masks
        for file in (sorted(place.rglob("*")) if place.is_dir() else [place])
        if file.suffix.lower() in _SUFFIXES
    ]
    if not files or not all(file.is_file() for file in files):
        raise DataError("there are no masks here", where=masks[0], fix=_ADVICE)
    return files


def _named_after_chips(files: Sequence[Path], chips: Mapping[str, str], preferred: str) -> dict[str, Path]:
    """The file of each chip: its stem is the chip's id, or the id, `_` and any other words."""
    found: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: file.stem.endswith(f"_{preferred}")):
        chip = file.stem
        while chip and chip not in chips:
            chip = chip.rpartition("_")[0]
        if chip in found and file.stem != f"{chip}_{preferred}":
            raise DataError(f"two masks are named after {chip}: {file.name} and {found[chip].name}", where=file.parent)
        if chip:
            found[chip] = file
    return found


def _on_chip(
    rasters: Sequence[DatasetReader], grid: DatasetReader, values: Mapping[int, int | None] | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Values (H, W) of the rasters on a chip's grid and where there are any; the first raster with data counts."""
    found, there = np.zeros(grid.shape), np.zeros(grid.shape, np.bool_)
    for raster in rasters:
        if (
            raster.crs
            and grid.crs
            and disjoint_bounds(raster.bounds, transform_bounds(grid.crs, raster.crs, *grid.bounds))
        ):
            continue
        rows, columns = _pixels_of(raster, grid)
        inside = (rows >= 0) & (rows < raster.height) & (columns >= 0) & (columns < raster.width) & ~there
        if not inside.any():
            continue
        top, left = int(rows[inside].min()), int(columns[inside].min())
        window = Window(left, top, int(columns[inside].max()) - left + 1, int(rows[inside].max()) - top + 1)
        part = raster.read(1, window=window)
        picked = part[rows[inside] - top, columns[inside] - left].astype(np.float64)
        valid = np.isfinite(picked)
        if raster.nodata is not None and not (values and raster.nodata in values):  # a value that is named is a class
            valid &= picked != raster.nodata
        found[inside] = np.where(valid, picked, 0)
        there[inside] = valid
    return found, there


def _pixels_of(raster: DatasetReader, grid: DatasetReader) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column (H, W) of the raster's pixel in which each pixel centre of the grid lies."""
    rows, columns = np.mgrid[: grid.height, : grid.width]
    same_grid = raster.transform.almost_equals(grid.transform) and raster.shape == grid.shape
    if (raster.crs == grid.crs and same_grid) or (raster.crs is None and raster.shape == grid.shape):
        return rows, columns
    if raster.crs is None or grid.crs is None:
        raise DataError("the mask has no CRS and another size than the chip", where=raster.name, fix="gdal_edit -a_srs")
    x, y = xy(grid.transform, rows.ravel(), columns.ravel())
    if raster.crs != grid.crs:
        x, y = project(grid.crs, raster.crs, x, y)
    found = rowcol(raster.transform, x, y)
    return np.reshape(found[0], grid.shape), np.reshape(found[1], grid.shape)


def _classes_of(
    found: npt.NDArray[Any], there: npt.NDArray[np.bool_], known: Mapping[int, int | None], chip: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Classes (H, W), and where there are any after the values that mean no data are left out."""
    prediction, seen = np.zeros(found.shape, np.int64), there.copy()
    for value in np.unique(found[there]).tolist():
        if value not in known:
            raise DataError(
                f"the mask over {chip} holds {value:g}, expected one of {sorted(known)}",
                fix=f"--values VALUE=CLASS,... names the values of your masks; {value:g}={LEFT_OUT} leaves one out, "
                "and --probability is for probabilities",
            )
        place = known[value]
        if place is None:
            seen[found == value] = False
        else:
            prediction[found == value] = place
    return prediction, seen


def _probability(found: npt.NDArray[Any], scale: float, chip: str) -> npt.NDArray[np.float64]:
    probability: npt.NDArray[np.float64] = found / scale
    if not 0 <= probability.min() <= probability.max() <= 1:
        raise DataError(
            f"the mask over {chip} holds probabilities up to {probability.max():g}, expected 0 to 1",
            fix="--probability 100 or --probability 255 says which value means 1",
        )
    return probability
