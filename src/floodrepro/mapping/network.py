"""A trained network as a function of chip values: exactly the arithmetic of `predict`.

B = tiles, T = timesteps, C = bands, K = classes, H, W = pixels.
"""

import numpy as np
import torch

from floodrepro.data.protocols import NO_DATA
from floodrepro.errors import CheckpointError
from floodrepro.mapping.scene import BANDS, STEPS, Array
from floodrepro.training.checkpoint import Checkpoint, load_strictly
from floodrepro.training.terratorch_cli import RecipeCLI, without_files

_PATCH = 32  # two of TerraMind's patches: what TerraTorch pads images to


class Network:
    """The model of a parsed recipe with the weights of a checkpoint, on the recipe's device and in its precision.

    `classes` is K, `steps` are timesteps by modality in the model's order. Raises `UsageError` where the recipe does
    not build, and `CheckpointError` where the weights are another model's.
    """

    def __init__(self, cli: RecipeCLI, weights: Checkpoint) -> None:
        without_files(cli.config)
        cli.build()
        load_strictly(weights, cli.model, cli.recipe)
        self._data = cli.datamodule
        self.device = cli.trainer.strategy.root_device
        self._precision = cli.trainer.strategy.precision_plugin
        self._task = self._precision.convert_module(cli.model).to(self.device).eval()
        steps = list(self._data.timesteps)
        self._count = len(steps)
        steps = steps if len(steps) < len(STEPS) else list(range(len(STEPS)))  # impactmesh: all, in their order
        self.steps = {m: [0] if m == "DEM" else steps for m in self._data.modalities}
        self.classes = int(cli.recipe["model"]["init_args"]["model_args"]["num_classes"])

    def probabilities(self, chips: dict[str, list[Array]]) -> Array:
        """Probabilities (B, K, H, W) of tiles of one size, by modality (T, C, H, W) in chip values.

        Raises `CheckpointError` where the model predicts NaN or infinities.
        """
        with torch.inference_mode(), self._precision.forward_context():
            images = {modality: self._image(np.stack(tiles)) for modality, tiles in chips.items()}
            height, width = next(iter(chips.values()))[0].shape[-2:]
            logits = self._task(self._data.aug({"image": images})["image"]).output
            top, left = (-height % _PATCH) // 2, (-width % _PATCH) // 2
            inside = logits[..., top : top + height, left : left + width]
            if not bool(torch.isfinite(inside).all()):
                raise CheckpointError("the model predicts values that are not finite", fix="--precision bf16 or fp32")
            return np.asarray(inside.float().softmax(dim=1).cpu())

    def _image(self, values: Array) -> torch.Tensor:
        """Float32 (B, C, T, H, W), or (B, C, H, W) of one timestep, with missing values replaced as in training."""
        # TerraTorch pads both sides by reflection too, but torch refuses where an image is smaller than its padding.
        sides = [(-size % _PATCH // 2, -size % _PATCH - -size % _PATCH // 2) for size in values.shape[-2:]]
        padded = np.pad(values, [(0, 0), (0, 0), (0, 0), *sides], mode="reflect")
        image = torch.from_numpy(padded).to(self.device, torch.float32).transpose(1, 2)
        image = image.masked_fill(image == NO_DATA, self._data.no_data_replace).nan_to_num(self._data.no_data_replace)
        image = image.expand(-1, -1, self._count, -1, -1)
        return image.contiguous() if self._count > 1 else image[:, :, 0]

    def fitting_batch(self, crop: int) -> int:
        """Tiles in a batch: one on a CPU; on a GPU what 70 % of its free memory holds, by a trial of one tile."""
        if self.device.type != "cuda":
            return 1
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        chips = {m: [np.zeros((len(steps), len(BANDS[m]), crop, crop), np.int16)] for m, steps in self.steps.items()}
        self.probabilities(chips)
        each = torch.cuda.max_memory_allocated(self.device) - before
        return int(min(max(0.7 * torch.cuda.mem_get_info(self.device)[0] // max(each, 1), 1), 64))
