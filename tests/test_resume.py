"""A run that was killed, stopped or starved of disk ends with the bits of one that never was, or says why it cannot.

Every command is a real process and every signal a real one (see forge.py). All runs are the demo recipe, smaller, for
two epochs of six steps: full states before steps 2, 4, 8 and 10, before both validations (6 and 12) and at the end.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Outcome
from floodrepro import recipe as recipes
from floodrepro.errors import UsageError
from floodrepro.run_folder import RunFolder, sha256_of
from floodrepro.training.checkpoint_files import LAST, PREVIOUS, is_whole
from forge import Forge

RECIPE = (
    *("--config", "demo", "--save-every", "2", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"),
    *("--data.init_args.batch_size", "2"),
    # Three quarters of the time, and a state of 77 MB, not 169.
    *("--data.init_args.timesteps", "[1,2]", "--model.init_args.model_args.backbone_temporal_n_timestamps", "2"),
    *("--model.init_args.model_args.backbone_temporal_pooling", "mean"),
    *("--model.init_args.model_args.decoder_channels", "[32,16,8,8]"),
    # No loss is good enough: the plateau scheduler halves the learning rate after each epoch.
    *("--lr_scheduler.init_args.patience", "0", "--lr_scheduler.init_args.threshold", "1.0"),
    "--trainer.callbacks+=forge.EpochMean",
)
LEARNING_RATE = 1e-4
KILLED = -signal.SIGKILL
MIDDLE = 800  # of a state's some 2,300 writes


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
        run = self.run(name)
        was_finished = status(run) == "finished"
        begin = time.monotonic()
        outcome = self.command("fit", *RECIPE, *self.where(name), *extra, **request)
        self.seconds[name] = time.monotonic() - begin
        assert was_finished or (outcome.code == 0) == (status(run) == "finished"), outcome.err
        assert len(outcome.report) <= 3
        assert not list(run.path.glob("**/*-v[0-9]*.ckpt"))
        return outcome

    def command(self, *argv: object, **request: Any) -> Outcome:
        self.runs.mkdir(exist_ok=True)
        self.logs += 1
        log = self.runs.parent / f"{self.logs}.log"
        answer = self.forge.ask(argv=[str(argument) for argument in argv], log=str(log), **request)
        return Outcome(answer.get("code", answer.get("held")), "", log.read_text())

    def where(self, name: str) -> tuple[object, ...]:
        return ("--data-root", self.chips, "--runs-root", self.runs, "--name", name)

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
    shutil.rmtree(folder)  # pytest would keep it for three sessions


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
    state = load(run.checkpoints / LAST)
    assert state["lr_schedulers"][0]["_last_lr"] == [LEARNING_RATE / 4]  # so these tests do see the scheduler step
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
    """A copy of it, to go on with as ``broken``."""
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


def differences(a: RunFolder, b: RunFolder, name: str, ignore: tuple[str, ...] = ("/callbacks/Recorder",)) -> list[str]:
    """Paths of what two checkpoints do not share to the bit."""
    one, other = (dict(leaves(load(run.checkpoints / name), run.path)) for run in (a, b))
    assert len(one) > 300
    return [key for key in one.keys() | other.keys() if not key.startswith(ignore) and not same(one, other, key)]


def same(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    if key not in one or key not in other or type(one[key]) is not type(other[key]):
        return False
    a, b = one[key], other[key]
    return (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


def assert_same_bits(run: RunFolder, straight: RunFolder, *ignore: str) -> None:
    assert status(run) == "finished"
    assert differences(run, straight, LAST, ("/callbacks/Recorder", *ignore)) == []
    assert differences(run, straight, "best.ckpt", ignore or ("nothing",)) == []
    assert run.metrics.read_bytes() == straight.metrics.read_bytes()
    files = [{path.name for path in r.checkpoints.iterdir() if ".damaged" not in path.name} for r in (run, straight)]
    assert files[0] == files[1]
    assert not list(run.path.glob("**/.*.partial"))


def finish(workshop: Workshop, name: str, *extra: object, **request: Any) -> Outcome:
    outcome = workshop.fit(name, *extra, **request)
    assert outcome.code == 0, outcome.err
    return outcome


def content(folder: Path) -> dict[str, tuple[int, str]]:
    """Times and hashes of a folder's files, the lock's left out: who refuses has held it for a moment."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256_of(path)) for path in files}


