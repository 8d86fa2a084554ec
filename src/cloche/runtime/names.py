"""Names that the runtime gives. Pure but for the clock and chance."""

from __future__ import annotations

import secrets
import time

RUN_ID = r"[a-z][a-z0-9-]{0,30}[a-z0-9]"
"""What a run may be called."""


def new_owner() -> str:
    """A name for whoever answers for boxes."""
    return f"o{secrets.token_hex(8)}"


def new_run_id() -> str:
    """A name for a run: unique, sorted by time, and fit for a label, a file and an address."""
    return f"r{int(time.time() * 1000):011x}{secrets.token_hex(6)}"
