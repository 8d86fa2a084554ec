"""What a container is made with."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.backends.docker import manifest
from cloche.backends.docker.facts import Image
from cloche.backends.docker.manifest import Ground
from cloche.spec import Limits, Network

GROUND = Ground(volume="cloche-supervisor-0", place="here", cpus=2)


def profile(limits: Limits | None = None, network: Network = Network.NONE) -> Profile:
    return Profile(
        run_id="r1", owner="o1", expires_at=2000.5, limits=limits or Limits(), network=network, bundle_bytes=10 * 2**20
    )


def body(made_of: Profile | None = None, ground: Ground = GROUND, volumes: tuple[str, ...] = ()) -> dict[str, Any]:
    made_of = made_of or profile()
    image = Image("sha256:1", "amd64", "linux", volumes)
    return manifest.container(made_of, ground, image, manifest.labels(made_of, ground, 2000.5))


def test_hardened() -> None:
    """Root that keeps four capabilities for the supervisor alone, a read-only root, no host path, no log, no network."""
    made = body()
    host = made["HostConfig"]
    assert made["User"] == "0:0"
    assert host["CapDrop"] == ["ALL"]
    assert host["CapAdd"] == ["KILL", "SETGID", "SETPCAP", "SETUID"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"] is True
    assert host["NetworkMode"] == "none"
    assert host["IpcMode"] == "none"
    assert host["LogConfig"]["Type"] == "none"
    assert [(m["Type"], m["ReadOnly"]) for m in host["Mounts"]] == [("volume", True)]
    assert not host.keys() & {"Binds", "VolumesFrom", "Devices", "Privileged", "PidMode", "UsernsMode", "GroupAdd"}
    assert made["Healthcheck"] == {"Test": ["NONE"]}
    assert "Runtime" not in host


def test_script_is_another_user() -> None:
    """The supervisor is told uid and gid of the script, which are never 0, and to end with its client."""
    command = body()["Entrypoint"]
    assert command[:2] == [shape.SUPERVISOR, "run"]
    assert command[command.index("--script-uid") + 1] == command[command.index("--script-gid") + 1] == "1000"
    assert "--lifeline" in command
    assert "--memory-watch" not in command
    assert "--nproc" not in command


@pytest.mark.parametrize("memory", [16 * 2**20, 256 * 2**20, 8 * 2**30])
def test_writable_places_are_bounded(memory: int) -> None:
    """Each writable mount has its bound of bytes and files, together at most half the memory; no other can be written."""
    made = body(profile(Limits(memory_bytes=memory)))
    mounts: dict[str, str] = made["HostConfig"]["Tmpfs"]
    assert {path for path, text in mounts.items() if "rw" in text.split(",")} == {"/workspace", *shape.WRITABLES}
    assert "ro" in mounts.pop("/dev/mqueue").split(",")
    sizes = {}
    for path, text in mounts.items():
        options = dict(option.partition("=")[::2] for option in text.split(","))
        assert {"nosuid", "nodev"} <= options.keys()
        sizes[path] = int(options["size"])
        if path == "/workspace":
            assert options["mode"] == "0755"
            assert "uid" not in options
        else:
            assert options["nr_inodes"] == "65536"
    assert sum(sizes[path] for path in shape.WRITABLES) <= memory // 2
    assert int(made["Entrypoint"][made["Entrypoint"].index("--fsize") + 1]) >= max(
        sizes[path] for path in shape.WRITABLES
    )


def test_limits() -> None:
    """Memory without swap, processes, and CPUs, of which no more are asked for than the engine's host has."""
    limits = Limits(memory_bytes=2**28, cpus=64.0, pids=100)
    host = body(profile(limits))["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == shape.memory_limit_bytes(profile(limits))
    assert host["PidsLimit"] == 100
    assert host["NanoCpus"] == 2 * 10**9
    assert body(profile(Limits(cpus=0.001)))["HostConfig"]["NanoCpus"] == 10**7
    assert body(profile(limits), Ground(volume="v", cpus=0))["HostConfig"]["NanoCpus"] == 64 * 10**9


@pytest.mark.parametrize(("pids", "at_start", "after"), [(4, 32, 4), (31, 32, 31), (32, 32, None), (500, 500, None)])
def test_few_pids_are_set_after_the_start(pids: int, at_start: int, after: int | None) -> None:
    """runc's own threads would meet a very low bound while the container starts."""
    made_of = profile(Limits(pids=pids))
    assert body(made_of)["HostConfig"]["PidsLimit"] == at_start
    assert manifest.start_pids(made_of, GROUND) == after


def test_a_guest_kernel() -> None:
    """Where the runtime has a kernel of its own, that kernel counts the script's processes; the engine's bounds leave it room."""
    ground = Ground(volume="v", runtime="runsc", guest_kernel=True)
    made_of = profile(Limits(pids=100))
    made = body(made_of, ground)
    host, command = made["HostConfig"], made["Entrypoint"]
    assert host["Runtime"] == "runsc"
    assert command[command.index("--nproc") + 1] == "99"
    assert host["PidsLimit"] > 28 + 1.5 * 100
    assert host["Memory"] == shape.memory_limit_bytes(made_of) + manifest.GUEST_MEMORY_BYTES
    assert manifest.start_pids(profile(Limits(pids=4)), ground) is None


def test_an_engine_without_memory_limits() -> None:
    """Where the engine cannot bound memory, it is not asked to, and the supervisor watches."""
    made = body(ground=Ground(volume="v", memory_limit=False))
    assert "Memory" not in made["HostConfig"]
    assert made["Entrypoint"][made["Entrypoint"].index("--memory-watch") + 1] == str(2**28)


def test_volumes_of_the_image_are_closed() -> None:
    """Where an image wants a writable volume on the host's disk, it gets an empty, read-only mount."""
    given = ("/data/", "/data/a/b", "//srv//x", "/tmp/", "/dev/shm/", "/run/cloche", "/proc/x", "/", "/workspace/y")
    mounts = body(volumes=given)["HostConfig"]["Tmpfs"]
    assert {path for path, text in mounts.items() if "ro" in text.split(",")} == {"/data", "/srv/x", "/dev/mqueue"}
    assert "rw" in mounts["/tmp"].split(",")


def test_podman() -> None:
    """Podman is asked for nothing that it refuses, and what it leaves open to write is covered."""
    made = body(ground=Ground(volume="v", podman=True))
    mounts: dict[str, str] = made["HostConfig"]["Tmpfs"]
    assert {path for path, text in mounts.items() if "ro" in text.split(",")} == {"/run", "/var/tmp", "/dev/mqueue"}
    assert not any(word in text for text in mounts.values() for word in ("nr_inodes", "uid=", "gid="))
    assert all("notmpcopyup" in text for text in mounts.values())
    assert made["HostConfig"]["CapAdd"] == [*manifest.CAPABILITIES, "CHOWN"]
    few = profile(Limits(pids=5))
    assert body(few, Ground(volume="v", podman=True))["HostConfig"]["PidsLimit"] == 5
    assert manifest.start_pids(few, Ground(volume="v", podman=True)) is None


def test_open_network() -> None:
    """Only a run that asks for it gets the engine's default network."""
    assert body(profile(network=Network.OPEN))["HostConfig"]["NetworkMode"] == "default"


def test_labels() -> None:
    """Run, owner, expiry in whole seconds, and the place of the owner's lock; nothing of the script."""
    made = body()
    assert made["Labels"] == {
        "cloche.run": "r1",
        "cloche.owner": "o1",
        "cloche.expires": "2000",
        "cloche.place": "here",
    }
    assert "cloche.place" not in manifest.labels(profile(), Ground(volume="v"), 1.0)
    assert json.loads(json.dumps(made)) == made


def test_filler() -> None:
    """The container that fills the volume may write to it, and would have no network if it ran."""
    made = manifest.filler(GROUND, "sha256:1", {"cloche.expires": "1"})
    assert made["HostConfig"]["NetworkMode"] == "none"
    (mount,) = made["HostConfig"]["Mounts"]
    assert (mount["Source"], mount["ReadOnly"]) == ("cloche-supervisor-0", False)
