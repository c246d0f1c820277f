"""Prints as JSON what torch makes of this machine. The doctor runs it apart: a broken torch may end its process."""

import json
from typing import Any


def probe() -> dict[str, Any]:
    """Import torch and torchvision and multiply on each device.

    Returns:
        ``torch``, ``cuda``, ``hip``, ``nms`` as far as they were reached, ``error`` where an import failed;
        ``devices``, each with ``name``, ``memory`` and ``free`` in bytes, ``float16`` and ``bfloat16``, or ``error``.
    """
    devices: list[dict[str, Any]] = []
    found: dict[str, Any] = {"devices": devices}
    try:
        import torch

        found |= {"torch": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip}
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            devices.append({"name": about.name, "memory": about.total_memory})
            try:
                devices[i]["free"] = torch.cuda.mem_get_info(i)[0]
                for kind in ("float16", "bfloat16"):
                    ones = torch.ones(64, 64, dtype=getattr(torch, kind), device=f"cuda:{i}")
                    devices[i][kind] = bool((ones @ ones == 64).all())
                devices[i]["bfloat16"] &= torch.cuda.is_bf16_supported(including_emulation=False)
            except RuntimeError as error:  # another process holds it, or the build has no kernels for it
                devices[i]["error"] = str(error).strip().splitlines()[0]
        import torchvision  # noqa: F401  # defines its operators

        found["nms"] = hasattr(torch.ops.torchvision, "nms")
    except Exception as error:  # whatever a broken build raises is the answer
        found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


if __name__ == "__main__":
    print(json.dumps(probe()))
