"""What stands between a model and its publication: the card's first line, and what `publish` refuses."""

from collections.abc import Mapping
from typing import Any

NOT_VERIFIED = "Not verified: none of the required checks was run."


def shortfall(results: Mapping[str, Any] | None) -> str | None:
    """What stands between a model and its publication, in one sentence; None if all required checks passed."""
    if results is None:
        return NOT_VERIFIED
    status = {check["id"]: check["status"] for check in results["checks"]}
    words = {"fail": "failed", "skip": "skipped"}
    named = [f"{name} ({words.get(status.get(name, ''), 'not run')})" for name in broken(results)]
    return f"Required checks did not pass: {', '.join(named)}." if named else None


def broken(results: Mapping[str, Any]) -> list[str]:
    """Ids of the checks that a claim needs and that did not pass, whatever --require asked for, skipped ones too."""
    return [str(name) for name in results["summary"]["needed_not_passed"]]
