"""Sandboxes of a real service: what is left of them, whoever dies, what happens to them from outside, and what they keep from a
script beside the supervisor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import anyio
import httpx2
import pytest
from anyio import to_thread
from tests import modes
from tests.crowds import kill_in_the_middle, leave_nothing, open_and_close, sweep_beside_a_run
from tests.engines.docker.api import Engine
from tests.engines.opensandbox.service import Service as Server
from tests.escape.attack import attack
from tests.services import Service

import cloche
from cloche.isolation import State
from cloche.testing.conformance import Target, assert_exited, python, shell

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["opensandbox", "opensandbox-old"])
def generation(request: pytest.FixtureRequest) -> Target:
    """A service with either kind of execd."""
    return modes.ready(request.param)


async def during(
    target: Target, then: Callable[[dict[str, Any]], object], service: Service, script: str = "echo running; sleep 30"
) -> tuple[cloche.Result, float]:
    """The result of a run of which, once its script runs, the sandbox is done something with; and how many seconds after that it
    came. An error has them in its note.
    """
    run_id = cloche.new_run_id()
    at = time.monotonic()
    async with target.sandbox() as sandbox:
        fold = sandbox.fold(run_id)
        try:
            async for event in sandbox.stream(shell(script, timeout=40), run_id=run_id):
                fold.add(event)
                if isinstance(event, cloche.Output) and event.data.startswith(b"running"):
                    (box,) = [b for b in service.boxes() if b["metadata"]["cloche-run"] == run_id]
                    await to_thread.run_sync(then, box)
                    at = time.monotonic()
        except cloche.ClocheError as error:
            error.add_note(f"{time.monotonic() - at}")
            raise
    return fold.result(), time.monotonic() - at


def seconds(error: BaseException) -> float:
    return float(error.__notes__[0])


async def test_as_the_service_sees_it(opensandbox: Target, service: Service, daemon: Engine) -> None:
    """The service and its daemon show limits, a lifetime, and whose the sandbox is; nothing of the script."""
    seen: dict[str, Any] = {}

    def look(box: dict[str, Any]) -> None:
        seen.update(box)
        seen["container"] = daemon.get(f"/containers/sandbox-{box['id']}/json")
        daemon.ask("POST", f"/containers/sandbox-{box['id']}/kill")

    with pytest.raises(cloche.EngineLost):
        await during(opensandbox, look, service)
    host = seen["container"]["HostConfig"]
    assert 256 * 2**20 < host["Memory"] < 320 * 2**20
    assert host["NanoCpus"] == 10**9
    assert seen["entrypoint"] == ["tail", "-f", "/dev/null"]
    lifetime_s = datetime.fromisoformat(seen["expiresAt"]).timestamp() - time.time()
    # The start's bound, the script's own, its grace, and a minute for clocks that differ.
    assert 120 + 40 < lifetime_s < 120 + 40 + 65
    assert abs(float(seen["metadata"]["cloche-expires"]) - datetime.fromisoformat(seen["expiresAt"]).timestamp()) < 5
    assert "sleep" not in str(seen)


@pytest.mark.parametrize("how", ["container", "api"])
async def test_killed_behind_our_back(opensandbox: Target, service: Service, daemon: Engine, how: str) -> None:
    """A sandbox that somebody kills, or removes, is known at once to be lost, for that reason; nothing is left of it."""

    def kill(box: dict[str, Any]) -> None:
        if how == "api":
            service.ask("DELETE", f"/sandboxes/{box['id']}")
        else:
            daemon.ask("POST", f"/containers/sandbox-{box['id']}/kill")

    with opensandbox.nothing_left(), pytest.raises(cloche.EngineLost) as caught:
        await during(opensandbox, kill, service)
    assert seconds(caught.value) < 5
    # It is killed before it is removed.
    words = ("was deleted", "exited with code") if how == "api" else ("exited with code",)
    assert any(word in caught.value.message for word in words), caught.value.message
    assert not caught.value.retryable


async def test_dead_peer(opensandbox: Target, service: Service, daemon: Engine) -> None:
    """An execd that stops sending, its connection still there, is found within 15 s, and its sandbox removed."""
    with opensandbox.nothing_left(), pytest.raises(cloche.EngineLost) as caught:
        await during(opensandbox, lambda box: daemon.ask("POST", f"/containers/sandbox-{box['id']}/pause"), service)
    assert seconds(caught.value) < 15
    assert "Paused" in caught.value.message
    assert caught.value.retryable


async def test_a_silent_script(generation: Target) -> None:
    """A script that says nothing for longer than after which a peer counts as dead is not taken for one."""
    async with generation.sandbox() as sandbox:
        result = await sandbox.run(shell("sleep 15; echo done", timeout=30))
    assert result.stdout == "done\n"


async def test_server_restarted(opensandbox: Target, service: Service, server: Server) -> None:
    """While a script runs its service may be killed and started again: the result is exact, and the sandbox is removed."""

    def restart(box: dict[str, Any]) -> None:
        del box
        server.kill_server()
        server.start_server()

    with opensandbox.nothing_left():
        result, _ = await during(opensandbox, restart, service, "echo running; sleep 3; echo done; exit 7")
    assert (result.stdout, result.exit_code) == ("running\ndone\n", 7)


async def test_server_gone_at_the_end(opensandbox: Target, service: Service, server: Server) -> None:
    """A service that is down when a script ends costs the result nothing; the sandbox is removed once it is back."""
    with opensandbox.nothing_left():
        try:
            async with opensandbox.sandbox() as sandbox:
                run_id = cloche.new_run_id()
                fold = sandbox.fold(run_id)
                spec = shell("echo running; sleep 1; exit 7", timeout=40)
                async for event in sandbox.stream(spec, run_id=run_id):
                    fold.add(event)
                    if isinstance(event, cloche.Output):
                        await to_thread.run_sync(server.kill_server)
                assert fold.result().exit_code == 7
                await to_thread.run_sync(server.start_server)
            assert sandbox.counters.removals_failed == 0
        finally:
            server.start_server()


async def test_wrong_key(opensandbox: Target) -> None:
    """A key that the service does not take is told when the sandbox opens, with the variable to set."""
    with pytest.raises(cloche.BackendUnavailable) as caught:
        async with opensandbox.sandbox(CLOCHE_OPENSANDBOX_API_KEY="wrong"):
            pytest.fail("it was entered")
    assert "does not take the key" in caught.value.message
    assert "CLOCHE_OPENSANDBOX_API_KEY" in caught.value.hint


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("cloche-test/sandbox:1", cloche.IsolationUnavailable, ["starts as uid 1000"]),
        ("cloche-test/tiny:1", cloche.BackendUnavailable, ["ended before it was ready"]),
        ("127.0.0.1:1/absent:1", cloche.ImageUnavailable, ["absent"]),
    ],
    ids=["not root", "no shell", "absent"],
)
async def test_images(
    opensandbox: Target, daemon: Engine, image: str, error: type[cloche.ClocheError], words: list[str]
) -> None:
    """An image that starts as somebody else than root, or that the service cannot use or have, ends early in its own error."""
    del daemon  # else it is not known that the images are there
    with opensandbox.nothing_left():
        async with opensandbox.sandbox(CLOCHE_IMAGE=image) as sandbox:
            begin = time.monotonic()
            with pytest.raises(error) as caught:
                await sandbox.run(shell("echo hello"))
            assert time.monotonic() - begin < 20
    assert all(word in caught.value.message for word in words), caught.value.message
    assert "image" in caught.value.hint.lower()


async def test_too_much_for_the_service(opensandbox: Target, server: Server) -> None:
    """A limit that the service does not take is told in its own words."""
    del server  # of ours it is known that it has fewer CPUs
    async with opensandbox.sandbox() as sandbox:
        with pytest.raises(cloche.BackendUnavailable) as caught:
            await sandbox.run(shell("true", cpus=1024.0))
    assert "does not make a sandbox" in caught.value.message


async def test_through_the_server(opensandbox: Target, service: Service) -> None:
    """Through the service itself a run goes as directly, where the settings say so."""
    with opensandbox.nothing_left():
        async with opensandbox.sandbox(CLOCHE_OPENSANDBOX_SERVER_PROXY="true") as sandbox:
            result = await sandbox.run(python("import sys; print(sys.stdin.read()); sys.exit(3)", stdin=b"hello"))
    assert_exited(result, 3)
    assert result.stdout == "hello\n"
    assert service.boxes() == []


ON_EXECD = r"""
def others():
    mine = (os.getpid(), os.getppid())
    return [int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) not in mine]
