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
    """Count masks against the truth of a recipe's split, as `docs/chip-table.md` describes.

    `masks` are files, or folders of files: one per chip, named after it, or rasters that cover several of the `chips`
    (the event of each id). With a `scale`, the value that means 1, they are probabilities of the positive class; else
    `values` has the class of each value, as `parse_values` reads it, or a value is a class.

    Raises:
        UsageError: The recipe has another data module, or more than two classes for probabilities.
        DataError: A file cannot be read, holds values that are not known, or no mask covers any chip.
    """
    protocol, arguments = protocols.protocol_of(recipe), protocols.data_arguments(recipe)
    names, positive = list(protocol.class_names), protocol.positive_class
    if not protocols.uses_flood_data_module(recipe):
        raise UsageError("masks are compared on chips of floodrepro's own data module", where="data.class_path")
    if scale is not None and len(names) != 2:
        raise UsageError(f"the protocol has {len(names)} classes: masks of probabilities need two", fix="give classes")
    data = check_data(recipe, (split if split in ("train", "val") else "test",))
    source = Chips(Path(arguments["data_root"]), protocol)
    files = _raster_files(masks, "_pred" if scale is None else "_prob")
    by_chip = _named_after_chips(files, chips)
    known = parse_values(values, names) if values else {k: k for k in range(len(names))}
    batches = []
    with contextlib.ExitStack() as stack, console.progress("chips") as show:
        large = [] if by_chip else [stack.enter_context(_open(file)) for file in files]
        for done, chip in enumerate(chips, 1):
            place = source.path(chip, protocols.LABEL_DIR)
            with contextlib.ExitStack() as own, rasterio.open(place, driver="GTiff") as grid:
                rasters = [own.enter_context(_open(by_chip[chip]))] if chip in by_chip else large
                found = _on_chip(rasters, grid, known if values else ())
            layers = [source.truth(chip), *_interpret(found, known, scale, positive, chip)]
            batches.append(count(*(layer[None] for layer in layers), classes=len(names), positive=positive))
            show(done, len(chips))
    metadata: dict[str, Any] = {"split": split, "class_names": names, "positive_class": positive, "checkpoint": None}
    metadata |= {"protocol": protocol.name, "data": vars(data), "predictor": {"kind": "masks", "name": name}}
    metadata |= {"detail": f"{len(files)} rasters, nearest pixel", "metrics": {}, "made": timestamp()}
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
        UsageError: It does not parse, says two things of a value, or names a class that the recipe does not have.
    """
    classes = {_NONE: -1} | {str(k): k for k in range(len(class_names))} | {n: k for k, n in enumerate(class_names)}
    try:
        pairs = [part.split("=") for part in text.split(",")]
        found = {int(value): classes[label.strip()] for value, label in pairs}
        if len(found) < len(pairs):
            raise ValueError("a value is there twice")
        return found
    except (ValueError, KeyError) as error:
        known = ", ".join([*class_names, _NONE])
        what = f"--values has {text!r}, expected VALUE=CLASS with commas, each value once; the classes are {known}"
        raise UsageError(what, fix="--values 1=flood,0=rest") from error


def _open(file: Path) -> DatasetReader:
    try:
        dataset = rasterio.open(file)
    except rasterio.errors.RasterioError as error:
        raise DataError(f"a mask cannot be read: {error}", where=file) from error
    if dataset.count != 1 or dataset.crs is None:
        what = f"a mask has {dataset.count} bands and the CRS {dataset.crs}, expected one band and any CRS"
        raise DataError(what, where=file, fix="gdal_translate -b 1 -a_srs EPSG:N")
    return dataset


def _raster_files(masks: Sequence[Path], preferred: str) -> list[Path]:
    """The rasters among files and in folders; where some are named like `predict`'s, these alone."""
    places = [file for place in masks for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    files = [file for file in places if file.suffix.lower() in (".tif", ".tiff", ".vrt")]
    if not files:
        raise DataError("there are no masks here", where=masks[0], fix=_ADVICE)
    return [file for file in files if file.stem.endswith(preferred)] or files


def _named_after_chips(files: Sequence[Path], chips: Mapping[str, str]) -> dict[str, Path]:
    """The file of each chip: its stem is the chip's id, or the id, `_` and any other words."""
    found: dict[str, Path] = {}
    for file in files:
        chip = file.stem
        while chip and chip not in chips:
            chip = chip.rpartition("_")[0]
        if chip in found:
            raise DataError(f"two masks are named after {chip}: {file.name} and {found[chip].name}", where=file.parent)
        if chip:
            found[chip] = file
    return found


def _on_chip(rasters: Sequence[DatasetReader], grid: DatasetReader, named: Container[float]) -> npt.NDArray[np.float64]:
    """Values (H, W) on a chip's grid, NaN without data; of several rasters the first that has some counts."""
    found = np.full(grid.shape, np.nan)
    for raster in rasters:
        if disjoint_bounds(raster.bounds, transform_bounds(grid.crs, raster.crs, *grid.bounds)):
            continue
        place = {"crs": grid.crs, "transform": grid.transform, "height": grid.height, "width": grid.width}
        if raster.nodata in named:  # then it is data, whatever the raster says
            place["src_nodata"] = np.nan
        # Nearest, to the pixel: GDAL's usual tolerance moves one pixel in a hundred to its neighbour.
        try:
            with WarpedVRT(raster, **place, dtype="float64", nodata=np.nan, tolerance=1e-9) as warped:
                found = np.where(np.isnan(found), warped.read(1), found)
        except rasterio.errors.RasterioError as error:  # a file that was cut short
            raise DataError(f"a mask cannot be read: {error}", where=raster.name) from error
    return found


def _interpret(
    found: npt.NDArray[np.float64], known: Mapping[int, int], scale: float | None, positive: int, chip: str
) -> list[npt.NDArray[Any]]:
    """Classes (H, W) of values, -1 where there is none; and probabilities (H, W) if there is a scale."""
    seen = ~np.isnan(found)
    if scale is None:
        layers, expected = [np.full(found.shape, -1)], f"one of {sorted(known)}"
        odd = np.setdiff1d(found[seen], list(known))
        fix = f"--values VALUE=CLASS,... names them, VALUE={_NONE} leaves one out; or --probability"
        for value, label in known.items():
            layers[0][found == value] = label
    else:
        share = found / scale
        layers = [np.select([share > 0.5, seen], [positive, 1 - positive], -1), share]
        odd, expected = share[(share < 0) | (share > 1)], "0 to 1"
        fix = "--probability SCALE says which value means 1, as 100, 250 (of floodrepro predict) or 255"
    if odd.size:
        raise DataError(f"the mask over {chip} holds {odd[0]:g}, expected {expected}", fix=fix)
    return layers
