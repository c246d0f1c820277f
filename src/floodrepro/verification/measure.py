"""What needs torch: chip tables that are missing, and the checks of weights, exported pair and pictures."""

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from floodrepro import console, recipe as recipes
from floodrepro.data import protocols
from floodrepro.data.chips import Chips
from floodrepro.errors import CheckpointError, DataError, FloodreproError, TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.metrics import iou
from floodrepro.evaluation.passes import ChipCounts, run_pass, table_path, tabulate_checkpoint
from floodrepro.publishing.export import read_exported
from floodrepro.run_folder import RunFolder, config_beside, replacing, sha256_of, write_atomically
from floodrepro.training.checkpoint import load_strictly, read_checkpoint
from floodrepro.training.terratorch_cli import RecipeCLI, without_files
from floodrepro.verification.battery import MEASURED
from floodrepro.verification.checks import CRITERIA, Check, figure, judge, tally
from floodrepro.verification.figures import MIN_SHARE, choose_chips_to_show, panels_png, take_pictures

_READS_SAFETENSORS = (2, 13)  # torch from this version on: its torch.load opens them
# Runs in an interpreter of its own, where nothing of floodrepro can be imported. The chips are raw, so that the
# exported YAML's statistics are part of what is compared.
_WITHOUT_FLOODREPRO = """
import sys
sys.modules["floodrepro"] = None  # an import of it raises ImportError
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
    home, config, made_from = RunFolder.of_checkpoint(checkpoint), run.recipe, None
    folder = None if home else run.evaluation / "reference"
    path = table_path(checkpoint, split, folder)
    with contextlib.suppress(TableError):  # there is none, or it is damaged
        made_from = chip_table.read_table(path).weights
    if made_from != sha256_of(checkpoint):
        console.say(f"{checkpoint} has no chip table over {split} yet: testing it")
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
        "weights": lambda: weights(run.recipe, run.best),
        "exported_pair": lambda: exported_pair(run.recipe, run.best, run.export),
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


def weights(recipe: Path, checkpoint: Path) -> Check:
    """Every tensor of a checkpoint against the recipe's model.

    Parameters alone do not tell: one overflow can leave NaN in a BatchNorm buffer only.

    Raises:
        UsageError: The recipe does not build.
        CheckpointError: The checkpoint cannot be read.
    """
    found = read_checkpoint(checkpoint).weights
    model = _build_on_cpu(recipe).model.model
    bad = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    parameters = sum(found[name].numel() for name, _ in model.named_parameters() if name in found)
    values = [
        tally("tensors with values that are not finite", bad),
        tally("tensors that differ from the recipe's model", _differing(found, model.state_dict(), lambda _: b"")),
        figure("parameters", parameters),
    ]
    return judge(values, f"{len(found)} tensors, all finite, and {parameters:,} parameters")


def exported_pair(recipe: Path, checkpoint: Path, folder: Path) -> Check:
    """The exported pair against the checkpoint: tensors to the bit, hashes in the header, and what it predicts.

    Fixed chips of raw values are given to the run's model and to the pair in plain TerraTorch
    (``LightningInferenceModel.from_config``), in a process in which floodrepro cannot be imported. Both normalise them
    with what their own YAML says.

    Raises:
        UsageError: The folder holds no pair of this checkpoint.
        CheckpointError: A file cannot be read, or the pair does not load in plain TerraTorch.
    """
    digest = sha256_of(checkpoint)
    found = (read_exported(file) for file in sorted(folder.glob("*.safetensors")))
    pair = next((one for one in found if one.metadata.get("source_sha256") == digest), None)
    if pair is None:
        raise UsageError("export/ holds no pair of this checkpoint: floodrepro export writes it", where=folder)
    source, written = read_checkpoint(checkpoint), read_checkpoint(pair.path).weights
    differing = _differing(source.weights, written, lambda raw: raw.view(torch.uint8).numpy().tobytes())
    cli, fingerprint = _build_on_cpu(recipe), recipes.fingerprint(recipes.read_yaml(recipe))
    values = [
        tally("tensors that differ from the checkpoint's", differing),
        figure("recipe in the header", pair.metadata.get("recipe_sha256"), expected=fingerprint),
    ]
    if not (chips := _raw_chips(cli.recipe)):
        return judge(values, "", "the recipe has no means of its own data: no chips can be made to be predicted")
    load_strictly(source, cli.model, cli.recipe)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        ours: Tensor = cli.model.model.eval()(cli.datamodule.aug({"image": dict(chips)})["image"]).output
        given, logits, file, notes = Path(scratch, "chips.pt"), Path(scratch, "logits.pt"), pair.path, []
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _READS_SAFETENSORS:
            file = Path(scratch, "twin.pt")
            torch.save({f"model.{name}": tensor for name, tensor in written.items()}, file)
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
        raise CheckpointError(f"the pair predicts {tuple(theirs.shape)}, the run's model {tuple(ours.shape)}")
    asked, gap = CRITERIA["exported_pair"], float((ours - theirs).abs().max())
    equal = (ours.argmax(dim=1) == theirs.argmax(dim=1)).double().mean(dim=(1, 2))
    values += [
        figure("largest difference of logits", gap if math.isfinite(gap) else None, at_most=asked["logit_difference"]),
        figure("smallest share of equal pixels", float(equal.min()), at_least=asked["equal_argmax"]),
    ]
    return judge(values, f"{len(written)} tensors, bit for bit; {len(ours)} chips predicted the same", notes=notes)


def panels(cli: RecipeCLI, checkpoint: Path, table_file: Path, folder: Path) -> Check:
    """Run TerraTorch's test loop over a few chips of a table, compare their counts with it, and draw `panels.png`.

    Raises:
        TableError: The table is missing or damaged, or has no chip to show.
        UsageError, DataError, CheckpointError: As `floodrepro.evaluation.passes.run_pass`.
    """
    if not protocols.uses_flood_data_module(cli.recipe):
        raise UsageError("the files of another data module are not drawn")
    table = chip_table.read_table(table_file)
    positive, shown = table.positive, choose_chips_to_show(table)
    name = table.metadata["class_names"][positive]
    chips, counts = [str(table.chips[row]) for row in shown.values()], table.counts[list(shown.values())]
    maps = _Maps(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "chips.txt").write_text("\n".join(chips), encoding="utf-8")
        run_pass(cli, "test", maps, "test", file=str(Path(scratch, "chips.txt")))
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
    with replacing(folder / "panels.png") as partial:
        partial.write_bytes(panels_png(drawn, table.metadata["class_names"], positive))
    caption = (
        f"A row a chip. Best, median and worst by {name} IoU among chips whose truth has at least {MIN_SHARE:.0%} "
        f"{name}; the empty chip is the one without any that has the most false alarms."
    )
    most, what = CRITERIA["panels"]["differing_share"], "share of pixels predicted otherwise than in the table"
    found = f"{', '.join(shown)} chip shown, " + (f"{worst:.2g} differ" if worst else "as in the table")
    plot = {"name": "panels", "kind": "panels", "caption": caption}
    return judge([figure(f"largest {what}", worst, at_most=most)], found, plots=[plot])


class _Maps(ChipCounts):
    """Keeps truth and prediction (H, W) of each chip, besides counting them."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.seen: dict[str, dict[str, npt.NDArray[np.int8]]] = {}

    def use(self, logits: Tensor, files: list[tuple[str, str]], batch: Any, task: Any) -> None:
        super().use(logits, files, batch, task)
        pairs = (task.squeeze_ground_truth(batch["mask"]), logits.argmax(dim=1))
        truth, prediction = (each.to(torch.int8).cpu().numpy() for each in pairs)
        for n, (chip, _) in enumerate(files):
            self.seen[chip] = {"truth": truth[n], "prediction": prediction[n]}


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor], bits: Callable[[Tensor], bytes]) -> list[str]:
    """Names of tensors that are not in both with one type, one shape and the same bits."""
    ours, theirs = (
        {(name, tensor.dtype, tensor.shape, bits(tensor.contiguous().reshape(-1))) for name, tensor in each.items()}
        for each in (one, other)
    )
    return sorted({name for name, *_ in ours ^ theirs})


def _raw_chips(recipe: recipes.Recipe) -> dict[str, Tensor]:
    """Raw values (2, bands, timesteps, H, W) by modality: noise around the means; of the second chip a half is zero."""
    arguments, generator, chips = protocols.data_arguments(recipe), torch.Generator().manual_seed(0), {}
    for name, means in (arguments.get("means") or {}).items():
        shape = (2, len(means), len(arguments.get("timesteps") or range(4)), 64, 64)
        mean, std = (torch.tensor(arguments[key][name]).view(-1, 1, 1, 1) for key in ("means", "stds"))
        chips[name] = mean + std * torch.randn(shape, generator=generator)
        chips[name][1, ..., :32] = 0
    return chips


def _parse(config: Path, data_root: Path | None) -> RecipeCLI:
    return RecipeCLI([config], recipes.data_overrides(data_root, recipes.read_yaml(config)) if data_root else [])


def _build_on_cpu(recipe: Path) -> RecipeCLI:
    """What a recipe describes, from random weights, on a CPU, in fp32."""
    cli = RecipeCLI([recipe])
    without_files(cli.config)
    cli.config.trainer.accelerator, cli.config.trainer.precision = "cpu", "32-true"
    cli.build()
    return cli
