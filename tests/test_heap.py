"""A process that keeps its freed memory does not pay for it again."""

import platform
import subprocess
import sys

import pytest

_TOUCH = """
import resource, sys
from floodrepro.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(20):
    if step == 5:
        start = faults()
    held = [b"1" * (60 << 20), b"2" * (48 << 20)]
    del held
print(faults() - start)
"""


def _faults(mode: str) -> int:
    ended = subprocess.run([sys.executable, "-c", _TOUCH, mode], capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_arrays_are_used_again_without_page_faults() -> None:
    assert _faults("keep") < 100
    assert _faults("leave") > 10_000