def change(path: Path, function: Any) -> None:
    """Edit a full state's file, hash included."""
    state = load(path)
    function(state)
    torch.save(state, path)
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256_of(path)}  {path.name}\n")


# Claim by claim.


@pytest.mark.parametrize(
    "moments",
    [
        [("step", 1)],
        [("step", 4)],
        [("epoch end", 1), ("step", 1)],  # after the repeated validation, which wrote best.ckpt: it comes once more
        [("validation", 4)],
    ],
    ids=["before the first state", "mid-epoch", "epoch's end and next begin", "in the last validation"],
)
def test_killed_run_resumes_to_the_same_weights(workshop, straight, moments):
    run = workshop.run("broken")
    for at, count in moments:
        assert workshop.fit("broken", strike=[{"at": at, "count": count}]).code == KILLED
        assert status(run) == "running"
    has_state = (run.checkpoints / LAST).exists()
    assert has_state == (moments != [("step", 1)])
    outcome = finish(workshop, "broken")
    assert ("going on from step" in outcome.err) == has_state
    assert_same_bits(run, straight)


@pytest.mark.parametrize(
    "moment",
    [("digest", 1), ("rename", 2), ("digest", 2), ("rename", 4), ("flush", 1)],
    ids=["previous unhashed", "previous unmoved", "last unhashed", "last unmoved", "unflushed"],
)
def test_run_killed_between_the_renames_of_a_state_resumes_to_the_same_weights(workshop, broken, straight, moment):
    assert workshop.fit("broken", strike=[{"at": moment[0], "count": moment[1]}]).code == KILLED
    whole = {
        name: load(broken.checkpoints / name)["global_step"]
        for name in (LAST, PREVIOUS)
        if is_whole(broken.checkpoints / name)
    }
    assert max(whole.values()) == (10 if moment[0] == "flush" else 8)
    outcome = finish(workshop, "broken")
    assert "damaged" not in outcome.err
    assert_same_bits(broken, straight)


def test_run_killed_in_the_middle_of_a_write_resumes_to_the_same_weights_and_leaves_no_partial_file(
    workshop, broken, straight
):
    whole = (broken.checkpoints / LAST).stat().st_size
    assert workshop.fit("broken", strike=[{"at": "write", "count": MIDDLE}]).code == KILLED
    (torn,) = broken.checkpoints.glob(".*.partial")
    assert 0.1 * whole < torn.stat().st_size < 0.9 * whole
    finish(workshop, "broken")
    assert not torn.exists()
    assert_same_bits(broken, straight)


def test_run_killed_ten_times_at_random_resumes_to_the_same_weights(workshop, shared, straight):
    draw = random.Random(3)
    codes = []
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
def test_signal_saves_the_state_of_that_very_step_and_the_run_resumes_to_the_same_weights(
    workshop, straight, number, moment, code, step
):
    run = workshop.run("broken")
    outcome = workshop.fit("broken", strike=[{"at": moment[0], "count": moment[1], "signal": number}])
    assert outcome.code == code
    assert f"stopped by {number.name}; the state is saved" in outcome.report[0]
    assert status(run) == "interrupted"
    assert is_whole(run.checkpoints / LAST)
    assert load(run.checkpoints / LAST)["global_step"] == step  # no multiple of --save-every brought it about
    finish(workshop, "broken")
    assert_same_bits(run, straight)


def test_run_with_worker_processes_resumes_at_once_to_the_same_weights(workshop, straight):
    """At once: workers outlive a killed run by some seconds and must not hold its lock."""
    workers = ("--data.init_args.num_workers", 2)
    assert workshop.fit("broken", *workers, strike=[{"at": "step", "count": 9}]).code == KILLED
    finish(workshop, "broken", *workers)
    assert_same_bits(
        workshop.run("broken"), straight, "/floodrepro/identity/recipe", "/datamodule", "/hyper_parameters"
    )


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


