"""What can be written, how far, and what lies about that is none of the script's. Pure."""

from __future__ import annotations

import re
from errno import EACCES, EDQUOT, ENOSPC

from cloche.backends import shape
from cloche.isolation import Guarantee, State
from cloche.runtime.prove.case import Case, broken, error_name, held, listed, unclear
from cloche.runtime.prove.rules.kernel import guest_kernel

SYSTEM_PLACES = (
    "/",
    "/etc",
    "/usr",
    "/usr/bin",
    "/usr/local/bin",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/var",
    "/home",
    "/opt",
    "/root",
    "/srv",
    "/run/cloche",
)
MOST_FILES = 2 * shape.INODES
"""An engine that is told nothing allows as many as half the memory has pages: a million for 8 GiB."""
MIB = 2**20
_NOT_LOOKED = "the prober did not come to it"
_SECRET = re.compile(r"(?i)token|secret|passw|credential|api_?key|private_?key|\AAWS_|\AGOOGLE_|\AAZURE_")


def read_only_root(case: Case) -> Guarantee:
    """The system's own files cannot be changed, by anybody in the box."""
    name, seen = "read-only-root", case.look
    if "/" not in seen.places or not seen.mounts:
        return unclear(name, _NOT_LOOKED)
    written = [path for path in SYSTEM_PLACES if path in seen.places and seen.places[path].errno == 0]
    if written:
        return broken(
            name, f"a script can make files in {listed(written)}", "Have the engine mount the root read-only."
        )
    open_mounts = [path for path in SYSTEM_PLACES if (mount := seen.mount_of(path)) is not None and mount.writable]
    if open_mounts:
        return broken(
            name,
            f"the mount of {listed(open_mounts)} is writable: only the files' own modes keep a script from it",
            "Have the engine mount the root read-only.",
        )
    return held(name, "every system folder is on a read-only mount; a file could be made in none of them")


def workspace_read_only(case: Case) -> Guarantee:
    """What was delivered stays as it was."""
    name, place = "workspace-read-only", case.look.places.get(shape.WORKSPACE)
    if place is None:
        return unclear(name, _NOT_LOOKED)
    if place.errno == 0:
        return broken(name, "a file could be made in /workspace")
    return held(name, f"making a file in /workspace failed: {error_name(place.errno)}")


def writable_places(case: Case) -> Guarantee:
    """Nothing can be written beside what is meant to be."""
    name, seen = "writable-places", case.look
    if not seen.places:
        return unclear(name, _NOT_LOOKED)
    meant = (*shape.WRITABLES, shape.WORKSPACE)  # of the workspace another guarantee tells
    more = [path for path, place in seen.places.items() if place.errno == 0 and path not in meant]
    more += [
        path
        for path, opening in seen.openings.items()
        if opening.purpose == "write" and opening.errno == 0 and not path.startswith(("/proc/", "/sys/"))
    ]
    if more:
        return broken(name, f"a script can also write to {listed(more)}")
    missing = [path for path in shape.WRITABLES if seen.places.get(path) is None or seen.places[path].errno != 0]
    where = f", though not {listed(missing)}" if missing else ""
    return held(name, f"of {len(seen.places)} folders only /output, /tmp and /dev/shm can be written{where}")


def disk_limit(case: Case) -> Guarantee:
    """Each of those is bounded, and full means full."""
    name, seen = "disk-limit", case.look
    places = [place for path, place in seen.places.items() if place.errno == 0 and path in shape.WRITABLES]
    if not places:
        return unclear(name, _NOT_LOOKED)
    bound = shape.writable_bytes(case.limits) + shape.ALIGNMENT
    large = [place.path for place in places if place.bytes is None or place.bytes > bound]
    if large:
        return broken(
            name,
            f"{listed(large)} may hold more than {bound // MIB} MiB: the disk of the engine's machine can be filled",
            "Give the engine's containers a quota of the disk.",
        )
    filled = [(what, reach) for what, reach in seen.reached.items() if what.startswith("size ")]
    for what, reach in filled:
        if reach.got > bound or reach.errno not in {ENOSPC, EDQUOT}:
            return broken(
                name,
                f"{what.removeprefix('size ')} took {reach.got // MIB} MiB and ended with {error_name(reach.errno)}",
            )
    if not filled:
        return held(name, f"each writable place holds {max(p.bytes or 0 for p in places) // MIB} MiB")
    what, reach = filled[0]
    return held(
        name,
        f"{what.removeprefix('size ')} took {reach.got // MIB} MiB of {reach.asked // MIB} and was full"
        f" ({error_name(reach.errno)}); the others are as large",
    )


