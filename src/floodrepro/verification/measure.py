"""What needs torch: chip tables that are missing, and the checks of weights, exported pair and pictures.

Shape suffixes: N = chips, C = bands, T = timesteps, H, W = pixels.
"""

import contextlib
import json
import math
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from torch import Tensor

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.errors import CheckpointError, DataError, FloodreproError, TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.metrics import iou
from floodrepro.evaluation.passes import chip_of, run_pass
from floodrepro.evaluation.test import ChipCounts, table_path, tabulate_checkpoint
from floodrepro.publishing.export import ExportedWeights, read_exported
from floodrepro.run_folder import RunFolder, config_beside, sha256_of, write_atomically
from floodrepro.training.checkpoint import load_strictly, read_checkpoint
from floodrepro.training.terratorch_cli import RecipeCLI, without_files
from floodrepro.verification.battery import MEASURED
from floodrepro.verification.checks import CRITERIA, Check, figure, judge
from floodrepro.verification.figures import MIN_SHARE, choose_chips_to_show, panels_png, take_pictures

_READS_SAFETENSORS = (2, 13)  # torch from this version on: its torch.load opens them
# Runs in an interpreter of its own, where nothing of floodrepro can be imported. The chips are raw, so that the
# exported YAML's statistics are part of what is compared.
_WITHOUT_FLOODREPRO = """
import os, sys
sys.modules["floodrepro"] = None  # an import of it raises ImportError
os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import torch
from terratorch.cli_tools import LightningInferenceModel
_, config, weights, given, logits = sys.argv
given = torch.load(given, weights_only=True)
torch.set_float32_matmul_precision(given["precision"])
torch.set_num_threads(given["threads"])
sys.argv = sys.argv[:1]
wrapper = LightningInferenceModel.from_config(config, weights)
network = wrapper.model.model.eval()  # from_config leaves it in train mode
with torch.inference_mode():
    torch.save(network(wrapper.datamodule.aug({"image": given["chips"]})["image"]).output, logits)
"""


def table_of(run: RunFolder, checkpoint: Path, split: str, data_root: Path | None) -> Path:
    """The chip table of a checkpoint; it is tested first if it has none.

    A checkpoint outside a run folder is read with the config beside it or, without one, with this run's, and its
    table is kept in this run's `evaluation/reference/`.

    Raises:
        FloodreproError: It cannot be tested.
    """
    folder = None if RunFolder.of_checkpoint(checkpoint) else run.evaluation / "reference"
    path, made_from = table_path(checkpoint, split, folder), None
    with contextlib.suppress(TableError):  # there is none, or it is damaged
        made_from = (chip_table.read_table(path).metadata.get("checkpoint") or {}).get("sha256")
    if made_from != sha256_of(checkpoint):
        console.say(f"{checkpoint} has no chip table over {split} yet: testing it")
        home, config = RunFolder.of_checkpoint(checkpoint), run.recipe
        with contextlib.suppress(UsageError):
            config = home.recipe if home else config_beside(checkpoint)
        tabulate_checkpoint(_parse(config, data_root), checkpoint, split=split, folder=folder, baselines=folder is None)
    return path