def test_kill_in_the_middle_of_a_write_leaves_no_torn_file_though_tmpdir_is_another_filesystem(workshop, broken):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == broken.path.stat().st_dev:
        pytest.skip("/dev/shm and the run folder are one filesystem, or there is no /dev/shm")
    named = [broken.checkpoints / name for name in (LAST, PREVIOUS)]
    in_the_file = [{"at": "write", "count": MIDDLE}]
    in_the_move = [{"at": "copy"}, {"at": "rename", "count": 4}]  # before the last rename, if nothing is copied
    with tempfile.TemporaryDirectory(dir=shm) as elsewhere:
        for strike in (in_the_file, in_the_move):
            assert workshop.fit("broken", environment={"TMPDIR": elsewhere}, strike=strike).code == KILLED
            assert any(is_whole(path) for path in named)
            assert all(is_whole(path) for path in named if path.exists())


@pytest.fixture(params=["limit on a file's size", "small filesystem"])
def full_disk(request, broken: RunFolder, workshop: Workshop, tmp_path: Path) -> Iterator[tuple[Workshop, Any, Any]]:
    """A workshop, a fit in it that finds no room for its next state, and what makes room."""
    size = (broken.checkpoints / LAST).stat().st_size
    if request.param == "limit on a file's size":
        yield workshop, lambda: workshop.fit("broken", limit_file_size=size // 2), lambda: None
        return
    small = tmp_path / "small"
    small.mkdir()

    def mount(*options: object) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(map(str, options)), "tmpfs", small]
        return subprocess.run(command, capture_output=True).returncode == 0

    def fill_up() -> Outcome:
        """Once the fit is at work: it does not begin where there is no room to be seen."""
        held = elsewhere.fit("broken", strike=[{"at": "step", "count": 2, "signal": signal.SIGSTOP}])
        used = sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
        assert mount("remount", f"size={used + size // 2}")
        code = elsewhere.forge.ask(go_on=held.code)["code"]
        return Outcome(code, "", (elsewhere.runs.parent / f"{elsewhere.logs}.log").read_text())

    if not mount("size=4g"):
        pytest.skip("mounting a filesystem needs root")
    try:
        shutil.copytree(broken.path, small / "broken")
        elsewhere = Workshop(workshop.forge, workshop.chips, small)
        yield elsewhere, fill_up, lambda: mount("remount", "size=4g")
    finally:
        subprocess.run(["umount", small], check=True)


