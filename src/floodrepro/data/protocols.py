"""The vocabulary of the data set, and the one table of protocols.

A protocol says what the chips of a recipe are: which data, which classes. A recipe names it in
`data.init_args.protocol`, and holds the statistics. A new protocol is one more entry of `PROTOCOLS` and one recipe.

Nothing here imports numpy or torch, so that every command can afford this module.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from floodrepro.errors import UsageError

MODALITIES = ("S2L2A", "S1RTC", "DEM")
LABEL_DIR = "MASK"
PARTS = ("S2L2A", "S1RTC", "DEM", "MASK")  # what a chip consists of: its modalities and its mask
S2_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
S1_BANDS = ("vv", "vh")
STEPS = ("month_before", "before", "event", "after")  # the timesteps 0 to 3, as a scene.yaml names them
TIMESTEPS = tuple(step.replace("_", " ") for step in STEPS)
BEFORE, EVENT = 1, 2
NO_DATA = -9999
PROBABILITY_STEPS = 250  # a probability of 1 in a uint8 raster
NO_BACKSCATTER = -100.0  # dB: no surface is so dark. In float16, which S1RTC is stored as, NO_DATA is -10000
IGNORE_INDEX = -1
SPLITS = ("train", "val", "test")
DATA_MODULE = "floodrepro.data.datamodule.FloodDataModule"

_CHIP = re.compile(r"(?:.*/)?(.+)_(?:S2L2A\.zarr\.zip|S1RTC\.zarr\.zip|DEM\.tif|annotation_\w+\.tif)")
_SUFFIXES = {"S2L2A": "_S2L2A.zarr.zip", "S1RTC": "_S1RTC.zarr.zip", "DEM": "_DEM.tif"}


@dataclass(frozen=True)
class Protocol:
    """What the chips of a recipe are."""

    name: str  # key in `PROTOCOLS`
    title: str  # one line for a reader
    class_names: tuple[str, ...] = ()  # one for each class, from 0 up; IGNORE_INDEX is not among them
    label_map: tuple[int, ...] = ()  # the class of each mask value on disk, from value 0 up; IGNORE_INDEX is kept
    data_version: str | None = None  # v0 or v1 of the published data set; None where nothing is published
    counts: Mapping[str, int] = field(default_factory=dict)  # chips that the published version lists, by split
    mask_suffix: str = "_annotation_flood.tif"  # end of a mask's file name, after the chip id
    positive_class: int = 1  # the class that reports speak of
    hazard: str = "flood"  # what that class is, in one word: flood, fire. It names the split files as well
    repo: str | None = None  # id of the data set on the Hugging Face hub
    size_gb: int | None = None  # of the whole data set there; None where it is unknown
    recipe: str | None = None  # the shipped recipe of the base model

    def split_file(self, split: str) -> str:
        """Name of the text file that lists the chip ids of a split, one a line."""
        return f"impactmesh_{self.hazard}_{split}.txt"

    @property
    def folder(self) -> str:
        """Folder of its data set, where no other is given."""
        return (self.repo or "chips").rpartition("/")[2]


_V0 = Protocol(
    name="v0",
    title="ImpactMesh-Flood version 0, two classes: the data of the published figures",
    class_names=("rest", "flood"),
    label_map=(0, 1),
    data_version="v0",
    counts={"train": 57_067, "val": 9_028, "test": 14_556},
    repo="ibm-esa-geospatial/ImpactMesh-Flood",
    size_gb=210,  # inferred from the sizes of chips; no published figure
    recipe="terramind_v1_base_impactmesh_flood_amd",
)
_V1_BINARY = replace(
    _V0,
    name="v1-binary",
    title="ImpactMesh-Flood version 1, permanent water counted as rest",
    label_map=(0, 0, 1),
    data_version="v1",
    counts={"train": 19_448, "val": 2_171, "test": 2_959},
    size_gb=72,  # inferred in the same way
    recipe="terramind_v1_base_impactmesh_flood_v1_binary",
)
_V1 = replace(
    _V1_BINARY,
    name="v1",
    title="ImpactMesh-Flood version 1, three classes",
    class_names=("no water", "permanent water", "flood water"),
    label_map=(0, 1, 2),
    positive_class=2,
    recipe="terramind_v1_base_impactmesh_flood_v1",
)
_CUSTOM = Protocol(name="custom", title="your own chips, with the classes of the recipe")
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (_V0, _V1_BINARY, _V1, _CUSTOM)}


def data_arguments(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The `init_args` of a recipe's data section; empty where there are none."""
    return (recipe.get("data") or {}).get("init_args") or {}


