"""Import TerraTorch without what its import does to the process.

Found by running terratorch 1.2.7: the import sets torch's float32 matmul precision to "medium" (its clay_v15 backbone,
at module level), the root logger to INFO, and lets lightly and albumentations ask the network for newer versions.
"""

import logging
import os
import warnings

from floodrepro import console


def import_terratorch() -> None:
    """Import torch and TerraTorch once, with logging, matmul precision and the network left as they were."""
    # lightly 1.5.22 and albumentations 2.0.8 read these at import, and would otherwise call home.
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    import torch

    matmul_precision = torch.get_float32_matmul_precision()
    with warnings.catch_warnings(), console.stdout_to_stderr():
        # Deprecations inside the libraries' own modules: nothing that a user of a recipe could act on.
        warnings.simplefilter("ignore")
        import terratorch.cli_tools  # noqa: F401
    torch.set_float32_matmul_precision(matmul_precision)
    root.setLevel(level)
    root.handlers[:] = handlers
