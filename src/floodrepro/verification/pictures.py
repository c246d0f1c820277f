"""The pictures of a report: a few chips chosen by rule, what the satellites saw, what is true, what is predicted.

Shape suffixes: H, W = pixels.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch

from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.errors import TableError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import iou
from floodrepro.evaluation.passes import chip_of, run_pass
from floodrepro.evaluation.test import ChipCounts
from floodrepro.run_folder import sha256_of
from floodrepro.training.terratorch_cli import RecipeCLI
from floodrepro.verification.battery import load_criteria
from floodrepro.verification.check import Cell, Check, Plot, Table, Value, judge
from floodrepro.verification.figures import panels_png

MIN_SHARE = 0.01
"""Share of counted pixels of the class from which a chip's IoU says something: on fewer, one field decides it."""

_NO_BACKSCATTER = -100.0  # dB; no surface is so dark, and -9999 is not -9999 in float16


def panels(cli: RecipeCLI, checkpoint: Path, table_file: Path, folder: Path) -> Check:
    """Run TerraTorch's test loop over a few chips of a table, compare their counts with it, and draw `panels.png`.

    Args:
        cli: The parsed recipe of the checkpoint.
        checkpoint: The weights.
        table_file: Their chip table.
        folder: Where `panels.png` goes.

    Raises:
        TableError: The table is missing, damaged, another checkpoint's, or has no chip to show.
        UsageError, DataError, CheckpointError: As `floodrepro.evaluation.passes.run_pass`.
    """
    table = chip_table.read_table(table_file)
    if (table.metadata.get("checkpoint") or {}).get("sha256") != sha256_of(checkpoint):
        raise TableError("the chip table was made from another checkpoint", where=table_file, fix="test it again")
    positive = protocols.positive_class_of(cli.recipe)
    shown, name = choose_chips_to_show(table, positive), table.class_names[positive]
    chips = [str(table.chips[row]) for row in shown.values()]
    maps = _predict_chips(cli, checkpoint, chips)
    again = maps.table({}, {}).subset(chips).counts
    source = Chips(Path(protocols.data_arguments(cli.recipe)["data_root"]), protocols.protocol_of(cli.recipe))
    drawn: list[dict[str, Any]] = []
    rows: list[list[Cell]] = []
    worst = 0.0
    for n, (kind, row) in enumerate(shown.items()):
        counts, pixels = table.counts[row], int(table.counts[row].sum())
        # The fewest that must have been predicted otherwise: a pixel leaves one count and enters another.
        moved = (int(np.abs(again[n] - counts).sum()) + 1) // 2
        worst = max(worst, moved / pixels)
        score, alarms = float(iou(counts, positive)), 100 * counts[:, positive].sum() / pixels
        says = f"{name} IoU {score:.3f}" if kind != "empty" else f"no {name} in truth, {alarms:.1f} % predicted"
        title = f"{kind}: {chips[n]}, {says}"
        drawn.append({"title": title, **maps.seen[chips[n]], **take_pictures(source, chips[n])})
        rows.append([kind, chips[n], None if np.isnan(score) else score, pixels, moved])
    with rasterio.open(source.path(chips[0], protocols.LABEL_DIR), driver="GTiff") as mask:
        metres = float(abs(mask.transform.a))
    (folder / "panels.png").write_bytes(panels_png(drawn, table.class_names, positive, metres))
    notes = [
        f"Best, median and worst by {name} IoU among chips whose truth has at least {100 * MIN_SHARE:g} % {name}; the "
        "empty chip is the one without any that has the most false alarms."
    ]
    if worst:
        here = f"{cli.trainer.strategy.root_device.type} in {cli.trainer.precision}"
        there = f"{table.metadata.get('device')} in {table.metadata.get('precision')}"
        notes.append(f"Predicted on {here}; the table: {there}.")
    allowed = load_criteria()["panels"]["differing_share"]
    columns = ["kind", "chip", f"{name} IoU", "pixels", "differing from the table"]
    caption = (
        "A row a chip: Sentinel-2 in true colour and Sentinel-1 VV before and at the event, the truth, the prediction, "
        f"and where they differ. A chip has {' x '.join(map(str, drawn[0]['truth'].shape))} pixels of {metres:g} m."
    )
    return judge(
        [Value("largest share of pixels predicted otherwise than in the chip table", worst, at_most=allowed)],
        f"{', '.join(shown)} chip shown, " + (f"{worst:.2g} differ" if worst else "as in the table"),
        tables=[Table("Chips shown", columns, rows)],
        plots=[Plot("panels", "panels", "What was seen, what is true, what is predicted", caption=caption)],
        notes=notes,
    )