def file_count_limit(case: Case) -> Guarantee:
    """Empty files cost the kernel memory that no size bounds."""
    name, seen = "file-count-limit", case.look
    places = [place for path, place in seen.places.items() if place.errno == 0 and path in shape.WRITABLES]
    if not places or any(place.files is None for place in places):
        return unclear(name, _NOT_LOOKED, needed=False)
    most = max(place.files or 0 for place in places)
    if any(not 0 < (place.files or 0) <= MOST_FILES for place in places):
        return broken(
            name,
            f"a writable place may hold {most or 'any number of'} files: only the memory limit bounds empty ones",
            needed=False,
        )
    return held(name, f"each writable place holds at most {most} files", needed=False)


def landlock(case: Case) -> Guarantee:
    """Seen by a file that is the script's own and that only Landlock keeps it from: /proc/self/oom_score_adj."""
    name, opening = "landlock", case.look.openings.get("/proc/self/oom_score_adj")
    if opening is None or opening.errno not in {0, EACCES}:
        return unclear(name, _NOT_LOOKED, needed=False)
    if opening.errno == 0:
        return broken(
            name, "writing to the script's own files below /proc is possible: this kernel has no Landlock", needed=False
        )
    return held(name, "a file of the script's own below /proc cannot be opened for writing", needed=False)


def no_credentials(case: Case) -> Guarantee:
    """Nothing lies in reach that opens another door."""
    name, seen = "no-credentials", case.look
    if not seen.credentials or seen.environment is None:
        return unclear(name, _NOT_LOOKED)
    found = [c.path for c in seen.credentials if c.errno == 0 and c.size > 0]
    found += [f"the variable {variable}" for variable in seen.environment if _SECRET.search(variable)]
    found += [
        f"the {what} of process {process.pid} ({process.name})"
        for process in seen.processes
        for what, error in (("environment", process.environ), ("memory", process.memory))
        if error == 0
    ]
    found += [f"the metadata service at {c.to}" for c in seen.connections if c.name == "metadata" and c.errno == 0]
    if found:
        return broken(
            name, f"a script can get at {listed(found)}", "Take it out of the image, or the mount off the box."
        )
    variables = listed(list(seen.environment)) or "nothing"
    return held(
        name,
        f"no token, key or engine socket in {len(seen.credentials)} usual places; the environment has {variables}; nothing of"
        " other processes can be read",
    )


def devices(case: Case) -> Guarantee:
    """No device beyond those that every box has."""
    name, seen = "devices", case.look
    if not seen.places:
        return unclear(name, _NOT_LOOKED)
    shown = [d for d in seen.devices if d.read == 0 or d.write == 0 or d.kind == "block"]
    if guest_kernel(case).state is State.IN_FORCE:
        shown = [d for d in shown if d.kind == "block"]
    elif seen.devices and not shown:
        shown = seen.devices
    if shown:
        return broken(
            name,
            f"the box shows devices of the host: {listed([d.path for d in shown])}",
            "Do not have the engine make privileged containers, or give boxes devices.",
        )
    return held(name, "no device but null, zero, full, random, urandom and terminals")


def kernel_files(case: Case) -> Guarantee:
    """What of /proc and /sys steers the kernel cannot be opened."""
    name, seen = "kernel-files", case.look
    if not seen.openings:
        return unclear(name, _NOT_LOOKED)
    opened = [
        path
        for path, o in seen.openings.items()
        if o.errno == 0
        and ((o.purpose == "write" and path.startswith(("/proc/", "/sys/"))) or path == "/proc/kcore")
        and path != "/proc/self/oom_score_adj"
        and o.kind != "device"  # what is masked is /dev/null
    ]
    if opened:
        return broken(name, f"a script can open {listed(opened)}")
    mount = seen.mount_of("/sys")
    if mount is not None and mount.writable and guest_kernel(case).state is not State.IN_FORCE:
        return broken(
            name,
            "/sys is mounted writable: only the files' own modes keep a script from it",
            "Do not have the engine make privileged containers.",
        )
    return held(name, "nothing below /proc and /sys that steers the kernel can be opened for writing")
