"""Times of a run on a GPU, told apart by the recorder; the GPU's own calls are stood in for, since none is here."""

from types import SimpleNamespace

import pytest
import torch

from floodrepro.run_folder import RunFolder
from floodrepro.training import recorder


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0, resets=[])
    monkeypatch.setattr(recorder.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: clock.resets.append(clock.now))
    monkeypatch.setattr(recorder, "memory", lambda device: {})
    return clock


def test_no_window_of_steps_on_a_gpu_holds_one_of_the_warm_up(clock, tmp_path):
    trainer = SimpleNamespace(world_size=1, is_global_zero=False)
    module = SimpleNamespace(device=torch.device("cuda"))
    watch = recorder.Recorder(RunFolder(tmp_path), lambda: 0.0, list)
    watch.on_train_start(trainer, module)
    watch.on_train_epoch_start(trainer, module)
    for step in range(60):
        watch.on_train_batch_start(trainer, module, {}, step)
        clock.now += 30.0 if step < 10 else 0.5
        watch.on_train_batch_end(trainer, module, {}, {"filename": ["chip"]}, step)
    assert watch.state_dict()["windows"] == [0.5, 0.5]
    assert clock.resets == [1000.0, 1300.0], "peaks of memory begin with the run, and again after its warm-up"


def test_validation_within_an_epoch_is_neither_waiting_for_data_nor_a_step(clock, tmp_path):
    trainer = SimpleNamespace(world_size=1, is_global_zero=False)
    module = SimpleNamespace(device=torch.device("cpu"))
    watch = recorder.Recorder(RunFolder(tmp_path), lambda: 0.0, list)
    watch.on_train_epoch_start(trainer, module)
    for step in range(20):
        watch.on_train_batch_start(trainer, module, {}, step)
        clock.now += 0.5
        watch.on_train_batch_end(trainer, module, {}, {"filename": ["chip"]}, step)
        clock.now += 30.0
        watch.on_validation_end(trainer, module)
    state = watch.state_dict()
    assert state["windows"] == [0.5] * 10
    assert (state["epoch"]["waiting"], state["epoch"]["seconds"]) == (0.0, 10.0)
