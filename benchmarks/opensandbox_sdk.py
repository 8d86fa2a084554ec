"""The official package, used as its README has it: a line comes in, sandboxes are made, a line with the times goes out.

benchmarks/opensandbox.py starts it, in an environment that has the package and nothing of cloche's. What it imports, and its
own start, are in nobody's time.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import sys
import time
from typing import Any

SCRIPT_PATH = "/tmp/main.py"
"""Of the sandbox."""
RUN_S = 30.0
"""Who takes longer has lost something on the way."""


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
        async with asyncio.timeout(RUN_S):  # for a command's output the package waits forever
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
    logging.getLogger("opensandbox").setLevel(logging.ERROR)  # it warns of each try to reach what is not there yet
    found = configurations(os.environ["OPEN_SANDBOX_DOMAIN"], os.environ["OPEN_SANDBOX_API_KEY"])
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        config = found[told["config"]]
        try:
            async with asyncio.TaskGroup() as tasks:
                begun = time.perf_counter()
                given = (told["image"], told["script"], told["expected"])
                runs = [tasks.create_task(run(config, *given)) for _ in range(told["number"])]
            whole = time.perf_counter() - begun
            answer: dict[str, Any] = {"result": max(task.result()[0] for task in runs), "whole": whole}
        except Exception as exc:  # noqa: BLE001 (whatever it is, the benchmark is told)
            answer = {"lost": repr(exc)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
