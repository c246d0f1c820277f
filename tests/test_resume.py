"""A run that was killed, stopped or starved of disk ends with the bits of one that never was, or says why it cannot.

Every command is a real process and every signal a real one (see forge.py). All runs are the demo recipe, smaller, for
two epochs of six steps: full states before steps 2, 4, 8 and 10, before both validations (6 and 12) and at the end.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Outcome
from floodrepro.run_folder import RunFolder, sha256_of
from forge import Forge

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
RECIPE = (
    *("--config", "demo", "--save-every", "2", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
    *("--data.init_args.batch_size", "2"),
    # Three quarters of the time, and a state of 77 MB, not 169.
    *("--data.init_args.timesteps", "[1,2]", "--model.init_args.model_args.backbone_temporal_n_timestamps", "2"),
    *("--model.init_args.model_args.backbone_temporal_pooling", "mean"),
    *("--model.init_args.model_args.decoder_channels", "[32,16,8,8]"),
    # No loss is good enough: the plateau scheduler halves the learning rate after each epoch.
    *("--lr_scheduler.init_args.patience", "0", "--lr_scheduler.init_args.threshold", "1.0"),
)
KILLED = -signal.SIGKILL


@dataclass
class Workshop:
    """Runs commands in one folder of runs."""

    forge: Forge
    chips: Path
    runs: Path
    seconds: dict[str, float] = field(default_factory=dict)
    logs: int = 0

    def fit(self, name: str, *extra: object, **request: Any) -> Outcome:
        """Train, and check what has to be true of every training; the code is the process's id if it is held."""
        begin = time.monotonic()
        where = ("--data-root", self.chips, "--runs-root", self.runs, "--name", name)
        outcome = self.command("fit", *RECIPE, *where, *extra, **request)
        self.seconds[name] = time.monotonic() - begin
        assert len(outcome.report) <= 3
        assert not list(self.run(name).path.glob("**/*-v[0-9]*.ckpt"))
        return outcome

    def command(self, *argv: object, **request: Any) -> Outcome:
        self.runs.mkdir(exist_ok=True)
        self.logs += 1
        log = self.runs.parent / f"{self.logs}.log"
        answer = self.forge.ask(argv=[str(argument) for argument in argv], log=str(log), **request)
        return Outcome(answer.get("code", answer.get("held")), "", log.read_text())

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.runs / name)


