"""The official package, used as its README has it: a line comes in, sandboxes are made, a line with the times goes out.

benchmarks/opensandbox.py starts it, in an environment that has the package and nothing of cloche's. What it imports, and its
own start, are in nobody's time.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from typing import Any

SCRIPT_PATH = "/tmp/main.py"
"""Of the sandbox."""


def configurations(url: str, key: str) -> dict[str, Any]:
    """How the package can be set up, by the name of a contender."""
    config: Any = importlib.import_module("opensandbox.config").ConnectionConfig
    httpx: Any = importlib.import_module("httpx")
    # The README recommends one transport to those who make many sandboxes, and this is its example.
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=50, keepalive_expiry=30.0)
    return {
        "defaults": config(domain=url, api_key=key),
        "one transport": config(domain=url, api_key=key, transport=httpx.AsyncHTTPTransport(limits=limits)),
    }


async def run(config: Any, image: str, script: str, expected: str) -> tuple[float, float]:
    """Seconds until its output and exit status are known, and until the sandbox is gone."""
    package: Any = importlib.import_module("opensandbox")
    entry: Any = importlib.import_module("opensandbox.models.filesystem").WriteEntry
    begun = time.perf_counter()
    sandbox = await package.Sandbox.create(image, connection_config=config)
    try:
        await sandbox.files.write_files([entry(path=SCRIPT_PATH, data=script, mode=644)])
        execution = await sandbox.commands.run(f"python3 {SCRIPT_PATH}")
        printed = "".join(message.text for message in execution.logs.stdout)
        result = time.perf_counter() - begun
    finally:
        await sandbox.destroy()
    whole = time.perf_counter() - begun
    if execution.exit_code != 0 or printed.strip() != expected:
        raise RuntimeError(f"the script ended with {execution.exit_code}, and printed {printed!r}")
    return result, whole


async def main() -> None:
    """Until stdin ends."""
    found = configurations(os.environ["OPEN_SANDBOX_DOMAIN"], os.environ["OPEN_SANDBOX_API_KEY"])
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        config = found[told["config"]]
        begun = time.perf_counter()
        runs = (run(config, told["image"], told["script"], told["expected"]) for _ in range(told["number"]))
        times = await asyncio.gather(*runs)
        whole = time.perf_counter() - begun
        print(json.dumps({"result": max(result for result, _ in times), "whole": whole}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
