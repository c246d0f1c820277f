"""What the checks rest on and torch has to measure: missing chip tables, and `verification/evidence/`.

Shape suffixes: N = chips, C = bands, T = timesteps, H, W = pixels.
"""

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from floodrepro import console
from floodrepro import recipe as recipes
from floodrepro.data.protocols import data_arguments
from floodrepro.errors import CheckpointError, DataError, FloodreproError, RunFolderError, TableError, UsageError
from floodrepro.evaluation import chip_table
from floodrepro.evaluation.test import table_path, tabulate_checkpoint
from floodrepro.publishing.export import ExportedWeights, export, read_exported
from floodrepro.recipe import Recipe
from floodrepro.run_folder import RunFolder, config_beside, sha256_of, write_atomically
from floodrepro.training.checkpoint import load_strictly, read_checkpoint
from floodrepro.training.layout import without_files
from floodrepro.training.terratorch_cli import RecipeCLI
from floodrepro.verification.pictures import measure_panels

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
    path = table_path(checkpoint, split, folder)
    if _made_from(path) != sha256_of(checkpoint):
        console.say(f"{checkpoint} has no chip table over {split} yet: testing it")
        try:
            config = config_beside(checkpoint)
        except UsageError:
            config = run.recipe
        cli = _parse(config, data_root)
        tabulate_checkpoint(cli, checkpoint, split=split, folder=folder, baselines=folder is None)
    return path


