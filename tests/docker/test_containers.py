"""Containers on a daemon that lives: how they are made, what they leave, and what happens to them from outside."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from tests import daemons
from tests.crowds import kill_in_the_middle, leave_nothing, open_and_close, sweep_beside_a_run
from tests.engines.docker.api import Engine

import cloche
from cloche.isolation import State
from cloche.supervisor.binary import supervisor_path
from cloche.testing.conformance import Target, assert_exited, python, shell

pytestmark = pytest.mark.anyio


async def running(sandbox: cloche.Sandbox, engine: Engine, then: Callable[[str], object]) -> cloche.Result:
    """The result of a run of which, once its script runs, the container is done something with, by its id."""
    spec = shell("echo running; sleep 30", timeout=40)
    run_id = cloche.new_run_id()
    fold = sandbox.fold(run_id)
    async for event in sandbox.stream(spec, run_id=run_id):
        fold.add(event)
        if isinstance(event, cloche.Output):
            await to_thread.run_sync(then, _id(engine, run_id))
    return fold.result()


def _id(engine: Engine, run_id: str) -> str:
    query = json.dumps({"label": [f"cloche.run={run_id}"]})
    (found,) = engine.get("/containers/json", filters=query)
    return str(found["Id"])


async def test_as_the_engine_sees_it(docker: Target, engine: Engine) -> None:
    """The engine itself shows the hardening: capabilities, read-only root, no host path, bounds; and nothing of the script."""
    seen: dict[str, Any] = {}
    async with docker.sandbox() as sandbox:
        with pytest.raises(cloche.EngineLost):
            await running(sandbox, engine, lambda name: seen.update(_inspect_and_kill(engine, name)))
        owner = sandbox.owner
    host, config = seen["HostConfig"], seen["Config"]
    assert host["ReadonlyRootfs"] is True
    assert not host["Privileged"]
    assert host["NetworkMode"] == "none"
    assert host["IpcMode"] == "none"
    assert host["LogConfig"]["Type"] == "none"
    assert host["CapDrop"] == ["ALL"]
    assert {name.removeprefix("CAP_") for name in host["CapAdd"]} == {"KILL", "SETGID", "SETPCAP", "SETUID"}
    assert not host["Binds"]
    assert [(m["Type"], m["RW"]) for m in seen["Mounts"] if m["Type"] != "tmpfs"] == [("volume", False)]
    assert host["Memory"] == host["MemorySwap"] > 256 * 2**20
    assert host["PidsLimit"] == 128
    assert config["Labels"]["cloche.owner"] == owner
    assert int(config["Labels"]["cloche.expires"]) > time.time()
    assert "sleep" not in json.dumps(seen)


def _inspect_and_kill(engine: Engine, name: str) -> dict[str, Any]:
    found: dict[str, Any] = engine.get(f"/containers/{name}/json")
    engine.ask("POST", f"/containers/{name}/kill")
    return found


@pytest.mark.parametrize("how", ["kill", "kill?signal=TERM", "stop"])
async def test_ended_from_outside(docker: Target, engine: Engine, how: str) -> None:
    """A container that somebody kills or stops is ``engine-lost``, never a cancelled or finished run; nothing is left."""
    with docker.nothing_left():
        async with docker.sandbox() as sandbox:
            with pytest.raises(cloche.EngineLost) as caught:
                await running(sandbox, engine, lambda name: _tell(engine, name, how))
    assert caught.value.hint


def _tell(engine: Engine, name: str, how: str) -> None:
    path, _, query = how.partition("?signal=")
    engine.ask("POST", f"/containers/{name}/{path}", {"signal": query} if query else None)


async def test_killed_after_a_child_was_out_of_memory(docker: Target, engine: Engine) -> None:
    """That a child was killed for want of memory is not why a container ended that somebody had killed later."""
    source = """
        import os, time
        if os.fork() == 0:
            kept = []
            while True:
                kept.append(b"x" * 2**22)
        os.wait()
        print("running", flush=True)
        time.sleep(60)
    """
    run_id = cloche.new_run_id()
    async with docker.sandbox() as sandbox:
        events = sandbox.stream(python(source, memory="64Mi", timeout=90), run_id=run_id)
        with pytest.raises(cloche.EngineLost):  # noqa: PT012 (the container is killed between two events)
            async for event in events:
                if isinstance(event, cloche.Output):
                    await to_thread.run_sync(_tell, engine, _id(engine, run_id), "kill")


async def test_removed_from_outside(docker: Target, engine: Engine) -> None:
    """A container that somebody removes is ``engine-lost`` too, and its removal then is no failure."""
    async with docker.sandbox() as sandbox:
        with pytest.raises(cloche.EngineLost):
            await running(sandbox, engine, lambda name: engine.ask("DELETE", f"/containers/{name}", {"force": 1}))
        assert sandbox.counters.removals_failed == 0


async def test_a_child_out_of_memory(docker: Target) -> None:
    """A child that is killed for want of memory is told in the usage, and the run goes on to its own end."""
    source = """
        import os, sys
        pid = os.fork()
        if pid == 0:
            kept = []
            while True:
                kept.append(b"x" * 2**22)
        status = os.waitpid(pid, 0)[1]
        print(os.WTERMSIG(status))
    """
    async with docker.sandbox() as sandbox:
        result = await sandbox.run(python(source, memory="64Mi", timeout=30))
    assert_exited(result)
    assert result.stdout == "9\n"
    assert result.usage.oom_kills > 0


async def test_cpus(docker: Target) -> None:
    """Two processes that burn what they get take no more CPU time than the run may have."""
    source = """
        import os, time
        end = time.monotonic() + 2
        pid = os.fork()
        while time.monotonic() < end:
            pass
        if pid:
            os.waitpid(pid, 0)
    """
    async with docker.sandbox() as sandbox:
        result = await sandbox.run(python(source, cpus=0.5, timeout=30))
    assert_exited(result)
    run_ms = result.timings_ms["run"]
    assert result.usage.cpu_ms is not None
    assert run_ms is not None
    assert result.usage.cpu_ms < 0.75 * run_ms


LISTENER = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(b"reached")
    connection.close()
"""
REACH = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as connection:
        print(connection.recv(7).decode())
