"""Entry point of ``python -m floodrepro``."""

import sys

from floodrepro.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
