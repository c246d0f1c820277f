"""Train in two processes (gloo): FOLDER, and the batch before which the second one is told to stop, or 0."""

import os
import signal
import sys
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from tiny_training import train


class Told(Callback):
    """SIGTERM for the second process alone."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == int(sys.argv[2]) != 0:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    last = folder / "checkpoints" / "last.ckpt"
    train(folder, Told(), devices=2, strategy="ddp", max_epochs=10, every=4, resume=last if last.exists() else None)
