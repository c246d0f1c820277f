"""A run that was killed or stopped ends with the bits of one that never was, in plain ``terratorch fit`` too."""

import multiprocessing.util
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from floodrepro.callbacks import AtomicCheckpointIO, ExactResume, exact_resume
from floodrepro.errors import CheckpointError, Interrupted, UsageError
from floodrepro.training.fit import newest_state
from processes import CONTEXT
from terratorch_runs import demo, different, generic, terratorch_fit, with_callbacks
from tiny_training import Data, Kill, Killed, train

LAST = Path("checkpoints", "last.ckpt")
SETTINGS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 4, "val_check_interval": 3},
    "several validations": {"val_check_interval": 2},
    "a validation every second epoch": {"schedule": "step", "check_val_every_n_epoch": 2, "max_epochs": 4},
    "validations across epochs": {"schedule": "step", "check_val_every_n_epoch": None, "val_check_interval": 4},
    "no validation": {"schedule": None, "limit_val_batches": 0, "best": False, "max_epochs": 3},
    "epochs of one batch": {"limit_train_batches": 1, "max_epochs": 4},
    "max_steps": {"max_epochs": -1, "max_steps": 12},
    "early stopping": {"max_epochs": 9},
    "a foreign sampler": {"max_epochs": 3},
    "a plugin for checkpoints": {},
}
# One after the other on one run of plain `terratorch fit`, with real signals: the exit code, and the step of the state.
KILL, TERM, INT = -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT
STRIKES = {
    "demo": [
        ({"at": "step", "count": 4, "number": signal.SIGINT, "group": True}, INT, 3),
        ({"at": "validation", "count": 1}, KILL, 6),
    ],
    "generic": [
        ({"at": "step", "count": 10}, KILL, 6),
        ({"at": "step", "count": 3, "number": signal.SIGTERM, "group": True}, TERM, 6),
    ],
}