def uses_flood_data_module(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe reads its chips with floodrepro's own data module."""
    return bool((recipe.get("data") or {}).get("class_path") == DATA_MODULE)


def protocol_of(recipe: Mapping[str, Any]) -> Protocol:
    """The protocol that a recipe names.

    A recipe that names none, and one with another data module, is `custom`. Its classes are the recipe's own, else the
    model's `class_names`, else `class 0` and so on.

    Raises:
        UsageError: The recipe names one that is not in `PROTOCOLS`, or keys that are not that protocol's.
    """
    arguments = data_arguments(recipe) if uses_flood_data_module(recipe) else {}
    keys = ("protocol", "class_names", "label_map", "positive_class", "mask_suffix")
    name, names, *others = (arguments.get(key) for key in keys)
    if name in (None, "custom"):
        task = (recipe.get("model") or {}).get("init_args") or {}
        count = (task.get("model_args") or {}).get("num_classes") or 0
        names = data_arguments(recipe).get("class_names") or task.get("class_names")
        names = names or [f"class {number}" for number in range(count)]
    try:
        return fill_protocol(name or "custom", names, *others)
    except ValueError as error:
        raise UsageError(str(error), where="data.init_args", fix="see docs/protocols.md") from error


def fill_protocol(
    name: str,
    class_names: Sequence[str] | None = None,
    label_map: Sequence[int] | None = None,
    positive_class: int | None = None,
    mask_suffix: str | None = None,
) -> Protocol:
    """The protocol of a name, with what a recipe says itself filled in.

    Raises:
        ValueError: There is no such protocol, or the values are not that protocol's, or do not fit each other.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol is {name!r}, expected one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if name == "custom":
        names = tuple(class_names or ())
        labels = tuple(label_map) if label_map else tuple(range(len(names)))
        if set(labels) != set(range(len(names))):
            raise ValueError(f"label_map gives {sorted(set(labels))}, class_names has {list(names)}")
        positive_class = len(names) - 1 if positive_class is None else positive_class
        hazard, suffix = names[positive_class] if names else protocol.hazard, mask_suffix or protocol.mask_suffix
        protocol = replace(protocol, class_names=names, label_map=labels, mask_suffix=suffix, hazard=hazard)
    for key, value in {"class_names": class_names, "label_map": label_map, "mask_suffix": mask_suffix}.items():
        if value and list(value) != list(getattr(protocol, key)):
            raise ValueError(f"{key} is {value}, protocol {name} has {getattr(protocol, key)}; protocol custom is free")
    return protocol if positive_class is None else replace(protocol, positive_class=positive_class)


def suffix_of(protocol: Protocol, part: str) -> str:
    """End of a file name, after the chip id, of a modality or of `MASK`."""
    return protocol.mask_suffix if part == LABEL_DIR else _SUFFIXES[part]


def event_of(chip: str) -> str:
    """The event of a chip: what stands before the first `_`, such as `EMSR686`."""
    return chip.split("_", 1)[0]


def chip_of(file: str) -> str:
    """The chip that a file is of, by its name; empty for another file."""
    found = _CHIP.fullmatch(file)
    return found[1] if found else ""
