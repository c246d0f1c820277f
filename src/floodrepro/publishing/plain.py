"""Recipes that TerraTorch takes without floodrepro: impactmesh's own data module in place of ours."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from floodrepro.data.names import TIMESTEPS
from floodrepro.recipe import Recipe

_DATA_ROOT = Path("ImpactMesh-Flood")


def with_stock_data(recipe: Recipe) -> Recipe:
    """The recipe with impactmesh's own data module, which reads extracted chips, and masks as they are."""
    plain = copy.deepcopy(recipe)
    if plain["data"]["class_path"].endswith("FloodDataModule"):
        plain["data"] = _stock_data(plain["data"]["init_args"])
    return plain


def portable(recipe: Recipe) -> Recipe:
    """The recipe without what belongs to one machine or one run: loggers, callbacks, paths, pretrained weights."""
    plain = with_stock_data(recipe)
    trainer = plain.setdefault("trainer", {})
    for key in ("callbacks", "default_root_dir"):
        trainer.pop(key, None)
    trainer["logger"] = False
    model_args = plain["model"].get("init_args", {}).get("model_args") or {}
    if "backbone_pretrained" in model_args:
        model_args["backbone_pretrained"] = False
    data = plain["data"].get("init_args") or {}
    for key, value in data.items():
        if key.endswith("data_root") and value:
            data[key] = str(_DATA_ROOT / "data")
        elif key.endswith("_split") and isinstance(value, dict):
            data[key] = {name: str(_DATA_ROOT / "split" / Path(path).name) for name, path in value.items()}
        elif key.endswith("_split") and value:
            data[key] = str(_DATA_ROOT / "split" / Path(value).name)
    return plain


def _stock_data(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Impactmesh's own data module with the same statistics and transforms; it knows no label map and no bands."""
    shared = (
        *("data_root", "batch_size", "num_workers", "train_split", "val_split", "test_split", "predict_split"),
        *("modalities", "timesteps", "means", "stds", "no_data_value", "no_data_replace"),
    )
    kept = {key: arguments[key] for key in shared if key in arguments}
    if arguments.get("augment", True):
        steps = len(arguments.get("timesteps") or range(len(TIMESTEPS)))
        kept["train_transform"] = [
            {"class_path": "terratorch.datasets.transforms.FlattenTemporalIntoChannels"},
            {"class_path": "albumentations.D4"},
            {"class_path": "albumentations.pytorch.ToTensorV2"},
            {
                "class_path": "terratorch.datasets.transforms.UnflattenTemporalFromChannels",
                "init_args": {"n_timesteps": steps},
            },
        ]
    return {
        "class_path": "impactmesh.impactmesh_datamodule.ImpactMeshDataModule",
        "init_args": kept,
        "dict_kwargs": {"disaster_type": "flood"},  # else guessed from the path, "fire" first
    }