def named(word):
    found = [p for p in others() if word in read('/proc/%d/cmdline' % p)]
    assert found, "it is not there"
    return found
def read(path):
    with open(path, 'rb') as file:
        return file.read()
def folder():
    return '/tmp/opensandbox-execd' if os.path.isdir('/tmp/opensandbox-execd') else '/tmp'
def outputs():
    return [os.path.join(folder(), name) for name in os.listdir(folder()) if name.endswith('.stdout')]
def ask(method, path, body=b'', token=None):
    import http.client
    connection = http.client.HTTPConnection('127.0.0.1', 44772, timeout=5)
    connection.request(method, path, body, {} if token is None else {'X-EXECD-ACCESS-TOKEN': token})
    answer = connection.getresponse()
    if answer.status in (401, 403):
        raise PermissionError(errno.EPERM, 'refused')
    return answer.status
EXECD, = named(b'/opt/opensandbox/execd')[:1]
"""


async def test_the_services_own_processes(generation: Target) -> None:
    """A script neither signals, reads nor follows execd, its token, the files in which it keeps the output, the supervisor's
    file or the bundle. Guards: a uid of the script's own, modes, the filter.
    """
    async with generation.sandbox() as sandbox:
        await attack(
            sandbox,
            {
                "SIGTERM to execd": "os.kill(EXECD, 15)",
                "SIGKILL to everything": "[os.kill(p, 9) for p in others()]",
                "SIGKILL to all at once": "os.kill(-1, 9)",
                "a signal through a pidfd": "call('pidfd_send_signal', call('pidfd_open', EXECD, 0), 9, None, 0)",
                "a descriptor of execd's": "call('pidfd_getfd', call('pidfd_open', EXECD, 0), 3, 0)",
                "execd's environment": "read('/proc/%d/environ' % EXECD)",
                "PID 1's environment": "read('/proc/1/environ')",
                "execd's memory": "openable('/proc/%d/mem' % EXECD, os.O_RDWR)",
                "execd's descriptors": "os.listdir('/proc/%d/fd' % EXECD)",
                "limits of execd": "call('prlimit64', EXECD, 0, struct.pack('QQ', 1, 1), None)",
                "the output's file, to read": "[read(p) for p in outputs()]",
                "the output's file, to write": "outputs() and [open(p, 'ab') for p in outputs()]",
                "the output's file, to remove": "outputs() and [os.unlink(p) for p in outputs()]",
                "the output's file, in another's place": "outputs() and [os.rename('/tmp/x', p) for p in outputs()]",
                "a file in execd's folder": "openable('/opt/opensandbox/x', os.O_CREAT | os.O_WRONLY)",
                "the bundle": "read('/opt/cloche/bundle')",
                "the supervisor": "openable('/opt/cloche/supervisor', os.O_WRONLY)",
                "execd's API": "ask('GET', '/ping')",
            },
            setup=ON_EXECD + "open('/tmp/x', 'w').close()\n",
            also_refused=("EAFNOSUPPORT",),
        )


async def test_execd_with_an_open_network(generation: Target) -> None:
    """A script with a network reaches execd's port, and gains nothing there: it does not know the sandbox's token."""
    async with generation.sandbox() as sandbox:
        await attack(
            sandbox,
            {
                "a command as root": "ask('POST', '/command', b'{\"command\": \"id\"}')",
                "the same with a guess": "ask('POST', '/command', b'{\"command\": \"id\"}', '0' * 64)",
                "through itself": "ask('POST', '/proxy/44772/command', b'{\"command\": \"id\"}')",
                "a file": "ask('GET', '/files/download?path=/opt/cloche/bundle')",
                "an upload": "ask('POST', '/files/upload')",
                "an interrupt": "ask('DELETE', '/command?id=x')",
            },
            setup=ON_EXECD,
            network="open",
        )


async def test_50_runs(opensandbox: Target, service: Service) -> None:
    """50 runs, 5 at a time, leave no sandbox, and nothing in the client: memory and descriptors stay flat."""
    with opensandbox.nothing_left(within_s=15):
        await leave_nothing(opensandbox, runs=50, warm_up=10, at_once=5, kept_fds=20)
    assert service.boxes() == []


def test_killed_in_the_middle_of_5_runs(opensandbox: Target, service: Service) -> None:
    """A client killed by SIGKILL in the middle of 5 runs leaves them to the next one, whose sweep leaves nothing of them."""
    with opensandbox.nothing_left(within_s=20):
        kill_in_the_middle(opensandbox, 5)
        assert len(service.boxes()) == 5, "nothing was left to sweep: the test shows nothing"
        anyio.run(open_and_close, opensandbox)
        assert service.boxes() == []


async def test_sweep_spares_the_living(opensandbox: Target) -> None:
    """While one client's run goes on, another one's sweep removes nothing of it."""
    assert await sweep_beside_a_run(opensandbox, lasts_s=3, after_s=1.0) == "done\n"


async def test_a_lifetime_of_its_own(opensandbox: Target, service: Service) -> None:
    """A sandbox that nobody removes any more, its client being dead, is removed by the service itself."""
    made = httpx2.post(
        f"{service.url}/v1/sandboxes",
        headers={"OPEN-SANDBOX-API-KEY": service.key},
        json=_create_body(opensandbox, lifetime_s=1.0),
        timeout=60,
        trust_env=False,
    )
    assert made.status_code == 202, made.text
    name = made.json()["id"]
    end = time.monotonic() + 75
    while service.ask("GET", f"/sandboxes/{name}") is not None:
        assert time.monotonic() < end, "it is still there"
        await anyio.sleep(1)


def _create_body(target: Target, lifetime_s: float) -> dict[str, Any]:
    from cloche.backends.contract import Profile
    from cloche.backends.opensandbox import manifest
    from cloche.spec import Limits

    profile = Profile("r0", "o0", time.time() + lifetime_s, Limits(timeout_s=1.0))
    made = manifest.Made("t0", "secret", time.time() + 3600, lifetime_s)
    return manifest.sandbox(profile, target.environ["CLOCHE_IMAGE"], "elsewhere", made)


async def test_fallback(opensandbox: Target) -> None:
    """Where the service is not there when the sandbox opens, ``local`` takes its place, and the result says so."""
    gone = replace(opensandbox, environ={**opensandbox.environ, "CLOCHE_OPENSANDBOX_API_URL": "http://127.0.0.1:9"})
    try:
        async with gone.sandbox(CLOCHE_FALLBACK="true") as sandbox:
            result = await sandbox.run(shell("exit 3"))
    except cloche.ClocheError as error:
        if "bwrap" in str(error) or "bubblewrap" in str(error):
            pytest.skip(f"local does not work here: {error}")
        raise
    assert (result.exit_code, result.mode, result.fallback_from) == (3, "local", "opensandbox")


async def test_posture(opensandbox: Target) -> None:
    """The posture says which service it is, and what it does not give."""
    async with opensandbox.sandbox() as sandbox:
        posture = await sandbox.posture()
    assert posture.engine.startswith("OpenSandbox")
    assert posture.isolation is cloche.Isolation.CONTAINER
    states = {guarantee.name: guarantee.state for guarantee in posture.guarantees}
    assert states["disk-limit"] is State.NOT_IN_FORCE
    assert states["identity"] is State.IN_FORCE
