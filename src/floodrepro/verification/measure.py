"""What needs torch: chip tables that are missing, and the checks of weights, exported pair and pictures.

Their answers are kept in `verification/evidence/`, from which `battery.gather` reads them.

Shape suffixes: N = chips, C = bands, T = timesteps, H, W = pixels.
"""

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
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
from floodrepro.training.terratorch_cli import RecipeCLI, without_files
from floodrepro.verification.battery import load_criteria
from floodrepro.verification.check import Check, Table, Value, judge
from floodrepro.verification.pictures import panels

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
    """Make the checks of weights, exported pair and pictures, and keep each answer, whatever the others say.

    Args:
        run: The run folder.
        folder: Where the answers go, `<check>.json`, and `panels.png`.
        split: Whose chip table the pictures are compared with.
        data_root: Where the chips are, if not where the recipe says.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    digest, table = sha256_of(run.best), table_path(run.best, split)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the evidence cannot be written: {error.strerror}"
        raise RunFolderError(what, where=folder, fix="--output DIR puts it elsewhere") from error

    def keep(name: str, check: Callable[[], Check]) -> None:
        console.say(f"measuring {name.replace('_', ' ')}")
        path = folder / f"{name}.json"
        try:
            answer = check()
        except DataError as error:  # the chips are elsewhere: nothing is wrong with the run
            console.warn(f"{name} is left out: {error.what}")
            path.unlink(missing_ok=True)
            return
        except FloodreproError as error:
            answer = Check("fail", error.what)
        kept = {"measured_on": digest, "check": asdict(replace(answer, code=f"{__name__}.{name}"))}
        write_atomically(path, json.dumps(kept, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        keep("weights", lambda: weights(run.recipe, run.best, run.checkpoints / "last.ckpt"))
        keep("load_back", lambda: load_back(run.recipe, run.best, *_pair(run, digest, Path(scratch))))
        keep("round_trip", lambda: round_trip(run.recipe, run.best, *_pair(run, digest, Path(scratch))))
    keep("panels", lambda: panels(_readable_here(run.recipe, data_root), run.best, table, folder))


def weights(recipe: Path, checkpoint: Path, state: Path) -> Check:
    """Every tensor of a checkpoint against the recipe's model, and which of them never had a gradient.

    Parameters alone do not tell: one overflow can leave NaN in a BatchNorm buffer only.

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
    parameters = [name for name, _ in model.named_parameters()]  # one name where two share a tensor
    ours, theirs = ({k: f"{v.dtype} {tuple(v.shape)}" for k, v in one.items()} for one in (found, expected))
    other = [
        f"{name}: {ours.get(name, 'missing')} for {theirs.get(name, 'nothing')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    bad = {name: tensor for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())}
    sizes = [sum(one[name].numel() for name in parameters if name in one) for one in (found, expected)]
    values = [
        _named("tensors with values that are not finite", list(bad)),
        _named("tensors that differ from the recipe's model", other),
        Value("parameters", sizes[0], expected=sizes[1]),
    ]
    moved = "how far they moved is unknown"
    if (unmoved := _unmoved(parameters, state)) is not None:
        values.append(_named("trained tensors that never moved", unmoved, load_criteria()["weights"]["unmoved"]))
        moved = f"{len(parameters)} trained tensors, all moved"
    rows = [
        [name, "parameter" if name in parameters else "buffer", int(tensor.isnan().sum()), int(tensor.isinf().sum())]
        for name, tensor in bad.items()
    ]
    tables = [Table("Values that are not finite", ["tensor", "kind", "NaN", "inf"], rows)]
    return judge(values, f"{len(found)} tensors, all finite; {moved}", tables=tables)


def load_back(recipe: Path, checkpoint: Path, pair: ExportedWeights, which: str, size: int = 64) -> Check:
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
    cli, asked = _build_on_cpu(recipe), load_criteria()["load_back"]
    load_strictly(read_checkpoint(checkpoint), cli.model, cli.recipe)
    chips = _raw_chips(cli.recipe, size)
    with torch.inference_mode():
        ours: Tensor = cli.model.model.eval()(cli.datamodule.aug({"image": dict(chips)})["image"]).output
    notes = [f"The pair that was measured: {which}."]
    with tempfile.TemporaryDirectory() as folder:
        file = pair.path
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _READS_SAFETENSORS:
            file = Path(folder) / "twin.pt"
            torch.save({f"model.{k}": v for k, v in read_checkpoint(pair.path).weights.items()}, file)
            notes.append(f"torch {torch.__version__} cannot load safetensors (2.13 can): a .pt twin was loaded.")
        theirs = _predict_without_floodrepro(pair.config, file, chips, Path(folder))
    if theirs.shape != ours.shape:
        what = f"plain TerraTorch predicts {tuple(theirs.shape)} where the run's model predicts {tuple(ours.shape)}"
        raise CheckpointError(what, where=pair.config)
    finite = bool((ours.isfinite() & theirs.isfinite()).all())
    gap = float((ours - theirs).abs().max()) if finite else None
    equal = (ours.argmax(dim=1) == theirs.argmax(dim=1)).double().mean(dim=(1, 2))
    values = [
        Value("largest difference of logits", gap, at_most=asked["logit_difference"]),
        Value("smallest share of equal pixels", float(equal.min()), at_least=asked["equal_argmax"]),
    ]
    return judge(values, f"{len(ours)} chips of {size * size:,} pixels predicted the same", notes=notes)


def round_trip(recipe: Path, checkpoint: Path, pair: ExportedWeights, which: str) -> Check:
    """The exported file against the checkpoint: tensors to the bit, and the hashes in its header.

    Raises:
        CheckpointError: One of the two cannot be read.
    """
    source, written = read_checkpoint(checkpoint).weights, read_checkpoint(pair.path).weights

    def same(one: Tensor, other: Tensor) -> bool:
        bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)

    both = source.keys() & written.keys()
    differing = (source.keys() ^ written.keys()) | {name for name in both if not same(source[name], written[name])}
    hashes = {"recipe_sha256": recipes.fingerprint(recipes.read_yaml(recipe)), "source_sha256": sha256_of(checkpoint)}
    values = [
        _named("tensors that differ from the checkpoint's", sorted(differing)),
        *(Value(f"{key} in the header", pair.metadata.get(key), expected=sha) for key, sha in hashes.items()),
    ]
    notes = [f"The pair that was measured: {which}."]
    return judge(values, f"{len(source)} tensors, bit for bit", notes=notes)


def _named(what: str, names: Sequence[str], allowed: int = 0) -> Value:
    """How many there are, and the first of them by name."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    return Value(f"{what} ({shown})" if names else what, len(names), at_most=allowed)


def _unmoved(names: Sequence[str], state: Path) -> list[str] | None:
    """Which parameters never had a gradient: their second moments in Adam's state are zero. None for other optimizers.

    Args:
        names: Of the model's parameters, in the order in which the optimizer was given them.
        state: The run's full state.
    """
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
    cli = RecipeCLI([recipe])
    without_files(cli.config)
    cli.config.trainer.accelerator, cli.config.trainer.precision = "cpu", "32-true"
    cli.build()
    return cli


def _made_from(table: Path) -> str | None:
    """The sha256 of the checkpoint that a table was made from; None where there is no table, or a damaged one."""
    try:
        return (chip_table.read_table(table).metadata.get("checkpoint") or {}).get("sha256")
    except TableError:
        return None
