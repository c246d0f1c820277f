"""``floodrepro test --masks``: anybody's masks become a chip table like any model's. H, W = pixels of a chip."""

import contextlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio import DatasetReader
from rasterio.coords import disjoint_bounds
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from floodrepro import console
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.data.protocols import IGNORE_INDEX, LABEL_DIR
from floodrepro.data.splits import check_data
from floodrepro.errors import DataError, UsageError
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.counting import count
from floodrepro.recipe import Recipe
from floodrepro.run_folder import timestamp

_NONE = "none"  # in --values: a value that means no data
_ADVICE = "give GeoTIFFs named after chips (CHIP.tif, CHIP_pred.tif), or rasters that cover them"


def tabulate_masks(
    recipe: Recipe,
    masks: Sequence[Path],
    chips: Mapping[str, str],
    *,
    name: str,
    split: str = "test",
    scale: float | None = None,
    values: str | None = None,
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
        scale: For masks of probabilities of the positive class: the value that means 1.
        values: The class of each value, as `parse_values` reads it. By default a value is a class.

    Raises:
        UsageError: The recipe has another data module, or more than two classes for probabilities.
        DataError: A file cannot be read, holds values that are not known, or no mask covers any chip.
    """
    protocol, arguments = protocols.protocol_of(recipe), protocols.data_arguments(recipe)
    classes, positive = len(protocol.class_names), protocol.positive_class
    if not protocols.uses_flood_data_module(recipe):
        raise UsageError("masks are compared on chips of floodrepro's own data module", where="data.class_path")
    if scale is not None and classes != 2:
        raise UsageError(f"the protocol has {classes} classes: masks of probabilities need two", fix="give classes")
    data = check_data(recipe, (split if split in ("train", "val") else "test",))
    source, files = Chips(Path(arguments["data_root"]), protocol), _raster_files(masks)
    by_chip = _named_after_chips(files, chips, "prob" if scale is not None else "pred")
    named = parse_values(values, protocol.class_names) if values else {}
    batches = []
    with contextlib.ExitStack() as stack, console.progress("chips") as show:
        large = [] if by_chip else [stack.enter_context(_open(file)) for file in files]
        for done, chip in enumerate(chips, 1):
            truth = read_truth(source, chip)
            with contextlib.ExitStack() as own, rasterio.open(source.path(chip, LABEL_DIR), driver="GTiff") as grid:
                rasters = [own.enter_context(_open(by_chip[chip]))] if chip in by_chip else large
                found = _on_chip(rasters, grid, named)
            probability = None if scale is None else found / scale
            if probability is None:
                prediction = _classes_of(found, named or {k: k for k in range(classes)}, chip)
            else:
                if (probability < 0).any() or (probability > 1).any():
                    low, high = np.nanmin(probability), np.nanmax(probability)
                    what = f"the mask over {chip} holds probabilities {low:g} to {high:g}, expected 0 to 1"
                    raise DataError(what, fix="--probability 100 or --probability 255 says which value means 1")
                prediction = np.select([probability > 0.5, probability <= 0.5], [positive, 1 - positive], -1)
            layers = (None if one is None else one[None] for one in (truth, prediction, probability))
            batches.append(count(*layers, classes=classes, positive=positive))
            show(done, len(chips))
    metadata: dict[str, Any] = {
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
    table = ChipTable.of_batches(chips.items(), batches, metadata)
    unseen, counted = int(table.unseen.sum()), int(table.counts.sum())
    if not counted:
        raise DataError(f"no mask covers any of the {len(table)} chips", where=masks[0], fix=_ADVICE)
    if unseen:
        share, chips_of = 100 * unseen / (unseen + counted), f"{int((table.unseen > 0).sum())} of {len(table)} chips"
        hint = "where no-data is 0, --values 0=rest,1=flood counts zeros as rest"
        console.warn(f"{share:.2g} % of the pixels have no mask and are not counted, {chips_of} are not whole; {hint}")
    return table


def parse_values(text: str, class_names: Sequence[str]) -> dict[int, int]:
    """What ``--values 1=flood,0=rest,255=none`` says: the class of each value, -1 for no data.

    Raises:
        UsageError: It does not parse, or names a class that the recipe does not have.
    """
    classes = {_NONE: -1} | {str(k): k for k in range(len(class_names))} | {n: k for k, n in enumerate(class_names)}
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(value): classes[label.strip()] for value, label in pairs}
    except (ValueError, KeyError) as error:
        known = ", ".join([*class_names, _NONE])
        what = f"--values has {text!r}, expected VALUE=CLASS with commas; the classes are {known}"
        raise UsageError(what, fix="--values 1=flood,0=rest") from error


def read_truth(source: Chips, chip: str) -> npt.NDArray[np.int64]:
    """A chip's mask (H, W) as classes, IGNORE_INDEX kept.

    Raises:
        DataError: The mask is missing, damaged, or holds a value that the protocol does not know.
    """
    mask, labels = source.raster(chip, LABEL_DIR), source.protocol.label_map
    unknown = sorted(set(np.unique(mask).tolist()) - {IGNORE_INDEX, *range(len(labels))})
    if unknown:
        what = f"the mask of {chip} holds {unknown}, expected {IGNORE_INDEX} to {len(labels) - 1}"
        raise DataError(what, where=source.root, fix="take the recipe of this data's protocol")
    return np.where(mask == IGNORE_INDEX, IGNORE_INDEX, np.array(labels)[np.maximum(mask, 0)])


def _open(file: Path) -> DatasetReader:
    try:
        dataset = rasterio.open(file)
    except rasterio.errors.RasterioError as error:
        raise DataError(f"a mask cannot be read: {error}", where=file) from error
    if dataset.count != 1 or dataset.crs is None:
        what = f"a mask has {dataset.count} bands and the CRS {dataset.crs}, expected one band and any CRS"
        raise DataError(what, where=file, fix="gdal_translate -b 1 -a_srs EPSG:N")
    return dataset


def _raster_files(masks: Sequence[Path]) -> list[Path]:
    places = [file for place in masks for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    files = [file for file in places if file.suffix.lower() in (".tif", ".tiff", ".vrt")]
    if not files:
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


def _on_chip(rasters: Sequence[DatasetReader], grid: DatasetReader, named: Container[float]) -> npt.NDArray[np.float64]:
    """Values (H, W) on a chip's grid, NaN without data; of several rasters the first that has some counts.

    A value that is `named` is data, whatever a raster says.
    """
    found = np.full(grid.shape, np.nan)
    for raster in rasters:
        if disjoint_bounds(raster.bounds, transform_bounds(grid.crs, raster.crs, *grid.bounds)):
            continue
        place = {"crs": grid.crs, "transform": grid.transform, "height": grid.height, "width": grid.width}
        if raster.nodata in named:
            place["src_nodata"] = np.nan
        # Nearest, to the pixel: GDAL's usual tolerance moves one pixel in a hundred to its neighbour.
        with WarpedVRT(raster, **place, dtype="float64", nodata=np.nan, tolerance=1e-9) as warped:
            found = np.where(np.isnan(found), warped.read(1), found)
    return found


def _classes_of(found: npt.NDArray[np.float64], known: Mapping[int, int], chip: str) -> npt.NDArray[np.int64]:
    """Classes (H, W) of values; -1 where there is none, or one that means no data."""
    prediction = np.full(found.shape, -1)
    for value in np.unique(found[~np.isnan(found)]).tolist():
        if value not in known:
            what = f"the mask over {chip} holds {value:g}, expected one of {sorted(known)}"
            fix = f"--values VALUE=CLASS,... names them, {value:g}={_NONE} leaves one out; or --probability"
            raise DataError(what, fix=fix)
        prediction[found == value] = known[value]
    return prediction
