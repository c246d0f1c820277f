"""How fast chips are read: this package's reader beside stock impactmesh and beside bare decoding, in one process.

What a loader worker does is compared with what a loader worker does. The work that is left to the device is timed and
reported beside it, for both, so that nothing is hidden there.
"""

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rasterio
import torch
from torch.utils.data import DataLoader, Dataset

from floodrepro.data.chips import ChipSource, open_source
from floodrepro.data.names import LABEL_DIR
from floodrepro.data.zarr_zip import Chunks, decode, find_chunks
from floodrepro.errors import DataError
from floodrepro.recipe import Recipe
from floodrepro.training.importing import import_terratorch

_BATCHES = 24  # of the recipe's own size in an epoch of the loader: enough for starting one not to count
_ROUNDS_OF_WORKERS = 3  # for each other round: they take a second each, and their ratio swings most
ZARRS, RASTERS = ("S2L2A", "S1RTC"), ("DEM", LABEL_DIR)


def bench(recipe: Recipe, extracted: Path, tars: Path, rounds: int) -> dict[str, Any]:
    """Time readers in turn, round by round, on the same chips; the first round warms the page cache and is left out.

    Args:
        recipe: Its data section says what is read.
        extracted: Chips as folders.
        tars: The same chips in the hub's layout.
        rounds: Passes over all chips that count.

    Returns:
        For each reader chips per second (median, p10, p90 over rounds), and ratios round by round.
    """
    import_terratorch()
    from floodrepro.data.datamodule import as_a_worker

    as_a_worker()  # all readers alike
    torch.set_num_threads(1)
    readers = _readers(recipe, extracted, tars)
    chips = len(next(iter(readers.values())))
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, steps in readers.items():
            start = time.perf_counter()
            for step in steps:
                step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    workers = _workers(recipe, tars, _ROUNDS_OF_WORKERS * rounds)
    ratios = {
        f"{ours} / {theirs}": _ratio(seconds[ours], seconds[theirs])
        for ours in ("train tars", "train extracted", "validation tars", "validation extracted")
        for theirs in (f"{ours.split()[0]} impactmesh", "bare decode")
    }
    return {
        "what": "one process, one core, warm page cache, chips per second of what a loader worker does",
        "chips": chips,
        "rounds": rounds,
        "workers": workers,
        "chips_per_second": {name: _rates(times, chips) for name, times in seconds.items()},
        "ratios": ratios,
        "device": platform.processor() or platform.machine(),
        "torch_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "impactmesh", "terratorch", "zarr", "numcodecs")},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _readers(recipe: Recipe, extracted: Path, tars: Path) -> dict[str, Sequence[Callable[[], Any]]]:
    """By name, one call for each chip."""
    from impactmesh.impactmesh_datamodule import ImpactMeshDataModule

    from floodrepro.data.datamodule import FloodDataModule

    arguments = _data_arguments(recipe) | {"num_workers": 0}
    readers: dict[str, Sequence[Callable[[], Any]]] = {}
    for layout, root in (("tars", tars), ("extracted", extracted)):
        ours = FloodDataModule(data_root=str(root), **_splits(root), **arguments)
        ours.setup("fit")
        for name, dataset in (("train", ours.train_dataset), ("validation", ours.val_dataset)):
            readers[f"{name} {layout}"] = [_item(dataset, i) for i in range(len(dataset))]
    stock = ImpactMeshDataModule(
        data_root=str(extracted / "data"),
        **_splits(extracted),
        **{k: arguments[k] for k in ("means", "stds", "modalities", "timesteps", "no_data_replace") if k in arguments},
        train_transform=_train_transform(len(arguments["timesteps"])),
        disaster_type="flood",
    )
    stock.setup("fit")
    for name, dataset in (("train", stock.train_dataset), ("validation", stock.val_dataset)):
        readers[f"{name} impactmesh"] = [_item(dataset, i) for i in range(len(dataset))]
    source = open_source(extracted)
    chips = ours.train_dataset.chips
    readers["bare decode"] = [_bare(source, chip) for chip in chips]
    for name, module in (("floodrepro", ours), ("impactmesh", stock)):
        readers[f"device work {name}"] = _device_work(module, len(chips))
    return readers


def _splits(root: Path) -> dict[str, Any]:
    """The same chips in training and validation."""
    train = str(root / "split" / "impactmesh_flood_train.txt")
    return {"train_split": train, "val_split": train}


def _train_transform(timesteps: int) -> list[Any]:
    """The published recipe's, which stock impactmesh runs in the worker."""
    import albumentations
    from albumentations.pytorch import ToTensorV2
    from terratorch.datasets.transforms import FlattenTemporalIntoChannels, UnflattenTemporalFromChannels

    return [
        FlattenTemporalIntoChannels(),
        albumentations.D4(),
        ToTensorV2(),
        UnflattenTemporalFromChannels(n_timesteps=timesteps),
    ]


def _item(dataset: Any, index: int) -> Callable[[], Any]:
    return lambda: dataset[index]


def _bare(source: ChipSource, chip: str) -> Callable[[], Any]:
    """Pread and decompress the chunks at offsets that are known already, and read the two GeoTIFFs."""
    places = [(source.path(chip, modality), _chunks(source.read_file(chip, modality))) for modality in ZARRS]

    def read() -> None:
        for path, chunks in places:
            descriptor = os.open(path, os.O_RDONLY)
            decode(chunks, lambda size, offset: os.pread(descriptor, size, offset))  # noqa: B023  # called at once
            os.close(descriptor)
        for part in RASTERS:
            with rasterio.open(source.path(chip, part)) as file:
                file.read(1)

    return read


def _chunks(content: bytes) -> Chunks:
    found = find_chunks(lambda size, offset: content[offset : offset + size], len(content))
    if found is None:
        raise DataError("these chips are laid out in a way that only the zarr library reads: nothing to compare")
    return found


class _OnlyDecoded(Dataset[Any]):
    """The yardstick: chips are read and decoded in a worker, and nothing travels to the process that asked."""

    def __init__(self, chips: Any) -> None:
        self._chips = chips

    def __len__(self) -> int:
        return len(self._chips)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        return {"chip": [self._chips[index]["chip"] for index in indices]}


def _workers(recipe: Recipe, root: Path, rounds: int) -> dict[str, Any]:
    """Whole epochs of the training loader with one worker and with two, in turn, workers started beforehand.

    Beside it, in the same rounds, the same for workers that only decode: what a second process gains on this machine.
    """
    from floodrepro.data.datamodule import FloodDataModule, as_a_worker

    loaders: dict[tuple[str, int], DataLoader[Any]] = {}
    for count in (1, 2):
        arguments = {**_data_arguments(recipe), "num_workers": count}
        module = FloodDataModule(data_root=str(root), **_splits(root), **arguments)
        module.setup("fit")
        times = -(-_BATCHES * module.batch_size // len(module.train_dataset.chips))
        module.train_dataset.chips *= times
        loaders["loader", count] = module.train_dataloader()
        loaders["decoding only", count] = DataLoader(
            _OnlyDecoded(module.train_dataset),
            batch_size=module.batch_size,
            drop_last=True,
            num_workers=count,
            persistent_workers=True,
            collate_fn=_as_it_is,
            worker_init_fn=as_a_worker,
        )
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
    load = os.getloadavg()[0]
    for number in range(rounds + 1):
        for key in sorted(loaders, reverse=number % 2 == 1):  # neighbours in a round are compared, in either order
            start = time.perf_counter()
            chips = sum(len(batch["chip"]) for batch in loaders[key])
            if number:
                seconds[key].append(time.perf_counter() - start)
    return {
        "rounds": rounds,
        "load_average": load,
        "chips_per_second": {f"{what}, {n}": _rates(times, chips) for (what, n), times in seconds.items()},
        "two workers / one": _ratio(seconds["loader", 2], seconds["loader", 1]),
        "two workers / one, decoding only": _ratio(seconds["decoding only", 2], seconds["decoding only", 1]),
    }


def _as_it_is(batch: Any) -> Any:
    return batch


def _data_arguments(recipe: Recipe) -> dict[str, Any]:
    return {k: v for k, v in recipe["data"]["init_args"].items() if not k.endswith(("_split", "data_root"))}


def _device_work(module: Any, chips: int) -> list[Callable[[], Any]]:
    """What is done to a batch after its transfer, on this machine's CPU and one thread, for as many chips."""
    module.batch_size = chips
    batch = next(iter(module.train_dataloader()))
    module.trainer = _Training()
    return [lambda: module.on_after_batch_transfer({**batch, "image": copy.copy(batch.get("image"))}, 0)]


class _Training:
    """What the data modules ask of a trainer while they train."""

    training = True
    validating = sanity_checking = testing = predicting = False
    current_epoch = 0


def _rates(times: Sequence[float], chips: int) -> dict[str, float]:
    rates = sorted(chips / seconds for seconds in times)
    tenths = statistics.quantiles(rates, n=10) if len(rates) > 1 else [rates[0]] * 9
    return {"median": round(statistics.median(rates), 1), "p10": round(tenths[0], 1), "p90": round(tenths[8], 1)}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as fast, from pairs of rounds."""
    pairs = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return {"median": round(statistics.median(pairs), 3), "min": round(pairs[0], 3), "max": round(pairs[-1], 3)}
