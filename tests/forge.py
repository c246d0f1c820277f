"""A process that has TerraTorch imported and forks one child for each command: a kill costs seconds, not an import.

Run as a program it reads one JSON request a line from stdin and answers each with one line. A child is a real process
that runs the real command line; a request can say where in it a real signal strikes:

    argv, log           the command, and the file that takes both of its streams
    environment         variables that are set in the child
    strike              a list of {"at": moment, "count": n, "signal": number, "group": bool}: see `strike`
    kill_after          seconds until SIGKILL, wherever the child is by then
    limit_file_size     bytes that no file of the child's may exceed: a disk that is full for large files only
    go_on               the pid of a child that a SIGSTOP holds, instead of all others: it goes on, to its end

The answer holds the exit code, negative for a signal, or {"held": pid} after a SIGSTOP.
"""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class Forge:
    """The process, seen from a test."""

    def __init__(self) -> None:
        # One thread each: small tensors gain nothing from a second one, and lose much where cores are shared.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, "the forge is gone"
        return json.loads(line)


def strike(at: str, count: int = 1, number: int = signal.SIGKILL, group: bool = False) -> None:
    """Arrange for a signal in this process, or its process group, the *count*-th time that it comes to a moment."""
    from floodrepro.callbacks import exact_resume
    from floodrepro.callbacks.exact_resume import ExactResume
    from floodrepro.run_folder import RunFolder

    left = count

    def hit() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(0 if group else os.getpid(), number)

    def before(owner: Any, name: str, when: Any = lambda *_, **__: True) -> None:
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

    def in_checkpoints(path: Path, _target: Any) -> bool:
        return path.parent.name == "checkpoints"

    def not_sanity(_: Any, trainer: Any, *__: Any) -> bool:
        return not trainer.sanity_checking

    def is_finishing(*_: Any, status: str = "", **__: Any) -> bool:
        return status == "finished"

    moments = {
        "step": lambda: before(ExactResume, "on_train_batch_start"),
        "validation": lambda: before(ExactResume, "on_validation_batch_start", not_sanity),
        "epoch end": lambda: before(ExactResume, "on_train_epoch_end"),
        "write": lambda: setattr(exact_resume, "torch", SimpleNamespace(**vars(torch) | {"save": half_a_write})),
        "rename": lambda: before(Path, "replace", in_checkpoints),
        "mark": lambda: before(RunFolder, "update_record", is_finishing),
    }
    moments[at]()


def child(request: dict[str, Any]) -> None:
    """Become the command; never returns."""
    code = 99
    os.setpgid(0, 0)  # so that a signal can go to the child's whole group
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request.get("environment", {}))
        tempfile.tempdir = None  # TMPDIR is read again
        if "limit_file_size" in request:  # Python ignores SIGXFSZ: a write beyond the limit is an OSError
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit_file_size"], resource.RLIM_INFINITY))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for one in request.get("strike", []):
            strike(one["at"], one.get("count", 1), one.get("signal", signal.SIGKILL), one.get("group", False))
        from floodrepro.cli.main import main

        code = main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer requests until stdin ends."""
    import floodrepro.training.fit  # noqa: F401  # the slow import, once

    print("ready", file=sys.stderr)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "go_on" in request:
            pid = request["go_on"]
            os.kill(pid, signal.SIGCONT)
        else:
            pid = os.fork()
            if pid == 0:
                child(request)
        if "kill_after" in request:
            time.sleep(request["kill_after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, os.WUNTRACED)
        held = os.WIFSTOPPED(status)
        print(json.dumps({"held": pid} if held else {"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    serve()
