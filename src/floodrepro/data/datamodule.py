"""ImpactMesh's data module with the arithmetic on the device, so that reading keeps a GPU busy.

What the model is given equals stock impactmesh + TerraTorch bit for bit (on a CPU). A loader worker only reads and
decodes: int16 and float16 travel. Conversion to float32, no-data, symmetries and normalisation follow on the device.

Shape suffixes: B = chips, T = timesteps, C = bands, H, W = pixels.
"""

import atexit
import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from impactmesh.impactmesh_datamodule import ImpactMeshDataModule
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from floodrepro import console
from floodrepro.data.chips import Array, Chips, radar_faults
from floodrepro.data.protocols import LABEL_DIR, MODALITIES, fill_protocol
from floodrepro.data.samplers import EachOnce, ShuffledByEpoch, hashed_number
from floodrepro.data.splits import read_splits
from floodrepro.errors import DataError

_NAMED = 10  # chips with odd radar values that are named; all are in `odd_chips`


class Batch(dict[str, Any]):
    """What the model is given: `image` (by modality), `mask` and `filename`.

    Chip ids are an attribute: TerraTorch passes every further key to the model as an argument.
    """

    chips: tuple[str, ...] = ()


def draw_symmetry(seed: int, epoch: int, chip: str) -> int:
    """The symmetry of a chip in an epoch, 0 to 7, equally likely. 0 leaves the chip as it is."""
    return hashed_number(seed, epoch, chip) % 8


def apply_symmetry(symmetry: int, image: torch.Tensor) -> torch.Tensor:
    """Apply a symmetry (0 to 3: quarter turns; 4 to 7: of the transposed image) to the last two axes (..., H, W).

    Raises:
        ValueError: The image is not square, and is to be turned.
    """
    if symmetry and image.shape[-1] != image.shape[-2]:
        raise ValueError(f"augment needs square chips, these have {image.shape[-2]} x {image.shape[-1]} pixels")
    turns, image = (symmetry, image) if symmetry < 4 else (symmetry - 3, image.transpose(-2, -1))
    return torch.rot90(image, turns, (-2, -1))


class ChipDataset(Dataset[dict[str, Any]]):
    """Chips of one split as they are on disk, read a batch at a time.

    Args:
        source: Where they lie.
        chips: Their ids.
        parts: Any of S2L2A, S1RTC, DEM, MASK.
    """

    def __init__(self, source: Chips, chips: Sequence[str], parts: Sequence[str]) -> None:
        self.source, self.chips, self.parts = source, list(chips), parts

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.chips)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch, stacked: S2L2A and S1RTC (B, T, C, H, W), DEM (B, H, W), as on disk; MASK (B, H, W), int8 classes.

        `chip` holds the ids, `failed` the errors of chips that are left out, `odd` what is odd in which. Chips are
        decoded into the memory that the batch travels in. Errors travel as values: torch makes another exception of
        one that a worker raises.
        """
        batch: dict[str, torch.Tensor] = {}
        chips: list[str] = []
        failed: list[tuple[str, DataError]] = []
        odd: list[tuple[str, str]] = []

        def place(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
            """Memory for a chip's array; that of a batch is made for its first chip."""
            if name not in batch:
                batch[name] = _empty((len(indices), *shape), torch.from_numpy(np.empty(0, dtype)).dtype)
            array: Array = batch[name][len(chips)].numpy()
            if (array.shape, array.dtype) != (shape, dtype):
                what = f"{name} of {chip} is {shape} {dtype}, of other chips {array.shape} {array.dtype}"
                raise DataError(what, where=self.source.root, fix="floodrepro data audit lists all such chips")
            return array

        for chip in (self.chips[index] for index in indices):
            try:
                for part in self.parts:
                    if part in ("S2L2A", "S1RTC"):
                        self.source.bands(chip, part, partial(place, part))
                    else:
                        layer = self.source.truth(chip) if part == LABEL_DIR else self.source.raster(chip, part)
                        place(part, layer.shape, layer.dtype)[...] = layer
            except DataError as error:
                failed.append((chip, error))
                continue
            if "S1RTC" in batch and (faults := radar_faults(batch["S1RTC"][len(chips)].numpy())):
                odd.append((chip, faults))
            chips.append(chip)
        tensors = {name: tensor[: len(chips)] for name, tensor in batch.items()}
        return {**tensors, "chip": chips, "failed": failed, "odd": odd}


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor; in a loader's worker in shared memory, as torch's own `default_collate` makes it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # type: ignore[no-untyped-call]
    tensor: torch.Tensor = torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
    return tensor