def choose_chips_to_show(table: ChipTable, positive: int) -> dict[str, int]:
    """Rows of the chips to show, by kind: best, median and worst IoU, and empty; ids break ties.

    The first three are of the chips whose truth has a share of MIN_SHARE of the class, the empty one is of those
    without any and has the most false alarms. A kind without a chip is left out.

    Raises:
        TableError: There is no chip to show.
    """
    pixels, truth = table.counts.sum(axis=(1, 2)), table.counts[:, positive].sum(axis=1)
    called, figures = table.counts[:, :, positive].sum(axis=1), iou(table.counts, positive)
    having = np.flatnonzero((truth > 0) & (truth >= MIN_SHARE * pixels)).tolist()
    having.sort(key=lambda row: (-figures[row], str(table.chips[row])))
    empty = np.flatnonzero((truth == 0) & (pixels > 0)).tolist()
    empty.sort(key=lambda row: (-called[row], str(table.chips[row])))
    rows: dict[str, int] = {}
    for kind, place in (("best", 0), ("median", len(having) // 2), ("worst", -1)):
        if having and having[place] not in rows.values():
            rows[kind] = having[place]
    if empty:
        rows["empty"] = empty[0]
    if not rows:
        raise TableError("all pixels of the chip table are ignored: there is no chip to show")
    return rows


class _Maps(ChipCounts):
    """Keeps truth and prediction (H, W) of each chip, besides counting them."""

    seen: dict[str, dict[str, npt.NDArray[np.int8]]]

    def use(self, logits: torch.Tensor, files: list[str], batch: Any, task: Any) -> None:
        """Keep the batch's maps."""
        super().use(logits, files, batch, task)
        pairs = (task.squeeze_ground_truth(batch["mask"]), logits.argmax(dim=1))
        truth, prediction = (each.to(torch.int8).cpu().numpy() for each in pairs)
        for n, file in enumerate(files):
            self.seen[chip_of(file)] = {"truth": truth[n], "prediction": prediction[n]}


def _predict_chips(cli: RecipeCLI, checkpoint: Path, chips: list[str]) -> _Maps:
    maps = _Maps(checkpoint)
    maps.seen = {}
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "chips.txt"
        split.write_text("".join(f"{chip}\n" for chip in chips), encoding="utf-8")
        run_pass(cli, "test", maps, "test", file=str(split))
    return maps


def take_pictures(source: Chips, chip: str) -> dict[str, npt.NDArray[Any]]:
    """True colour (H, W, 3) uint8 and VV (H, W) in dB before and at the event, as they are on disk."""
    colours = [protocols.S2_BANDS.index(band) for band in ("B04", "B03", "B02")]
    times = [protocols.BEFORE, protocols.EVENT]
    optical = source.bands(chip, "S2L2A")[times][:, colours].astype(np.float32)
    seen, optical = (optical != protocols.NO_DATA).all(axis=1), np.moveaxis(optical, 1, -1)
    # One stretch for both dates and all bands, so that a change of colour is one on the ground; from the darker date
    # of each pixel, for a cloud on one date would leave the land black on both.
    darker = np.where(seen[..., None], optical, np.inf).min(axis=0)
    land = darker[np.isfinite(darker)]
    low, high = np.percentile(land, (2, 98)) if land.size else (0.0, 1.0)
    rgb = 255 * np.where(seen[..., None], np.clip((optical - low) / max(high - low, 1.0), 0, 1), 0)
    radar = source.bands(chip, "S1RTC")[times][:, protocols.S1_BANDS.index("vv")].astype(np.float32)
    vv = np.where(radar > _NO_BACKSCATTER, radar, np.float32(np.nan))
    rgb = np.rint(rgb).astype(np.uint8)
    return {"before_rgb": rgb[0], "event_rgb": rgb[1], "before_vv": vv[0], "event_vv": vv[1]}
