"""A few chips to look at: what the satellites saw, what is true, what is predicted.

Shape suffixes: P = panels, H, W = pixels, K = classes.
"""

import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from floodrepro import recipe as recipes
from floodrepro.data.chips import ChipSource, open_source_loudly
from floodrepro.data.names import BEFORE, EVENT, IGNORE_INDEX, LABEL_DIR, NO_DATA, S1_BANDS, S2_BANDS
from floodrepro.errors import DataError, TableError
from floodrepro.evaluation.chip_counts import ChipCounts
from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.evaluation.metrics import iou
from floodrepro.evaluation.passes import prepare, watched
from floodrepro.run_folder import sha256_of
from floodrepro.system.environment import environment
from floodrepro.training.recipe_cli import RecipeCLI

FILE = "panels.npz"
KINDS = ("best", "median", "worst", "dry")
MIN_FLOOD = 0.01
"""Share of counted pixels that are flood, from which a chip's flood IoU says something: on fewer, one field decides."""

_FP16 = ("16", "16-mixed", "16-true")
_TRUE_COLOUR = [S2_BANDS.index(band) for band in ("B04", "B03", "B02")]
_STRETCH = (2, 98)  # percentiles
_NO_BACKSCATTER = -100.0  # dB; no surface is so dark, and -9999 is not -9999 in float16


