"""Is what leaves the run folder what was trained? Evidence for the checks `load_back` and `round_trip`.

Shape suffixes: N = chips, C = bands, T = timesteps, K = classes, H, W = pixels.
"""

import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from floodrepro.data.names import NO_DATA
from floodrepro.data.scene import make_scene
from floodrepro.errors import CheckpointError
from floodrepro.evaluation.checkpoint import load_strictly, read_checkpoint
from floodrepro.evaluation.measured import build_on_cpu
from floodrepro.recipe import Recipe
from floodrepro.run_folder import sha256_of
from floodrepro.training.starting_point import tensor_sha256

CHIPS = ("noise", "zeros", "flood scene")
_READS_SAFETENSORS = (2, 13)  # torch from this version on: its torch.load opens them

# Runs in the other interpreter, where nothing of floodrepro can be imported. The chips are raw, so that the exported
# YAML's statistics are part of what is compared.
_STRANGER = """
import json, os, sys
sys.modules["floodrepro"] = None  # an import of it raises ImportError
os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import torch
from terratorch.cli_tools import LightningInferenceModel
request = json.loads(sys.argv[1])
torch.set_float32_matmul_precision(request["matmul_precision"])
torch.set_num_threads(request["threads"])
sys.argv = sys.argv[:1]
wrapper = LightningInferenceModel.from_config(request["config"], request["weights"])
network = wrapper.model.model.eval()  # from_config leaves it in train mode
chips = torch.load(request["chips"], weights_only=True)
with torch.inference_mode():
    logits = network(wrapper.datamodule.aug({"image": chips})["image"]).output
torch.save(logits, request["logits"])
"""


def measure_load_back(recipe: Path, checkpoint: Path, config: Path, weights: Path, size: int = 64) -> dict[str, Any]:
    """Predict fixed chips with our model and with the exported pair in plain TerraTorch, and compare.

    The other side is a fresh process in which floodrepro cannot be imported:
    ``LightningInferenceModel.from_config(config, weights)``. Both sides are given raw values (no-data replaced) and
    normalise them with what their own YAML says.

    Args:
        recipe: The run's recipe.
        checkpoint: The run's weights.
        config: Exported YAML.
        weights: Exported safetensors.
        size: Height and width of the chips in pixels.

    Returns:
        `chips`, each with `name`, `logit_difference` (largest; None where a logit is not finite) and `equal_argmax`
        (share of pixels, 0 to 1); the worst of both over all chips under the same names; `pixels` of one chip;
        `through`, what was loaded there: safetensors, or pt (a twin with the same tensors, for an older torch);
        `config` and `weights` with `name` and `sha256`; `torch`, its version.

    Raises:
        CheckpointError: The checkpoint does not fit, or the pair does not load in plain TerraTorch.
    """
    cli = build_on_cpu(recipe)
    load_strictly(read_checkpoint(checkpoint), cli.model, cli.recipe)
    chips = raw_chips(cli.recipe, size)
    with torch.inference_mode():
        ours: Tensor = cli.model.model.eval()(cli.datamodule.aug({"image": dict(chips)})["image"]).output
    with tempfile.TemporaryDirectory() as folder:
        readable = _as_torch_reads_it(weights, Path(folder))
        theirs = _predict_in_plain_terratorch(config, readable, chips, Path(folder))
    if theirs.shape != ours.shape:
        raise CheckpointError(
            f"plain TerraTorch predicts {tuple(theirs.shape)} where we predict {tuple(ours.shape)}", where=config
        )
    differences = (ours - theirs).abs().amax(dim=(1, 2, 3)).tolist()
    equal = (ours.argmax(dim=1) == theirs.argmax(dim=1)).double().mean(dim=(1, 2)).tolist()
    finite = (ours.isfinite() & theirs.isfinite()).flatten(1).all(dim=1).tolist()
    compared = [
        {"name": name, "logit_difference": difference if ok else None, "equal_argmax": share}
        for name, difference, share, ok in zip(CHIPS, differences, equal, finite, strict=True)
    ]
    return {
        "chips": compared,
        "logit_difference": max(differences) if all(finite) else None,
        "equal_argmax": min(equal),
        "pixels": size * size,
        "through": readable.suffix.removeprefix("."),
        "config": {"name": config.name, "sha256": sha256_of(config)},
        "weights": {"name": weights.name, "sha256": sha256_of(weights)},
        "torch": str(torch.__version__),
    }


