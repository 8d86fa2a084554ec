"""Requires that every type in the public API is known to pyright, and none left to inference."""

from __future__ import annotations

import json
import subprocess
import sys

import cloche


def main() -> int:
    """Check what ``cloche`` exports, with all attributes and methods; other modules are cloche's own business."""
    command = ["pyright", "--verifytypes", "cloche", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    exported = [getattr(cloche, name) for name in cloche.__all__]
    ours = {
        f"{thing.__module__}.{thing.__qualname__}" for thing in exported if isinstance(thing, type) or callable(thing)
    }
    public = [symbol for symbol in symbols if any(f"{symbol['name']}.".startswith(f"{name}.") for name in ours)]
    wrong = [symbol for symbol in public if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
    for symbol in wrong:
        print(symbol["name"], *(found["message"] for found in symbol["diagnostics"]), sep="\n  ", file=sys.stderr)
    print(f"{len(public)} symbols in the public API, {len(wrong)} with types that are not known")
    return 1 if wrong or not public else 0


if __name__ == "__main__":
    sys.exit(main())
