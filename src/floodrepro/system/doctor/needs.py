"""What a recipe will ask of the machine, read from its YAML; neither torch nor TerraTorch is imported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.names import PROTOCOLS, protocol_of
from floodrepro.recipe import Recipe, differences
from floodrepro.system.doctor.finding import Finding
from floodrepro.system.doctor.gpus import peak_of

CHIP = 256 * 256  # pixels of a chip of ImpactMesh-Flood, which all figures below are for
CHIP_BYTES = (4 * 12 * 2 + 4 * 2 * 2 + 2 + 1) * CHIP  # as on disk: S2 int16, S1 float16, DEM int16, mask int8
FLOAT_CHIP_BYTES = (12 + 2 + 1) * 4 * 4 * CHIP  # as the model and stock impactmesh have it
OWN_LOADER = "floodrepro.data.datamodule.FloodDataModule"
# Shares of the peak rate. The lower one is what the published run came to: about 830 s an epoch on an MI300X.
UTILISATION = (0.1, 0.4)


@dataclass(frozen=True)
class Model:
    """Measured figures of a backbone with its neck and UNetDecoder, for a chip of 256 px.

    Args:
        weights: Bytes of the state dict.
        forward_flop: Operations of a chip's forward pass; a training step takes three times as many.
        step_s: Seconds of a chip's forward and backward pass on two CPU cores.
        forward_s: Seconds of the forward pass alone.
        chip_memory: Bytes that a chip's two passes take in float32, beside weights and gradients.
    """

    weights: int
    forward_flop: float
    step_s: float
    forward_s: float
    chip_memory: int


MODELS = {  # a process that trains on one chip takes 5.5 and 1.9 GB; 1.2 GB of it, weights and gradients are left out
    "terramind_v1_base": Model(673_100_000, 682e9, 20, 10, 3_000_000_000),
    "terramind_v1_tiny": Model(56_400_000, 64e9, 2.0, 0.9, 600_000_000),
}


@dataclass(frozen=True)
class Needs:
    """What a run asks for, in the recipe's words; `protocol` by its label map, `data_root` the folder with `split`."""

    backbone: str
    pretrained: bool
    accelerator: str
    devices: Any
    precision: str
    epochs: int
    batch: int
    workers: int
    prefetch: int
    own_loader: bool
    protocol: str | None
    data_root: Path | None

    @property
    def model(self) -> Model | None:
        """Figures of the model; None where they were not measured."""
        return MODELS.get(self.backbone)

    @property
    def batch_bytes(self) -> int:
        """Of a batch on its way from a worker."""
        return self.batch * (CHIP_BYTES if self.own_loader else FLOAT_CHIP_BYTES)


def read_needs(configs: Sequence[Recipe], overrides: Sequence[str] = ()) -> Needs:
    """What recipes, later ones winning, and command-line overrides ask for; of a strange type counts as not given."""
    flat: dict[str, Any] = {}
    for content in configs:
        flat |= {key: value for key, (_, value) in differences({}, content).items()}
    words = iter(overrides)
    for word in words:
        key, given, text = word.removeprefix("--").partition("=")
        try:
            value = yaml.safe_load(text if given else next(words, ""))
        except yaml.YAMLError:
            continue  # the parser will say so
        flat |= {leaf: new for leaf, (_, new) in differences({}, {key: value}).items()}

    def number(key: str, default: int) -> int:
        return flat[key] if isinstance(flat.get(key), int) else default

    data, model = "data.init_args", "model.init_args.model_args"
    labels, root = flat.get(f"{data}.label_map"), flat.get(f"{data}.data_root")
    folder = Path(root) if isinstance(root, str) else None
    own_weights = flat.get(f"{model}.backbone_ckpt_path") or flat.get("model.init_args.ckpt_path")
    return Needs(
        backbone=str(flat.get(f"{model}.backbone", "")),
        pretrained=flat.get(f"{model}.backbone_pretrained") is True and not own_weights,
        accelerator=str(flat.get("trainer.accelerator", "auto")),
        devices=flat.get("trainer.devices", "auto"),
        precision=str(flat.get("trainer.precision", "32-true")),
        epochs=number("trainer.max_epochs", 1000),  # Lightning's, and the data module's, defaults
        batch=number(f"{data}.batch_size", 8),
        workers=number(f"{data}.num_workers", 0),
        prefetch=number(f"{data}.prefetch_factor", 2),
        own_loader=flat.get("data.class_path") == OWN_LOADER,
        protocol=protocol_of(labels),
        data_root=folder.parent if folder and folder.name == "data" else folder,
    )


def estimate_time(needs: Needs, device: str | None, *, published: bool) -> Finding:
    """Time of all epochs, training and validation, where a rate is known; early stopping may end it sooner.

    Args:
        needs: The recipe's.
        device: Name of the GPU; None where the CPU computes.
        published: Whether the data is, or will be, a published version; else its chips are of unknown number and size.
    """
    if unknown := _unknown(needs, device, published=published):
        return Finding("time", "ok", f"not estimated: {unknown}")
    protocol = PROTOCOLS[DATA_OF[str(needs.protocol)]]
    train, val, _ = protocol.chip_counts
    took = _took(needs, device, trained=needs.epochs * train, seen=needs.epochs * val)
    detail = f"{took} for {needs.epochs} epochs of {protocol.name}'s {train:,} + {val:,} chips (estimate)"
    fix = "" if device else "a GPU; or toy size: floodrepro reproduce --demo"
    return Finding("time", "ok" if device else "warn", detail, fix)


def estimate_test(needs: Needs, device: str | None, *, published: bool, passes: int) -> str:
    """Time of passes over the test split, as `estimate_time`, in words."""
    if unknown := _unknown(needs, device, published=published):
        return f"not estimated: {unknown}"
    chips = PROTOCOLS[DATA_OF[str(needs.protocol)]].chip_counts[2]
    return f"{_took(needs, device, seen=passes * chips)} for {passes} x {chips:,} chips (estimate)"


def _unknown(needs: Needs, device: str | None, *, published: bool) -> str:
    """What keeps a time from being estimated; empty where nothing does."""
    protocol = PROTOCOLS.get(DATA_OF.get(needs.protocol or "", ""))
    peak = peak_of(device) if device else True
    known = {"model": needs.model, "number and size of chips": protocol and published, "peak rate": peak}
    return next((f"the {what} is not known" for what, value in known.items() if not value), "")


def _took(needs: Needs, device: str | None, *, seen: int, trained: int = 0) -> str:
    """Time to train on so many chips and to look at so many, in words; `_unknown` was asked."""
    model, peak = needs.model, peak_of(device or "")
    assert model is not None
    if peak is None:
        seconds = trained * model.step_s + seen * model.forward_s
        return f"about {_duration(seconds)} on two CPU cores"
    work = (3 * trained + seen) * model.forward_flop
    slow, fast = (_duration(work / (peak[0] * 1e12 * share)) for share in UTILISATION)
    return f"{fast} to {slow} on one {device}, at 40 to 10 % of its peak rate,"


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{math.ceil(seconds / 60)} min"
