"""Is the exported file the checkpoint, to the bit, and would a damaged one be noticed?"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from floodrepro import recipe as recipes
from floodrepro.verification.check import Check, Evidence, Table, Value
from floodrepro.verification.measured import evidence_file, listed, unmeasured, which_pair

ID = "round_trip"
_CLAIM = (
    "The exported safetensors hold the checkpoint's tensors bit for bit and name the recipe and the checkpoint that "
    "they come from, and a file with a tampered header is refused."
)
_answer = partial(Check, ID, "Safetensors round trip", _CLAIM)


def check(evidence: Evidence) -> Check:
    """Tensors, metadata and header of the exported file."""
    if refusal := unmeasured(evidence, ID):
        return _answer(*refusal)
    found = evidence.measured[ID]
    metadata, refused = found["metadata"], found["refused"]
    accepted = sorted(name for name, was in refused.items() if not was)
    problems = [f"{kind} tensors: {listed(found[kind])}" for kind in ("altered", "missing", "added") if found[kind]]
    wanted = {
        "recipe_sha256": recipes.fingerprint(evidence.recipe),
        "source_sha256": found["checkpoint"]["sha256"],
    }
    if "data_digest" in metadata:  # a pair of a run without a digest names none
        wanted["data_digest"] = str(evidence.record.get("data_digest"))
    wrong = [key for key, value in wanted.items() if metadata.get(key) != value]
    problems += [f"the metadata's {key} is {metadata.get(key)}, not {wanted[key]}" for key in wrong]
    if accepted:
        problems.append(f"a tampered header was accepted: {', '.join(accepted)}")
    if not found["untampered_accepted"]:
        problems.append("the reader refuses an untampered header as well")
    tensors_ok = not (found["altered"] or found["missing"] or found["added"])
    header_ok = not accepted and bool(found["untampered_accepted"])
    return _answer(
        "fail" if problems else "pass",
        "; ".join(problems),
        values=[
            Value("tensors compared", found["tensors"]),
            Value("altered, missing or added", _wrong(found), threshold="0", ok=tensors_ok),
            Value(
                "hashes in the metadata that match", len(wanted) - len(wrong), threshold=f"{len(wanted)}", ok=not wrong
            ),
            Value(
                "tampered headers refused", len(refused) - len(accepted), threshold=f"all {len(refused)}", ok=header_ok
            ),
            Value("file", found["weights"]["name"]),
            Value("its sha256", found["weights"]["sha256"]),
        ],
        tables=[Table("Tampering", ["change", "refused"], [[n, "yes" if was else "no"] for n, was in refused.items()])],
        notes=[
            "The format has no checksum: a changed byte of the data is noticed by the file's sha256 alone.",
            *which_pair(found),
        ],
        evidence=[evidence_file(ID)],
    )


def _wrong(found: Mapping[str, Any]) -> int:
    return sum(len(found[kind]) for kind in ("altered", "missing", "added"))
