"""A run that was killed or stopped ends with the bits of one that never was, in plain ``terratorch fit`` too."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from floodrepro.callbacks import AtomicCheckpointIO, ExactResume
from floodrepro.callbacks.exact_resume import newest_state
from floodrepro.errors import CheckpointError, Interrupted, UsageError
from terratorch_runs import Run, demo, different, generic, with_callbacks
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
}


def fit(folder: Path, name: str, *more, resume=None):
    stop = [EarlyStopping("val/loss", patience=0, min_delta=0.5)] if name == "early stopping" else []
    data = Data(resumable=name != "a foreign sampler")
    return train(folder, *stop, *more, data=data, resume=resume, **SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_at_any_hook_it_ends_as_if_it_never_was(name, tmp_path: Path):
    """Every seventh call of the hooks from first to last; all of them were tried for each setting."""
    fit(tmp_path / "straight", name)
    resumed = 0
    for count in range(5, 200, 7):
        folder = tmp_path / str(count)
        try:
            fit(folder, name, Kill(count))
            break
        except Killed:
            if not (folder / LAST).exists():
                continue
        fit(folder, name, resume=folder / LAST)
        names, leaves = different(tmp_path / "straight" / LAST, folder / LAST)
        assert (names, leaves > 100) == ([], True), f"killed at call {count}"
        assert files(folder) == files(tmp_path / "straight")
        resumed += 1
    assert resumed > 2


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path: Path):
    train(tmp_path / "long", max_epochs=3)
    train(tmp_path / "short", max_epochs=2)
    train(tmp_path / "short", max_epochs=3, resume=tmp_path / "short" / LAST)
    assert different(tmp_path / "long" / LAST, tmp_path / "short" / LAST)[0] == []


def test_a_moved_run_keeps_its_best_score(tmp_path: Path):
    train(tmp_path / "straight")
    with pytest.raises(Killed):
        train(tmp_path / "before", Kill(35))
    (tmp_path / "before").rename(tmp_path / "after")
    trainer = train(tmp_path / "after", resume=tmp_path / "after" / LAST)
    assert different(tmp_path / "straight" / LAST, tmp_path / "after" / LAST)[0] == []
    assert Path(trainer.checkpoint_callback.best_model_path).parent == tmp_path / "after" / "checkpoints"


def test_a_checkpoint_plugin_of_the_recipe_does_not_touch_the_states(tmp_path: Path):
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    with pytest.raises(Killed):
        train(tmp_path, Kill(35), plugins=[AsyncCheckpointIO()])
    train(tmp_path, plugins=[AsyncCheckpointIO()], resume=tmp_path / LAST)
    train(tmp_path / "straight")
    names, _ = different(tmp_path / "straight" / LAST, tmp_path / LAST)
    # Which best checkpoints are on the disk by then is up to the plugin's thread.
    assert [name for name in names if not name.startswith(".floodrepro.files.")] == []


def test_a_trial_run_leaves_no_file(tmp_path: Path):
    train(tmp_path, fast_dev_run=True)
    assert list(tmp_path.rglob("*")) == []


def test_what_would_be_overwritten_or_mixed_is_refused_before_training(tmp_path: Path):
    train(tmp_path)
    before = (tmp_path / LAST).stat()
    with pytest.raises(UsageError, match="there already"):
        train(tmp_path)
    with pytest.raises(UsageError, match="save_last"):
        train(tmp_path, ModelCheckpoint(tmp_path / "checkpoints", save_last=True), resume=tmp_path / LAST)
    state = torch.load(tmp_path / LAST, weights_only=True)
    state["floodrepro"]["ranks"] *= 2
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(UsageError, match="2 processes"):
        train(tmp_path, resume=tmp_path / "two.ckpt")
    assert (tmp_path / LAST).stat().st_mtime_ns == before.st_mtime_ns


def test_the_identity_is_in_the_state(tmp_path: Path):
    keeper = ExactResume(str(tmp_path / "own"), identity={"recipe": "abc"})
    train(tmp_path, keeper)
    assert torch.load(tmp_path / "own" / "last.ckpt", weights_only=True)["floodrepro"]["identity"] == {"recipe": "abc"}
    assert keeper.seconds > 0


def test_a_damaged_state_is_kept_and_the_one_before_is_used(tmp_path: Path, capsys):
    assert newest_state(tmp_path) is None
    for number in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.full((1000,), number)}, tmp_path / "last.ckpt")
    assert newest_state(tmp_path) == tmp_path / "last.ckpt"
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[:2000] + b"\xff" + whole[2001:])  # one byte of a tensor
    assert newest_state(tmp_path) == tmp_path / "previous.ckpt"
    assert torch.load(tmp_path / "previous.ckpt")["weights"][0] == 1
    (aside,) = tmp_path.glob("last.ckpt.damaged-*")
    assert len(aside.read_bytes()) == len(whole)
    assert aside.name in capsys.readouterr().err
    (tmp_path / "previous.ckpt").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        newest_state(tmp_path)


def test_a_full_disk_leaves_the_state_before_it(tmp_path: Path):
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(10)}, tmp_path / "last.ckpt")
    code = (
        "import resource, signal, sys, torch; from floodrepro.callbacks import AtomicCheckpointIO as IO;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5));"
        f"IO().save_checkpoint({{'weights': torch.ones(10**6)}}, '{tmp_path}/last.ckpt')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CheckpointError: the checkpoint cannot be written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert newest_state(tmp_path) == tmp_path / "last.ckpt"


def test_a_second_signal_stops_at_once(tmp_path: Path):
    keeper = ExactResume(str(tmp_path / "own"))
    twice = Kill(9)
    twice._strike = lambda *args: None
    for name in ("on_before_backward",):
        setattr(twice, name, lambda *args: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    with pytest.raises(Interrupted, match="at once"):
        train(tmp_path, keeper, twice)
    assert not (tmp_path / "own").exists()


def test_loader_workers_leave_signals_to_the_process_that_trains(tmp_path: Path):
    blocked: list[int] = []

    class Look(Callback):
        def on_train_epoch_end(self, *args):
            for worker in multiprocessing.active_children():
                status = Path(f"/proc/{worker.pid}/status").read_text()
                blocked.append(int(status.split("SigBlk:")[1].split()[0], 16))

    train(tmp_path, Look(), data=Data(workers=2))
    assert len(blocked) >= 2
    for number in (signal.SIGTERM, signal.SIGINT):
        assert all(mask >> (number - 1) & 1 for mask in blocked)


# In plain `terratorch fit`, with real signals


@pytest.fixture(scope="module")
def recipes(chips: Path, tmp_path_factory: pytest.TempPathFactory):
    """By name a recipe and a run of it that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    made = {"demo": demo(chips, num_workers=2), "generic": generic(folder, num_workers=2)}
    runs = {name: Run(with_callbacks(recipe), folder / name) for name, recipe in made.items()}
    for name, run in runs.items():
        assert run.wait() == 0, run.log
        assert ("cannot be taken up in the middle of an epoch" in run.log) == (name == "generic")
    return made, {name: run.folder / LAST for name, run in runs.items()}