def measure_all(run: RunFolder, folder: Path, split: str, data_root: Path | None) -> None:
    """Make the checks of weights, exported pair and pictures, and keep answers and `panels.png` in the folder.

    An error fails its check; what is no fault of the run, chips that are elsewhere or fp16 on a CPU, skips it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, table = sha256_of(run.best), table_path(run.best, split)
    makers: dict[str, Callable[[], Check]] = {
        "weights": lambda: weights(run.recipe, run.best, run.checkpoints / "last.ckpt"),
        "load_back": lambda: load_back(run.recipe, run.best, _pair(run, digest)),
        "round_trip": lambda: round_trip(run.recipe, run.best, _pair(run, digest)),
        "panels": lambda: panels(_parse(run.recipe, data_root), run.best, table, folder),
    }
    answers: dict[str, Check] = {}
    for name, make in makers.items():
        console.say(f"measuring {name.replace('_', ' ')}")
        try:
            answers[name] = make()
        except FloodreproError as error:
            status = "skip" if isinstance(error, DataError | UsageError) else "fail"
            answers[name] = {"status": status, "finding": error.what}
    write_atomically(folder / MEASURED, json.dumps({"measured_on": digest, "checks": answers}, indent=1) + "\n")


def weights(recipe: Path, checkpoint: Path, state: Path) -> Check:
    """Every tensor of a checkpoint against the recipe's model, and which of them never had a gradient.

    Parameters alone do not tell: one overflow can leave NaN in a BatchNorm buffer only. `state` is the run's full
    state, ``last.ckpt``; without it, or with another optimizer than Adam, movement is unknown.

    Raises:
        UsageError: The recipe does not build.
        CheckpointError: The checkpoint or the full state cannot be read.
    """
    found = read_checkpoint(checkpoint).weights
    model = _build_on_cpu(recipe).model.model
    parameters = [name for name, _ in model.named_parameters()]  # one name where two share a tensor
    ours, theirs = ({k: f"{v.dtype} {tuple(v.shape)}" for k, v in one.items()} for one in (found, model.state_dict()))
    other = [
        f"{name}: {ours.get(name, 'missing')} for {theirs.get(name, 'nothing')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    bad = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    values = [
        _named("tensors with values that are not finite", bad),
        _named("tensors that differ from the recipe's model", other),
        figure("parameters", sum(found[name].numel() for name in parameters if name in found)),
    ]
    moved = "how far they moved is unknown"
    if (unmoved := _unmoved(parameters, state)) is not None:
        values.append(_named("trained tensors that never moved", unmoved, CRITERIA["weights"]["unmoved"]))
        moved = f"{len(parameters)} trained tensors, all moved"
    return judge(values, f"{len(found)} tensors, all finite; {moved}")


def load_back(recipe: Path, checkpoint: Path, pair: ExportedWeights, size: int = 64) -> Check:
    """Predict fixed chips of so many pixels with the run's model and with the exported pair in plain TerraTorch.

    The other side is a fresh process in which floodrepro cannot be imported:
    ``LightningInferenceModel.from_config(config, weights)``. Both sides are given raw values (no-data replaced) and
    normalise them with what their own YAML says.

    Raises:
        DataError: The recipe names no statistics: there is nothing to make chips of.
        CheckpointError: The checkpoint does not fit, or the pair does not load in plain TerraTorch.
    """
    cli, asked, notes = _build_on_cpu(recipe), CRITERIA["load_back"], []
    load_strictly(read_checkpoint(checkpoint), cli.model, cli.recipe)
    chips = _raw_chips(cli.recipe, size)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        ours: Tensor = cli.model.model.eval()(cli.datamodule.aug({"image": dict(chips)})["image"]).output
        given, logits, file = Path(scratch) / "chips.pt", Path(scratch) / "logits.pt", pair.path
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _READS_SAFETENSORS:
            file = Path(scratch) / "twin.pt"
            torch.save({f"model.{k}": v for k, v in read_checkpoint(pair.path).weights.items()}, file)
            notes.append(f"torch {torch.__version__} cannot load safetensors (2.13 can): a .pt twin was loaded.")
        settings = {"precision": torch.get_float32_matmul_precision(), "threads": torch.get_num_threads()}
        torch.save({"chips": chips} | settings, given)
        # -I keeps this checkout, and whatever PYTHONPATH names, out of the other interpreter's path.
        command = [sys.executable, "-I", "-W", "ignore", "-c", _WITHOUT_FLOODREPRO]
        command += [str(path.resolve()) for path in (pair.config, file, given, logits)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise CheckpointError(f"plain TerraTorch does not load the pair: {lines[-1]}", where=pair.path)
        theirs: Tensor = torch.load(logits, weights_only=True)
    if theirs.shape != ours.shape:
        what = f"plain TerraTorch predicts {tuple(theirs.shape)} where the run's model predicts {tuple(ours.shape)}"
        raise CheckpointError(what, where=pair.config)
    gap = float((ours - theirs).abs().max())
    equal = (ours.argmax(dim=1) == theirs.argmax(dim=1)).double().mean(dim=(1, 2))
    values = [
        figure("largest difference of logits", gap if math.isfinite(gap) else None, at_most=asked["logit_difference"]),
        figure("smallest share of equal pixels", float(equal.min()), at_least=asked["equal_argmax"]),
    ]
    return judge(values, f"{len(ours)} chips of {size * size:,} pixels predicted the same", notes=notes)


def round_trip(recipe: Path, checkpoint: Path, pair: ExportedWeights) -> Check:
    """The exported file against the checkpoint: tensors to the bit, and the hashes in its header.

    Raises:
        CheckpointError: One of the two cannot be read.
    """
    source, written = read_checkpoint(checkpoint).weights, read_checkpoint(pair.path).weights

    def bits(tensor: Tensor | None) -> tuple[Any, ...] | None:
        if tensor is None:
            return None
        return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    names = sorted(source.keys() | written.keys())
    differing = [name for name in names if bits(source.get(name)) != bits(written.get(name))]
    hashes = {"recipe_sha256": recipes.fingerprint(recipes.read_yaml(recipe)), "source_sha256": sha256_of(checkpoint)}
    values = [
        _named("tensors that differ from the checkpoint's", differing),
        *(figure(f"{key} in the header", pair.metadata.get(key), expected=sha) for key, sha in hashes.items()),
    ]
    return judge(values, f"{len(source)} tensors, bit for bit")


def panels(cli: RecipeCLI, checkpoint: Path, table_file: Path, folder: Path) -> Check:
    """Run TerraTorch's test loop over a few chips of a table, compare their counts with it, and draw `panels.png`.

    Raises:
        TableError: The table is missing, damaged, another checkpoint's, or has no chip to show.
        UsageError, DataError, CheckpointError: As `floodrepro.evaluation.passes.run_pass`.
    """
    table = chip_table.read_table(table_file)
    if (table.metadata.get("checkpoint") or {}).get("sha256") != sha256_of(checkpoint):
        raise TableError("the chip table was made from another checkpoint", where=table_file, fix="test it again")
    positive = protocols.positive_class_of(cli.recipe)
    shown, name = choose_chips_to_show(table, positive), table.class_names[positive]
    chips, counts = [str(table.chips[row]) for row in shown.values()], table.counts[list(shown.values())]
    maps = _predict_chips(cli, checkpoint, chips)
    # The fewest that must have been predicted otherwise: a pixel leaves one count and enters another.
    moved = (np.abs(maps.table({}, {}).subset(chips).counts - counts).sum(axis=(1, 2)) + 1) // 2
    worst = float((moved / counts.sum(axis=(1, 2))).max())
    source = Chips(Path(protocols.data_arguments(cli.recipe)["data_root"]), protocols.protocol_of(cli.recipe))
    drawn = []
    for kind, chip, one in zip(shown, chips, counts, strict=True):
        alarms = f"no {name} in truth, {one[:, positive].sum() / one.sum():.1%} predicted"
        says = alarms if kind == "empty" else f"{name} IoU {float(iou(one, positive)):.3f}"
        pictures = take_pictures(source.bands(chip, "S2L2A"), source.bands(chip, "S1RTC"))
        drawn.append({"title": f"{kind}: {chip}, {says}", **maps.seen[chip], **pictures})
    with rasterio.open(source.path(chips[0], protocols.LABEL_DIR), driver="GTiff") as mask:
        metres = float(abs(mask.transform.a))
    (folder / "panels.png").write_bytes(panels_png(drawn, table.class_names, positive, metres))
    caption = (
        "A row a chip: Sentinel-2 in true colour and Sentinel-1 VV before and at the event, the truth, the prediction, "
        f"and where they differ. Best, median and worst by {name} IoU among chips whose truth has at least "
        f"{MIN_SHARE:.0%} {name}; the empty chip is the one without any that has the most false alarms."
    )
    what, allowed = (
        "largest share of pixels predicted otherwise than in the table",
        CRITERIA["panels"]["differing_share"],
    )
    found = f"{', '.join(shown)} chip shown, " + (f"{worst:.2g} differ" if worst else "as in the table")
    plot = {"name": "panels", "kind": "panels", "caption": caption}
    return judge([figure(what, worst, at_most=allowed)], found, plots=[plot])


class _Maps(ChipCounts):
    """Keeps truth and prediction (H, W) of each chip, besides counting them."""

    seen: dict[str, dict[str, npt.NDArray[np.int8]]]

    def use(self, logits: Tensor, files: list[str], batch: Any, task: Any) -> None:
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


def _named(what: str, names: Sequence[str], allowed: int = 0) -> dict[str, Any]:
    """How many there are, and the first of them by name."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    return figure(f"{what} ({shown})" if names else what, len(names), at_most=allowed)


