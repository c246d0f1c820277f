"""What the fork server of processes.py imports before it forks: TerraTorch, as floodrepro imports it, and watched."""

import gc
import logging
import os
import socket
import time

import torch

# A parent that has imported TerraTorch has set them.
for _name in ("LIGHTLY_DID_VERSION_CHECK", "NO_ALBUMENTATIONS_UPDATE"):
    os.environ.pop(_name, None)
_asked: list[object] = []
_real = socket.getaddrinfo
socket.getaddrinfo = lambda *args, **named: _asked.append(args[0]) or _real(*args, **named)


def _settings() -> tuple[str, int, int]:
    return torch.get_float32_matmul_precision(), logging.getLogger().level, len(logging.getLogger().handlers)


_before = _settings()
import floodrepro.training.fit  # noqa: E402, F401

time.sleep(1)  # checks of versions run in a thread
FOUND = {"unchanged": _before == _settings(), "asked": [*_asked]}  # whether the process was left alone, and the hosts
import torch.utils.tensorboard  # noqa: E402  # the recipes' logger imports it later

import terratorch_runs  # noqa: E402, F401  # registers a network

gc.freeze()  # children copy no page because a collector went over it
