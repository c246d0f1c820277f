"""The record: speed, waiting, memory and energy of all parts of a run."""

import json
import time
from pathlib import Path

import pytest

from floodrepro.callbacks import RunRecord
from floodrepro.callbacks.run_record import percentiles
from tiny_training import Chips, Kill, Killed, train

RECORD = Path("checkpoints", "run_record.json")


def test_every_epoch_of_every_part_is_in_it(tmp_path: Path, capsys):
    start = time.monotonic()
    with pytest.raises(Killed):
        train(tmp_path, Kill(40), max_epochs=3)
    assert json.loads((tmp_path / RECORD).read_text())["progress"]["epochs"] == 1
    train(tmp_path, max_epochs=3, resume=tmp_path / "checkpoints" / "last.ckpt")
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["progress"] == {"epochs": 3, "step": 18, "skipped_steps": 0}
    assert [(e["epoch"], e["steps"], e["chips"]) for e in record["epoch_times"]] == [(0, 6, 12), (1, 6, 12), (2, 6, 12)]
    assert record["chips_per_second"]["n"] == 3
    # Resumed in the middle of an epoch, which has no start then: its clock would run since the machine's.
    assert sum(epoch["seconds"] for epoch in record["epoch_times"]) < time.monotonic() - start
    assert [part["method"] for part in record["energy"]] == ["none", "none"]
    assert record["memory_gib"]["after_warm_up"]["process"] > 0.1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("floodrepro: epoch ")]
    assert [line.split("  ")[0] for line in lines] == [f"floodrepro: epoch {n}/3" for n in (1, 2, 3)]
    assert all("train/loss 0." in line and "val/loss 0." in line for line in lines)


def test_waiting_for_data_is_told_from_work_and_validation_is_neither(tmp_path: Path, monkeypatch):
    read = Chips.__getitem__
    nap = {"train": 0.01, "val": 0.1}

    def slowly(self, index):
        time.sleep(nap["train" if trainer_of[0].training else "val"])
        return read(self, index)

    class Note(RunRecord):
        def setup(self, trainer, pl_module, stage):
            trainer_of[:] = [trainer]

    trainer_of: list = []
    monkeypatch.setattr(Chips, "__getitem__", slowly)
    records: list[dict] = []
    start = time.monotonic()
    train(tmp_path, Note(write=lambda **record: records.append(record)))
    seconds, waiting = (sum(epoch[key] for epoch in records[-1]["epoch_times"]) for key in ("seconds", "waiting"))
    assert 2 * 12 * 0.01 <= waiting < seconds, "two epochs of 12 chips of 10 ms"
    assert seconds < time.monotonic() - start - 2 * 12 * 0.1, "a validation took 1.2 s more"
    assert records[-1]["share_waiting_for_data"] == pytest.approx(waiting / seconds, abs=1e-3)
    assert percentiles([]) is None
    assert percentiles(list(range(11))) == {"median": 5.0, "p10": 1.0, "p90": 9.0, "n": 11}
