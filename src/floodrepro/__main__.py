"""Entry point of ``python -m floodrepro``."""

import sys
from pathlib import Path

from floodrepro.cli.main import main

if __name__ == "__main__":
    if sys.path[0] == str(Path.cwd()):
        del sys.path[0]  # as for the script: no class_path of a downloaded config finds code here
    sys.exit(main())
