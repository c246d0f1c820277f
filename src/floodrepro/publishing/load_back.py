"""Load an exported pair as a stranger would: plain TerraTorch, a fresh interpreter, no floodrepro."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from floodrepro.errors import CheckpointError
from floodrepro.recipe import Recipe

# Runs in the other interpreter, where nothing of floodrepro can be imported.
_STRANGER = """
import json, os, sys
sys.modules["floodrepro"] = None  # an import of it raises ImportError
os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import torch
from terratorch.cli_tools import LightningInferenceModel
request = json.loads(sys.argv[1])
torch.set_float32_matmul_precision(request["matmul_precision"])
sys.argv = sys.argv[:1]
wrapper = LightningInferenceModel.from_config(request["config"], request["weights"])
network = wrapper.model.model.eval()  # from_config leaves it in train mode
chip = torch.load(request["chip"], weights_only=True)
with torch.inference_mode():
    logits = network(chip).output
torch.save(logits, request["logits"])
"""


def chip_shapes(recipe: Recipe, size: int) -> dict[str, tuple[int, ...]]:
    """Shapes (1, C, T, H, W) of one chip's modalities.

    Args:
        recipe: A recipe whose data section has ``means`` (a value a band) and ``timesteps``.
        size: Height and width in pixels.
    """
    data = recipe["data"]["init_args"]
    return {name: (1, len(means), len(data["timesteps"]), size, size) for name, means in data["means"].items()}


def fixed_chip(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A chip of normal noise, as normalised bands roughly are; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load_in_plain_terratorch(config: Path, weights: Path, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    """Load the pair with ``LightningInferenceModel.from_config`` and predict `fixed_chip`.

    Matrices are multiplied at this process's float32 precision in both. TerraTorch 1.2.7 sets "medium" when it is
    imported: on a CPU with bf16 instructions (AMX) that alone moves logits by some 0.004.

    Args:
        config: Exported YAML.
        weights: Exported safetensors.
        shapes: As from `chip_shapes`.

    Returns:
        Logits, a tensor (1, K, H, W) of the other interpreter.

    Raises:
        CheckpointError: The pair does not load there.
    """
    with tempfile.TemporaryDirectory() as folder:
        chip, logits = Path(folder) / "chip.pt", Path(folder) / "logits.pt"
        torch.save(fixed_chip(shapes), chip)
        request = {
            "config": str(config.resolve()),
            "weights": str(weights.resolve()),
            "chip": str(chip),
            "logits": str(logits),
            "matmul_precision": torch.get_float32_matmul_precision(),
        }
        # -I keeps this checkout, and whatever PYTHONPATH names, out of the other interpreter's path.
        command = [sys.executable, "-I", "-W", "ignore", "-c", _STRANGER, json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise CheckpointError(f"plain TerraTorch does not load the pair: {lines[-1]}", where=weights)
        predicted: torch.Tensor = torch.load(logits, weights_only=True)
        return predicted
