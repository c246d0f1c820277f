"""What a battery says in words: two sentences of verdict, and the warnings that stand below them."""

from collections.abc import Iterable, Sequence
from typing import Any

from floodrepro.evaluation.chip_table import ChipTable
from floodrepro.recipe import beside_shipped
from floodrepro.verification.check import Check, Evidence, Value
from floodrepro.verification.comparison import same_model

_SHOWN = 4
_WORDS = {"pass": "passed", "fail": "failed", "skip": "skipped"}


def verdict(evidence: Evidence, checks: Sequence[Check], required_not_passed: Sequence[str]) -> dict[str, Any]:
    """What was shown and what was not, one sentence each, and `equivalent`: True, False, or None where nothing is said.

    Equivalence is claimed only where parity and every required check passed: a comparison is worth what it rests on.
    """
    by_id = {check.id: check for check in checks}
    parity, seeds = by_id.get("parity"), by_id.get("variance")
    name = evidence.reference_name or "the reference"
    equivalent: bool | None = None
    if evidence.reference is None:
        why = _bare(evidence.missing.get("reference", "no reference was given"))
        shown = f"{why[:1].upper()}{why[1:]}, so that nothing is said about a reproduction; only the run was checked"
    elif parity is None or parity.status == "skip":
        why = _bare(parity.reason) if parity else "it was not checked"
        shown = f"Nothing is said about a reproduction of {name}: parity was skipped, {why}"
    elif parity.status == "fail":
        equivalent = False
        shown = f"Compared with {name}, {_bare(parity.reason)}"
    elif required_not_passed:
        failed = f"{len(required_not_passed)} required check{'s' if len(required_not_passed) > 1 else ''}"
        nothing = f"Nothing is claimed of a reproduction of {name}, because {failed} did not pass"
        shown = f"{nothing}; the comparison by itself says: {_bare(parity.reason)}"
    else:
        equivalent = True
        shown = f"Compared with {name}, {_bare(parity.reason)}"
        if seeds and seeds.status == "pass" and seeds.reason:
            shown = f"{shown}; over {len(evidence.seeds)} seeds, {_bare(seeds.reason)}"
    not_shown = "; ".join(_not_shown(evidence, checks, required_not_passed))
    return {"sentences": [f"{shown}.", f"Not shown: {not_shown}."], "equivalent": equivalent}


def warnings(evidence: Evidence) -> list[str]:
    """What a reader must not overlook: how the run ended, what went wrong on the way, which runs are missing."""
    record, found = evidence.record, []
    options, precision = record.get("options") or {}, (record.get("rollback") or {}).get("precision") or ["?", "?"]
    if not record:
        found.append("There is no run.json: how this checkpoint was made is not known.")
    elif record.get("status") != "finished":
        found.append(f"The run is not finished: its status is {record.get('status')}.")
    if (split := _split(evidence)) in ("train", "val"):
        found.append(f"The scores are of the split {split}, which training saw: they are those of no test.")
    found += [_sentence(str(text)) for text in record.get("data_warnings") or []]
    found += _other_batch(evidence)
    name, changed = beside_shipped(evidence.recipe)
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        found.append(f"The recipe is none that is shipped: {name} has another {_list(changed[:_SHOWN])}{more}.")
    for incident in record.get("incidents") or []:
        found.append(
            f"The guard found an incident ({incident.get('kind')}) at step {incident.get('step')}, epoch "
            f"{incident.get('epoch')} counted from 0: {_bare(str(incident.get('detail')))}."
        )
    if back := record.get("rollback"):
        found.append(
            f"The run was rolled back at step {back.get('step')} to {back.get('state')} and went "
            f"on in {precision[1]} in place of {precision[0]}: it is not the recipe's precision throughout."
        )
    for resume in record.get("resumes") or []:
        if resume.get("changes"):
            changes = "; ".join(_bare(str(line)) for line in resume["changes"])
            found.append(f"The run was resumed although something had changed: {changes}.")
    if on := [name for name, used in (record.get("numerics") or {}).items() if used]:
        found.append(f"Options that may change roundings were on: {_list(on)}.")
    if options.get("guard") is False:
        found.append("The guard was off: nothing watched losses, gradients, weights and buffers.")
    if operations := record.get("undetermined_operations"):
        found.append(f"Operations without a deterministic form were used: {_list(operations)}.")
    if unfinished := [f"{run.seed} ({run.status})" for run in evidence.seeds if run.status != "finished"]:
        found.append(f"Of {len(evidence.seeds)} declared runs, these seeds are not finished: {_list(unfinished)}.")
    if untested := [str(run.seed) for run in evidence.seeds if run.status == "finished" and run.table is None]:
        found.append(f"Of {len(evidence.seeds)} declared runs, these seeds were not tested: {_list(untested)}.")
    if evidence.reference is not None and evidence.table is not None:
        known = {entry.get("sha256") for entry in evidence.published.values()}
        if same_model(evidence.table, evidence.reference):
            found.append("The reference is this very model: a comparison with itself shows nothing.")
        elif _sha(evidence.reference) not in known:
            name = evidence.reference_name or "the reference"
            found.append(_sentence(f"{name} is no published checkpoint that is known here"))
    published = _published_chips(evidence)
    if evidence.table is not None and published is not None and len(evidence.table) != published:
        found.append(
            f"Generated or partial data: the scores are of {len(evidence.table):,} chips, the published split has "
            f"{published:,}."
        )
    return found


