"""How fast training and testing went, on which device, and whether the figures can all be true."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from floodrepro.verification.check import Check, Evidence, Table, Value
from floodrepro.verification.comparison import table_file
from floodrepro.verification.judging import judge
from floodrepro.verification.wording import on_gpu

ID = "throughput"
_TITLE = "Throughput and memory"
_CLAIM = (
    "Training speed was measured over enough timed steps after the warm-up, on the device that is named, and the "
    "figures of training, test and clock do not contradict each other."
)
_FACTOR = 1.5
"""Two ways to the same rate may differ by this much: a median step leaves out what a whole epoch has in it."""
_WINDOW = 20  # steps behind one value of step_seconds on a GPU, docs/run-folder.md
_START_UP = 900.0  # seconds that no step accounts for: imports, weights to fetch, the index of a large archive

Figures = Mapping[str, Any]


def check(evidence: Evidence) -> Check:
    """Hold the figures of run.json, of the chip table and of benchmarks against each other."""
    record, least = evidence.record, int(evidence.thresholds[ID]["min_steps"])
    values: list[Value] = []
    notes: list[str] = []
    if (steps := record.get("step_seconds")) is None:
        skip = "no step of training was timed" if record else evidence.missing.get("record", "there is no run.json")
    else:
        timed = steps["n"] * (_WINDOW if on_gpu(record) else 1)
        skip = f"{timed} steps of training were timed, asked are {least} or more" if timed < least else ""
        values += _device(record, notes)
        values.append(Value("timed steps after the warm-up", timed, threshold=f"at least {least}"))
        values += _training(evidence)
        values += _hours(record, notes)
    values += _test(evidence, least, notes)
    rows, contradictions = _benchmarks(evidence.benchmarks)
    values += contradictions
    tables = []
    if rows:
        tables.append(Table("Benchmarks", ["benchmark", "what", "chips/s", "p10", "p90", "device"], rows))
        notes.append("Benchmarks are runs of their own, on the device beside them: not this run's figures.")
    status, reason = judge(values, skip)
    files = [*(["run.json"] if record else []), *([table_file(evidence.table)] if evidence.table else [])]
    return Check(ID, _TITLE, _CLAIM, status, reason, values, tables, notes=notes, evidence=files)


def _memory(record: Figures) -> Figures:
    """Peaks after the warm-up in GiB."""
    peaks: Figures = (record.get("memory_gib") or {}).get("after_warm_up") or {}
    return peaks


def _device(record: Figures, notes: list[str]) -> list[Value]:
    environment = record.get("environment") or {}
    gpu, torch = environment.get("accelerator") or {}, environment.get("torch") or {}
    name = gpu.get("name") if on_gpu(record) else (environment.get("cpu") or {}).get("model")
    build = " ".join(str(part) for part in (torch.get("build"), torch.get("build_version")) if part)
    detail = f"torch {torch.get('version', 'of unknown version')}, a {build or 'unknown'} build"
    named = Value("device of training", name, method=detail, threshold="named in run.json", ok=None if name else False)
    values = [named]
    if not on_gpu(record) and gpu.get("name"):
        notes.append(f"A {gpu['name']} was there, but training was not on it: run.json has no memory of it.")
    for kind, peak in _memory(record).items():
        most = gpu.get("memory_gib") if kind != "process" else None  # the process's is the host's memory
        asked = f"at most the device's {most} GiB" if most else ""
        ok = peak <= most + 0.1 if most else None  # recorded to a tenth
        values.append(Value(f"training memory, {kind}", peak, "GiB", method="peak", threshold=asked, ok=ok))
    return values


def _training(evidence: Evidence) -> list[Value]:
    record = evidence.record
    steps, rate, share = record["step_seconds"], record.get("chips_per_second"), record.get("share_waiting_for_data")
    values = [_spread("training, a batch", steps, "s")]
    if rate is None:
        return values
    waiting = float(share or 0)
    values.append(_spread("training, whole epochs", rate, "chips/s"))
    in_bounds = 0 <= waiting <= 1
    asked = "" if in_bounds else "from 0 to 1"
    values.append(
        Value("share of training spent waiting for data", share, threshold=asked, ok=None if in_bounds else False)
    )
    chips = evidence.recipe["data"]["init_args"].get("batch_size")
    if chips and in_bounds and steps["median"]:
        chips = min(chips, (record.get("chips") or {}).get("train", chips)) * _processes(evidence)
        # The only epoch of a run has the warm-up in it, however long that took.
        least = (1 - waiting) / _FACTOR if rate["n"] > 1 else 0.0
        values.append(_ratio("training", rate["median"], chips / steps["median"], least))
    return values


def _processes(evidence: Evidence) -> int:
    """How many processes trained, each with a batch of its own."""
    trainer = evidence.recipe.get("trainer") or {}
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices).isdigit():
        count = int(devices)
    else:  # auto: every GPU, or one process on a CPU
        count = (evidence.record.get("environment") or {}).get("accelerator", {}).get("count", 1)
        count = count if on_gpu(evidence.record) else 1
    return max(count, 1) * int(trainer.get("num_nodes") or 1)


def _hours(record: Figures, notes: list[str]) -> list[Value]:
    """The clock from start to end beside the time that epochs, chips and rate account for."""
    if record.get("resumes") or record.get("rollback"):
        notes.append("The run has several parts or was rolled back: its hours are not held against its rate.")
        return []
    epochs, chips = (record.get("progress") or {}).get("epochs"), record.get("chips") or {}
    rate, started, ended = (record.get(key) for key in ("chips_per_second", "started", "ended"))
    if not (epochs and rate and rate["median"] and started and ended and "train" in chips):
        notes.append("run.json lacks what is needed to hold the run's hours against its rate.")
        return []
    wall = (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
    training, validating = (epochs * chips.get(split, 0) / rate["median"] for split in ("train", "val"))
    least = training / _FACTOR - 1  # times are recorded to the second
    most = _FACTOR * (training + validating) + record.get("seconds_writing_states", 0.0) + _START_UP
    ok = least <= wall <= most
    shown = _in_hours(max(least, 0.0), wall, most)
    asked = f"{shown[0]} to {shown[2]} h, from {epochs} epochs at {rate['median']:g} chips/s"
    return [Value("from start to end", float(shown[1]), "h", threshold=asked, ok=ok)]


def _in_hours(*seconds: float) -> list[str]:
    """Hours to one digit after the point, or to as many more as tell those apart that are not the same."""
    for digits in range(1, 5):
        shown = [f"{one / 3600:.{digits}f}" for one in seconds]
        if len(set(shown)) == len(set(seconds)):
            break
    return shown


def _test(evidence: Evidence, least: int, notes: list[str]) -> list[Value]:
    if evidence.table is None:
        notes.append("There is no chip table: the speed of testing is not known.")
        return []
    metadata = evidence.table.metadata
    speed = metadata.get("speed") or {}
    seconds, rate = speed.get("batch_seconds"), speed.get("chips_per_second")
    if not (isinstance(seconds, Mapping) and isinstance(rate, Mapping)):
        notes.append("The chip table has no timed batches: the speed of testing is not known.")
        return []
    values = [
        Value("device of test", metadata.get("device")),
        _spread("test, a batch", seconds, "s"),
        _spread("test", rate, "chips/s"),
    ]
    chips = evidence.recipe["data"]["init_args"].get("batch_size")
    if chips and seconds["median"]:  # slower than the batches by themselves is waiting for data
        values.append(_ratio("test", rate["median"], min(chips, len(evidence.table)) / seconds["median"], 0.0))
    values += [Value(f"test memory, {k}", v, "GiB", method="peak") for k, v in (speed.get("memory_gib") or {}).items()]
    if seconds["n"] < least:
        notes.append(f"Testing timed {seconds['n']} batches, fewer than {least}: its rate says little.")
    return values


def _ratio(what: str, rate: float, expected: float, least: float) -> Value:
    """A rate beside the one that a batch and its median time give."""
    asked = f"{least:.2g} to {_FACTOR:g}" if least else f"at most {_FACTOR:g}"
    ratio = rate / expected
    return Value(
        f"{what}, chips/s over chips of a batch / its seconds", ratio, threshold=asked, ok=least <= ratio <= _FACTOR
    )


def _spread(name: str, figures: Figures, unit: str) -> Value:
    """A median with its percentiles; failed where they cannot be any."""
    low, median, high = (figures[key] for key in ("p10", "median", "p90"))
    sane = 0 < low <= median <= high
    asked = "" if sane else "0 < 10th percentile <= median <= 90th"
    method = f"median, 10th and 90th percentile of {figures.get('n', 'an unknown number')}"
    return Value(name, median, unit, low, high, method=method, threshold=asked, ok=None if sane else False)


def _benchmarks(benchmarks: Mapping[str, Figures]) -> tuple[list[list[Any]], list[Value]]:
    """Rates of the bench files, and those of them that contradict themselves."""
    rows, wrong = [], []
    for name, content in benchmarks.items():
        for what, rate in (content.get("chips_per_second") or {}).items():
            rows.append([name, what, *(rate[key] for key in ("median", "p10", "p90")), content.get("device")])
            if (value := _spread(f"benchmark {name}, {what}", rate, "chips/s")).ok is False:
                wrong.append(value)
    return rows, wrong
