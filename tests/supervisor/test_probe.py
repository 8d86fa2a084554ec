"""The prober sees what is so, says it as JSON, and leaves everything as it was."""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from tests.supervisor.harness import ENV, SUPERVISOR, Bench

from cloche.runtime.prove.observe import Seen, observe

MIB = 2**20
SECRET = "a-value-that-nobody-may-see"


def printed(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def look(bench: Bench, *options: str, box: tuple[str, ...] = ()) -> Seen:
    """What it sees in a box of plain bubblewrap."""
    # A sanitized prober reports where a script can write.
    run = bench.run([SUPERVISOR, "probe", *options], *box, env={**ENV, **bench.build.environment("/output")})
    assert run.end.exit_code == 0, (run.stderr, run.files)
    return observe(run.stdout)


def direct(bench: Bench, *options: str, env: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What it sees without any box."""
    environment = {**os.environ, **bench.build.environment(str(bench.build.reports)), **(env or {})}
    done = subprocess.run(
        [bench.build.path, "probe", *options], env=environment, capture_output=True, check=True, timeout=60
    )
    assert not bench.build.reported()
    return printed(done.stdout)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_in_a_box(bench: Bench) -> None:
    """It comes to its end, in the time of a start, and every kind of observation is there."""
    seen = look(bench)
    assert seen.complete
    assert seen.identity is not None
    assert (seen.identity.guard, set(seen.identity.uids)) == (1, {1000})
    assert set(seen.identity.capabilities.values()) == {0}
    assert seen.identity.no_new_privileges == 1
    assert seen.identity.seccomp == 2
    assert seen.kernel is not None
    assert seen.kernel.release == platform.release()
    assert seen.namespaces.keys() >= {"user", "pid", "mnt", "net", "ipc", "uts"}
    assert seen.process_count == 2
    assert seen.environment is not None
    assert {"PATH", "HOME"} <= set(seen.environment)
    assert seen.places["/etc" if "/etc" in seen.places else "/usr"].errno != 0
    assert seen.places["/tmp"].errno == 0
    assert seen.mount_of("/tmp") is not None
    assert seen.interfaces == ("lo",)
    assert {connection.errno for connection in seen.connections} == {errno.ENETUNREACH}


def test_calls_are_refused_in_a_box(bench: Bench) -> None:
    """All calls of the list, and all ways to the supervisor, are refused by the filter."""
    seen = look(bench)
    refused = {errno.EPERM, errno.ENOSYS}
    groups = {call.group for call in seen.calls}
    assert groups >= {"filter", "guard", "identity"}
    through = [call for call in seen.calls if call.group in {"filter", "guard"} and call.errno not in refused]
    assert not through
    assert all(call.errno != 0 for call in seen.calls)


def test_calls_get_through_without_a_box(shipped: Bench) -> None:
    """Without a filter the same calls get further, whoever asks: so it is the filter that is seen."""
    through = {
        row["name"]
        for row in direct(shipped)
        if row["see"] == "call" and row.get("errno") not in {errno.EPERM, errno.ENOSYS, None}
    }
    assert through >= {"setns", "clone3", "ptrace", "process_vm_readv", "personality", "kill-all"}
    if os.geteuid() == 0:
        assert through >= {"mount", "umount2", "pivot_root", "chroot", "unshare-net"}


def test_sockets_alone_are_refused_where_they_are_to_be(bench: Bench) -> None:
    """With the filter for sockets it says that none can be made, and what failed."""
    seen = look(bench, box=("--sockets", "unix"))
    assert all(seen.sockets[kind] == errno.EPERM for kind in ("inet-stream", "inet-dgram", "inet6-stream", "netlink"))
    assert seen.sockets["unix"] == 0
    assert {(connection.at, connection.errno) for connection in seen.connections} == {("socket", errno.EPERM)}


def test_what_answers(shipped: Bench, listener: socket.socket) -> None:
    """A listener that says something is reached, and what it says is told; one that is not there refuses."""
    port = listener.getsockname()[1]
    with ExitStack() as stack:
        free = stack.enter_context(closing(socket.socket()))
        free.bind(("127.0.0.1", 0))  # bound, and nobody listens
        process = subprocess.Popen(
            [
                shipped.build.path,
                "probe",
                "--tcp",
                f"here=127.0.0.1:{port}",
                "--tcp",
                f"nobody=127.0.0.1:{free.getsockname()[1]}",
                "--udp",
                f"silent=127.0.0.1:{port}",
                "--tcp",
                "malformed=example.org:80",
            ],
            stdout=subprocess.PIPE,
        )
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'nonce "\x01')
            out, _ = process.communicate(timeout=30)
    tried = {row["name"]: row for row in printed(out) if row["see"] == "connect"}
    assert tried["here"]["errno"] == 0
    assert tried["here"]["said"] == 'nonce "\x01'
    assert tried["nobody"]["errno"] == errno.ECONNREFUSED
    assert tried["silent"]["errno"] in {errno.ECONNREFUSED, errno.ETIMEDOUT}
    assert "malformed" not in tried


def test_a_datagram_that_is_answered(shipped: Bench) -> None:
    """A name server that answers anything at all is reached."""
    with closing(socket.socket(type=socket.SOCK_DGRAM)) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(20)
        with subprocess.Popen(
            [shipped.build.path, "probe", "--udp", f"dns=127.0.0.1:{server.getsockname()[1]}"], stdout=subprocess.PIPE
        ) as process:
            question, sender = server.recvfrom(512)
            server.sendto(b"no", sender)
            out, _ = process.communicate(timeout=30)
    assert question[2:6] == b"\x01\x00\x00\x01"
    assert b"\x06cloche\x07invalid\x00\x00\x01\x00\x01" in question
    assert {row["errno"] for row in printed(out) if row["see"] == "connect" and row["name"] == "dns"} == {0}


def test_no_values_of_the_environment(shipped: Bench) -> None:
    """Variables are told by name alone."""
    rows = direct(shipped, env={"CLOCHE_TEST_PROBE_NAME": SECRET})
    assert any("CLOCHE_TEST_PROBE_NAME" in row["names"] for row in rows if row["see"] == "environment")
    assert SECRET not in json.dumps(rows)


def test_nothing_is_left(shipped: Bench, tmp_path: Path) -> None:
    """Files that it made are gone, wherever it could make them."""
    direct(shipped, "--files", f"{tmp_path},50", "--size", f"{tmp_path},100000")
    assert list(tmp_path.iterdir()) == []
    for folder in ("/", "/tmp", "/dev/shm", "/var/tmp"):
        assert not [name for name in os.listdir(folder) if name.startswith((".cloche-probe", "cloche-probe"))]


def test_processes_up_to_the_bound(bench: Bench) -> None:
    """It says how many it could start, and why no more; all of them are gone before it ends."""
    seen = look(bench, "--no-look", "--processes", "60", box=("--nproc", "20"))
    reach = seen.reached["processes"]
    assert (reach.asked, reach.errno) == (60, errno.EAGAIN)
    assert 10 <= reach.got < 20


def test_processes_without_a_bound(bench: Bench) -> None:
    """Without a bound it has as many as it asked for, and says so."""
    reach = look(bench, "--no-look", "--processes", "30").reached["processes"]
    assert (reach.asked, reach.got, reach.errno) == (30, 30, 0)


def test_memory(shipped: Bench) -> None:
    """It takes step by step what it is told, and what it had is known also when it is ended over it."""
    seen = look(shipped, "--no-look", "--memory", str(40 * MIB))
    assert seen.reached["memory"].got == 40 * MIB
    run = shipped.run([SUPERVISOR, "probe", "--no-look", "--memory", str(300 * MIB)], "--memory-watch", str(64 * MIB))
    assert run.end.cause == "memory"
    seen = observe(run.stdout)
    assert not seen.complete
    assert seen.touched_bytes is not None
    assert 16 * MIB < seen.touched_bytes < 300 * MIB


def test_bounded_by_itself(shipped: Bench) -> None:
    """Whatever it is asked for, it takes no more than 1 GiB and 2000 processes."""
    seen = look(shipped, "--no-look", "--processes", "1000000", box=("--nproc", "30"))
    assert seen.reached["processes"].asked == 2000
    seen = look(shipped, "--no-look", "--size", f"/tmp,{2**40}")
    assert seen.reached["size /tmp"].asked == 2**30


def test_size_and_files(bench: Bench) -> None:
    """A folder that is full says ENOSPC, by bytes and by files."""
    seen = look(
        bench,
        "--no-look",
        "--size",
        f"/tmp,{70 * MIB}",
        "--files",
        "/output,200",
        box=("--inodes", "100", "--fsize", str(80 * MIB)),
    )
    size, files = seen.reached["size /tmp"], seen.reached["files /output"]
    assert (size.got, size.errno) == (64 * MIB, errno.ENOSPC)
    assert files.errno == errno.ENOSPC
    assert 90 < files.got < 100


def test_cpu(shipped: Bench) -> None:
    """Two processes that want all of it have some of it, for as long as they are told."""
    cpu = look(shipped, "--no-look", "--cpu", "200,2").cpu
    assert cpu is not None
    assert cpu.processes == 2
    assert 200 <= cpu.ms < 5000
    assert 0 < cpu.cpu_ms <= 2 * cpu.ms + 50


def test_it_does_not_take_long(shipped: Bench) -> None:
    """A whole look is over within seconds, on a busy machine too, though nothing answers."""
    begun = time.monotonic()
    direct(shipped, "--tcp", "nowhere=192.0.2.1:80", "--udp", "nowhere=192.0.2.1:53")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "options",
    [
        ["--what"],
        ["--memory"],
        ["--memory", "much"],
        ["--tcp", "127.0.0.1:1"],
        ["--cpu", "100"],
        ["--cpu", "x,1"],
        ["--size", "tmp,1"],
        ["--files", "/tmp"],
        *[["--tcp", "a=127.0.0.1:1"] * 17],
    ],
)
def test_usage(bench: Bench, options: list[str]) -> None:
    """What it does not understand it does not begin."""
    environment = {**os.environ, **bench.build.environment(str(bench.build.reports))}
    done = subprocess.run([bench.build.path, "probe", *options], env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"usage" in done.stderr
    assert not bench.build.reported()


def test_a_name_that_is_no_ascii(shipped: Bench) -> None:
    """Whatever stands in a name, each line stays JSON."""
    environment = {**os.environb, b'CLOCHE_"\\\xff\n': b"x"}
    done = subprocess.run([shipped.build.path, "probe"], env=environment, capture_output=True, check=True)
    names = [row["names"] for row in printed(done.stdout) if row["see"] == "environment"]
    assert 'CLOCHE_"\\\xff\n' in names[0]


def test_a_box_that_is_full_of_names(shipped: Bench) -> None:
    """A list that does not fit is cut between two names, and says so."""
    environment = {f"{'V' * 100}{i}": "" for i in range(300)}
    done = subprocess.run([shipped.build.path, "probe"], env=environment, capture_output=True, check=True)
    row = next(row for row in printed(done.stdout) if row["see"] == "environment")
    assert row["cut"] == 1
    assert 20 < len(row["names"]) < 300


def test_listens_for_another_one(shipped: Bench) -> None:
    """It says where it can be reached, greets who comes, and ends when its time is over."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(shipped.build.path), "probe", "--no-look", "--listen", f"{port},1500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert (said["see"], said["port"], said["errno"]) == ("listen", port, 0)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            assert connection.recv(100) == b"cloche"
        rest = printed(process.stdout.read())
    assert [(row["see"], row.get("guests")) for row in rest] == [("listened", 1), ("end", None)]