def status(run: RunFolder) -> str | None:
    return run.read_record().get("status") if run.record.exists() else None


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="module")
def shared(forge: Forge, chips: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Runs that tests only read or copy; the chips are this file's own."""
    folder = tmp_path_factory.mktemp("resume")
    yield Workshop(forge, Path(shutil.copytree(chips, folder / "chips")), folder / "runs")
    shutil.rmtree(folder)


@pytest.fixture
def workshop(shared: Workshop, tmp_path: Path) -> Iterator[Workshop]:
    yield Workshop(shared.forge, shared.chips, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


@pytest.fixture(scope="module")
def straight(shared: Workshop) -> RunFolder:
    """The run that was never interrupted."""
    outcome = shared.fit("straight")
    assert outcome.code == 0, outcome.err
    run = shared.run("straight")
    assert load(run.checkpoints / LAST)["lr_schedulers"][0]["_last_lr"] == [1e-4 / 4]  # the tests see the scheduler
    return run


@pytest.fixture(scope="module")
def killed(shared: Workshop) -> RunFolder:
    """A run killed after its ninth step: last.ckpt is of step 8, previous.ckpt of 6."""
    assert shared.fit("killed", strike=[{"at": "step", "count": 10}]).code == KILLED
    run = shared.run("killed")
    assert [load(run.checkpoints / name)["global_step"] for name in (LAST, PREVIOUS)] == [8, 6]
    return run


@pytest.fixture
def broken(killed: RunFolder, workshop: Workshop) -> RunFolder:
    """A copy of it, to be resumed as ``broken``: it moved, therefore."""
    return RunFolder(Path(shutil.copytree(killed.path, workshop.runs / "broken")))


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def leaves(node: Any, folder: Path, path: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors and values by their path, the run's folder taken out of what names a file in it."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, folder, f"{path}/{str(key).replace(str(folder), 'RUN')}")
    elif isinstance(node, list | tuple) and node:
        for number, value in enumerate(node):
            yield from leaves(value, folder, f"{path}/{number}")
    else:
        yield path, node.replace(str(folder), "RUN") if isinstance(node, str) else node


# Times; training metrics of the epoch that was interrupted; and a progress counter without effect.
IGNORED = ("/callbacks/RunRecord", "/metrics_csv", "/loops/fit_loop/epoch_loop.val_loop.batch_progress/total")


def differences(a: RunFolder, b: RunFolder, name: str, ignored: tuple[str, ...] = IGNORED) -> list[str]:
    """Paths of what two checkpoints do not share to the bit."""
    one, other = (dict(leaves(load(run.checkpoints / name), run.path)) for run in (a, b))
    assert len(one) > 300
    return [key for key in one.keys() | other.keys() if not key.startswith(ignored) and not same(one, other, key)]


def same(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    if key not in one or key not in other or type(one[key]) is not type(other[key]):
        return False
    a, b = one[key], other[key]
    return (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


def validations(run: RunFolder) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k.startswith("val/")} for row in run.read_metrics() if row["val/loss"]]


def assert_same_bits(run: RunFolder, straight: RunFolder, *more: str) -> None:
    assert status(run) == "finished"
    assert differences(run, straight, LAST, (*IGNORED, *more)) == []
    assert differences(run, straight, "best.ckpt", (*IGNORED, *more)) == []
    assert validations(run) == validations(straight)
    steps = [row["step"] for row in run.read_metrics()]
    assert steps == [row["step"] for row in straight.read_metrics()]
    assert not list(run.path.glob("**/.*.partial"))


def finish(workshop: Workshop, name: str, *extra: object, **request: Any) -> Outcome:
    outcome = workshop.fit(name, *extra, **request)
    assert outcome.code == 0, outcome.err
    return outcome


def content(folder: Path) -> dict[str, tuple[int, str]]:
    """Times and hashes of a folder's files; the lock and the log belong to whoever tries."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "log.txt")]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256_of(path)) for path in files}


# Claim by claim.


@pytest.mark.parametrize(
    "moments",
    [
        [("step", 1)],
        [("step", 4)],
        [("epoch end", 1), ("step", 1)],  # after the repeated validation, which wrote best.ckpt: it comes once more
        [("validation", 4)],
        [("rename", 4)],
        [("write", 3)],
    ],
    ids=["before a state", "mid-epoch", "epoch's end and next begin", "validation", "between renames", "in a write"],
)
def test_killed_run_resumes_to_the_same_weights(workshop, straight, moments):
    run = workshop.run("broken")
    for at, count in moments:
        assert workshop.fit("broken", strike=[{"at": at, "count": count}]).code == KILLED
        assert status(run) == "running"
    finish(workshop, "broken")
    assert_same_bits(run, straight)


@pytest.mark.slow
def test_run_killed_ten_times_at_random_resumes_to_the_same_weights(workshop, shared, straight):
    draw = random.Random(3)
    codes: list[int] = []
    while len(codes) < 10 and 0 not in codes:
        delay = draw.uniform(0.15, 0.35) * shared.seconds["straight"]
        codes.append(workshop.fit("broken", kill_after=delay).code)
    assert codes.count(KILLED) >= 3
    if 0 not in codes:
        finish(workshop, "broken")
    assert_same_bits(workshop.run("broken"), straight)


@pytest.mark.parametrize(
    ("number", "moment", "code", "step"),
    [(signal.SIGTERM, ("step", 10), 143, 9), (signal.SIGINT, ("validation", 2), 130, 6)],
    ids=["SIGTERM mid-epoch", "SIGINT in validation"],
)
def test_signal_saves_the_state_of_that_very_step(workshop, straight, number, moment, code, step):
    run = workshop.run("broken")
    outcome = workshop.fit("broken", strike=[{"at": moment[0], "count": moment[1], "signal": number}])
    assert outcome.code == code
    assert f"stopped by {number.name}" in outcome.report[0]
    assert status(run) == "interrupted"
    assert load(run.checkpoints / LAST)["global_step"] == step  # no multiple of --save-every brought it about
    finish(workshop, "broken")
    assert_same_bits(run, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_with_loader_workers_loses_no_step(workshop, straight, number):
    workers = ("--data.init_args.num_workers", 2)
    strike = [{"at": "step", "count": 9, "signal": number, "group": True}]
    outcome = workshop.fit("broken", *workers, strike=strike)
    assert outcome.code == 128 + number
    assert load(workshop.run("broken").checkpoints / LAST)["global_step"] == 8
    finish(workshop, "broken", *workers)
    assert_same_bits(workshop.run("broken"), straight, "/datamodule", "/hyper_parameters")


def test_run_with_accumulated_gradients_resumes_to_the_same_weights(workshop):
    accumulate = ("--trainer.accumulate_grad_batches", 2)
    finish(workshop, "straight", *accumulate)
    # The tenth batch is the second of its step: half a step's gradients are in no state, so that it is ended first.
    stop = {"at": "step", "count": 10, "signal": signal.SIGTERM}
    outcome = workshop.fit("broken", *accumulate, "--save-every", 500, strike=[stop])
    assert outcome.code == 143
    assert load(workshop.run("broken").checkpoints / LAST)["global_step"] == 5
    finish(workshop, "broken", *accumulate)
    assert_same_bits(workshop.run("broken"), workshop.run("straight"))


def test_full_disk_is_a_clear_error_and_the_same_command_finishes_once_there_is_room(workshop, broken, straight):
    size = (broken.checkpoints / LAST).stat().st_size
    outcome = workshop.fit("broken", limit_file_size=size // 2)
    assert outcome.code == 1
    assert "the checkpoint cannot be written" in outcome.report[0]
    assert outcome.report[1] == f"  where: {broken.checkpoints / LAST}"
    assert load(broken.checkpoints / LAST)["global_step"] == 8
    finish(workshop, "broken")
    assert_same_bits(broken, straight)


def flip_one_byte(path: Path) -> None:
    """In the middle of a tensor: torch.load would notice nothing."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", [flip_one_byte, lambda path: os.truncate(path, 0)], ids=["flipped", "empty"])
def test_damaged_state_is_kept_aside_and_the_one_before_is_used(workshop, broken, straight, damage):
    last = broken.checkpoints / LAST
    damage(last)
    damaged = sha256_of(last)
    outcome = finish(workshop, "broken")
    assert "damaged" in outcome.err
    (aside,) = broken.checkpoints.glob(f"{LAST}.*")
    assert sha256_of(aside) == damaged
    assert_same_bits(broken, straight)


@pytest.mark.parametrize("changed", ["recipe", "data", "packages"])
def test_changed_run_is_refused_before_training(workshop, broken, changed):
    extra: tuple[object, ...] = ()
    mask = next((workshop.chips / "data" / "MASK").iterdir())
    whole, last = mask.read_bytes(), broken.checkpoints / LAST
    if changed == "recipe":
        extra, expected = ("--optimizer.init_args.lr", 2e-4), "optimizer.init_args.lr: 0.0001 became 0.0002"
    elif changed == "data":
        mask.write_bytes(whole + b"\0")
        expected = "data."
    else:
        state = load(last)
        state["floodrepro"]["identity"]["packages"]["torch"] = "1.13.1"
        torch.save(state, last)
        expected = "packages.torch: '1.13.1' became"
    try:
        before = content(broken.path)
        refused = workshop.fit("broken", *extra)
        assert refused.code == 2
        assert expected in refused.report[0]
        assert content(broken.path) == before
        allowed = workshop.fit("broken", *extra, "--resume-anyway", "--trainer.limit_val_batches", 1)
        if changed == "recipe":  # its values would come out of the state all the same
            assert allowed.code == 2
            assert "--weights" in allowed.report[2]
        else:
            assert allowed.code == 0, allowed.err
            (entry,) = broken.read_record()["resumes"]
            assert any(change.startswith(expected) for change in entry["changes"])
    finally:
        mask.write_bytes(whole)


def test_workers_loggers_paths_and_log_intervals_may_change(workshop, broken, straight, tmp_path):
    moved = Path(shutil.copytree(workshop.chips, tmp_path / "moved"))
    changes = ("--data-root", moved, "--trainer.log_every_n_steps", 3, "--data.init_args.num_workers", 1)
    finish(
        workshop,
        "broken",
        *changes,
        *("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", tmp_path),
    )
    ignored = ("/datamodule", "/hyper_parameters", "/floodrepro/identity")
    assert differences(broken, straight, LAST, (*IGNORED, *ignored)) == []


def test_state_of_one_run_starts_another_that_ends_with_the_same_weights(workshop, killed, straight):
    before = content(killed.path)
    finish(workshop, "other", "--ckpt_path", killed.checkpoints / LAST)
    other = workshop.run("other")
    one, reference = (load(run.checkpoints / LAST)["state_dict"] for run in (other, straight))
    assert all(torch.equal(one[key], reference[key]) for key in one)
    assert content(killed.path) == before
    assert workshop.fit("third", "--ckpt_path", straight.best).code == 1  # weights only


def test_second_fit_in_a_run_folder_is_refused_while_the_first_trains(workshop, broken, straight):
    first = workshop.fit("broken", strike=[{"at": "step", "count": 2, "signal": signal.SIGSTOP}])
    second = workshop.fit("broken")
    assert second.code == 1
    assert "another fit is running" in second.report[0]
    assert workshop.forge.ask(go_on=first.code) == {"code": 0}
    assert_same_bits(broken, straight)


def test_exit_code_0_and_the_mark_of_a_finished_run_come_together(workshop, broken, straight):
    """Killed after all work and before the mark."""
    assert workshop.fit("broken", strike=[{"at": "mark"}]).code == KILLED
    assert status(broken) == "running"
    finish(workshop, "broken")
    assert broken.read_record()["best_val_loss"] == straight.read_record()["best_val_loss"]
    assert_same_bits(broken, straight)


def test_run_that_stopped_early_does_not_train_on_when_it_was_killed_before_its_mark(workshop):
    early = ("--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/mIoU")
    early += ("--trainer.callbacks.mode=max", "--trainer.callbacks.stopping_threshold=-1.0", "--trainer.max_epochs=3")
    assert workshop.fit("early", *early, strike=[{"at": "mark"}]).code == KILLED
    finish(workshop, "early", *early)
    assert workshop.run("early").read_record()["epochs"] == 1


def test_second_signal_ends_at_once_with_the_code_and_status_of_a_signal(workshop, broken):
    twice = [{"at": "step", "count": 2, "signal": signal.SIGTERM}] * 2
    outcome = workshop.fit("broken", strike=twice)
    assert outcome.code == 143
    assert "at once" in outcome.report[0]
    assert status(broken) == "interrupted"


def test_full_state_holds_no_code_and_can_be_tested(shared, straight):
    outcome = shared.command("test", "--ckpt", straight.checkpoints / LAST, "--format", "json")
    assert outcome.code == 0, outcome.err
