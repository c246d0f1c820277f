"""ImpactMesh's data module, made to keep a GPU busy: raw chips to the device, the arithmetic there, nothing guessed.

What the model is given equals stock impactmesh + TerraTorch bit for bit (on a CPU). What differs is where the work is
done: a loader worker reads and decodes, and hands on int16 and float16; conversion to float32, no-data, symmetries and
normalisation are done on the device for a whole batch.

Shape suffixes: B = chips, T = timesteps, C = bands, H, W = pixels.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from impactmesh.impactmesh_datamodule import ImpactMeshDataModule
from numcodecs import blosc
from torch.utils.data import DataLoader, Dataset, Sampler

from floodrepro.data import batch_memory, d4
from floodrepro.data.batch_memory import BatchMemory
from floodrepro.data.chips import ChipSource, open_source_loudly
from floodrepro.data.names import IGNORE_INDEX, LABEL_DIR, MODALITIES, TIMESTEPS
from floodrepro.data.samplers import EachOnce, ShuffledByEpoch
from floodrepro.errors import DataError
from floodrepro.heap import keep_freed_memory

RawChip = dict[str, Any]


class Batch(dict[str, Any]):
    """What the model is given: ``image`` (by modality), ``mask``, ``filename``; who it is travels as attributes.

    TerraTorch passes every further key of a batch on to the model as an argument, so that chip ids cannot be keys.

    Attributes:
        chips: Chip ids, B of them.
        events: Their Copernicus EMS events.
    """

    chips: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


class ChipDataset(Dataset[RawChip]):
    """Chips of one split as they are on disk.

    Args:
        source: Where they lie.
        chips: Their ids.
        modalities: Any of S2L2A, S1RTC, DEM.
        timesteps: Indices on the time axis. As in impactmesh, as many as there are on disk means all, in disk order.
        bands: Indices of the bands to keep, by modality; all bands of a modality that is not in it.
        label_map: The class of each mask value, from 0 up; the ignore index is kept. None for a split without masks.
    """

    def __init__(
        self,
        source: ChipSource,
        chips: Sequence[str],
        *,
        modalities: Sequence[str],
        timesteps: Sequence[int],
        bands: Mapping[str, Sequence[int]],
        label_map: Sequence[int] | None,
    ) -> None:
        self.source, self.chips, self.modalities = source, list(chips), list(modalities)
        self._timesteps = list(timesteps) if len(timesteps) < len(TIMESTEPS) else None
        self._bands = {modality: list(indices) for modality, indices in bands.items()}
        self._classes = None if label_map is None else _lookup(label_map)

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.chips)

    def __getitem__(self, index: int) -> RawChip:
        """One chip: each modality (T, C, H, W) in its dtype on disk (DEM with T = 1), mask (H, W) int8, id."""
        chip = self.chips[index]
        raw: RawChip = {modality: torch.from_numpy(self._read(chip, modality)) for modality in self.modalities}
        if self._classes is not None:
            raw["mask"] = torch.from_numpy(self._classified(chip))
        return raw | {"chip": chip}

    def __getitems__(self, indices: Sequence[int]) -> RawChip:
        """A whole batch, decoded into the memory that it travels in: collating would copy every chip once more."""
        first = self[indices[0]]
        chips = [self.chips[index] for index in indices]
        batch = batch_memory.room({k: v for k, v in first.items() if k != "chip"}, len(chips))
        for name in batch:
            batch[name][0] = first[name]
            for place, chip in zip(batch[name][1:].numpy(), chips[1:], strict=True):
                array = self._classified(chip) if name == "mask" else self._read(chip, name, out=place)
                if array.shape != place.shape:
                    raise DataError(f"{chip}: {name} is {array.shape}, other chips are {place.shape}")
                if array is not place:
                    place[...] = array
        batch["chip"] = chips
        return batch

    def _read(self, chip: str, modality: str, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """A modality (T, C, H, W); DEM has T = C = 1."""
        if modality == "DEM":
            return self.source.read_raster(chip, modality)[None, None]
        if modality in self._bands:
            return self.source.read_bands(chip, modality, self._timesteps)[:, self._bands[modality]]
        return self.source.read_bands(chip, modality, self._timesteps, out)

    def _classified(self, chip: str) -> np.ndarray[Any, np.dtype[np.int8]]:
        values = self.source.read_raster(chip, LABEL_DIR)
        assert self._classes is not None
        narrow = values.astype(np.int8)
        classes = self._classes[narrow.view(np.uint8)]  # -1 becomes 255: the table's last place
        if (classes == _UNKNOWN).any() or (values.dtype != np.int8 and (narrow != values).any()):
            strange = sorted({int(value) for value in np.unique(values)} - set(self._known()))
            raise DataError(
                f"the mask of {chip} holds {strange}, which the label map does not know",
                where=self.source.path(chip, LABEL_DIR),
                fix="take the recipe of this data's protocol (v0, v1 or v1-binary), or set data.init_args.label_map",
            )
        return classes

    def _known(self) -> list[int]:
        assert self._classes is not None
        return [IGNORE_INDEX, *(int(i) for i in np.flatnonzero(self._classes[:255] != _UNKNOWN))]


def _as_it_is(batch: Any) -> Any:
    return batch


_UNKNOWN = -128


def _lookup(label_map: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Table of 256 classes for int8 masks read as uint8."""
    table = np.full(256, _UNKNOWN, np.int8)
    table[IGNORE_INDEX % 256] = IGNORE_INDEX
    table[: len(label_map)] = label_map
    return table