def fit(folder: Path, name: str, *more, resume=None):
    stop = [EarlyStopping("val/loss", patience=0, min_delta=0.5)] if name == "early stopping" else []
    plugins = [AsyncCheckpointIO()] if "plugin" in name else []
    data = Data(resumable=name != "a foreign sampler")
    return train(folder, *stop, *more, data=data, resume=resume, plugins=plugins, **SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_again_and_again_at_any_hook_it_ends_as_if_it_never_was(name, tmp_path: Path):
    """A wrong bit of any resume would stay in the weights, so that each chain of kills is compared at its end."""
    fit(tmp_path / "straight", name)
    draw, resumed = random.Random(name), 0
    for chain in ("one", "two"):
        finished = False
        while not finished:
            last = tmp_path / chain / LAST
            resumed += last.exists()
            try:
                fit(tmp_path / chain, name, Kill(draw.randint(5, 35)), resume=last if last.exists() else None)
                finished = True
            except Killed:
                pass
        assert different(tmp_path / "straight" / LAST, last)[0] == []
        if "plugin" not in name:  # its thread may still be writing
            assert files(tmp_path / chain) == files(tmp_path / "straight")
    assert resumed > 2
    assert different(tmp_path / "straight" / LAST, last)[1] > 100


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one_but_not_one_that_stopped_early(tmp_path: Path):
    train(tmp_path / "long", max_epochs=3)
    train(tmp_path / "short", max_epochs=2)
    train(tmp_path / "short", max_epochs=3, resume=tmp_path / "short" / LAST)
    assert different(tmp_path / "long" / LAST, tmp_path / "short" / LAST)[0] == []
    stopped = fit(tmp_path / "early", "early stopping").global_step  # and was killed before its mark
    assert fit(tmp_path / "early", "early stopping", resume=tmp_path / "early" / LAST).global_step == stopped < 9 * 6


def test_a_trial_run_leaves_no_file_and_what_would_be_overwritten_or_mixed_is_refused(tmp_path: Path):
    train(tmp_path, fast_dev_run=True)
    assert list(tmp_path.rglob("*")) == []
    train(tmp_path)
    before = (tmp_path / LAST).stat()
    with pytest.raises(UsageError, match="there already"):
        train(tmp_path)
    with pytest.raises(UsageError, match="save_last"):
        train(tmp_path, ModelCheckpoint(tmp_path / "checkpoints", save_last=True), resume=tmp_path / LAST)
    state = torch.load(tmp_path / LAST, weights_only=True)
    state["exact_resume"]["ranks"] *= 2
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(UsageError, match="2 processes"):
        train(tmp_path, resume=tmp_path / "two.ckpt")
    assert (tmp_path / LAST).stat().st_mtime_ns == before.st_mtime_ns


def test_a_damaged_state_is_kept_and_the_one_before_is_used(tmp_path: Path, capsys):
    assert newest_state(tmp_path) is None
    for number in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.full((1000,), number)}, tmp_path / "last.ckpt")
    assert newest_state(tmp_path) == tmp_path / "last.ckpt"
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[:2000] + b"\xff" + whole[2001:])  # one byte of a tensor
    assert newest_state(tmp_path) == tmp_path / "previous.ckpt"
    assert torch.load(tmp_path / "previous.ckpt")["weights"][0] == 1
    aside = tmp_path / "last.ckpt.damaged"
    assert len(aside.read_bytes()) == len(whole)
    assert aside.name in capsys.readouterr().err
    for damaged in (whole[:-100], b""):
        (tmp_path / "previous.ckpt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            newest_state(tmp_path)


class Told(Callback):
    """Sends signals in the first backward of the fifth step."""

    def __init__(self, times: int) -> None:
        self.times = times

    def on_before_backward(self, trainer, *args):
        while trainer.global_step == 4 and self.times:
            self.times -= 1
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_stops_at_once(tmp_path: Path):
    with pytest.raises(Interrupted, match="at once") as caught:
        train(tmp_path, Told(2), every=100)
    assert caught.value.code == 143
    assert not (tmp_path / LAST).exists()


def test_a_signal_ends_a_step_with_accumulated_gradients_first_and_saves_it(tmp_path: Path):
    """Half a step's gradients are in no state."""
    settings = {"accumulate_grad_batches": 2, "max_epochs": 4, "every": 100}
    train(tmp_path / "straight", **settings)
    with pytest.raises(Interrupted, match="the state of step 5 is saved"):
        train(tmp_path / "told", Told(1), **settings)
    assert torch.load(tmp_path / "told" / LAST, weights_only=True)["global_step"] == 5
    train(tmp_path / "told", resume=tmp_path / "told" / LAST, **settings)
    assert different(tmp_path / "straight" / LAST, tmp_path / "told" / LAST)[0] == []


def _train_for_ever(writer) -> None:
    """A training process with a loader worker that tells its number ten times a second."""

    def work() -> None:
        while True:
            writer.send(os.getpid())
            time.sleep(0.1)

    callback = ExactResume()  # the registry holds no reference
    multiprocessing.util.register_after_fork(callback, exact_resume._shield_worker)
    multiprocessing.get_context("fork").Process(target=work).start()
    signal.pause()


def test_a_loader_worker_obeys_its_training_process_alone_and_dies_with_it():
    reader, writer = CONTEXT.Pipe(duplex=False)
    parent = CONTEXT.Process(target=_train_for_ever, args=(writer,))
    parent.start()
    writer.close()
    os.kill(reader.recv(), signal.SIGTERM)
    assert all(reader.poll(5) and reader.recv() for _ in range(10)), "a signal of others ends it"
    parent.kill()
    with pytest.raises(EOFError):  # of a pipe that nobody writes to any more
        for _ in range(100):
            reader.recv()


@pytest.mark.parametrize("kind", [pytest.param("demo", marks=pytest.mark.slow), "generic"])
def test_plain_terratorch_with_two_workers_goes_on_to_the_same_bits(kind, chips: Path, tmp_path: Path):
    made = demo(chips, num_workers=2) if kind == "demo" else generic(tmp_path, num_workers=2)
    recipe, straight, broken = with_callbacks(made), tmp_path / "straight", tmp_path / "broken"
    run = terratorch_fit(recipe, straight)
    assert run.wait() == 0, run.log
    assert ("cannot be taken up in the middle of an epoch" in run.log) == (kind == "generic")
    resume: tuple[object, ...] = ()
    for strike, code, step in STRIKES[kind]:
        run = terratorch_fit(recipe, broken, *resume, strikes=[strike])
        assert run.wait() == code, run.log
        assert torch.load(broken / LAST, weights_only=True, mmap=True)["global_step"] == step
        resume = ("--ckpt_path", broken / LAST)
    run = terratorch_fit(recipe, broken, *resume)
    assert run.wait() == 0, run.log
    names, leaves = different(straight / LAST, broken / LAST)
    assert (names, leaves > 500) == ([], True)
    assert files(broken) == files(straight)
