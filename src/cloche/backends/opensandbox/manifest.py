"""Profile → the bodies of requests. Pure.

Nothing of the script stands in them: whoever may list sandboxes sees limits and whose they are.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.spec import Network

META_KIND, KIND = "cloche-kind", "box"
META_RUN, META_OWNER = "cloche-run", "cloche-owner"
META_PLACE, META_EXPIRES = "cloche-place", "cloche-expires"
META_TRY = "cloche-try"
"""Of one try to make a sandbox: by it one is found whose answer did not come."""
FOLDER = "/opt/cloche"
"""Where root alone can write, in most images, and no mount says noexec."""
SUPERVISOR, BUNDLE = f"{FOLDER}/supervisor", f"{FOLDER}/bundle"
ENTRYPOINT = ("tail", "-f", "/dev/null")
"""The sandbox's main process. The service itself needs a shell and such tools in the image."""
LEAST_TIMEOUT_S = 60
"""The service takes no shorter one."""
SCRIPT_UIDS = (20_000, 59_999)
"""A uid for each run, by chance: the kernel counts processes by uid (RLIMIT_NPROC), in all sandboxes of a machine together, and
the service has no bound of its own that we could set. No user of an image is there, and a user namespace of 65536 uids has
them."""
EXECD_BYTES = 24 * 2**20
"""What the service's own processes may take of the sandbox's memory."""
SPOOL_BYTES = 32 * 2**20
"""Of an upload execd keeps so much in memory."""


@dataclass(frozen=True, slots=True)
class Made:
    """A sandbox that is about to be made. ``expires_at`` is by the service's clock; ``lifetime_s`` is until then."""

    name: str
    """Of this try."""
    access_token: str = field(repr=False)
    """What execd of the sandbox wants to see in each request."""
    expires_at: float
    lifetime_s: float


def sandbox(profile: Profile, image: str, place: str | None, made: Made) -> dict[str, Any]:
    """The body of ``POST /v1/sandboxes``."""
    metadata = {
        META_KIND: KIND,
        META_RUN: profile.run_id,
        META_OWNER: profile.owner,
        META_TRY: made.name,
        META_EXPIRES: str(int(made.expires_at)),
    }
    return {
        "image": {"uri": image},
        "entrypoint": list(ENTRYPOINT),
        # What is left when everything else fails goes then.
        "timeout": max(LEAST_TIMEOUT_S, math.ceil(made.lifetime_s)),
        "resourceLimits": {
            "cpu": f"{max(10, round(profile.limits.cpus * 1000))}m",
            "memory": f"{-(-memory_bytes(profile) // 1024)}Ki",
        },
        # Where execd keeps its files; an image could name a place that is the script's.
        "env": {"EXECD_ACCESS_TOKEN": made.access_token, "TMPDIR": "/tmp"},
        "metadata": metadata if place is None else {**metadata, META_PLACE: place},
    }


def memory_bytes(profile: Profile) -> int:
    """What the sandbox may take: the script's memory, and beside it what the supervisor and execd need."""
    limits = profile.limits
    ours = shape.OVERHEAD_BYTES + EXECD_BYTES + min(SPOOL_BYTES, profile.bundle_bytes)
    return limits.memory_bytes + limits.output_bytes // 2 + ours


def supervisor(profile: Profile, uid: int) -> list[str]:
    """The command that runs the script as ``uid``."""
    command = [SUPERVISOR, "run", "--bundle", BUNDLE, "--script-uid", str(uid), "--script-gid", str(uid)]
    # Nothing else bounds a file: what is written lands on the disk of the service's machine.
    command += ["--fsize", str(shape.WRITABLE_CAP_BYTES), "--nproc", str(profile.limits.pids)]
    if profile.network is Network.NONE and not profile.sockets:
        command += ["--sockets", "unix"]
    return command


def upload(files: Sequence[tuple[str, int, bytes]]) -> list[tuple[str, bytes]]:
    """The form that writes files. The digits of a mode are decimal ones there."""
    parts: list[tuple[str, bytes]] = []
    for path, mode, content in files:
        about = {"path": path, "mode": int(f"{mode:o}")}
        parts += [("metadata", json.dumps(about).encode()), ("file", content)]
    return parts


def command(argv: Sequence[str], *, shell: bool) -> Mapping[str, Any]:
    """The body of ``POST /command``. Where execd takes nothing but a shell's text, that text has each argument in quotes.

    Raises:
        ValueError: an argument holds a NUL.
    """
    if any("\0" in argument for argument in argv):
        raise ValueError("an argument with a NUL")
    return {"command": f"exec {shlex.join(argv)}"} if shell else {"argv": list(argv)}