def measure_all(run: RunFolder, folder: Path, split: str, data_root: Path | None) -> None:
    """Measure weights, exported pair and pictures; each leaves its file, whatever happens to the others.

    Args:
        run: The run folder.
        folder: Where the measurements go, `<name>.json` and `panels.png`.
        split: Whose chip table the pictures are compared with.
        data_root: Where the chips are, if not where the recipe says.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    digest, table = sha256_of(run.best), table_path(run.best, split)

    def keep(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        console.say(f"measuring {name.replace('_', ' ')}")
        path = folder / f"{name}.json"
        try:
            found = measure()
        except DataError as error:  # the chips are elsewhere: nothing is wrong with the run
            console.warn(f"{name} is left out: {error.what}")
            path.unlink(missing_ok=True)
            return
        except FloodreproError as error:
            found = {"problem": error.what}
        write_atomically(path, json.dumps({"measured_on": digest} | found, indent=1) + "\n")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            keep("weights", lambda: measure_weights(run.recipe, run.best, run.checkpoints / "last.ckpt"))
            keep("load_back", lambda: measure_load_back(run.recipe, run.best, *_pair(run, digest, Path(scratch))))
            keep("round_trip", lambda: measure_round_trip(run.best, *_pair(run, digest, Path(scratch))))
            keep("panels", lambda: measure_panels(_readable_here(run.recipe, data_root), run.best, table, folder))
    except OSError as error:
        what = f"the evidence cannot be written: {error.strerror}"
        raise RunFolderError(what, where=folder, fix="--output DIR puts it elsewhere") from error


def measure_weights(recipe: Path, checkpoint: Path, state: Path) -> dict[str, Any]:
    """Every parameter and buffer of a checkpoint against the recipe's model, and which of them never had a gradient.

    Args:
        recipe: The recipe whose model the checkpoint holds.
        checkpoint: A ``.ckpt``, ``.pt`` or ``.safetensors``.
        state: The run's full state, ``last.ckpt``; it may be missing.

    Raises:
        UsageError: The recipe does not build.
        CheckpointError: The checkpoint cannot be read, or the full state is damaged or another model's.
    """
    found = read_checkpoint(checkpoint).weights
    model = _build_on_cpu(recipe).model.model
    expected: dict[str, Tensor] = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}  # one name where two share a tensor
    kinds = [
        {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in one.items()} for one in (found, expected)
    ]
    return {
        "sha256": sha256_of(checkpoint),
        "tensors": len(found),
        "parameters": sum(tensor.numel() for name, tensor in found.items() if name in parameters),
        "expected_parameters": sum(tensor.numel() for name, tensor in expected.items() if name in parameters),
        "other_than_model": [
            f"{name}: {kinds[0].get(name, 'missing')} for {kinds[1].get(name, 'nothing')}"
            for name in sorted(found.keys() | expected.keys())
            if kinds[0].get(name) != kinds[1].get(name)
        ],
        "not_finite": [
            {
                "name": name,
                "kind": "parameter" if name in parameters else "buffer",
                "nan": int(tensor.isnan().sum()),
                "inf": int(tensor.isinf().sum()),
            }
            for name, tensor in found.items()
            if not bool(torch.isfinite(tensor).all())
        ],
        **_movement([name for name, _ in model.named_parameters()], state),
    }


def measure_load_back(
    recipe: Path, checkpoint: Path, pair: ExportedWeights, which: str, size: int = 64
) -> dict[str, Any]:
    """Predict fixed chips with the run's model and with the exported pair in plain TerraTorch.

    The other side is a fresh process in which floodrepro cannot be imported:
    ``LightningInferenceModel.from_config(config, weights)``. Both sides are given raw values (no-data replaced) and
    normalise them with what their own YAML says.

    Args:
        recipe: The run's recipe.
        checkpoint: The run's weights.
        pair: Exported YAML and safetensors.
        which: Which pair it is, in words.
        size: Height and width of the chips in pixels.

    Raises:
        CheckpointError: The checkpoint does not fit, or the pair does not load in plain TerraTorch.
    """
    cli = _build_on_cpu(recipe)
    load_strictly(read_checkpoint(checkpoint), cli.model, cli.recipe)
    chips = _raw_chips(cli.recipe, size)
    with torch.inference_mode():
        ours: Tensor = cli.model.model.eval()(cli.datamodule.aug({"image": dict(chips)})["image"]).output
    reads = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= _READS_SAFETENSORS
    with tempfile.TemporaryDirectory() as folder:
        weights = pair.path
        if not reads:
            weights = Path(folder) / "twin.pt"
            torch.save({f"model.{k}": v for k, v in read_checkpoint(pair.path).weights.items()}, weights)
        theirs = _predict_without_floodrepro(pair.config, weights, chips, Path(folder))
    if theirs.shape != ours.shape:
        what = f"plain TerraTorch predicts {tuple(theirs.shape)} where the run's model predicts {tuple(ours.shape)}"
        raise CheckpointError(what, where=pair.config)
    finite = bool((ours.isfinite() & theirs.isfinite()).all())
    equal = (ours.argmax(dim=1) == theirs.argmax(dim=1)).double().mean(dim=(1, 2))
    return {
        "chips": len(ours),
        "logit_difference": float((ours - theirs).abs().max()) if finite else None,
        "equal_argmax": float(equal.min()),
        "pixels": size * size,
        "through": "safetensors" if reads else "pt",
        "torch": str(torch.__version__),
        "pair": which,
    }


def measure_round_trip(checkpoint: Path, pair: ExportedWeights, which: str) -> dict[str, Any]:
    """Compare exported tensors with the checkpoint's bit for bit.

    Raises:
        CheckpointError: One of the two cannot be read.
    """
    source, written = read_checkpoint(checkpoint).weights, read_checkpoint(pair.path).weights

    def same(one: Tensor, other: Tensor) -> bool:
        bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)

    both = source.keys() & written.keys()
    return {
        "tensors": len(source),
        "differing": sorted((source.keys() ^ written.keys()) | {k for k in both if not same(source[k], written[k])}),
        "metadata": {key: value for key, value in pair.metadata.items() if key.endswith("_sha256")},
        "checkpoint_sha256": sha256_of(checkpoint),
        "pair": which,
    }


def _movement(names: Sequence[str], state: Path) -> dict[str, Any]:
    """Which parameters never had a gradient: their second moments in Adam's state are zero. None for other optimizers.

    Args:
        names: Of the model's parameters, in the order in which the optimizer was given them.
        state: The run's full state.
    """
    if not state.is_file():
        return {"trained": None, "unmoved": None}
    try:
        (optimizer,) = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["optimizer_states"]
        moments, numbers = optimizer["state"], [n for group in optimizer["param_groups"] for n in group["params"]]
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        what = f"the full state is damaged or another optimizer's: {type(error).__name__} {error}"
        raise CheckpointError(what, where=state) from error
    if len(numbers) != len(names) or any("exp_avg_sq" not in entry for entry in moments.values()):
        return {"trained": None, "unmoved": None}
    named = dict(zip(numbers, names, strict=True))
    unmoved = [name for n, name in named.items() if n not in moments or not moments[n]["exp_avg_sq"].any()]
    return {"trained": len(names), "unmoved": unmoved}


def _raw_chips(recipe: Recipe, size: int) -> dict[str, Tensor]:
    """Raw values (N, C, T, H, W) by modality: noise around the recipe's means, zeros, and both in halves."""
    arguments, generator = data_arguments(recipe), torch.Generator().manual_seed(0)
    if not arguments.get("means"):
        raise DataError("the recipe has no means of its own data: no fixed chips can be made for it")
    chips = {}
    for name, means in arguments["means"].items():
        shape = (len(means), len(arguments.get("timesteps") or range(4)), size, size)
        mean, std = (torch.tensor(arguments[key][name]).view(-1, 1, 1, 1) for key in ("means", "stds"))
        noise = mean + std * torch.randn(*shape, generator=generator)
        halves = noise.flip(-1).clone()
        halves[..., : size // 2] = 0
        chips[name] = torch.stack([noise, torch.zeros(shape), halves])
    return chips


def _predict_without_floodrepro(config: Path, weights: Path, chips: Mapping[str, Tensor], folder: Path) -> Tensor:
    given, logits = folder / "chips.pt", folder / "logits.pt"
    settings = {"precision": torch.get_float32_matmul_precision(), "threads": torch.get_num_threads()}
    torch.save({"chips": dict(chips)} | settings, given)
    # -I keeps this checkout, and whatever PYTHONPATH names, out of the other interpreter's path.
    files = [str(file.resolve()) for file in (config, weights, given, logits)]
    command = [sys.executable, "-I", "-W", "ignore", "-c", _WITHOUT_FLOODREPRO, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CheckpointError(f"plain TerraTorch does not load the pair: {lines[-1]}", where=weights)
    predicted: Tensor = torch.load(logits, weights_only=True)
    return predicted


def _pair(run: RunFolder, digest: str, scratch: Path) -> tuple[ExportedWeights, str]:
    """The pair in `export/` if it is the best checkpoint's; else one that is made for this measurement alone.

    Raises:
        CheckpointError: A pair in `export/` is damaged.
    """
    for file in sorted(run.export.glob("*.safetensors")):
        if (pair := read_exported(file)).metadata.get("source_sha256") == digest:
            return pair, "as it lies in export/"
    made = scratch / "pair.safetensors"
    pair = read_exported(made) if made.is_file() else export(run.best, recipes.read_yaml(run.recipe), scratch, "pair")
    return pair, "made for this check, since export/ holds none of this checkpoint"


def _parse(config: Path, data_root: Path | None, *more: str) -> RecipeCLI:
    overrides = recipes.data_overrides(data_root, recipes.read_yaml(config)) if data_root else []
    return RecipeCLI([config], [*overrides, *more])


def _readable_here(config: Path, data_root: Path | None) -> RecipeCLI:
    """A recipe, parsed; in fp32 where it asks for fp16 and there is no GPU."""
    fp16 = str((recipes.read_yaml(config).get("trainer") or {}).get("precision")).startswith("16")
    more = ["--trainer.precision=32-true"] if fp16 and not torch.cuda.is_available() else []
    return _parse(config, data_root, *more)


def _build_on_cpu(recipe: Path) -> RecipeCLI:
    """What a recipe describes, from random weights, on a CPU, in fp32."""

    def on_cpu(config: Namespace) -> None:
        without_files(config, progress_bar=False)
        config.trainer.accelerator, config.trainer.precision = "cpu", "32-true"

    cli = RecipeCLI([recipe])
    cli.build(on_cpu)
    return cli


def _made_from(table: Path) -> str | None:
    """The sha256 of the checkpoint that a table was made from; None where there is no table, or a damaged one."""
    try:
        return (chip_table.read_table(table).metadata.get("checkpoint") or {}).get("sha256")
    except TableError:
        return None
