"""A run that was killed, stopped or starved of disk ends with the bits of one that never was, or says why it cannot.

Every command is a real process and every signal a real one (see processes.py). All runs are the demo recipe, smaller,
for two epochs of six steps: full states before steps 2, 4, 8 and 10, before both validations (6 and 12) and at the end.
"""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SMALL, Outcome, content
from floodrepro.run_folder import RunFolder
from processes import Command
from terratorch_runs import different

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
RECIPE = (
    *("--config", "demo", "--save-every", "2", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", *SMALL),
    # No loss is good enough: the plateau scheduler halves the learning rate after each epoch.
    *("--lr_scheduler.init_args.patience", "0", "--lr_scheduler.init_args.threshold", "1.0"),
)
KILLED = -signal.SIGKILL


@dataclass
class Workshop:
    """Runs commands in one folder of runs."""

    chips: Path
    runs: Path
    logs: int = 0

    def start(self, name: str, *extra: object, **how: Any) -> Command:
        self.logs += 1
        where = ("--data-root", self.chips, "--runs-root", self.runs, "--name", name)
        return Command("fit", *RECIPE, *where, *extra, log=self.runs.parent / f"{self.logs}.log", **how)

    def fit(self, name: str, *extra: object, **how: Any) -> Outcome:
        """Train, and check what has to be true of every training."""
        command = self.start(name, *extra, **how)
        outcome = Outcome(command.wait(), "", command.log)
        assert len(outcome.report) <= 3
        assert not list(self.run(name).path.glob("**/*-v[0-9]*.ckpt"))
        return outcome

    def finish(self, name: str, *extra: object) -> Outcome:
        return self.fit(name, *extra).ok()

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.runs / name)


@pytest.fixture(scope="module")
def shared(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """Runs that tests only read or copy; the chips are this file's own."""
    folder = tmp_path_factory.mktemp("resume")
    yield Workshop(Path(shutil.copytree(chips, folder / "chips")), folder / "runs")
    shutil.rmtree(folder)


@pytest.fixture
def workshop(shared: Workshop, tmp_path: Path) -> Iterator[Workshop]:
    yield Workshop(shared.chips, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


@pytest.fixture(scope="module")
def straight(shared: Workshop) -> RunFolder:
    """The run that was never interrupted."""
    shared.finish("straight")
    run = shared.run("straight")
    assert load(run.checkpoints / LAST)["lr_schedulers"][0]["_last_lr"] == [1e-4 / 4]  # the tests see the scheduler
    return run


@pytest.fixture(scope="module")
def killed(shared: Workshop) -> RunFolder:
    """A run killed after its ninth step: last.ckpt is of step 8, previous.ckpt of 6."""
    assert shared.fit("killed", strikes=[{"at": "step", "count": 10}]).code == KILLED
    run = shared.run("killed")
    assert [load(run.checkpoints / name)["global_step"] for name in (LAST, PREVIOUS)] == [8, 6]
    return run


@pytest.fixture
def broken(killed: RunFolder, workshop: Workshop) -> RunFolder:
    """A copy of it, to be resumed as ``broken``: it moved, therefore."""
    return RunFolder(Path(shutil.copytree(killed.path, workshop.runs / "broken")))


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(a: RunFolder, b: RunFolder, name: str, *ignored: str) -> list[str]:
    """Paths of what two checkpoints do not share to the bit, but for training metrics of an interrupted epoch."""
    names, leaves = different(a.checkpoints / name, b.checkpoints / name)
    assert leaves > 300
    return [key for key in names if not key.startswith(("floodrepro.metrics.", *ignored))]


def validations(run: RunFolder) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k.startswith("val/")} for row in run.read_metrics() if row["val/loss"]]


def assert_same_bits(run: RunFolder, straight: RunFolder) -> None:
    assert run.read_record()["status"] == "finished"
    assert differences(run, straight, LAST) == []
    assert differences(run, straight, "best.ckpt") == []
    assert validations(run) == validations(straight)
    steps = [row["step"] for row in run.read_metrics()]
    assert steps == [row["step"] for row in straight.read_metrics()]
    assert not list(run.path.glob("**/.*.partial"))


@pytest.mark.slow
def test_run_killed_at_every_kind_of_moment_resumes_to_the_same_weights(workshop, straight):
    """One kill after the other: a wrong bit of any resume would stay in the weights.

    TMPDIR lies on another filesystem, where a file that is renamed from there would be copied, and could be torn.
    """
    moments = [("step", 1), ("step", 4), ("epoch end", 1), ("rename", 4), ("write", 1), ("validation", 2)]
    moments += [("mark", 1)]  # after all work, and before the mark of a finished run
    for at, count in moments:
        strikes, elsewhere = [{"at": at, "count": count}], {"TMPDIR": "/dev/shm"}
        assert workshop.fit("broken", strikes=strikes, environment=elsewhere).code == KILLED, at
        assert workshop.run("broken").read_record()["status"] == "running"
    workshop.finish("broken")
    assert_same_bits(workshop.run("broken"), straight)
    assert workshop.run("broken").read_record()["best_metrics"] == straight.read_record()["best_metrics"]