# One after the other on one run: what strikes, the exit code, and the step of the state that it leaves.
KILL, TERM, INT = -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT
STRIKES = {
    "demo": [
        ({"at": "step", "count": 3, "how": "SIGTERM", "group": True}, TERM, 3),
        ({"at": "fetch", "count": 3, "how": "error"}, 1, 5),
        ({"at": "val", "count": 1}, KILL, 6),
        ({"at": "step", "count": 3, "how": "SIGINT", "group": True}, INT, 9),
        ({"at": "end"}, KILL, 12),
    ],
    "generic": [
        ({"at": "step", "count": 10}, KILL, 6),
        ({"at": "step", "count": 3, "how": "SIGTERM", "group": True}, TERM, 6),
    ],
}


@pytest.mark.parametrize("kind", STRIKES)
def test_plain_terratorch_with_two_workers_goes_on_to_the_same_bits(kind, recipes, tmp_path: Path):
    recipe, straight = recipes[0][kind], recipes[1][kind]
    resume: tuple[object, ...] = ()
    for how, code, step in STRIKES[kind]:
        strike = {"class_path": "striking.Strike", "init_args": how}
        workers = ("--data.init_args.num_workers", 0) if how["at"] == "fetch" else ()
        run = Run(with_callbacks(recipe, strike), tmp_path, *resume, *workers)
        assert run.wait() == code, run.log
        assert torch.load(tmp_path / LAST, weights_only=True, mmap=True)["global_step"] == step
        resume = ("--ckpt_path", tmp_path / LAST)
    run = Run(with_callbacks(recipe), tmp_path, *resume)
    assert run.wait() == 0, run.log
    names, leaves = different(straight, tmp_path / LAST)
    assert (names, leaves > 1000) == ([], True)
    assert files(tmp_path) == files(straight.parents[1])


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path: Path):
    script = Path(__file__).parent / "two_processes.py"

    def start(*arguments: object) -> int:
        command = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, timeout=240, check=False).returncode

    assert start(tmp_path / "straight", 0) == 0
    assert start(tmp_path / "struck", 13) == 143
    assert torch.load(tmp_path / "struck" / LAST, weights_only=True)["global_step"] == 19  # asked every tenth batch
    assert start(tmp_path / "struck", 0) == 0
    assert different(tmp_path / "straight" / LAST, tmp_path / "struck" / LAST)[0] == []