except OSError as exc:
    print(type(exc).__name__)
"""


@pytest.fixture
def listener(docker: Target, engine: Engine) -> Iterator[tuple[str, str]]:
    """Somebody who listens in the network of the daemon's host: address and port."""
    (config,) = engine.get("/networks/bridge")["IPAM"]["Config"]
    address = config.get("Gateway") or str(next(ipaddress.ip_network(config["Subnet"]).hosts()))
    body = {
        "Image": docker.environ["CLOCHE_IMAGE"],
        "Cmd": ["python3", "-c", LISTENER, address],
        "HostConfig": {"NetworkMode": "host"},
    }
    name = json.loads(engine.ask("POST", "/containers/create", body=body))["Id"]
    try:
        engine.ask("POST", f"/containers/{name}/start")
        said, end = b"", time.monotonic() + 20
        while not said and time.monotonic() < end:
            time.sleep(0.1)
            said = engine.ask("GET", f"/containers/{name}/logs", {"stdout": 1, "stderr": 1})
        yield address, said[8:].decode().strip()
    finally:
        engine.ask("DELETE", f"/containers/{name}", {"force": 1})


@pytest.mark.parametrize(("network", "said"), [("open", "reached\n"), ("none", "OSError\n")])
async def test_network(docker: Target, listener: tuple[str, str], network: str, said: str) -> None:
    """An open network reaches what the daemon's host reaches; without one the same address is not to be reached."""
    spec = cloche.Spec(name="a.py", content=REACH, args=listener, network=cloche.Network(network), timeout=30)
    async with docker.sandbox() as sandbox:
        result = await sandbox.run(spec)
    assert_exited(result)
    assert result.stdout == said


def test_killed_in_the_middle_of_20_runs(docker: Target, engine: Engine) -> None:
    """A client killed by SIGKILL in the middle of 20 runs: their scripts end at once, and the next one's sweep leaves none."""
    host = docker.environ["CLOCHE_DOCKER_HOST"]
    with docker.nothing_left(within_s=20):

        def all_are_there() -> None:
            assert daemons.count_boxes(host) >= 20

        kill_in_the_middle(docker, 20, all_are_there)
        end = time.monotonic() + 15
        while daemons.count_boxes(host) and time.monotonic() < end:
            time.sleep(0.1)
        assert daemons.count_boxes(host) == 0, "scripts run on after their client"
        assert len(list(daemons.remains(host))) >= 20, "nothing was left to sweep: the test shows nothing"
        anyio.run(open_and_close, docker)
        assert list(daemons.remains(host)) == []


async def test_sweep_spares_the_living(docker: Target) -> None:
    """While one client's run goes on, another one's sweep removes nothing of it."""
    assert await sweep_beside_a_run(docker, lasts_s=3, after_s=1) == "done\n"


async def test_sweep_by_expiry(docker: Target, engine: Engine) -> None:
    """What has expired goes, whoever it belonged to; what has not stays, if it is from elsewhere. Volumes too."""
    image = docker.environ["CLOCHE_IMAGE"]
    now = int(time.time())
    made = {}
    for name, expires in (("old", now - 5), ("new", now + 600)):
        labels = {"cloche.run": "r0", "cloche.owner": "o0", "cloche.place": "elsewhere", "cloche.expires": str(expires)}
        body = {"Image": image, "Cmd": ["sleep", "100"], "Labels": labels}
        made[name] = json.loads(engine.ask("POST", "/containers/create", {"name": f"cloche-test-{name}"}, body))["Id"]
        engine.ask("POST", f"/containers/{made[name]}/start")
        engine.ask("POST", "/volumes/create", body={"Name": f"cloche-test-{name}", "Labels": labels})
    try:
        await open_and_close(docker)
        ids = {found["Id"] for found in engine.get("/containers/json", all=1)}
        volumes = {found["Name"] for found in engine.get("/volumes")["Volumes"]}
        assert (made["old"] in ids, made["new"] in ids) == (False, True)
        assert ("cloche-test-old" in volumes, "cloche-test-new" in volumes) == (False, True)
    finally:
        engine.ask("DELETE", f"/containers/{made['new']}", {"force": 1})
        engine.ask("DELETE", "/volumes/cloche-test-new")


