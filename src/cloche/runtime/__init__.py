"""What turns a spec into events: choosing the backend, the queue, the deadline, the box's life.

The runtime asks nobody which engine it holds; what differs is declared in the backend's capabilities.
"""

from __future__ import annotations

from cloche.runtime.admission import Load
from cloche.runtime.choose import MODES
from cloche.runtime.names import new_run_id
from cloche.runtime.runtime import Sandbox
from cloche.runtime.sweep import Swept, sweep_now
from cloche.runtime.sync import run

__all__ = ["MODES", "Load", "Sandbox", "Swept", "new_run_id", "run", "sweep_now"]
