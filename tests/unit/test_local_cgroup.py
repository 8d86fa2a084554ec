"""Finding cgroups: what the kernel's files say, on machines of every kind, and which folder follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloche.backends.contract import Profile
from cloche.backends.local import cgroup, places
from cloche.backends.local.cgroup import Cgroup, Flavour
from cloche.backends.local.manifest import CgroupPlan, launcher
from cloche.spec import Limits

UNIFIED = "29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
LEGACY = """\
30 24 0:25 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:26 / /sys/fs/cgroup/memory rw,nosuid shared:10 - cgroup cgroup rw,memory
32 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:11 - cgroup cgroup rw,cpu,cpuacct
33 30 0:28 / /sys/fs/cgroup/pids rw,nosuid shared:12 - cgroup cgroup rw,pids
34 30 0:29 / /sys/fs/cgroup/systemd rw,nosuid shared:13 - cgroup cgroup rw,xattr,name=systemd
"""
HYBRID = LEGACY + "35 30 0:30 / /sys/fs/cgroup/unified rw,nosuid shared:14 - cgroup2 cgroup2 rw,nsdelegate\n"
DOCKER_V1 = """\
700 690 0:26 /docker/0123abcd /sys/fs/cgroup/memory ro,nosuid master:10 - cgroup cgroup rw,memory
701 690 0:28 /docker/0123abcd /sys/fs/cgroup/pids ro,nosuid master:12 - cgroup cgroup rw,pids
"""
ELSEWHERE = "29 23 0:26 / /mnt/c\\040group rw shared:9 master:1 - cgroup2 none rw\n"
WITHOUT_TAGS = "29 23 0:26 / /sys/fs/cgroup rw,relatime - cgroup2 none rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "found"),
    [
        pytest.param("", {}, id="none"),
        pytest.param("22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n", {}, id="other file systems"),
        pytest.param(UNIFIED, {"": ("/sys/fs/cgroup", "/")}, id="v2"),
        pytest.param(WITHOUT_TAGS, {"": ("/sys/fs/cgroup", "/")}, id="v2 without optional fields"),
        pytest.param(ELSEWHERE, {"": ("/mnt/c group", "/")}, id="v2 at an escaped path"),
        pytest.param(
            DOCKER_V1,
            {
                "memory": ("/sys/fs/cgroup/memory", "/docker/0123abcd"),
                "pids": ("/sys/fs/cgroup/pids", "/docker/0123abcd"),
            },
            id="v1 in a container",
        ),
        pytest.param(
            HYBRID,
            {
                "": ("/sys/fs/cgroup/unified", "/"),
                "memory": ("/sys/fs/cgroup/memory", "/"),
                "cpu": ("/sys/fs/cgroup/cpu,cpuacct", "/"),
                "pids": ("/sys/fs/cgroup/pids", "/"),
            },
            id="hybrid",
        ),
    ],
)
def test_mounts(mountinfo: str, found: dict[str, tuple[str, str]]) -> None:
    """Mount point and root of each hierarchy are read from mountinfo; the first mount of one counts."""
    read = places.read_mounts(mountinfo)
    seen = {name: (str(point), root) for name, (point, root) in read.items() if name in {"", *places.WANTED}}
    assert seen == found


def test_first_mount_counts() -> None:
    """A second mount of the same hierarchy, as a container engine makes them, changes nothing."""
    again = UNIFIED.replace("/sys/fs/cgroup", "/var/lib/other")
    assert places.read_mounts(UNIFIED + again)[""][0] == Path("/sys/fs/cgroup")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param("", {}, id="none"),
        pytest.param("0::/\n", {"": "/"}, id="v2, a container's view"),
        pytest.param("0::/user.slice/s-1.scope\n", {"": "/user.slice/s-1.scope"}, id="v2"),
        pytest.param("0::/../other\n", {"": "/../other"}, id="v2, outside the namespace"),
        pytest.param("0::/a:b/c\n", {"": "/a:b/c"}, id="a colon in a name"),
        pytest.param(
            "5:cpu,cpuacct:/x\n4:memory:/y\n1:name=systemd:/z\n0::/w\n",
            {"cpu": "/x", "cpuacct": "/x", "memory": "/y", "name=systemd": "/z", "": "/w"},
            id="hybrid",
        ),
    ],
)
def test_own_paths(text: str, found: dict[str, str]) -> None:
    """Our own path in each hierarchy is read from /proc/self/cgroup."""
    assert places.read_own_paths(text) == found


@pytest.mark.parametrize(
    ("root", "own", "below"),
    [
        pytest.param("/", "/a/b", "a/b", id="the whole tree is mounted"),
        pytest.param("/a", "/a/b", "b", id="a part of it is"),
        pytest.param("/a/b", "/a/b", ".", id="just ours"),
        pytest.param("/", "/", ".", id="a namespace"),
        pytest.param("/", "/gone", ".", id="a folder that is not there"),
        pytest.param("/ab", "/abc/d", ".", id="a name that only begins alike"),
        pytest.param("/", "/../other", ".", id="outside the namespace"),
    ],
)
def test_inside(tmp_path: Path, root: str, own: str, below: str) -> None:
    """Our folder is found below the mount point; where that cannot be, it is the mount point."""
    point = tmp_path / "point"
    for name in ("a/b", "b", "c/d", "../other"):
        (point / name).mkdir(parents=True)
    assert places.inside(point, root, own) == point / below


def profile(**limits: float) -> Profile:
    return Profile(run_id="r1", owner="o1", expires_at=0, limits=Limits(**limits))  # type: ignore[arg-type]


def box(folder: Path, *names: str) -> Cgroup:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("")
    return Cgroup(CgroupPlan(bounded=True), (folder,), folder)


V2_FILES = ("memory.max", "memory.swap.max", "pids.max", "cpu.max")


@pytest.mark.parametrize("kind", ["v2", "systemd"])
def test_limits_of_v2(tmp_path: Path, kind: str) -> None:
    """The four limits of a run are written, in the kernel's own words."""
    made = box(tmp_path / "box", *V2_FILES)
    cgroup.limit(Flavour(kind), made, profile(memory_bytes=2**26, pids=30, cpus=0.25, output_bytes=2**20))
    written = {name: (tmp_path / "box" / name).read_text() for name in V2_FILES}
    assert written == {
        "memory.max": str(2**26 + 2**19 + 8 * 2**20),
        "memory.swap.max": "0",
        "pids.max": "31",
        "cpu.max": "25000 100000",
    }