def _volume() -> str:
    """The name of the volume with this version's supervisor."""
    return f"cloche-supervisor-{hashlib.sha256(supervisor_path().read_bytes()).hexdigest()[:16]}"


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut short"])
async def test_the_supervisors_volume_is_repaired(docker: Target, engine: Engine, damage: str) -> None:
    """A volume that lost the supervisor is filled again by the next run, or by the one after it, without a word."""
    async with docker.sandbox() as sandbox:
        assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
        name = _volume()
        place = Path(engine.get(f"/volumes/{name}")["Mountpoint"])
        if damage == "removed":
            engine.ask("DELETE", f"/volumes/{name}")
        else:
            if not place.exists():
                pytest.skip("the daemon's files cannot be reached from here")
            program = place / "supervisor"
            if damage == "emptied":
                program.unlink()
            else:
                data = program.read_bytes()
                program.write_bytes(data[: len(data) // 2])
        try:
            result = await sandbox.run(shell("echo fine"))
        except cloche.BackendUnavailable:
            assert damage == "cut short"  # it could be started, and was no program
            result = await sandbox.run(shell("echo fine"))
        assert result.stdout == "fine\n"


async def test_many_fill_the_volume_at_once(docker: Target, engine: Engine) -> None:
    """Clients that start together on a daemon without the volume all run, and fill it in turn."""
    async with docker.sandbox() as sandbox:
        assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
    engine.ask("DELETE", f"/volumes/{_volume()}")
    code = "import cloche; assert cloche.run(name='a.sh', content='echo up').stdout == 'up\\n'"
    ended = []

    async def one() -> None:
        ended.append(await anyio.run_process([sys.executable, "-c", code], env=docker.command_environment()))

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(one)
    assert len(ended) == 5


async def test_an_image_with_a_volume(docker: Target, engine: Engine) -> None:
    """Where an image declares a volume, the script cannot write there, and the daemon keeps no volume of it."""
    before = {v["Name"] for v in engine.get("/volumes")["Volumes"]}
    body = {"Image": docker.environ["CLOCHE_IMAGE"], "Cmd": ["true"]}
    made = json.loads(engine.ask("POST", "/containers/create", body=body))["Id"]
    try:
        query = {"container": made, "repo": "cloche-test/volume", "tag": "1", "changes": "VOLUME /data"}
        engine.ask("POST", "/commit", query, {})
    finally:
        engine.ask("DELETE", f"/containers/{made}", {"force": 1, "v": 1})
    try:
        async with docker.sandbox(CLOCHE_IMAGE="cloche-test/volume:1") as sandbox:
            source = "import os\ntry:\n    open('/data/x', 'w')\nexcept OSError as exc:\n    print(exc.strerror)"
            result = await sandbox.run(cloche.Spec(name="a.py", content=source), wait_cleanup=True)
            assert result.stdout == "Read-only file system\n"
    finally:
        engine.ask("DELETE", "/images/cloche-test/volume:1", {"force": 1})
    assert {v["Name"] for v in engine.get("/volumes")["Volumes"]} - before <= {_volume()}


async def test_writable_folders(anywhere: Target) -> None:
    """By mounts and owners alone, whatever Landlock adds, the script may write in three places of all that it sees.

    Guard: a read-only root, a workspace of another user's, and mounts over what engines leave open.
    """
    source = """
        import os
        places = {line.split()[4] for line in open("/proc/self/mountinfo")}
        for folder, folders, _ in os.walk("/"):
            places.add(folder)
            if folder == "/":
                folders.remove("proc")
        for folder in sorted(places):
            # Landlock has no say in access(2).
            if os.path.isdir(folder) and os.access(folder, os.W_OK):
                print(folder)
    """
    async with anywhere.sandbox() as sandbox:
        engine = (await sandbox.posture()).engine
        result = await sandbox.run(python(source, timeout=60))
    assert_exited(result)
    # Under cgroup v1 crun leaves its folder of controllers open, of 1 MiB.
    found = [folder for folder in result.stdout.split() if "Podman" not in engine or folder != "/sys/fs/cgroup"]
    assert found == ["/dev/shm", "/output", "/tmp"]


async def test_100_runs(anywhere: Target) -> None:
    """100 runs, 8 at a time, leave nothing on the daemon and nothing in the client: memory and descriptors stay flat."""
    with anywhere.nothing_left():
        await leave_nothing(anywhere, runs=100, warm_up=16, at_once=8, kept_fds=8)


async def test_posture(docker: Target) -> None:
    """The posture names the engine, and every promise with its evidence; none that should hold does not."""
    async with docker.sandbox() as sandbox:
        posture = await sandbox.posture()
    assert posture.engine.startswith("Docker ")
    assert posture.isolation is cloche.Isolation.CONTAINER
    assert {g.name for g in posture.guarantees if g.state is State.NOT_IN_FORCE} <= {"user-namespace"}
    assert all(g.evidence for g in posture.guarantees)
