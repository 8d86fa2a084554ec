"""``python -m cloche``: the same as the command ``cloche``."""

from __future__ import annotations

import sys

from cloche.cli import main

if __name__ == "__main__":
    sys.exit(main())
