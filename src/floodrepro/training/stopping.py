"""Ending a run early without losing it: SIGTERM and SIGINT are asked for, not obeyed in the middle of a step."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from lightning.pytorch import Trainer

from floodrepro.errors import SIGNALLED, FloodreproError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_AGREE_EVERY = 10  # batches: asking all processes costs a round trip


class Interrupted(FloodreproError):
    """The run was told to stop and did so in good order: exit code 128 + the signal's number, as shells have it."""

    def __init__(self, number: int, run: Path, how: str = "the state is saved") -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; {how}", where=run, fix="the same command goes on from the last state")
        self.exit_code = SIGNALLED + number


class StopRequest:
    """Remembers that the process was told to stop. A second signal stops it at once.

    Lightning 2.6.1 ends a fit with exit code 0 on SIGTERM and saves nothing; its handler is replaced while this is
    entered and `listen` was called.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, Any] = {}
        self._asked = 0

    def __enter__(self) -> Self:
        """Listen from here on."""
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
            self.listen()
        return self

    def listen(self) -> None:
        """Take the signals over again, once Lightning has installed its own handlers."""
        for number in self._before:
            signal.signal(number, self._remember)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
        # print() is not allowed to be interrupted by itself.
        os.write(
            2, f"floodrepro: {signal.Signals(number).name}: stopping after this batch, twice stops at once\n".encode()
        )

    def agreed(self, trainer: Trainer) -> bool:
        """Whether to stop now; with several processes all of them answer alike."""
        if trainer.world_size == 1:
            return self.signal_number != 0
        self._asked += 1
        if self._asked % _AGREE_EVERY:
            return False
        number = torch.tensor(self.signal_number, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        self.signal_number = int(number)
        return self.signal_number != 0