def _unmoved(names: Sequence[str], state: Path) -> list[str] | None:
    """Which parameters, in the model's order, never had a gradient: Adam's second moments of them are zero."""
    if not state.is_file():
        return None
    try:
        (optimizer,) = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["optimizer_states"]
        moments, numbers = optimizer["state"], [n for group in optimizer["param_groups"] for n in group["params"]]
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        what = f"the full state is damaged or another optimizer's: {type(error).__name__} {error}"
        raise CheckpointError(what, where=state) from error
    if len(numbers) != len(names) or any("exp_avg_sq" not in entry for entry in moments.values()):
        return None
    named = dict(zip(numbers, names, strict=True))
    return [name for n, name in named.items() if n not in moments or not moments[n]["exp_avg_sq"].any()]


def _raw_chips(recipe: recipes.Recipe, size: int) -> dict[str, Tensor]:
    """Raw values (2, C, T, H, W) by modality: noise around the recipe's means, of the second chip a half is zero."""
    arguments, generator = protocols.data_arguments(recipe), torch.Generator().manual_seed(0)
    if not arguments.get("means"):
        raise DataError("the recipe has no means of its own data: no fixed chips can be made for it")
    chips = {}
    for name, means in arguments["means"].items():
        shape = (2, len(means), len(arguments.get("timesteps") or range(4)), size, size)
        mean, std = (torch.tensor(arguments[key][name]).view(-1, 1, 1, 1) for key in ("means", "stds"))
        chips[name] = mean + std * torch.randn(shape, generator=generator)
        chips[name][1, ..., : size // 2] = 0
    return chips


def _pair(run: RunFolder, digest: str) -> ExportedWeights:
    for file in sorted(run.export.glob("*.safetensors")):
        if (pair := read_exported(file)).metadata.get("source_sha256") == digest:
            return pair
    raise UsageError("export/ holds no pair of this checkpoint: floodrepro export writes it", where=run.export)


def _parse(config: Path, data_root: Path | None) -> RecipeCLI:
    overrides = recipes.data_overrides(data_root, recipes.read_yaml(config)) if data_root else []
    return RecipeCLI([config], overrides)


def _build_on_cpu(recipe: Path) -> RecipeCLI:
    """What a recipe describes, from random weights, on a CPU, in fp32."""
    cli = RecipeCLI([recipe])
    without_files(cli.config)
    cli.config.trainer.accelerator, cli.config.trainer.precision = "cpu", "32-true"
    cli.build()
    return cli
