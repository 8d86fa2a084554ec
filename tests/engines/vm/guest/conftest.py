"""For the tests that only make sense inside the machine."""

from __future__ import annotations

import os

SCENE = os.environ.get("SCENE")
# They are not for the machine that this is developed on: `make engines-vm` runs them.
collect_ignore_glob = [] if SCENE else ["test_*.py"]
