"""A process that has TerraTorch imported and forks one child for each command: kills cost seconds, not an import each.

Run as a program it reads one JSON request a line from stdin and answers with one line. Each child is a real process
that runs the real command line; a request can say where in it a real SIGKILL or another signal strikes.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any


def strike(request: dict[str, Any]) -> None:
    """Arrange in a child for a signal at a moment: {"at": moment, "count": n, "signal": number}."""
    from floodrepro.training import checkpoint_files
    from floodrepro.training.full_state import FullState

    number = request.get("signal", signal.SIGKILL)
    left = request.get("count", 1)

    def hit() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    def before(owner: Any, name: str, when: Any = lambda *_: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                hit()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    moments: dict[str, Any] = {
        "step": lambda: before(FullState, "on_train_batch_start"),
        "validation": lambda: before(FullState, "on_validation_batch_start", lambda _, trainer, *__: not trainer.sanity_checking),
        "epoch end": lambda: before(FullState, "on_train_epoch_end"),
        "write": lambda: before(checkpoint_files._Hashing, "write"),
        "rename": lambda: before(checkpoint_files, "_write_digest"),
        "flush": lambda: before(checkpoint_files, "_flush_folder"),
    }
    moments[request["at"]]()


def child(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request.get("environment", {}))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "strike" in request:
        strike(request["strike"])
    from floodrepro.cli.main import main

    code = 99
    try:
        code = main(request["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    import floodrepro.training.fit  # noqa: F401  # the slow import, once

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request)
        after = request.get("kill_after")
        if after is not None:
            import time

            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    serve()