def raw_chips(recipe: Recipe, size: int) -> dict[str, Tensor]:
    """The fixed chips of `CHIPS`, the same at every call.

    Normal noise around the recipe's own means; zeros, which no-data becomes; and a generated flood with clouds, swath
    edges and no-data.

    Args:
        recipe: A recipe whose data section has ``means``, ``stds`` and ``timesteps``.
        size: Height and width in pixels.

    Returns:
        By modality, float32 (N, C, T, H, W) in the units of the data: reflectance x 10,000, dB, metres.
    """
    data, steps = recipe["data"]["init_args"], len(recipe["data"]["init_args"]["timesteps"])
    generator = torch.Generator().manual_seed(0)
    scene = make_scene(np.random.default_rng(0), (size, size), s1_edge=True, s2_edge=True)
    drawn = {"S2L2A": scene.s2, "S1RTC": scene.s1, "DEM": np.broadcast_to(scene.elevation, (4, 1, size, size))}
    chips = {}
    for name, means in data["means"].items():
        shape = len(means), steps, size, size
        mean, std = (torch.tensor(data[key][name]).view(-1, 1, 1, 1) for key in ("means", "stds"))
        bands = (data.get("bands") or {}).get(name, range(drawn[name].shape[1]))
        values = drawn[name][data["timesteps"]][:, list(bands)].astype(np.float32)
        values[np.isnan(values) | (values == NO_DATA)] = data.get("no_data_replace") or 0
        flood = torch.from_numpy(values).transpose(0, 1)
        chips[name] = torch.stack([mean + std * torch.randn(*shape, generator=generator), torch.zeros(shape), flood])
    return chips


def _as_torch_reads_it(weights: Path, folder: Path) -> Path:
    """The weights; for a torch that cannot load safetensors, a ``.pt`` with the same tensors."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= _READS_SAFETENSORS:
        return weights
    twin = folder / f"{weights.stem}.pt"
    torch.save(load_file(weights), twin)
    return twin


def _predict_in_plain_terratorch(config: Path, weights: Path, chips: Mapping[str, Tensor], folder: Path) -> Tensor:
    given, logits = folder / "chips.pt", folder / "logits.pt"
    request = {
        "config": str(config.resolve()),
        "weights": str(weights.resolve()),
        "chips": str(given),
        "logits": str(logits),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }
    torch.save(dict(chips), given)
    # -I keeps this checkout, and whatever PYTHONPATH names, out of the other interpreter's path.
    command = [sys.executable, "-I", "-W", "ignore", "-c", _STRANGER, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CheckpointError(f"plain TerraTorch does not load the pair: {lines[-1]}", where=weights)
    predicted: Tensor = torch.load(logits, weights_only=True)
    return predicted


def measure_round_trip(checkpoint: Path, weights: Path) -> dict[str, Any]:
    """Compare exported tensors with the checkpoint's bit for bit, and see that a tampered header is refused.

    Args:
        checkpoint: The run's weights.
        weights: Exported safetensors.

    Returns:
        `checkpoint` and `weights` with `name` and `sha256`; `tensors`, number compared; `altered`, `missing`, `added`,
        names; `metadata`, the file's without the hyper-parameters; `untampered_accepted`, whether the reader opens the
        copy before it is tampered with; `refused`, by kind of tampering, whether the reader refuses it then.

    Raises:
        CheckpointError: One of the two cannot be read.
    """
    source, written = read_checkpoint(checkpoint).weights, read_checkpoint(weights).weights
    with safe_open(str(weights), framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "hyper_parameters"}
    common = [name for name in source if name in written]
    return {
        "checkpoint": {"name": checkpoint.name, "sha256": sha256_of(checkpoint)},
        "weights": {"name": weights.name, "sha256": sha256_of(weights)},
        "tensors": len(common),
        "altered": [name for name in common if not _same_bits(source[name], written[name])],
        "missing": [name for name in source if name not in written],
        "added": [name for name in written if name not in source],
        "metadata": metadata,
        **_tampering(weights),
    }


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and tensor_sha256(one) == tensor_sha256(other)


def _tampering(weights: Path) -> dict[str, Any]:
    """Tamper with copies of a header; the data behind it are as many zeros, which a header is not checked against.

    A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes
    (https://github.com/huggingface/safetensors, "Format").
    """
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
    size = weights.stat().st_size
    offsets = header.index(b'"data_offsets":[', header.index(b'"dtype"')) + len(b'"data_offsets":[')
    end = header.index(b"]", offsets) - 1
    changes = {
        "length field one more": (struct.pack("<Q", length + 1), header, size),
        "length field beyond the file": (struct.pack("<Q", size), header, size),
        "first byte of the JSON": (struct.pack("<Q", length), b"[" + header[1:], size),
        "one digit of an offset": (struct.pack("<Q", length), _with_other_digit(header, end), size),
        "one byte cut off the end": (struct.pack("<Q", length), header, size - 1),
    }
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / weights.name
        accepted = _is_accepted(copy, struct.pack("<Q", length), header, size)
        refused = {name: not _is_accepted(copy, *change) for name, change in changes.items()}
    return {"untampered_accepted": accepted, "refused": refused}


def _with_other_digit(header: bytes, place: int) -> bytes:
    digit = b"1" if header[place : place + 1] != b"1" else b"2"
    return header[:place] + digit + header[place + 1 :]


def _is_accepted(path: Path, length: bytes, header: bytes, size: int) -> bool:
    with path.open("wb") as file:
        file.write(length + header)
        file.truncate(size)
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True
