"""Runs the stages in order, leaves out what is done, and keeps RUN-DIR/reproduction.json.

The file is one JSON object, whole at every moment, schema 1::

    schema   1
    stages   by name, of those that were done: inputs (sha256 over the commands and what they read), outputs (what was
             left, by name), commands, code (exit code), when (UTC, ISO 8601), seconds, floodrepro (version)
    log      a line for each thing that happened: when, stage, event (started, done, unchanged, left out, stopped),
             detail; a stage that was killed has started and nothing after it
"""

import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from floodrepro import __version__, console
from floodrepro.cli.reproduction.plan import STAGES, Plan
from floodrepro.cli.reproduction.stage import call
from floodrepro.cli.reproduction.stages import TABLE
from floodrepro.errors import FloodreproError, RunFolderError
from floodrepro.lock import hold
from floodrepro.run_folder import timestamp, write_atomically
from floodrepro.verification import results

RECORD, LOCK = "reproduction.json", ".reproduce.lock"


def describe(plan: Plan, name: str) -> list[str]:
    """What a stage will run, and its expected time and disk."""
    stage = TABLE[name]
    if reason := stage.left_out(plan):
        return [f"left out: {reason}"]
    return [*map(shlex.join, stage.commands(plan)), stage.cost(plan)]


def run_stages(plan: Plan, names: Sequence[str], output_format: str) -> int:
    """Run stages; 1 where the verdict's required checks did not pass, else 0.

    Raises:
        FloodreproError: A stage failed, or another process is at work here.
    """
    if console.follows():  # Lightning starts the command again for each further device: they train, and no more
        call(TABLE["fit"].commands(plan)[0])
        return 0  # how the run ended is the first process's word: it may not have written it yet
    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"the folder cannot be made: {error.strerror}", where=plan.run_dir) from error

    def taken(process: str) -> FloodreproError:
        what = f"another reproduction (process {process}) is at work here"
        return RunFolderError(what, where=plan.run_dir, fix="wait until it is done, or give another --run-dir")

    with hold(plan.run_dir / LOCK, taken):
        record = _Record(plan.run_dir / RECORD)
        events = {name: _run(plan, name, record) for name in names}
    return _report(plan, events, output_format)


class _Record:
    """reproduction.json, written after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = {"schema": 1, "stages": {}, "log": []}
        try:
            if path.exists():
                self._content = json.loads(path.read_text(encoding="utf-8"))
            self.stages: dict[str, Any] = self._content["stages"]
        except (OSError, ValueError, KeyError) as error:
            fix = "move it away: all stages are then looked at again, and nothing is lost"
            raise RunFolderError(f"the record cannot be read: {error}", where=path, fix=fix) from error

    def add(self, stage: str, event: str, detail: str = "") -> str:
        self._content["log"].append({"when": timestamp(), "stage": stage, "event": event, "detail": detail})
        write_atomically(self._path, json.dumps(self._content, indent=1) + "\n")
        return event


def _run(plan: Plan, name: str, record: _Record) -> str:
    stage, place = TABLE[name], f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}"
    if reason := stage.left_out(plan):
        console.say(f"{place}: left out: {reason}")
        return record.add(name, "left out", reason)
    before = record.stages.get(name, {})
    try:
        commands = stage.commands(plan)
        asked = _fingerprint([commands, stage.inputs(plan)])
        if before.get("inputs") == asked and before["outputs"] == stage.outputs(plan):
            console.say(f"{place}: as it was on {before['when']}, nothing to do")
            return record.add(name, "unchanged")
        took = f"; the last time {before['seconds']:.0f} s" if before else ""
        console.say("\n  ".join([place, *describe(plan, name)]) + took)
        record.add(name, "started")
        start = time.monotonic()
        code = stage.work(plan, commands)
    except BaseException as error:  # whatever it is, a signal included: the record has it
        console.say(f"{place}: stopped; the same command goes on here")
        record.add(name, "stopped", f"{type(error).__name__}: {error}")
        raise
    record.stages[name] = {
        **{"inputs": asked, "outputs": stage.outputs(plan), "commands": commands, "code": code},
        **{"when": timestamp(), "seconds": round(time.monotonic() - start, 1), "floodrepro": __version__},
    }
    return record.add(name, "done", f"exit code {code}" if code else "")


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _report(plan: Plan, events: dict[str, str], output_format: str) -> int:
    """Say what was done, and the verdict where it was looked at."""
    run = plan.runs[0]
    data: dict[str, Any] = {"stages": events, "run": str(run.path), "record": str(plan.run_dir / RECORD)}
    text, code = console.columns([["stage", "what"], *map(list, events.items())], right_from=2), 0
    if "verify" in events:
        found = results.load(run.results)
        code = 0 if found["summary"]["ok"] else 1
        data |= {"verdict": found["verdict"]["sentences"], "summary": found["summary"]["text"]}
        data["required_not_passed"] = found["summary"]["required_not_passed"]
        text += f"\n\n{' '.join(data['verdict'])}\n\n{data['summary']}"
        if code:
            text += f"\nrequired, and not passed: {', '.join(data['required_not_passed'])}"
        data["report"] = str(run.verification / "report.html")
    if "export" in events:
        data["card"] = str(run.export / "README.md")
    where = [[key, data[key]] for key in ("run", "record", "report", "card") if key in data]
    console.emit(data, f"{text}\n\n{console.columns(where, right_from=2)}", output_format)
    return code
