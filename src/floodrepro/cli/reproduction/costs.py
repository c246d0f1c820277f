"""What a stage of the whole path is expected to cost: time and disk in words, or that they are not known."""

import os

from floodrepro.cli.reproduction.plan import Plan
from floodrepro.data.hub_layout import DATA_OF
from floodrepro.data.names import PROTOCOLS
from floodrepro.data.sources import DATA_BYTES
from floodrepro.system.doctor import data, gpus, machine
from floodrepro.system.doctor.needs import estimate_test, estimate_time

_DECODE = 0.0063  # seconds to decode a chip of 256 px on one core (measured); an audit hashes and sums as well


def of_fetch(plan: Plan) -> str:
    """Of the data and the weights."""
    weights, size = [file.name for file in plan.weights], DATA_BYTES[DATA_OF[plan.protocol]] / 1e9
    time = f"{size / 0.1 / 3600:.1f} h at 100 MB/s, {size / 0.01 / 3600:.0f} h at 10 MB/s"
    disk = f"about {size:.0f} GB of chips (inferred; less what is here)"
    return f"time {time}; disk {disk}" + (f", and {', '.join(weights)}" if weights else "")


def of_audit(plan: Plan) -> str:
    """Of reading every chip."""
    chips = sum(PROTOCOLS[DATA_OF[plan.protocol]].chip_counts)
    cores = len(os.sched_getaffinity(0))
    return f"time at least {chips * _DECODE / cores / 60:.0f} min for {chips:,} chips on {cores} cores; disk none"


def of_fit(plan: Plan) -> str:
    """Of the declared runs."""
    needs = plan.needs
    time = estimate_time(needs, _device(plan), published=_published(plan)).detail
    runs = f"each of {len(plan.seeds)} runs: " if len(plan.seeds) > 1 else ""
    disk = f"{needs.model.weights * machine.ALL_FILES / 1e9:.1f} GB, export included" if needs.model else "not known"
    return f"{runs}time {time}; disk {disk}"


def of_test(plan: Plan, passes: int) -> str:
    """Of passes over the test split; a chip's row of the table takes 320 bytes (measured)."""
    time = estimate_test(plan.needs, _device(plan), published=_published(plan), passes=passes)
    return f"time {time}; disk {5 * passes} MB"


def of_export(plan: Plan) -> str:
    """Of one copy of the weights."""
    needs = plan.needs
    return f"time a minute or two; disk {f'{needs.model.weights / 1e9:.1f} GB' if needs.model else 'not known'}"


def _device(plan: Plan) -> str | None:
    return next((g.name for g in gpus.find_gpus() if g.trains and plan.needs.accelerator != "cpu"), None)


def _published(plan: Plan) -> bool:
    """Whether the data is a published version, or will be: it is not here yet."""
    version = data.version_of(plan.data_root)
    return version is None or version.published
