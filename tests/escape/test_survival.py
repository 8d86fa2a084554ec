"""Living on after the end of the run: whatever a script does to stay, nothing of it is on the host a moment later."""

from __future__ import annotations

import pytest
from anyio import to_thread
from tests.escape.attack import PREAMBLE

import cloche
from cloche.testing.conformance import Target, observe

WAYS = {
    "setsid": "os.setsid() if os.fork() == 0 else os._exit(0)",
    "double fork": "daemon()",
    "deaf": "daemon(); signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "not dumpable": "daemon(); LIBC.prctl(4, 0, 0, 0, 0)",
    "subreaper": "LIBC.prctl(36, 1, 0, 0, 0); daemon()",
    "sibling of the script": "call('clone', 0x8000 | 17, 0, 0, 0, 0) and os._exit(0)",
    "unnoticed clone": "call('clone', 0, 0, 0, 0, 0) and os._exit(0)",
    "death signal": "LIBC.prctl(1, 0, 0, 0, 0); daemon()",
    "exec of a shell": "daemon(); os.execv('/bin/sh', ['sh', '-c', DEAF_SHELL, *sys.argv[1:]])",
    "nohup": "os.execvp('nohup', ['nohup', 'sh', '-c', 'sleep 60 & sleep 61 &', *sys.argv[1:]])",
    "relay": "relay()",
    "storm": "storm()",
    "traced by nobody": "daemon(); os.kill(os.getpid(), 19)",
    "busy": "daemon(); spin()",
}
SETUP = r"""
DEAF_SHELL = "trap '' HUP TERM; while :; do sleep 1; done"

def daemon():
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.closerange(0, 64)

def relay():
    # Never the same pid for long: each process ends as soon as the next one is there.
    while True:
        if os.fork():
            os._exit(0)

def storm():
    # Many relays at once, racing with whoever kills them.
    for _ in range(5):
        os.fork()
    relay()

def spin():
    while True:
        pass
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ending", ["exits", "times out"])
async def test_nothing_survives(sandbox: cloche.Sandbox, target: Target, way: str, ending: str) -> None:
    """No process of a run is left on the host when its script has ended, or was ended.

    Guard: the supervisor kills the whole tree as PID 1 of a process namespace, which dies with it.
    """
    if not target.on_this_host:
        pytest.skip("the processes of its boxes cannot be seen from here")
    word = observe.marker()
    # The main process stays for a moment, so that what it started is there when the end comes.
    source = "\n".join(
        [
            PREAMBLE,
            SETUP,
            "if os.fork() == 0:",
            f"    {WAYS[way]}",
            "    time.sleep(60)",
            "    os._exit(0)",
            f"time.sleep({0.15 if ending == 'exits' else 60})",
            "os._exit(0)",
        ]
    )
    result = await sandbox.run(
        cloche.Spec(name="attack.py", content=source, args=[word], timeout=20 if ending == "exits" else 0.4)
    )
    assert result.outcome is (cloche.Outcome.EXITED if ending == "exits" else cloche.Outcome.TIMED_OUT), result
    assert await to_thread.run_sync(observe.gone, word), await to_thread.run_sync(observe.processes_with, word)


async def test_the_ways_are_seen(sandbox: cloche.Sandbox, target: Target) -> None:
    """While such a script runs, the host does see its processes by their mark: the test above looks at the right thing."""
    if not target.on_this_host:
        pytest.skip("the processes of its boxes cannot be seen from here")
    word = observe.marker()
    body = (
        "if os.fork() == 0:\n    daemon()\n    time.sleep(60)\ntime.sleep(0.2)\nprint('up', flush=True)\ntime.sleep(1)"
    )
    source = f"{PREAMBLE}\n{SETUP}\n{body}\n"
    seen: list[int] = []
    async for event in sandbox.stream(cloche.Spec(name="attack.py", content=source, args=[word])):
        if isinstance(event, cloche.Output):
            seen = await to_thread.run_sync(observe.processes_with, word)
    assert len(seen) == 2
    assert await to_thread.run_sync(observe.gone, word)
