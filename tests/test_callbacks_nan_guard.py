"""The guard: what goes wrong is noticed in time, named, and never saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torchmetrics.classification import MulticlassConfusionMatrix

from conftest import save
from floodrepro.callbacks import NaNGuard
from floodrepro.callbacks.nan_guard import chips_of, largest_values
from floodrepro.errors import Incident
from terratorch_runs import generic, terratorch_fit, with_callbacks
from tiny_training import Data, Task, train


class Overflow(Callback):
    """One inf in the first layer's output, in the forward of one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            handle = pl_module.model[0].register_forward_hook(lambda *args: (handle.remove(), args[2] + torch.inf)[1])


class Poison(Callback):
    """A NaN in a tensor after a step."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.state_dict()[self.name].view(-1)[0] = torch.nan


def all_finite(folder: Path) -> bool:
    files = list(folder.rglob("*.ckpt"))
    states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    return bool(files) and all(bool(torch.isfinite(t).all()) for state in states for t in state.values())


@pytest.mark.parametrize("step", [3, 14, 17])
def test_an_overflow_is_reported_within_ten_steps_and_never_saved(step, tmp_path: Path):
    every_step = ModelCheckpoint(tmp_path / "each", every_n_train_steps=1, save_weights_only=True, save_top_k=-1)
    with pytest.raises(Incident, match="the loss is nan") as caught:
        train(tmp_path, Overflow(step), every_step, every=1, max_epochs=4)
    entry, tensors = caught.value.entry, caught.value.entry["tensors"]
    assert (entry["kind"], entry["step"], caught.value.rolls_back) == ("loss", step, True)
    assert tensors[0].startswith("model.1.running_"), "running statistics first"
    assert {"model.0.weight", "model.3.bias"} < set(tensors)
    assert len(entry["chips"]) % 2 == 0
    assert all(chip.endswith(".tif") for chip in entry["chips"])
    assert all_finite(tmp_path)


@pytest.mark.parametrize("fault", [Overflow(23), Poison(24, "model.1.running_var")], ids=["loss", "buffer"])
def test_it_is_reported_by_the_tenth_batch_where_nothing_is_saved(fault, tmp_path: Path):
    seen: list[int] = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(trainer.global_step)

    data = Data()
    data.chips.values = data.chips.values.repeat(10, 1)  # 60 steps an epoch
    with pytest.raises(Incident) as caught:
        train(tmp_path, fault, Count(), data=data, every=1000)
    assert caught.value.entry["step"] in (23, 30)  # of a loss its own, of a state the one that was looked at
    assert seen[-1] == 29


@pytest.mark.parametrize("name", ["model.1.running_var", "model.0.weight"])
def test_a_bad_weight_or_buffer_ends_the_run_before_its_validation(name, tmp_path: Path):
    with pytest.raises(Incident) as caught:
        train(tmp_path, Poison(5, name), every=1000)
    assert name in caught.value.entry["tensors"]
    assert caught.value.entry["kind"] == ("state" if "running" in name else "loss")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -3.4028e38])  # the last is nan_to_num's infinity
@pytest.mark.parametrize("named", [True, False])
def test_a_bad_input_is_told_from_an_overflow_with_its_chip(value, named, tmp_path: Path):
    data = Data(named=named)
    data.chips.values[7, 2] = value
    with pytest.raises(Incident) as caught:
        train(tmp_path, data=data)
    assert (caught.value.entry["kind"], caught.value.rolls_back) == ("input", False)
    (chip,) = caught.value.entry["chips"]
    assert chip == "chip7.tif" if named else chip.endswith("of the batch")
    assert "rollback" not in caught.value.fix
    assert not list(tmp_path.rglob("*.ckpt")) or all_finite(tmp_path)


def test_steps_that_gradscaler_leaves_out_are_no_incident(tmp_path: Path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    trainer = train(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], every=1000)
    assert trainer.global_step == 12
    assert scaler.get_scale() < 2.0**25


def test_one_class_everywhere_is_a_warning(tmp_path: Path, capsys, monkeypatch):
    class Segments(Task):
        def __init__(self, schedule) -> None:
            super().__init__(schedule)
            self.val_metrics = MulticlassConfusionMatrix(3)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            truth = torch.arange(len(batch["image"])) % 3
            self.val_metrics.update(torch.full_like(truth, 2) if self.current_epoch else truth, truth)

        def on_validation_epoch_end(self):
            self.val_metrics.reset()

    monkeypatch.setattr("tiny_training.Task", Segments)
    train(tmp_path)
    warned = [line for line in capsys.readouterr().err.splitlines() if "for every pixel" in line]
    assert warned == ["floodrepro: warning: epoch 2: validation predicted class 2 for every pixel"]


def test_inputs_and_chips_of_any_batch():
    image, other = torch.tensor([[1.0, -5.0], [2.0, 0.5]]), torch.tensor([[[9.0]], [[0.0]]])
    assert largest_values(image).tolist() == [5, 2]
    assert largest_values((image, torch.tensor([[1e9], [1e9]]))).tolist() == [5, 2], "the second is the target"
    assert largest_values({"image": {"S1": image, "S2": other}, "mask": image * 100}).tolist() == [9, 2]
    assert largest_values({"x": image, "mask": image * 100}).tolist() == [5, 2]
    assert largest_values({"image": torch.ones(2, 3, dtype=torch.uint8)}).numel() == 0
    assert chips_of({"filename": {"S1": ["a/b.tif"], "S2": ["a/c.tif"]}}) == ["b.tif"]
    assert chips_of(image) == []


def test_a_step_reads_nothing_from_the_device():
    """Every read on the host is an operation that a fake tensor, which has no values, refuses."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    class Trainer:
        global_step, world_size, precision = 3, 1, "32-true"

    guard = NaNGuard()
    with FakeTensorMode():
        batch = {"image": torch.ones(2, 3, 8, 8), "filename": ["a", "b"]}
        for number in range(9):
            guard.on_train_batch_start(Trainer, None, batch, number)
            guard.on_train_batch_end(Trainer, None, {"loss": batch["image"].mean()}, batch, number)
        with pytest.raises(DataDependentOutputException):
            guard.on_train_batch_end(Trainer, None, {"loss": batch["image"].mean()}, batch, 9)


def test_plain_terratorch_names_the_file_with_the_bad_pixel(tmp_path: Path):
    recipe = generic(tmp_path)
    pixels = np.zeros((3, 32, 32), "float32")
    pixels[0, 3, 3] = -np.inf
    save(tmp_path / "tiffs" / "chip4_image.tif", pixels, nodata=-9999)
    run = terratorch_fit(with_callbacks(recipe), tmp_path / "run", "--trainer.limit_val_batches", 0)
    assert run.wait() == 1
    assert "floodrepro.errors.Incident: NaNGuard stopped the run" in run.log
    assert "chips chip4_image.tif" in run.log
