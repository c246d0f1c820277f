"""What a run reads: the backbone's weights, the chips, the reference; and what would still have to be fetched."""

import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from floodrepro.data.hub_layout import DATA_OF, PARTS, Version, check_protocol, identify
from floodrepro.data.ledger import Ledger
from floodrepro.data.names import SPLITS, split_file
from floodrepro.data.sources import DATA_BYTES, REFERENCE, HubFile, backbone_weights
from floodrepro.errors import DataError
from floodrepro.system.doctor.finding import Finding, gb, judged
from floodrepro.system.doctor.needs import Needs


@dataclass(frozen=True)
class Hub:
    """Where the hub is, where its files are kept, and whether HF_HUB_OFFLINE forbids to ask it."""

    endpoint: str
    cache: Path
    offline: bool

    @classmethod
    def of_environment(cls) -> "Hub":
        """As huggingface_hub reads the environment."""
        from huggingface_hub import constants

        return cls(constants.ENDPOINT, Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE)

    def has(self, file: HubFile) -> bool:
        """Whether a file is in the cache, of `main` where no revision is named."""
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(file.repo, file.name, self.cache, file.revision), str)


def check_backbone(needs: Needs, hub: Hub) -> Finding:
    """Whether the backbone's weights are at hand."""
    name, file = "backbone weights", backbone_weights(needs.backbone)
    if not needs.pretrained or file is None:
        return Finding(name, "ok", "none to fetch: random, or the recipe's own file" if file else "not looked for")
    fix = f"{' '.join(file.command)}; where there is no network, copy the cache (HF_HOME) of a machine that did"
    here, state = hub.has(file), "not in the cache"
    state = "in the cache" if here else f"{state}, and HF_HUB_OFFLINE is set" if hub.offline else f"{state}: to fetch"
    return judged(name, here, f"{file.name} is {state}", fix, "fail" if hub.offline else "warn")


def check_reference(hub: Hub) -> Finding:
    """Whether IBM's checkpoint is in the cache. A fit can do without."""
    if hub.has(REFERENCE):
        return Finding("reference", "ok", f"{REFERENCE.name} is in the cache")
    detail = f"{REFERENCE.name} (0.7 GB) is not in the cache; only verify --reference asks for it"
    return Finding("reference", "ok", detail, " ".join(REFERENCE.command))


def check_network(endpoint: str, timeout: float = 1.0) -> Finding:
    """Whether the hub's port can be reached; nothing is sent."""
    url, answered = urlsplit(endpoint), threading.Event()
    if urllib.request.getproxies().get(url.scheme) and not urllib.request.proxy_bypass(url.hostname or ""):
        return Finding("network", "ok", f"{endpoint} not tried: a proxy stands between")

    def connect() -> None:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            socket.create_connection((url.hostname, port), timeout).close()
            answered.set()
        except OSError:
            pass

    threading.Thread(target=connect, daemon=True).start()  # looking a name up knows no time limit
    reached = answered.wait(timeout)
    detail = f"{endpoint} {'reached' if reached else f'not reached within {timeout:.0f} s'}"
    return judged("network", reached, detail, "set HF_ENDPOINT or HTTPS_PROXY, or fetch elsewhere and copy", "warn")


def version_of(root: Path) -> Version | None:
    """What the split files say; None where one is missing."""
    if not all((root / "split" / split_file(split)).is_file() for split in SPLITS):
        return None
    return identify(root, [file.relative_to(root).as_posix() for file in root.glob("split/*.txt")])


def check_data(root: Path, protocol: str | None, free: int, *, offline: bool) -> Finding:
    """Look which archives or folders are there, by name; `data audit` looks inside, and `fit` for each chip.

    Args:
        root: The data set's folder.
        protocol: v0, v1-binary or v1; None where there is none to keep to.
        free: Bytes free on its disk.
        offline: Whether nothing can be fetched.
    """
    version, missing = version_of(root), f"no split files in {root / 'split'}"
    try:
        ledger = Ledger.read(root)
        if version is not None:
            check_protocol(version, protocol, str(root))
    except DataError as error:
        return Finding("data", "fail", error.what, error.fix or "")
    if version is not None:
        parts = [f"{split}/{part}" for split in SPLITS for part in PARTS if not _is_there(root, split, part)]
        if not parts:
            return Finding("data", "ok", f"{root} is {version}")
        missing = f"{root} is {version}, but lacks {', '.join(parts[:4])}{', …' if len(parts) > 4 else ''}"
    fix = f"floodrepro data fetch --root {root} --protocol {protocol or 'v0'}"
    if ledger is None:  # it may also be meant for generated chips, so that a small disk is no failure yet
        needed, size = 0.0, f"published, about {gb(DATA_BYTES[DATA_OF[protocol or 'v0']])}"
        fix += f"; toy chips: floodrepro data synth --root {root}"
    else:
        needed = sum(entry.size for path, entry in ledger.files.items() if not ledger.unchanged(path))
        size, fix = f"{gb(needed)} to fetch", f"{fix} --revision {ledger.asked}"
    detail = f"{missing}; {size}, {gb(free)} free{', and HF_HUB_OFFLINE is set' if offline else ''}"
    return Finding("data", "fail" if offline or needed > free else "warn", detail, fix)


def _is_there(root: Path, split: str, part: str) -> bool:
    return any(root.glob(f"{split}/{part}*.tar")) or next((root / "data" / part).glob("*"), None) is not None