def test_full_disk_is_a_clear_error_and_the_same_command_finishes_once_there_is_room(full_disk, straight):
    workshop, fit_without_room, make_room = full_disk
    run = workshop.run("broken")
    outcome = fit_without_room()
    assert outcome.code == 1
    assert "the checkpoint cannot be written: " in outcome.report[0]
    assert outcome.report[1] == f"  where: {run.checkpoints / LAST}"
    assert len(outcome.report) == 3
    assert is_whole(run.checkpoints / LAST)
    assert load(run.checkpoints / LAST)["global_step"] == 8
    assert not list(run.checkpoints.glob(".*.partial"))
    make_room()
    finish(workshop, "broken")
    assert_same_bits(run, straight)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_one_byte(path: Path) -> None:
    """In the middle of a tensor: torch.load would notice nothing."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [truncate, flip_one_byte, empty], ids=lambda damage: damage.__name__)
def test_damaged_state_is_found_by_its_hash_and_set_aside_for_the_one_before(workshop, broken, straight, damage):
    last = broken.checkpoints / LAST
    damage(last)
    damaged = sha256_of(last)
    outcome = finish(workshop, "broken")
    assert f"warning: {LAST} is damaged" in outcome.err
    assert f"set aside as {LAST}.damaged, going on from {PREVIOUS}" in outcome.err
    assert "going on from step 6," in outcome.err
    assert sha256_of(broken.checkpoints / f"{LAST}.damaged") == damaged
    assert_same_bits(broken, straight)


def test_run_whose_states_are_both_damaged_is_refused_and_nothing_is_deleted(workshop, broken):
    for name in (LAST, PREVIOUS):
        flip_one_byte(broken.checkpoints / name)
    before = {digest for _, digest in content(broken.path).values()}
    for _ in range(2):
        outcome = workshop.fit("broken")
        assert outcome.code == 1
        assert PREVIOUS in outcome.report[0]
        assert "damaged" in outcome.report[0]
        assert {digest for _, digest in content(broken.path).values()} == before


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_sha256sum_checks_the_sidecars(broken):
    command = ["sha256sum", "--strict", "-c", f"{LAST}.sha256", f"{PREVIOUS}.sha256"]
    checked = subprocess.run(command, cwd=broken.checkpoints, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout.split()) == (0, [f"{LAST}:", "OK", f"{PREVIOUS}:", "OK"])
    flip_one_byte(broken.checkpoints / LAST)
    assert subprocess.run(command, cwd=broken.checkpoints, capture_output=True).returncode == 1


@pytest.mark.parametrize("changed", ["recipe", "data", "code"])
def test_changed_run_is_refused_and_with_resume_anyway_goes_on_on_record(workshop, broken, changed):
    extra: tuple[object, ...] = ()
    mask = next((workshop.chips / "data" / "MASK").iterdir())
    whole = mask.read_bytes()
    digest = broken.read_record()["data_digest"]
    if changed == "recipe":
        extra = ("--optimizer.init_args.lr", 2e-4)
        expected = "optimizer.init_args.lr: 0.0001 became 0.0002"
    elif changed == "data":
        mask.write_bytes(whole + b"\0")
        expected = f"data_digest: '{digest}' became '"
    else:
        change(broken.checkpoints / LAST, lambda state: state["floodrepro"]["identity"]["code"].update(torch="1.13.1"))
        expected = f"code.torch: '1.13.1' became '{torch.__version__.split('+')[0]}'"
    try:
        before = content(broken.path)
        refused = workshop.fit("broken", *extra)
        assert refused.code == 2
        assert expected in refused.report[0]
        assert "--resume-anyway" in refused.report[2]
        assert content(broken.path) == before
        old_recipe = broken.recipe.read_bytes()
        finish(workshop, "broken", *extra, "--resume-anyway")
    finally:
        mask.write_bytes(whole)
    (entry,) = broken.read_record()["resumes"]
    assert Path(entry["from"]).name == LAST
    assert len(entry["changes"]) == 1
    assert entry["changes"][0].startswith(expected)
    assert (broken.path / "recipe.yaml-2").read_bytes() == old_recipe
    assert (broken.recipe.read_bytes() == old_recipe) == (changed != "recipe")


def test_adamw_in_one_kernel_cannot_be_chosen_or_given_up_within_a_run(workshop, broken):
    """Its state has another form: going on would fail in the first step, or go on as before and record the opposite."""
    refused = workshop.fit("broken", "--fused", "--resume-anyway")
    assert refused.code == 2
    assert "one kernel" in refused.report[0]
    assert "without --fused" in refused.report[2]


def test_finished_run_is_never_gone_on_with_and_never_refuses_an_unfinished_one(shared, straight, killed):
    for run, extra, said in (
        (straight, (), "the run is finished"),
        (straight, ("--resume-anyway",), "the run is finished"),
        (straight, ("--resume", straight.checkpoints / LAST), "the run is finished"),
        (killed, ("--resume", "never"), "exists already and is never written over"),
    ):
        before = content(run.path)
        outcome = shared.fit(run.path.name, *extra)
        assert outcome.code == 2
        assert said in outcome.report[0]
        assert f"--name {run.path.name}-2" in outcome.report[2]
        assert content(run.path) == before


@pytest.mark.parametrize("name", [LAST, PREVIOUS])
def test_state_of_one_run_starts_another_that_ends_with_the_same_bits(workshop, killed, straight, name):
    """From mid-epoch, and from a validation whose best weights the first run has but its state does not know of."""
    before = content(killed.path)
    finish(workshop, "other", "--resume", killed.checkpoints / name)
    assert_same_bits(workshop.run("other"), straight)
    assert content(killed.path) == before


def test_run_started_from_another_ones_state_goes_on_from_its_own_by_the_same_command(workshop, killed, straight):
    start = ("--resume", killed.checkpoints / LAST)
    # Before its first own state, where only the other one's is there, and after it.
    for count, step in ((2, 8), (4, 8)):
        outcome = workshop.fit("other", *start, strike=[{"at": "step", "count": count}])
        assert outcome.code == KILLED
        assert f"going on from step {step}," in outcome.err
    outcome = finish(workshop, "other", *start)
    assert f"this run was started from {start[1]} and goes on from its own {LAST}" in outcome.err
    assert "going on from step 10," in outcome.err
    assert_same_bits(workshop.run("other"), straight)


def test_state_that_a_run_was_not_started_from_is_gone_back_to(workshop, broken, killed, straight):
    outcome = finish(workshop, "broken", "--resume", killed.checkpoints / PREVIOUS)
    assert "going on from step 6," in outcome.err
    assert_same_bits(broken, straight)


def test_run_that_starts_from_another_ones_end_has_its_best_weights_and_metrics(workshop, straight):
    finish(workshop, "other", "--resume", straight.checkpoints / LAST)
    run = workshop.run("other")
    assert run.read_record()["best_val_loss"] == straight.read_record()["best_val_loss"]
    assert run.best.read_bytes() == straight.best.read_bytes()
    assert run.metrics.read_bytes() == straight.metrics.read_bytes()


def test_damaged_state_is_not_resumed_from_though_it_was_asked_for(workshop, broken):
    flip_one_byte(broken.checkpoints / LAST)
    outcome = workshop.fit("other", "--resume", broken.checkpoints / LAST)
    assert outcome.code == 1
    assert f"{LAST} is damaged" in outcome.report[0]


def test_second_fit_in_a_run_folder_is_refused_while_the_first_is_at_work(workshop, broken, straight):
    first = workshop.fit("broken", strike=[{"at": "step", "count": 2, "signal": signal.SIGSTOP}])
    second = workshop.command("fit", *RECIPE, *workshop.where("broken"))
    assert second.code == 1
    assert f"another fit (process {first.code}) is at work" in second.report[0]
    assert workshop.forge.ask(go_on=first.code) == {"code": 0}
    assert_same_bits(broken, straight)


def test_exit_code_0_and_the_mark_of_a_finished_run_come_together(workshop, broken, straight):
    """Killed after all work and before the mark; every other outcome of this file is checked in `Workshop.command`."""
    assert workshop.fit("broken", strike=[{"at": "mark"}]).code == KILLED
    assert status(broken) == "running"
    finish(workshop, "broken")
    assert broken.read_record()["best_val_loss"] == straight.read_record()["best_val_loss"]
    assert_same_bits(broken, straight)


def test_run_that_stopped_early_does_not_train_on_when_it_was_killed_before_its_mark(workshop):
    early = ("--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/mIoU")
    early += (
        "--trainer.callbacks.mode=max",
        "--trainer.callbacks.stopping_threshold=-1.0",
        "--trainer.max_epochs=3",
    )  # any mIoU is good enough
    assert workshop.fit("early", *early, strike=[{"at": "mark"}]).code == KILLED
    finish(workshop, "early", *early)
    assert workshop.run("early").read_record()["epochs"] == 1


def test_second_signal_ends_at_once_with_the_code_and_status_of_a_signal(workshop, broken):
    twice = [{"at": "step", "count": 2, "signal": signal.SIGTERM}] * 2
    outcome = workshop.fit("broken", strike=twice)
    assert outcome.code == 143
    assert "at once, without saving" in outcome.report[0]
    assert status(broken) == "interrupted"


def test_optimizer_that_a_recipe_changed_wins_over_the_state_where_the_run_goes_on_all_the_same(workshop, broken):
    changes = ("--optimizer.init_args.weight_decay", 0.5, "--lr_scheduler.init_args.factor", 0.25)
    finish(workshop, "broken", *changes, "--resume-anyway")
    state = load(broken.checkpoints / LAST)
    assert {group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]} == {0.5}
    assert state["lr_schedulers"][0]["factor"] == 0.25


def test_recipe_of_an_attempt_that_never_was_built_gives_way_and_is_kept(tmp_path):
    from floodrepro.training.resume import begin, identity

    run = RunFolder.create(tmp_path / "run")
    for decoder in ("NopeDecoder", "UNetDecoder"):
        recipe = {"model": {"decoder": decoder}}
        digest = recipes.fingerprint(recipe)
        assert begin(run, identity(recipe, digest, None, {}, {"fused": False}), "auto", anyway=False) is None
        run.update_record(data_digest=None, code={}, numerics={"fused": False})
    assert recipes.read(run.recipe) == recipe
    assert "NopeDecoder" in (run.path / "recipe.yaml-2").read_text()
    run.update_record(environment={})  # it was built: from here on another recipe is another run
    with pytest.raises(UsageError, match=r"model\.decoder: 'UNetDecoder' became 'Other'"):
        begin(run, identity({"model": {"decoder": "Other"}}, "x", None, {}, {"fused": False}), "auto", anyway=False)


def test_start_that_was_killed_with_nothing_but_a_recipe_does_not_bar_its_folder(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.save_recipe({"model": {}})
    (run.path / ".run.json.x1.partial").touch()
    run.refuse_to_begin("auto")
    (run.path / "notes.txt").touch()
    with pytest.raises(UsageError, match="exists already"):
        run.refuse_to_begin("auto")


def test_moved_run_remembers_its_best_checkpoint(workshop, broken, straight):
    outcome = workshop.fit("broken", strike=[{"at": "step", "count": 2, "signal": signal.SIGTERM}])
    assert outcome.code == 143
    state = load(broken.checkpoints / LAST)
    (best,) = [value for key, value in state["callbacks"].items() if key.startswith("ModelCheckpoint")]
    with straight.metrics.open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert state["global_step"] == 9
    assert float(best["best_model_score"]) == losses[0]
    assert best["best_model_path"] == str(broken.best)


def test_full_state_holds_no_code_and_can_be_tested(shared, straight):
    last = straight.checkpoints / LAST
    assert torch.load(last, weights_only=True)["floodrepro"]["moment"] == "end"
    outcome = shared.command("test", "--ckpt", last, "--format", "json")
    assert outcome.code == 0, outcome.err


def test_run_below_a_relative_and_linked_root_keeps_its_best_when_it_goes_on(workshop, straight):
    """Lightning knows a folder by its real path: under another spelling it forgets the best, and keeps a worse one."""
    workshop.runs.mkdir(exist_ok=True)
    link = workshop.runs.with_name("link")
    link.symlink_to(workshop.runs)
    roots = Path(os.path.relpath(link, Path.cwd()))
    elsewhere = ("--runs-root", roots)
    assert workshop.fit("moved", *elsewhere, strike=[{"at": "step", "count": 10}]).code == KILLED
    best = load(workshop.run("moved").best)["epoch"]
    outcome = finish(workshop, "moved", *elsewhere)
    assert "dirpath has changed" not in outcome.err
    scores = {
        name: next(v for k, v in load(run.checkpoints / LAST)["callbacks"].items() if "ModelCheckpoint" in k)
        for name, run in (("moved", workshop.run("moved")), ("straight", straight))
    }
    assert best is not None
    assert len(scores["moved"]["best_k_models"]) == len(scores["straight"]["best_k_models"]) == 1
    assert scores["moved"]["best_model_score"] == scores["straight"]["best_model_score"]
    assert load(workshop.run("moved").best)["epoch"] == load(straight.best)["epoch"]
