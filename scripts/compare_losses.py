#!/usr/bin/env python3
"""Compare two loss files that tests/golden/make.py wrote: to the bit, or within a tolerance.

    scripts/compare_losses.py tests/golden/tiny_v0_64px.json new.json --exact

A loss file holds every training loss of a short run at full precision, what was trained, and the stack that did it:
{"schema": 1, "recipe_sha256", "chips_sha256", "steps": [1, 2, ...], "loss": [...], "stack": {"torch": ..., ...}}.
Losses are the shortest decimals that read back as the same float, so that the text loses no bit.

Another recipe or other steps are a difference however close the losses are. Other chips are one with --exact only: they
are generated, and another build of numpy may round a pixel in another way.

Exit codes: 0 the same, 1 they differ, 2 bad usage or a file that is no loss file. Standard library only.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Where these come from is written in tests/test_golden.py, beside the test that stands on them.
TIGHT_STEPS, TIGHT_RTOL, LOOSE_RTOL = 2, 1e-5, 5e-2


class UsageError(Exception):
    """What is wrong, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """Argparse that reports an error in three lines instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        raise UsageError(message, "command line", f"{self.prog} --help")


@dataclass(frozen=True)
class LossFile:
    """A loss file that was found to be one."""

    path: Path
    recipe: str
    chips: str
    losses: dict[int, float]
    stack: dict[str, Any]


def read(path: Path) -> LossFile:
    """Read a loss file.

    Raises:
        UsageError: It cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"the loss file cannot be read: {error.strerror}"
        raise UsageError(problem, path, "tests/golden/make.py FILE makes one") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise UsageError(f"the loss file is no JSON: {error}", path, "tests/golden/make.py FILE makes one") from error
    try:
        if content["schema"] != 1:
            raise ValueError(f"its schema is {content['schema']}, expected 1")
        if any(type(loss) not in (int, float) for loss in content["loss"]):
            raise ValueError("a loss is no number")
        if any(type(step) is not int for step in content["steps"]):
            raise ValueError("a step is no whole number")
        losses = dict(zip(content["steps"], map(float, content["loss"]), strict=True))
        if len(losses) != len(content["steps"]) or not losses:
            raise ValueError("there is no step" if not losses else "a step is there twice")
        return LossFile(path, content["recipe_sha256"], content["chips_sha256"], losses, dict(content["stack"]))
    except (KeyError, TypeError, ValueError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"this is no loss file: {problem}", path, "tests/golden/make.py FILE makes one") from error


def relative(first: float, second: float) -> float:
    """Difference of two losses relative to the first; NaN if one is NaN, infinite beside a first of 0 or infinity."""
    if first == second:
        return 0.0
    if math.isnan(first) or math.isnan(second):
        return math.nan
    return abs(second - first) / abs(first) if first and math.isfinite(first) else math.inf


def differences(first: LossFile, second: LossFile, rtol: float | None, *, exact: bool) -> list[str]:
    """What differs, one line each; nothing if they are the same.

    Args:
        first: The reference: tolerances are relative to its losses.
        second: The other one.
        rtol: Tolerance of every step, inclusive; None for the one that goes by step.
        exact: Whether every bit counts. NaN is then the same as NaN, and 0.0 is not the same as -0.0.
    """
    found = []
    if first.recipe != second.recipe:
        found.append(f"recipe      {first.recipe[:12]} and {second.recipe[:12]}")
    if exact and first.chips != second.chips:
        found.append(f"chips       {first.chips[:12]} and {second.chips[:12]}")
    if list(first.losses) != list(second.losses):
        found.append(f"steps       {_steps(first)} and {_steps(second)}")
    for step in _shared(first, second):
        a, b = first.losses[step], second.losses[step]
        allowed = tolerance(step) if rtol is None else rtol
        # `not ... <=` and not `>`: a NaN is within no tolerance.
        if (a.hex() != b.hex()) if exact else not relative(a, b) <= allowed:
            limit = "" if exact else f", allowed {allowed:.1e}"
            found.append(f"step {step:<6} {a!r} and {b!r}, relative {relative(a, b):.1e}{limit}")
            break
    return found


def tolerance(step: int) -> float:
    """The default tolerance of a step, counted from 1."""
    return TIGHT_RTOL if step <= TIGHT_STEPS else LOOSE_RTOL


def largest(first: LossFile, second: LossFile) -> str:
    """The largest relative difference and its step; a NaN is larger than anything."""
    by_step = {step: relative(first.losses[step], second.losses[step]) for step in _shared(first, second)}
    if not by_step:
        return "no step in common"
    step = max(by_step, key=lambda step: math.inf if math.isnan(by_step[step]) else by_step[step])
    return f"largest relative difference {by_step[step]:.1e} at step {step}"


def other_stack(first: LossFile, second: LossFile) -> list[str]:
    """The parts of the stack that differ."""
    keys = sorted(first.stack.keys() | second.stack.keys())
    pairs = [(key, first.stack.get(key), second.stack.get(key)) for key in keys]
    return [f"stack       {key} {a} and {b}" for key, a, b in pairs if a != b]


def _shared(first: LossFile, second: LossFile) -> list[int]:
    return [step for step in first.losses if step in second.losses]


def _steps(file: LossFile) -> str:
    steps = list(file.losses)
    return f"{len(steps)} ({steps[0]} to {steps[-1]})"


def _rtol(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no relative tolerance, such as 1e-5")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="the reference, such as tests/golden/tiny_v0_64px.json")
    parser.add_argument("second", type=Path, help="what is compared with it")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_true", help="every bit counts: for two runs on one stack")
    how.add_argument(
        "--rtol",
        type=_rtol,
        metavar="X",
        help=f"relative tolerance of every step, inclusive (default: {TIGHT_RTOL:g} up to step {TIGHT_STEPS}, "
        f"{LOOSE_RTOL:g} from there on: rounding errors grow in training)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compare."""
    try:
        args = _parser().parse_args(argv)
        first, second = read(args.first), read(args.second)
    except UsageError as error:
        what, where, fix = (" ".join(str(part).split()) for part in error.args)
        print(f"compare_losses: error: {what}\n  where: {where}\n  to do: {fix}", file=sys.stderr)
        return 2
    found = differences(first, second, args.rtol, exact=args.exact)
    how = "to the bit" if args.exact else "within the tolerance"
    print(f"{'they differ' if found else f'the same {how}'}: {largest(first, second)}")
    for line in [*found, *other_stack(first, second)]:
        print(f"  {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
