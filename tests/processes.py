"""Commands in processes of their own, forked from one that has imported TerraTorch: seconds, not minutes.

A child is a real process that runs the real command line, floodrepro's or TerraTorch's, and its signals are real.
"""

import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Where the server finds fork_server.py: Python 3.11 gives it no sys.path. An empty entry would be the working folder.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fork_server"])


class Command:
    """One command, under way or over; the log takes both of its streams, and `_run` the keyword arguments."""

    def __init__(self, *argv: object, log: Path, **how: Any) -> None:
        self._log = log
        self._process = CONTEXT.Process(target=_run, args=([*map(str, argv)], log), kwargs=how)
        self._process.start()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def wait(self, timeout: float = 180) -> int:
        """The exit code, negative for a signal."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.log[-3000:]}")
        return self._process.exitcode

    def wait_until_stopped(self) -> None:
        """Wait until a SIGSTOP has hit it."""
        while Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.05)

    def kill(self, number: int) -> None:
        os.kill(self._process.pid, number)


class _Follower(multiprocessing.get_context("fork").Process):
    """A process that Lightning's launcher starts for a further device, in place of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: None) -> None:
        super().__init__(target=_run, args=(command[2:], Path("/dev/stderr")), kwargs={"environment": env})
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    returncode = property(poll)


def _run(
    argv: list[str],
    log: Path,
    program: str | Callable[[], object] = "floodrepro",
    strikes: Sequence[dict[str, Any]] = (),
    limit_file_size: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run ``floodrepro``, ``terratorch`` or a function; signals hit it as *strikes* (arguments of `_strike`) say.

    No file may exceed *limit_file_size* bytes: a disk that is full for large files only.
    """
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as it is in a process of its own
    os.setpgrp()  # signals for the group are this process's and its loader workers' alone
    os.environ.update(environment or {})
    file = log.open("ab", buffering=0)  # open until the process ends
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr, sys.argv = sys.__stdout__, sys.__stderr__, [str(program), *argv]
    import torch
    from lightning.pytorch.strategies.launchers import subprocess_script
    from terratorch.cli_tools import build_lightning_cli

    from floodrepro.cli.main import main

    subprocess_script.subprocess = SimpleNamespace(Popen=_Follower)
    torch.set_num_threads(1)  # more of them wait for each other where cores are shared
    if limit_file_size is not None:  # Python ignores SIGXFSZ: a write beyond the limit is an OSError
        sys.dont_write_bytecode = True  # Python 3.11 keeps a module's bytecode that was cut short
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_size, resource.RLIM_INFINITY))
    for one in strikes:
        _strike(**one)
    if callable(program):
        program()
    elif program == "terratorch":
        build_lightning_cli(argv)
    else:
        sys.exit(main(argv))


def _strike(at: str, count: int = 1, number: int = signal.SIGKILL, group: bool = False, worker: bool = False) -> None:
    """The *count*-th time that this process comes to a moment, signal it, its group, or one of its loader workers."""
    import torch

    from floodrepro.callbacks import ExactResume, exact_resume
    from floodrepro.run_folder import RunFolder

    left = count

    def hit() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            target = multiprocessing.active_children()[0].pid if worker else os.getpid()
            os.kill(0 if group else target, number)

    def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                hit()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def half_a_write(content: Any, file: Any) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        hit()
        file.write(buffer.getvalue()[buffer.tell() // 2 :])

    match at:
        case "step":
            before(ExactResume, "on_train_batch_start")
        case "validation":
            before(ExactResume, "on_validation_batch_start", lambda _, trainer, *__: not trainer.sanity_checking)
        case "epoch end":
            before(ExactResume, "on_train_epoch_end")
        case "write":
            exact_resume.torch = SimpleNamespace(**vars(torch) | {"save": half_a_write})
        case "rename":
            before(Path, "replace", lambda path, _: path.parent.name == "checkpoints")
        case "mark":
            before(RunFolder, "update_record", lambda *_, **entries: entries.get("status") == "finished")