def choose(table: ChipTable) -> dict[str, int]:
    """Rows of the chips to show, by kind; a kind without a chip is left out.

    Best, median and worst by flood IoU among chips with a share of MIN_FLOOD flood pixels in their truth; dry: without
    flood in its truth, the one with the most pixels predicted as flood. Flood is the last class. Chip ids break ties.
    """
    pixels, truth = table.counts.sum(axis=(1, 2)), table.counts[:, -1].sum(axis=1)
    predicted, scores = table.counts[:, :, -1].sum(axis=1), iou(table.counts, table.num_classes - 1)
    wet = np.flatnonzero((truth > 0) & (truth >= MIN_FLOOD * pixels)).tolist()
    wet.sort(key=lambda row: (-scores[row], str(table.chips[row])))
    dry = np.flatnonzero((truth == 0) & (pixels > 0)).tolist()
    dry.sort(key=lambda row: (-predicted[row], str(table.chips[row])))
    places = {"best": 0, "median": len(wet) // 2, "worst": -1}
    kinds = KINDS[:3] if len(wet) > 2 else ("best", "worst")[: len(wet)]
    return {kind: wet[places[kind]] for kind in kinds} | ({"dry": dry[0]} if dry else {})


class Maps(ChipCounts):
    """Keeps truth and prediction pixel by pixel, besides counting them."""

    def __init__(self, checkpoint: Path, ignore_index: int) -> None:
        super().__init__(checkpoint, ignore_index)
        self._truth: list[npt.NDArray[np.int8]] = []
        self._prediction: list[npt.NDArray[np.int8]] = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Keep the batch's maps."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *args)
        assert self._logits is not None
        self._truth.append(pl_module.squeeze_ground_truth(batch["mask"]).to(torch.int8).cpu().numpy())
        self._prediction.append(self._logits.argmax(dim=1).to(torch.int8).cpu().numpy())

    def maps(self) -> dict[str, npt.NDArray[np.int8]]:
        """`truth` and `prediction` (P, H, W)."""
        return {"truth": np.concatenate(self._truth), "prediction": np.concatenate(self._prediction)}


def measure(recipe: Path, checkpoint: Path, table: ChipTable, folder: Path) -> dict[str, Any]:
    """Run TerraTorch's test loop over the chosen chips only and write `panels.npz`.

    Args:
        recipe: The recipe that the checkpoint was trained with; normalisation is its data module's.
        checkpoint: The weights that the table was made from.
        table: Chip table of the test split.
        folder: Where `panels.npz` goes: `titles` (P,), `before_rgb` and `event_rgb` (P, H, W, 3) uint8, `before_vv` and
            `event_vv` (P, H, W) float32 in dB with NaN where missing, `truth` and `prediction` (P, H, W) int8 with -1
            where the truth is ignored, `metres_per_pixel`, `class_names` (K,).

    Returns:
        `file`, `sha256`; `checkpoint` with `name` and `sha256`; `available`, the kinds that the table has a chip of;
        `min_flood_share`; `device`, `precision`, and whether both are the table's (`same_device`); `panels`, each with
        `kind`, `chip`, `event`, `flood_iou` (None where undefined), `pixels` (counted), `differing_pixels`: the fewest
        that must have been predicted otherwise in the pass that made the table, and `differing_share`.

    Raises:
        TableError: The table is another checkpoint's, or has no chip to show.
        UsageError, DataError, CheckpointError: As `floodrepro.evaluation.passes.prepare`.
    """
    digest = sha256_of(checkpoint)
    if (made_from := (table.metadata.get("checkpoint") or {}).get("sha256")) != digest:
        raise TableError(
            f"the chip table was made from another checkpoint (sha256 {str(made_from)[:12]}…)",
            where=checkpoint,
            fix="floodrepro test --ckpt FILE makes this one's",
        )
    rows = choose(table)
    if not rows:
        raise TableError("all pixels of the chip table are ignored: there is no chip to show")
    chosen = table.subset([str(table.chips[row]) for row in rows.values()])
    cli = _readable_here(recipe)
    seen = _run(cli, checkpoint, chosen.chips.tolist())
    counts = seen.table({}).subset(chosen.chips.tolist()).counts
    surroundings = environment(str(cli.trainer.precision))
    on_cpu = cli.trainer.strategy.root_device.type == "cpu"
    device = surroundings["cpu"]["model"] if on_cpu else surroundings["accelerator"]["name"]
    panels = [
        _compare(kind, chosen, place, int(np.abs(counts[place] - chosen.counts[place]).sum()))
        for place, kind in enumerate(rows)
    ]
    source = open_source_loudly(Path(cli.recipe["data"]["init_args"]["data_root"]))
    pictures = [_pictures(source, panel["chip"]) for panel in panels]
    names = table.metadata.get("class_names") or [f"class {k}" for k in range(table.num_classes)]
    arrays: dict[str, npt.NDArray[Any]] = {
        "titles": np.array([_title(panel) for panel in panels]),
        **{name: np.stack([picture[name] for picture in pictures]) for name in pictures[0]},
        **seen.maps(),
        "metres_per_pixel": np.array(_metres_per_pixel(source, panels[0]["chip"])),
        "class_names": np.array(names),
    }
    source.close()
    return {
        "file": FILE,
        "sha256": _write(arrays, folder / FILE),
        "checkpoint": {"name": checkpoint.name, "sha256": digest},
        "available": list(rows),
        "min_flood_share": MIN_FLOOD,
        "device": device,
        "precision": str(cli.trainer.precision),
        "same_device": (device, str(cli.trainer.precision))
        == (table.metadata.get("device"), table.metadata.get("precision")),
        "panels": panels,
    }


def _readable_here(recipe: Path) -> RecipeCLI:
    """The recipe; in fp32 where it asks for fp16 and there is no GPU: pictures can be made on any machine."""
    precision = str((recipes.read(recipe).get("trainer") or {}).get("precision"))
    in_fp32 = precision in _FP16 and not torch.cuda.is_available()
    return RecipeCLI([recipe], ["--trainer.precision=32-true"] if in_fp32 else [])


def _run(cli: RecipeCLI, checkpoint: Path, chips: list[str]) -> Maps:
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "chips.txt"
        split.write_text("".join(f"{chip}\n" for chip in chips), encoding="utf-8")

        def these_chips(config: Namespace) -> None:
            config.data.init_args.test_split = str(split)
            if "test_dataloaders_names" in config.model.init_args:
                config.model.init_args.test_dataloaders_names = None

        prepare(cli, checkpoint, "test", labels=True, wire=these_chips)
        maps = Maps(checkpoint, (cli.recipe["model"].get("init_args") or {}).get("ignore_index", IGNORE_INDEX))
        cli.trainer.callbacks.append(maps)
        with watched(cli):
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return maps


def _compare(kind: str, chosen: ChipTable, place: int, moved: int) -> dict[str, Any]:
    """A panel's entry; each pixel that is predicted otherwise leaves one count and enters another."""
    score, pixels = float(iou(chosen.counts[place], chosen.num_classes - 1)), int(chosen.counts[place].sum())
    return {
        "kind": kind,
        "chip": str(chosen.chips[place]),
        "event": str(chosen.events[place]),
        "flood_iou": None if np.isnan(score) else score,
        "predicted_flood_share": float(chosen.counts[place, :, -1].sum() / pixels),
        "pixels": pixels,
        "differing_pixels": (moved + 1) // 2,
        "differing_share": (moved + 1) // 2 / pixels,
    }


def _title(panel: dict[str, Any]) -> str:
    if panel["kind"] == "dry":
        result = f"no flood in truth, {100 * panel['predicted_flood_share']:.1f} % predicted as flood"
    else:
        result = f"flood IoU {panel['flood_iou']:.3f}"
    return f"{panel['kind']}: {panel['chip']}, event {panel['event']}, {result}"


def _pictures(source: ChipSource, chip: str) -> dict[str, npt.NDArray[Any]]:
    """True colour and VV before and at the event, as they are on disk: (T, C, H, W), S1 in dB already."""
    optical = source.read_bands(chip, "S2L2A", [BEFORE, EVENT])[:, _TRUE_COLOUR].astype(np.float32)
    seen = (optical != NO_DATA).all(axis=1)  # (2, H, W)
    colours = np.moveaxis(optical, 1, -1)
    # One stretch for both dates and all three bands, so that a change of brightness or colour is one on the ground;
    # from the darker date of each pixel, for a cloud on one date would leave the land black on both.
    darker = np.where(seen[..., None], colours, np.inf).min(axis=0)
    land = darker[np.isfinite(darker)]
    low, high = np.percentile(land, _STRETCH) if land.size else (0.0, 1.0)
    stretched = np.clip((colours - low) / max(high - low, 1.0), 0, 1)
    rgb = np.rint(255 * np.where(seen[..., None], stretched, 0)).astype(np.uint8)
    radar = source.read_bands(chip, "S1RTC", [BEFORE, EVENT])[:, S1_BANDS.index("vv")].astype(np.float32)
    vv = np.where(radar > _NO_BACKSCATTER, radar, np.float32(np.nan))  # a comparison with NaN is false
    return {"before_rgb": rgb[0], "event_rgb": rgb[1], "before_vv": vv[0], "event_vv": vv[1]}


def _metres_per_pixel(source: ChipSource, chip: str) -> float:
    path = source.path(chip, LABEL_DIR)
    try:
        with rasterio.open(path) as mask:
            return float(abs(mask.transform.a))
    except rasterio.errors.RasterioError as error:
        raise DataError(f"the mask cannot be read: {error}", where=path) from error


def _write(arrays: dict[str, npt.NDArray[Any]], path: Path) -> str:
    """Write the arrays, whole or not at all, and return the file's sha256; numpy dates all members 1980-01-01."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.getvalue())
    partial.replace(path)
    return hashlib.sha256(content.getvalue()).hexdigest()
