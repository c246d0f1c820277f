"""A measurement's own process: by fork or spawn, its result or its error comes back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
from floodrepro.errors import FloodreproError, Incident
from floodrepro.system.own_process import in_own_process

def work(what):
    if what == "die":
        os._exit(1)
    if what == "incident":
        raise Incident("loss", "the loss is nan", module=None, epoch=0, step=3, chips=())
    if what == "sleep":
        print(os.getpid(), file=sys.stderr, flush=True)
        time.sleep(60)
    if what == "bug":
        return 1 // 0
    print("a library's banner")
    return {"process": os.getpid(), "argument": what}

if __name__ == "__main__":
    try:
        result = in_own_process(work, sys.argv[2], method=sys.argv[1])
        print(result["argument"], result["process"] != os.getpid())
    except FloodreproError as error:
        print(error.what)
"""


@pytest.mark.parametrize(
    ("method", "what", "said"),
    [
        ("fork", "work", "work True"),
        ("spawn", "work", "work True"),
        ("spawn", "incident", "a measurement failed: the guard stopped the run at step 3, epoch 1: the loss is nan"),
        ("fork", "bug", "a measurement failed: ZeroDivisionError: integer division or modulo by zero"),
        ("fork", "die", "a measurement failed: BrokenProcessPool: "),
    ],
)
def test_result_or_error_of_the_process_comes_back(tmp_path, method, what, said):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), method, what], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.stdout.startswith(said), done.stderr
    assert done.stdout.count("\n") == 1  # the banner went to stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_ends_with_its_killed_parent(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, str(script), method, "sleep"], stderr=subprocess.PIPE, text=True)
    child = Path("/proc") / next(line for line in parent.stderr if line.strip().isdigit()).strip()
    assert child.exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()
