"""Makes a CUDA build of torch look like AMD's to all but a kernel: for the stand-in of build-on-stand-in.sh alone.

What AMD's wheels look like that matters to a build on them: ``torch.version.hip`` is set, each version carries a
local part (of which ``torch.__version__`` and the metadata say different ones), torchvision is 0.24.0, triton is its
own build, and nothing of NVIDIA's is installed.
"""

import importlib.metadata
import re
import shutil
from pathlib import Path

LOCAL = "+rocm7.2.4.lw.git00000000"
VERSIONS = {"torch": f"2.9.1{LOCAL}", "torchvision": f"0.24.0{LOCAL}", "triton": f"3.5.1{LOCAL}"}


def main() -> None:
    """Disguise the torch family of the Python that runs this."""
    # Read at once: a distribution reads its metadata lazily, from where it was.
    found = [(d.name, d.version, Path(str(d.locate_file("")))) for d in importlib.metadata.distributions()]
    for name, version, site in found:
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        if name.startswith("nvidia-"):
            shutil.rmtree(folder)  # the libraries stay: the build for CUDA is linked against them
        elif new := VERSIONS.get(name):
            metadata = folder / "METADATA"
            text = re.sub(r"(?m)^Version: .*$", f"Version: {new}", metadata.read_text(encoding="utf-8"), count=1)
            text = re.sub(r"(?m)^Requires-Dist: nvidia-.*\n", "", text)
            text = re.sub(r"(?m)^Requires-Dist: triton.*$", f"Requires-Dist: triton=={VERSIONS['triton']}", text)
            metadata.write_text(text, encoding="utf-8")
            # A layered file system renames no folder of a lower layer: this copies and removes it.
            shutil.move(folder, site / f"{name}-{new}.dist-info")
        if name in {"torch", "torchvision"}:
            source = site / name / "version.py"
            said = re.sub(r"(?m)^cuda\b.*$", "cuda = None", source.read_text(encoding="utf-8"))
            said = re.sub(r"(?m)^(hip\b.*|\Z)", "hip = '7.2.53211'\n", said, count=1)
            said = re.sub(r"(?m)^__version__ = .*$", f"__version__ = '{VERSIONS[name].replace('.lw', '')}'", said)
            source.write_text(said, encoding="utf-8")


if __name__ == "__main__":
    main()