class FloodDataModule(ImpactMeshDataModule):  # type: ignore[misc]  # impactmesh ships no types
    """Chips in ImpactMesh's layout, from folders or straight from the downloaded tars.

    Args:
        data_root: Folder in ImpactMesh-Flood's layout, or the `data` folder in it.
        protocol: Name in `PROTOCOLS`. Classes that are not given here are the protocol's; `custom` has none.
        train_split, val_split, predict_split: Split files, see `floodrepro.data.splits.read_events`.
        test_split: One split file, or several by name, in this order (the task's `test_dataloaders_names`).
        means, stds: By modality, a value for each band. Reflectance x 10,000, dB, metres.
        label_map: The class of each mask value on disk, from value 0 up; the ignore index -1 is kept.
        class_names: Of the classes that the label map gives, from 0 up.
        positive_class: The class that reports speak of.
        mask_suffix: End of a mask's file name, after the chip id.
        modalities: Any of S2L2A, S1RTC, DEM.
        timesteps: Indices: 0 a month before, 1 before, 2 event, 3 after.
        no_data_value, no_data_replace: A missing value on disk, besides NaN, and what it becomes.
        augment: Whether training chips are turned and mirrored.
        seed: Of the order of training chips and of their symmetries. Default: what seed_everything was given.
        limit, fraction: How many chips of each split to use; whole events where they fit.
        strict: Whether an event in two splits is an error.
        skip_damaged: Number of chips that may be left out because they cannot be read.
        batch_size: Chips in a batch.
        num_workers, prefetch_factor: Loader processes, and the batches that each holds ready.
        predict_data_root: The chips to predict, where they lie elsewhere.

    Attributes `failed_chips` and `odd_chips`: by chip, why it was left out, and what is odd about its radar.

    Raises:
        ValueError: Protocol, statistics, label map and class names do not fit each other.
    """

    def __init__(
        self,
        data_root: str,
        protocol: str = "custom",
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | dict[str, str] | None = None,
        predict_split: str | None = None,
        means: dict[str, list[float]] | None = None,
        stds: dict[str, list[float]] | None = None,
        label_map: list[int] | None = None,
        class_names: list[str] | None = None,
        positive_class: int | None = None,
        mask_suffix: str | None = None,
        modalities: list[str] | None = None,
        timesteps: list[int] | None = None,
        no_data_value: float = -9999,
        no_data_replace: float = 0,
        augment: bool = True,
        seed: int | None = None,
        limit: int | None = None,
        fraction: float | None = None,
        strict: bool = False,
        skip_damaged: int = 0,
        batch_size: int = 8,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        predict_data_root: str | None = None,
    ) -> None:
        modalities = modalities or list(MODALITIES)
        self.protocol = fill_protocol(protocol, class_names, label_map, positive_class, mask_suffix)
        means, stds = means or {}, stds or {}
        if absent := [name for name in modalities if name not in means or name not in stds]:
            raise ValueError(f"means or stds lack {', '.join(absent)}: take them from a shipped recipe, or data stats")
        if any(std <= 0 for name in modalities for std in stds[name]):
            raise ValueError("stds hold a value that is not above 0: every pixel would become infinite")
        if odd := [name for name in modalities if len(means[name]) != len(stds[name])]:
            raise ValueError(f"means and stds of {', '.join(odd)} are of different length")
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size {batch_size}, num_workers {num_workers}: at least 1, and at least 0")
        super().__init__(
            data_root=data_root,
            batch_size=batch_size,
            num_workers=num_workers,
            means={modality: means[modality] for modality in modalities},
            stds={modality: stds[modality] for modality in modalities},
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            predict_split=predict_split,
            modalities=modalities,
            timesteps=timesteps,
            predict_data_root=predict_data_root,
            no_data_value=no_data_value,
            no_data_replace=no_data_replace,
            disaster_type="flood",  # else guessed from the path; nothing here depends on it
        )
        self.augment, self.seed, self.limit, self.fraction = augment, seed, limit, fraction
        self.skip_damaged, self.prefetch_factor = skip_damaged, prefetch_factor
        self.failed_chips: dict[str, str] = {}
        self.odd_chips: dict[str, str] = {}
        self._datasets: dict[str, list[ChipDataset]] = {}

    def setup(self, stage: str) -> None:
        """Open the chips and list those of the stage's splits."""
        stage = getattr(stage, "value", stage)  # Lightning's is an enum, which an f-string shows by its name
        root = self.predict_data_root if stage == "predict" else None
        self.source = Chips(Path(root or self.data_root), self.protocol)
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}
        for split in splits[stage]:
            keys = {name: getattr(self, name) for name in (f"{split}_split", "limit", "fraction")}
            read = [*self.modalities, *([LABEL_DIR] if split != "predict" else [])]
            self._datasets[split] = []
            for events in read_splits(keys, split).values():
                self._datasets[split].append(ChipDataset(self.source, list(events), read))
            setattr(self, f"{split}_dataset", self._datasets[split][0])

    def test_dataloader(self) -> Any:
        """One loader for each test split, in a list if there are several. impactmesh 0.2.0 has one of its own."""
        return self._dataloader_factory("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn raw chips, on the device by now, into what the model is given, and record what is wrong with some.

        Raises:
            DataError: More chips than `skip_damaged` could not be read, or all of a batch.
        """
        if "chip" not in batch:
            return batch
        for chip, error in [(chip, error) for chip, error in batch["failed"] if chip not in self.failed_chips]:
            if len(self.failed_chips) >= self.skip_damaged:
                raise error
            self.failed_chips[chip] = error.what
            console.warn(f"left out {len(self.failed_chips)} of {self.skip_damaged}: {error.what}")
        for chip, faults in batch["odd"]:
            if chip not in self.odd_chips and len(self.odd_chips) < _NAMED:
                console.warn(f"the radar of {chip} holds {faults}")
            self.odd_chips[chip] = faults
        chips, symmetries = tuple(batch["chip"]), [0] * len(batch["chip"])
        if not chips:
            raise DataError("no chip of a batch can be read", where=self.data_root, fix="floodrepro data audit")
        if self.augment and self.trainer is not None and self.trainer.training:
            symmetries = [draw_symmetry(self._seed(), self.trainer.current_epoch, chip) for chip in chips]
        images = {modality: self._image(modality, batch[modality], symmetries) for modality in self.modalities}
        # TerraTorch's writer takes a georeference from these: a chip without DEM and mask has its first modality.
        parts, having = ("DEM", LABEL_DIR, *self.modalities), self.source.having
        names = [self.source.path(chip, next(part for part in parts if chip in having(part))) for chip in chips]
        ready = Batch(image=images, filename=names)
        if LABEL_DIR in batch:
            ready["mask"] = torch.stack(list(map(apply_symmetry, symmetries, batch[LABEL_DIR]))).long()
        ready.chips = chips
        return ready

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _image(self, modality: str, raw: torch.Tensor, symmetries: Sequence[int]) -> torch.Tensor:
        """Normalised (B, C, T, H, W), or (B, C, H, W) for a single timestep, from raw (B, T, C, H, W) or (B, H, W)."""
        wanted = len(self.timesteps)
        raw = raw if raw.ndim == 5 else raw[:, None, None]
        if raw.shape[1] > wanted:  # as many as on disk means all, in disk order, as in impactmesh
            raw = raw[:, self.timesteps]
        count, steps, bands, height, width = raw.shape
        if steps not in (1, wanted):
            raise DataError(f"chips have {steps} timesteps, the recipe asks for {wanted}", where=self.data_root)
        missing, filled = float(self.no_data_value), float(self.no_data_replace)
        whole = raw.dtype == torch.int16 and all(v.is_integer() and abs(v) < 2**15 for v in (missing, filled))
        if whole:  # half of the bytes that it takes in float32, and on a CPU less than half of the time
            raw.masked_fill_(raw == int(missing), int(filled))
        image = torch.empty((count, bands, wanted, height, width), dtype=torch.float32, device=raw.device)
        for chip, symmetry, place in zip(raw, symmetries, image, strict=True):
            place.copy_(apply_symmetry(symmetry, chip).transpose(0, 1))  # converts, turns and repeats T = 1 in one pass
        if not whole:
            image.masked_fill_(image == missing, filled)
            image.nan_to_num_(nan=filled)  # numpy's and torch's agree on infinities as well
        # As TerraTorch's `aug` does it, which would ask for twice as much memory again.
        mean, std = (torch.tensor(given[modality], device=raw.device) for given in (self.means, self.stds))
        image.sub_(mean.view(-1, 1, 1, 1)).div_(std.view(-1, 1, 1, 1))
        return image if wanted > 1 else image[:, :, 0]

    def _dataloader_factory(self, split: str) -> Any:
        """As torchgeo's, with pinned memory and prefetching; a list of loaders if there are several test splits.

        In training shuffled, without a last short batch.
        """
        workers = self.num_workers > 0
        device = torch.get_default_device() if self.trainer is None else self.trainer.strategy.root_device
        loaders = [
            DataLoader(
                dataset,
                batch_size=self.batch_size,
                sampler=self._sampler(split, len(dataset)),
                drop_last=split == "train",
                # Its own: torch 2.14 draws from it, and what it took from the global one would be missing in dropout.
                generator=torch.Generator(),
                num_workers=self.num_workers,
                persistent_workers=workers,
                prefetch_factor=self.prefetch_factor if workers else None,
                pin_memory=device.type == "cuda",  # not where a recipe keeps to the CPU of a machine with a GPU
                collate_fn=dict,  # the batch is stacked already
                worker_init_fn=_start_worker,
            )
            for dataset in self._datasets[split]
        ]
        return loaders if len(loaders) > 1 else loaders[0]

    def _sampler(self, split: str, count: int) -> Sampler[int] | None:
        """Lightning leaves a DistributedSampler as it is; any other it would replace in a run of several processes."""
        world, rank, resumed = 1, 0, (0, 0)
        if self.trainer is not None:
            world, rank, loop = self.trainer.world_size, self.trainer.global_rank, self.trainer.fit_loop
            # The loader is asked for its first batches before Lightning tells the epoch of a resumed run.
            done = loop.epoch_loop.batch_progress.current.completed if loop.restarting else 0
            resumed = (loop.epoch_progress.current.processed, done)
        if split == "train":
            size = self.batch_size
            return ShuffledByEpoch(count, self._seed(), batch_size=size, world=world, rank=rank, resumed=resumed)
        return EachOnce(count, world=world, rank=rank) if world > 1 and split != "predict" else None


@atexit.register  # before multiprocessing's own, which would send SIGTERM and wait for ever
def _end_workers() -> None:
    """End the loader workers that an error left behind."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(_: int) -> None:
    """Set a process up as a loader's worker: a signal to the process group must not end it, its parent decides."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
