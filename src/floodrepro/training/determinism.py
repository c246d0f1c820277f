"""Which operations of a run have no deterministic form, as torch says while it runs them."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

_SAID = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def undetermined_operations() -> Iterator[set[str]]:
    """Collect the names of such operations, instead of a warning each; other warnings go their way.

    torch says it (torch.use_deterministic_algorithms, warn_only) where ``trainer.deterministic`` is "warn".
    """
    names: set[str] = set()
    show = warnings.showwarning

    def collect(message: Any, *args: Any, **kwargs: Any) -> None:
        said = _SAID.search(str(message))
        if said:
            names.add(said.group(1))
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = collect
    try:
        yield names
    finally:
        warnings.showwarning = show
