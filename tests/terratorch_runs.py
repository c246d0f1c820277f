"""Two recipes of a few steps for plain ``terratorch fit``, and whether two checkpoints are the same.

The demo's on generated chips, and a generic TerraTorch one (GeoTIFFs, a MobileNet).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from terratorch.models.backbones.terramind.model.terramind_vit import TerraMindViT
from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY

from conftest import SMALL, save
from floodrepro import recipe as recipes
from processes import Command

GENERIC = """
seed_everything: 7
trainer: {accelerator: cpu, devices: 1, max_epochs: 2, num_sanity_val_steps: 0}
data:
  class_path: GenericNonGeoSegmentationDataModule
  init_args: {batch_size: 2, num_workers: 0, num_classes: 2, means: [0.0, 0.0, 0.0], stds: [1.0, 1.0, 1.0],
    img_grep: "*_image.tif", label_grep: "*_mask.tif", no_data_replace: 0}
model:
  class_path: terratorch.tasks.SemanticSegmentationTask
  init_args:
    model_factory: EncoderDecoderFactory
    model_args: {backbone: timm_mobilenetv3_small_050, backbone_pretrained: false, backbone_in_chans: 3,
      decoder: FCNDecoder, decoder_channels: 8, head_dropout: 0.2, num_classes: 2}
    loss: ce
    ignore_index: -1
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
lr_scheduler:
  class_path: lightning.pytorch.cli.ReduceLROnPlateau
  init_args: {monitor: val/loss, patience: 0, threshold: 1.0, factor: 0.5}
"""


@TERRATORCH_BACKBONE_REGISTRY.register
def thin_terramind(**kwargs: Any) -> torch.nn.Module:
    """A TerraMind with all layers of the tiny one, a quarter as wide."""
    return TerraMindViT(dim=48, num_heads=3, **kwargs)


def terratorch_fit(recipe: dict[str, Any], folder: Path, *overrides: object, strikes: Sequence[Any] = ()) -> Command:
    """Plain ``terratorch fit``, under way; it writes below its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    argv = ("fit", "--config", config, "--trainer.default_root_dir", folder, *overrides)
    return Command(*argv, log=folder / "log.txt", program="terratorch", strikes=strikes)


def with_callbacks(recipe: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe with the three callbacks of floodrepro and a ModelCheckpoint, no logger, no progress bar."""
    best = {"monitor": "val/loss", "filename": "best-{epoch}", "save_weights_only": True}
    callbacks = [{"class_path": f"floodrepro.callbacks.{name}"} for name in ("NaNGuard", "ExactResume", "RunRecord")]
    callbacks[1]["init_args"] = {"every_n_steps": 2}
    callbacks.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "callbacks": callbacks}
    return recipe | {"trainer": {**recipe["trainer"], **quiet}}


def demo(chips: Path, **data: Any) -> dict[str, Any]:
    """The demo's recipe, smaller: 12 training chips, six steps an epoch, two epochs; the plateau halves each epoch."""
    recipe = recipes.read_yaml(recipes.find("demo"))
    changes = [*map(str, SMALL), *recipes.data_overrides(chips, recipe), "--trainer.max_epochs=2"]
    changes += ["--trainer.accelerator=cpu", "--lr_scheduler.init_args.patience=0"]
    changes += ["--lr_scheduler.init_args.threshold=1.0"]
    return recipes.fold([recipe], [*changes, *(f"--data.init_args.{key}={value}" for key, value in data.items())])


def generic(folder: Path, **data: Any) -> dict[str, Any]:
    """A recipe without anything of floodrepro or TerraMind: 12 GeoTIFFs of three bands, a small MobileNet.

    One pixel of the first has no data.
    """
    images, draw = folder / "tiffs", np.random.default_rng(3)
    for number in range(12):
        image = draw.normal(size=(3, 32, 32)).astype("float32")
        save(images / f"chip{number}_mask.tif", (image[0] > 0).astype("int16"), nodata=-9999)
        if number == 0:
            image[:, 3, 5] = -9999
        save(images / f"chip{number}_image.tif", image, nodata=-9999)
    recipe: dict[str, Any] = yaml.safe_load(GENERIC)
    for split in ("train", "val", "test", "predict"):
        recipe["data"]["init_args"][f"{split}_data_root"] = str(images)
        if split != "predict":
            recipe["data"]["init_args"][f"{split}_label_data_root"] = str(images)
    recipe["data"]["init_args"] |= data
    return recipe


def different(one: Path, other: Path) -> tuple[list[str], int]:
    """Paths of the leaves that differ between two checkpoints, but for times, and their number; the folders are one."""

    def state_of(path: Path) -> dict[str, Any]:
        folder, state = str(path.parents[1]), torch.load(path, map_location="cpu", weights_only=True)
        leaves = [(key.replace(folder, ""), value) for key, value in recipes.leaves(state) if "RunRecord" not in key]
        return {key: value.replace(folder, "") if isinstance(value, str) else value for key, value in leaves}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and a == b

    first, second = state_of(one), state_of(other)
    names = sorted(first.keys() | second.keys())
    return [n for n in names if n not in first or n not in second or not same(first[n], second[n])], len(names)