def test_limits_of_v1(tmp_path: Path) -> None:
    """In v1 each limit goes to the hierarchy that has it; what swap accounting lacks is left out."""
    memory, pids = tmp_path / "memory", tmp_path / "pids"
    box(memory, "memory.limit_in_bytes")
    box(pids, "pids.max")
    made = Cgroup(CgroupPlan(bounded=True), (memory, pids), memory)
    cgroup.limit(Flavour("v1"), made, profile(memory_bytes=2**26, pids=30, output_bytes=2**20))
    assert (memory / "memory.limit_in_bytes").read_text() == str(2**26 + 2**19 + 8 * 2**20)
    assert (pids / "pids.max").read_text() == "31"


@pytest.mark.parametrize("missing", ["memory.max", "pids.max"])
def test_a_limit_that_cannot_be_written(tmp_path: Path, missing: str) -> None:
    """A cgroup without the memory or the pids controller is an error, never a run without the bound."""
    made = box(tmp_path / "box", *(name for name in V2_FILES if name != missing))
    with pytest.raises(FileNotFoundError, match=missing):
        cgroup.limit(Flavour("v2"), made, profile())


def test_cpu_and_swap_may_be_absent(tmp_path: Path) -> None:
    """Without the cpu controller and swap accounting the rest is bounded."""
    cgroup.limit(Flavour("v2"), box(tmp_path / "box", "memory.max", "pids.max"), profile())


def test_oom_kills(tmp_path: Path) -> None:
    """The counter is read from v2 and v1 alike; a cgroup that is gone has none."""
    made = box(tmp_path / "v2")
    (tmp_path / "v2/memory.events").write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 0\n")
    assert made.oom_kills() == 3
    made = box(tmp_path / "v1")
    (tmp_path / "v1/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert made.oom_kills() == 2
    assert Cgroup(CgroupPlan(), (), tmp_path / "gone").oom_kills() == 0
    assert cgroup.NO_CGROUP.oom_kills() == 0


def test_a_scope_for_a_box() -> None:
    """The command that makes a scope names it once, delegates it, and enters the box's folder below it, no other."""
    prefix = ("systemd-run", "--user", "--scope", "--property=Delegate=yes")
    root = Path("/sys/fs/cgroup/app.slice")
    made = cgroup.create(Flavour("systemd", {"memory": root, "pids": root}, prefix), "o1")
    assert made.counters is not None
    scope = made.counters.parent
    assert (made.counters.name, scope.parent, made.folders) == ("box", root, (made.counters,))
    assert scope.name.startswith("cloche-o1.")
    assert scope.suffix == ".scope"
    vector = launcher("/supervisor", made.plan, 7)
    assert vector[: len(prefix) + 1] == [*prefix, f"--unit={scope.name}"]
    assert vector[vector.index("/bin/sh") + 3 :] == [
        str(scope),
        "+memory +pids",
        "/supervisor",
        "launch",
        "--parent",
        "7",
        "--procs",
        f"{scope}/box/cgroup.procs",
    ]