def _not_shown(evidence: Evidence, checks: Sequence[Check], required_not_passed: Sequence[str]) -> list[str]:
    """What the second sentence lists; parity itself has the first."""
    by_id, found = {check.id: check for check in checks}, []
    if broken := [f"{id_} ({_word(by_id.get(id_))})" for id_ in required_not_passed if id_ != "parity"]:
        found.append(f"what these required checks ask for: {_list(broken)}")
    told = {*required_not_passed, "parity", *(["variance"] if len(evidence.seeds) < 2 else [])}
    others = [check for check in checks if check.id not in told and check.status != "pass"]
    if others:
        found.append(f"what these further checks ask for: {_list(f'{check.id} ({_word(check)})' for check in others)}")
    if len(evidence.seeds) < 2:
        found.append("what another seed would give, for this is one run")
    value, enough = _interval(by_id.get("parity")), evidence.thresholds.get("parity", {}).get("enough_events")
    if value is not None and value.n_events is not None and enough is not None and value.n_events < enough:
        found.append(f"that the interval keeps its level, approximate with fewer than {enough} events")
    found.append("how the model does on events, regions and chips other than these")
    return found


def _other_batch(evidence: Evidence) -> list[str]:
    """Several processes take the recipe's batch each: another experiment under the same recipe."""
    processes, batch = evidence.record.get("processes"), evidence.record.get("batch_size")
    if not processes or processes == 1 or not batch:
        return []
    return [f"{processes} processes trained with {batch} chips each: a step saw {processes * batch}, not the recipe's."]


def _split(evidence: Evidence) -> str | None:
    return evidence.table.metadata.get("split") if evidence.table else None


def _published_chips(evidence: Evidence) -> int | None:
    """Chips of this split in the published data set of this protocol; None where that is not known."""
    dataset, metadata = evidence.published.get("dataset", {}), evidence.table.metadata if evidence.table else {}
    version = dataset.get("data_of", {}).get(metadata.get("protocol"))
    count = dataset.get("chips", {}).get(version, {}).get(metadata.get("split"))
    return int(count) if count is not None else None


def _interval(parity: Check | None) -> Value | None:
    values = parity.values if parity else ()
    return next((value for value in values if value.low is not None and value.high is not None), None)


def _word(check: Check | None) -> str:
    return _WORDS[check.status] if check else "not made"


def _list(items: Iterable[str]) -> str:
    return ", ".join(items)


def _bare(sentence: str) -> str:
    """A sentence without its full stop, to go on after it."""
    return sentence.strip().rstrip(".") or "no reason was given"


def _sentence(text: str) -> str:
    return f"{_bare(text)[:1].upper()}{_bare(text)[1:]}."


def _sha(table: ChipTable | None) -> str | None:
    return (table.metadata.get("checkpoint") or {}).get("sha256") if table else None