class FloodDataModule(ImpactMeshDataModule):  # type: ignore[misc]  # impactmesh ships no types
    """ImpactMesh-Flood, from extracted folders or straight from the downloaded tars.

    Args:
        data_root: Folder in ImpactMesh-Flood's layout, or the ``data`` folder in it; the layout is found, not asked.
        train_split: Text file, one chip id a line.
        val_split: The same.
        test_split: The same, or several by name, tested in this order (the task's ``test_dataloaders_names``).
        predict_split: The same.
        means: By modality, a value for each band that is used. Reflectance x 10,000, dB, metres.
        stds: The same.
        modalities: Any of S2L2A, S1RTC, DEM.
        timesteps: Indices: 0 a month before, 1 before, 2 event, 3 after.
        bands: Indices of the bands to keep, by modality.
        label_map: The class of each mask value on disk, from value 0 up; the ignore index -1 is kept.
        class_names: Of the classes that the label map gives, from 0 up.
        no_data_value: Marks a missing value on disk, besides NaN.
        no_data_replace: What a missing value becomes before normalisation.
        augment: Whether training chips are turned and mirrored (D4).
        seed: Of the order of training chips and of their symmetries. Default: what seed_everything was given.
        batch_size: Chips in a batch.
        num_workers: Loader processes.
        prefetch_factor: Batches that each worker holds ready.
        predict_data_root: As data_root, for prediction.

    Raises:
        ValueError: Statistics, bands, label map and class names do not fit each other.
    """

    def __init__(
        self,
        data_root: str,
        means: dict[str, list[float]],
        stds: dict[str, list[float]],
        label_map: list[int],
        class_names: list[str],
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | dict[str, str] | None = None,
        predict_split: str | None = None,
        modalities: list[str] | None = None,
        timesteps: list[int] | None = None,
        bands: dict[str, list[int]] | None = None,
        no_data_value: float = -9999,
        no_data_replace: float = 0,
        augment: bool = True,
        seed: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        predict_data_root: str | None = None,
    ) -> None:
        modalities = modalities or list(MODALITIES)
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
            disaster_type="flood",  # else guessed from the path; only file names hang on it here
        )
        self.bands = bands or {}
        self.label_map = label_map
        self.class_names = class_names
        self.augment, self.seed = augment, seed
        self.prefetch_factor = prefetch_factor
        for modality, chosen in self.bands.items():
            if len(chosen) != len(self.means[modality]):
                raise ValueError(
                    f"{modality}: {len(chosen)} bands are used, but {len(self.means[modality])} means given"
                )
        if set(label_map) != set(range(len(class_names))):
            raise ValueError(f"label_map gives {sorted(set(label_map))}, class_names has {class_names}")

    def setup(self, stage: str) -> None:
        """Open the chips and list those of the stage's splits."""
        root = self.predict_data_root if stage == "predict" else None
        self.source = source = open_source_loudly(Path(root or self.data_root))
        if stage == "fit":
            self.train_dataset = self._dataset(source, self.train_split)
        if stage in ("fit", "validate"):
            self.val_dataset = self._dataset(source, self.val_split)
        if stage == "test":
            splits = self.test_split if isinstance(self.test_split, dict) else {"test": self.test_split}
            self.test_datasets = [self._dataset(source, split) for split in splits.values()]
            self.test_dataset = self.test_datasets[0]
        if stage == "predict":
            self.predict_dataset = self._dataset(source, self.predict_split, labels=False)

    def test_dataloader(self) -> Any:
        """One loader for each test split; a list if there are several."""
        loaders = []
        for dataset in self.test_datasets:
            self.test_dataset = dataset
            loaders.append(self._dataloader_factory("test"))
        return loaders if len(loaders) > 1 else loaders[0]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn raw chips, on the device by now, into what the model is given."""
        if "chip" not in batch:
            return batch
        chips = tuple(batch["chip"])
        training = self.trainer is not None and self.trainer.training
        elements = ["e"] * len(chips)
        if training and self.augment:
            elements = [d4.draw(self._seed(), self.trainer.current_epoch, chip) for chip in chips]
        images = {modality: self._image(batch[modality], elements) for modality in self.modalities}
        ready = Batch(image=images, filename=[self._filename(chip) for chip in chips])
        if "mask" in batch:
            pairs = zip(elements, batch["mask"], strict=True)
            ready["mask"] = torch.stack([d4.apply(element, mask) for element, mask in pairs]).long()
        ready.chips = chips
        ready.events = tuple(chip.split("_", 1)[0] for chip in chips)
        return self.aug(ready)

    def _seed(self) -> int:
        """What order and symmetries are drawn from: as given, or as seed_everything left it."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _image(self, raw: torch.Tensor, elements: Sequence[str]) -> torch.Tensor:
        """Float32 (B, C, T, H, W), or (B, C, H, W) for a single timestep, from raw (B, T, C, H, W)."""
        count, steps, bands, height, width = raw.shape
        wanted = len(self.timesteps)
        if steps not in (1, wanted):
            raise DataError(f"chips have {steps} timesteps, the recipe asks for {wanted}", where=self.data_root)
        image = torch.empty((count, bands, wanted, height, width), dtype=torch.float32, device=raw.device)
        for chip, element, place in zip(raw, elements, image, strict=True):
            place.copy_(d4.apply(element, chip).transpose(0, 1))  # converts, turns and spreads T = 1 in one pass
        image.masked_fill_(image == self.no_data_value, self.no_data_replace)
        if raw.is_floating_point():
            image.nan_to_num_(nan=self.no_data_replace)  # numpy's and torch's agree on infinities as well
        return image if wanted > 1 else image[:, :, 0]

    def _filename(self, chip: str) -> str:
        """A file that TerraTorch's writer can take a georeference from."""
        path: str = self.source.path(chip, "DEM")
        return path

    def _dataset(self, source: ChipSource, split: str | None, *, labels: bool = True) -> ChipDataset:
        chips = Path(split).read_text(encoding="utf-8").split() if split else sorted(source.parts(self.modalities[0]))
        return ChipDataset(
            source,
            chips,
            modalities=self.modalities,
            timesteps=self.timesteps,
            bands=self.bands,
            label_map=self.label_map if labels else None,
        )

    def _dataloader_factory(self, split: str) -> DataLoader[RawChip]:
        """As torchgeo's, with pinned memory and prefetching; shuffled and without a last odd batch in training."""
        workers = self.num_workers > 0
        device = torch.get_default_device() if self.trainer is None else self.trainer.strategy.root_device
        dataset = getattr(self, f"{split}_dataset")
        memory = None
        if workers and len(dataset):
            batch_bytes = self.batch_size * sum(v.nbytes for k, v in dataset[0].items() if k != "chip")
            # Beyond what is prefetched, Lightning and the model hold one batch each.
            memory = BatchMemory(batch_bytes, self.num_workers, self.prefetch_factor + 2)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=self._sampler(split, len(dataset)),
            drop_last=split == "train",
            # Of its own: torch 2.14 draws from it once an epoch without workers, and once for all with persistent ones,
            # and what it took from torch's global generator would be missing in dropout.
            generator=torch.Generator(),
            num_workers=self.num_workers,
            persistent_workers=workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            pin_memory=device.type == "cuda",  # not where a recipe keeps to the CPU of a machine with a GPU
            collate_fn=_as_it_is,
            worker_init_fn=partial(as_a_worker, memory=memory),
        )

    def _sampler(self, split: str, count: int) -> Sampler[int] | None:
        """Lightning leaves a DistributedSampler as it is; any other it would replace in a run of several processes."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        if split == "train":
            # The loader is asked for its first batches before Lightning tells the epoch of a resumed run.
            loop = self.trainer.fit_loop if self.trainer is not None else None
            resumed = (0, 0)
            if loop is not None:
                done = loop.epoch_loop.batch_progress.current.completed if loop.restarting else 0
                resumed = (loop.epoch_progress.current.processed, done)
            size = self.batch_size
            return ShuffledByEpoch(count, self._seed(), batch_size=size, world=world, rank=rank, resumed=resumed)
        return EachOnce(count, world=world, rank=rank) if world > 1 and split != "predict" else None


def as_a_worker(_: int = 0, memory: BatchMemory | None = None) -> None:
    """Set a process up as a loader's worker: one core, and memory that is kept for the next chip and the next batch.

    Blosc's own threads would only get in each other's way.
    """
    batch_memory.use(memory)
    blosc.use_threads = False
    keep_freed_memory()
