"""What `helm test` runs, in a pod with the service's own image: one script, sent to the service as any client does it."""
# ruff: noqa: INP001, S310, T201 - a program of its own, whose address is the chart's and whose output is the pod's log

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

URL = os.environ["CHECK_URL"]
MODE = os.environ["CHECK_MODE"]
TIMEOUT_S = float(os.environ["CHECK_TIMEOUT"])
TOKENS = Path("/etc/cloche/tokens/tokens")
SPEC = {"name": "check.py", "content": "print(6 * 7)"}


def token() -> str:
    """The first one of the file: the service's own clients come after it."""
    for line in TOKENS.read_text().replace(",", "\n").splitlines():
        entry = line.strip()
        if entry and not entry.startswith("#"):
            return entry.split(":")[1]
    return sys.exit(f"{TOKENS} has no token")


def ask() -> tuple[int, dict[str, object]]:
    """The service's answer to a run: its status, and a Result or a problem."""
    headers = {"Authorization": f"Bearer {token()}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{URL}/v1/runs", json.dumps(SPEC).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def patient() -> tuple[int, dict[str, object]]:
    """The same, when it has begun to listen: a Service leads to a pod a moment after that is ready."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return ask()
        except OSError as error:
            if time.monotonic() > end:
                sys.exit(f"{URL} does not answer: {error}")
            time.sleep(1)


status, body = patient()
print(status, json.dumps(body, indent=1))
if MODE == "disabled":
    good = (status, body.get("code")) == (403, "sandbox-disabled")
else:
    good = (status, body.get("outcome"), body.get("exit_code"), body.get("stdout")) == (200, "exited", 0, "42\n")
sys.exit(not good)