def test_signals_save_the_state_of_that_very_step_with_loader_workers_and_without(workshop, straight):
    """No multiple of --save-every brings the steps about."""
    run, workers = workshop.run("broken"), ("--data.init_args.num_workers", 2)
    for number, at, count, group, step in (
        (signal.SIGTERM, "step", 4, True, 3),
        (signal.SIGINT, "validation", 2, False, 6),
        (signal.SIGINT, "step", 2, True, 7),
        (signal.SIGTERM, "step", 3, False, 9),
    ):
        strike = {"at": at, "count": count, "number": number, "group": group}
        outcome = workshop.fit("broken", *(workers if group else ()), strikes=[strike])
        assert outcome.code == 128 + number
        assert f"stopped by {number.name}" in outcome.report[0]
        assert run.read_record()["status"] == "interrupted"
        assert load(run.checkpoints / LAST)["global_step"] == step
    workshop.finish("broken", "--data.init_args.num_workers", 0)
    assert_same_bits(run, straight)


def test_dead_loader_worker_and_full_disk_end_the_fit_and_the_same_command_finishes_it(workshop, broken, straight):
    last, strike = broken.checkpoints / LAST, {"at": "step", "count": 2, "worker": True}
    dead = workshop.fit("broken", "--data.init_args.num_workers", 2, strikes=[strike])
    assert (dead.code, "is killed by signal: Killed" in dead.err) == (1, True), dead.err
    assert broken.read_record()["status"] == "failed"
    full = workshop.fit("broken", limit_file_size=last.stat().st_size // 2)
    assert (full.code, "cannot be written: [Errno 27]" in full.report[0]) == (1, True), full.err
    assert full.report[1] == f"  where: {last}"
    assert load(last)["global_step"] == 8
    workshop.finish("broken")
    assert_same_bits(broken, straight)


def test_changed_run_is_refused_before_training(workshop, broken, cli):
    where: tuple[object, ...] = ("--data-root", workshop.chips, "--runs-root", workshop.runs, "--name", "broken")

    def refused(*extra: object) -> list[str]:
        before = content(broken.path)
        outcome = cli("fit", *RECIPE, *where, *extra)
        assert (outcome.code, content(broken.path)) == (2, before)
        return outcome.report

    lr = ("--optimizer.init_args.lr", 2e-4)
    assert "optimizer.init_args.lr: 0.0001 became 0.0002" in refused(*lr)[0]
    assert "--weights" in refused(*lr, "--resume-anyway")[2]  # its values would come out of the state all the same
    mask, last = next((workshop.chips / "data" / "MASK").iterdir()), broken.checkpoints / LAST
    whole, state = mask.read_bytes(), load(last)
    state["floodrepro"]["identity"]["packages"]["torch"] = "1.13.1"
    state["floodrepro"]["identity"]["chosen_by"]["mode"] = "max"
    torch.save(state, last)
    mask.write_bytes(whole + b"\0")
    try:
        told = refused()[0]
        cli("fit", *RECIPE, *where, "--resume-anyway", "--trainer.limit_val_batches", 1).ok()
    finally:
        mask.write_bytes(whole)
    changes = " ".join(broken.read_record()["resumes"][0]["changes"])
    for change in ("data.", "packages.torch: '1.13.1' became", "chosen_by.mode"):
        assert (change in told, change in changes) == (True, True), change


def test_workers_loggers_paths_and_log_intervals_may_change(workshop, broken, straight, tmp_path):
    moved = Path(shutil.copytree(workshop.chips, tmp_path / "moved"))
    workshop.finish(
        *("broken", "--data-root", moved, "--trainer.log_every_n_steps", 3, "--data.init_args.num_workers", 1),
        *("--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", tmp_path),
    )
    assert differences(broken, straight, LAST, "datamodule", "hyper_parameters", "floodrepro.identity") == []


def test_state_of_one_run_starts_another_that_ends_with_the_same_weights(workshop, killed, straight):
    before = content(killed.path)
    workshop.finish("other", "--ckpt_path", killed.checkpoints / LAST)
    one, reference = (load(run.checkpoints / LAST)["state_dict"] for run in (workshop.run("other"), straight))
    assert all(torch.equal(one[key], reference[key]) for key in one)
    assert content(killed.path) == before
    assert workshop.fit("third", "--ckpt_path", straight.best).code == 1  # weights only


def test_second_fit_in_a_run_folder_is_refused_while_the_first_trains(workshop, broken, straight, cli, monkeypatch):
    first = workshop.start("broken", strikes=[{"at": "step", "count": 2, "number": signal.SIGSTOP}])
    first.wait_until_stopped()
    monkeypatch.setattr("floodrepro.training.fit._LOCK_SECONDS", 0.1)
    second = cli("fit", *RECIPE, "--data-root", workshop.chips, "--runs-root", workshop.runs, "--name", "broken")
    assert (second.code, "another fit is running" in second.report[0]) == (1, True), second.err
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert_same_bits(broken, straight)
