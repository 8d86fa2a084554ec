"""What a box looks like from the inside, the same on every engine: its places, its script's identity, its sizes. Pure."""

from __future__ import annotations

from cloche.backends.contract import Profile
from cloche.spec import Limits

BOX_UID = 1000
"""The script's uid and gid, as the box sees them."""
HOSTNAME = "cloche"
SUPERVISOR_FOLDER = "/run/cloche"
SUPERVISOR = f"{SUPERVISOR_FOLDER}/supervisor"
WORKSPACE = "/workspace"
WRITABLES = ("/output", "/tmp", "/dev/shm")
WRITABLE_CAP_BYTES = 64 * 2**20
WORKSPACE_SLACK_BYTES = 64 * 2**20
"""Beside the bundle itself: /workspace is written by the supervisor alone, and small files round up."""
INODES = 65536
"""Of each writable mount; an empty file costs the kernel about 1 KiB that no size bounds."""
OVERHEAD_BYTES = 8 * 2**20
"""What the supervisor itself may take of the box's memory, beside the rings for the output's tail."""


ALIGNMENT = 64 * 2**10
"""Of sizes of mounts, in bytes; the largest page of any kernel that we know of. A tmpfs rounds its size up to whole pages, and
whoever compares what is in it with the size that he gave (the kubelet does) finds it too large."""


def writable_bytes(limits: Limits) -> int:
    """Size of each writable mount: 64 MiB, and all together at most half the box's memory."""
    return min(WRITABLE_CAP_BYTES, limits.memory_bytes // 2 // len(WRITABLES)) // ALIGNMENT * ALIGNMENT


def workspace_bytes(profile: Profile) -> int:
    """Size of the mount that holds the workspace."""
    return -(-(profile.bundle_bytes + WORKSPACE_SLACK_BYTES) // ALIGNMENT) * ALIGNMENT


def memory_limit_bytes(profile: Profile) -> int:
    """What the engine allows: the script's memory, and beside it what cloche itself puts into the box."""
    return profile.limits.memory_bytes + profile.bundle_bytes + profile.limits.output_bytes // 2 + OVERHEAD_BYTES


def file_size_limit_bytes(limits: Limits) -> int:
    """RLIMIT_FSIZE: never below the bound of a mount, so that a full one says ENOSPC."""
    return max(WRITABLE_CAP_BYTES, limits.memory_bytes)
