"""Whoever goes away — the task, the person, the client's whole process — nothing stays behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

import cloche
from cloche.testing.conformance import observe
from cloche.testing.conformance.target import Suite, Target, assert_exited, python, shell
from cloche.testing.conformance.terminal import command, on_terminal

SLOW = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]], start_new_session=True)
print("running", flush=True)
time.sleep(60)
"""


CLIENT = """
import anyio, cloche, os, signal, sys
async def main():
    async with cloche.Sandbox.from_env() as sandbox:
        spec = cloche.Spec(name="main.sh", content="sleep 20")
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(sandbox.run, spec)
            await anyio.sleep(float(sys.argv[1]) / 1000)
            os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""


async def _open_and_run(target: Target) -> None:
    async with target.sandbox() as sandbox:
        assert_exited(await sandbox.run(python("pass")))


class Departures(Suite):
    """Cancellation, Ctrl-C and sudden death."""

    async def test_cancelled_task(self, sandbox: cloche.Sandbox, target: Target) -> None:
        """Cancelling the task that waits for a run kills the box with all that is in it; the sandbox can go on."""
        word = observe.marker()
        running = anyio.Event()

        async def run() -> None:
            async for event in sandbox.stream(cloche.Spec(name="main.py", content=SLOW, args=[word])):
                if isinstance(event, cloche.Output):
                    running.set()

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                await running.wait()
                if target.on_this_host:
                    assert len(await to_thread.run_sync(observe.processes_with, word)) >= 2
                tasks.cancel_scope.cancel()
        if target.on_this_host:
            assert await to_thread.run_sync(observe.gone, word)
        assert_exited(await sandbox.run(shell("true")))

    async def test_cancelled_anywhere(self, sandbox: cloche.Sandbox, target: Target) -> None:
        """A task cancelled at any moment of a run, before the script, in it or after it, leaves nothing."""
        word = observe.marker()

        async def one(after_ms: float) -> None:
            with anyio.move_on_after(after_ms / 1000):
                await sandbox.run(shell("sleep 0.03", args=[word]))

        with target.nothing_left():
            for after_ms in range(0, 100, 4):
                await one(after_ms)
            async with anyio.create_task_group() as tasks:
                for half_ms in range(50):
                    tasks.start_soon(one, half_ms / 2)
        if target.on_this_host:
            assert await to_thread.run_sync(observe.gone, word)
        assert_exited(await sandbox.run(shell("true")))

    async def test_cancelled_while_opening(self, target: Target) -> None:
        """A task cancelled while its sandbox opens leaves nothing of it."""
        with target.nothing_left():
            for after_ms in (0, 1, 2, 3, 5, 7, 10, 14, 20, 30, 45, 60, 200):
                with anyio.move_on_after(after_ms / 1000):
                    async with target.sandbox() as sandbox:
                        await sandbox.run(shell("sleep 10"))

    async def test_cancel_by_run_id(self, sandbox: cloche.Sandbox) -> None:
        """cancel() ends a run as ``cancelled``, with what it wrote and left before."""
        results: list[cloche.Finished] = []
        said = b""
        started = ""

        async for event in sandbox.stream(shell("echo partial > /output/partial; echo running; sleep 60", timeout=30)):
            match event:
                case cloche.Started(run_id=run_id):
                    started = run_id
                case cloche.Output(data=data):
                    said += data
                    await sandbox.cancel(started)
                case cloche.Artifact(path=path):
                    assert path == "partial"
                case cloche.Finished():
                    results.append(event)
        assert [(end.outcome, end.exit_code, end.signal) for end in results] == [(cloche.Outcome.CANCELLED, None, None)]
        assert said == b"running\n"

    async def test_reader_walks_away(self, sandbox: cloche.Sandbox, target: Target) -> None:
        """Leaving the loop over a stream's events kills the box."""
        word = observe.marker()
        stream = sandbox.stream(cloche.Spec(name="main.py", content=SLOW, args=[word]))
        async for event in stream:
            if isinstance(event, cloche.Output):
                break
        await stream.aclose()
        if target.on_this_host:
            assert await to_thread.run_sync(observe.gone, word)

    async def test_closing_the_sandbox(self, target: Target) -> None:
        """close() ends what still runs, may be called twice, and afterwards nothing starts."""
        word = observe.marker()
        ended: list[str] = []
        async with target.sandbox() as sandbox:

            async def run() -> None:
                try:
                    result = await sandbox.run(cloche.Spec(name="main.py", content=SLOW, args=[word]))
                    ended.append(str(result.outcome))
                except cloche.ClocheError as error:
                    ended.append(error.code)

            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(run)
                    await anyio.sleep(0.5)
                    await sandbox.close()
                    await sandbox.close()
        assert len(ended) == 1
        assert ended[0] != "exited"
        with pytest.raises((cloche.ClocheError, RuntimeError)):
            await sandbox.run(shell("true"))
        if target.on_this_host:
            assert await to_thread.run_sync(observe.gone, word)

    def test_ctrl_c(self, target: Target, tmp_path: Path) -> None:
        """Ctrl-C at the terminal ends the command with 130 and the box with all that is in it."""
        word = observe.marker()
        script = tmp_path / "slow.py"
        script.write_text(SLOW)
        argv = command("run", str(script), "--", word)
        with target.nothing_left(), on_terminal(argv, target.command_environment()) as terminal:
            terminal.read(b"running", within_s=30)
            begin = time.monotonic()
            terminal.press(b"\x03")
            shown = terminal.read(None, within_s=10)
            assert terminal.process.wait(10) == 130
            assert time.monotonic() - begin < 5
        assert b"Traceback" not in shown
        if target.on_this_host:
            assert observe.gone(word)

    def test_ctrl_c_with_json(self, target: Target, tmp_path: Path) -> None:
        """An interrupted command with --json still prints one result, ``cancelled``, with what the script wrote."""
        script = tmp_path / "slow.py"
        script.write_text(SLOW)
        word = observe.marker()
        argv = command("run", "--json", str(script), "--", word)
        environ, pipe = target.command_environment(), subprocess.PIPE
        with target.nothing_left(), subprocess.Popen(argv, env=environ, stdout=pipe, stderr=pipe) as process:
            assert observe.wait_until(lambda: len(observe.processes_with(word)) >= 3 or not target.on_this_host, 20)
            if not target.on_this_host:
                time.sleep(10)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        assert process.returncode == 130, err
        result = json.loads(out)
        assert (result["outcome"], result["exit_code"], result["error"]) == ("cancelled", None, None)
        assert result["stdout"] == "running\n"
        if target.on_this_host:
            assert observe.gone(word)

    @pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
    def test_terminated_client(self, target: Target, tmp_path: Path, sent: signal.Signals) -> None:
        """A client that is asked to end (SIGTERM, SIGHUP) takes its box with it."""
        with target.nothing_left():
            word = self._client_gets(sent, target, tmp_path)
        assert observe.gone(word), observe.processes_with(word)

    def test_clients_killed_at_any_moment(self, target: Target) -> None:
        """Clients that die by SIGKILL at any moment of a run leave no process; what else they leave, the next open sweeps."""
        if not target.dies_with_client:
            pytest.skip("its engine keeps a box until its expiry")

        with target.nothing_left():
            clients = [
                subprocess.Popen([sys.executable, "-c", CLIENT, str(after_ms)], env=target.command_environment())
                for after_ms in (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30)
            ]
            assert [client.wait(60) for client in clients] == [-signal.SIGKILL] * len(clients)
            target.settle()
            anyio.run(_open_and_run, target)

    def test_killed_client(self, target: Target, tmp_path: Path) -> None:
        """When the client dies by SIGKILL, every process of its box is gone within 2 s; the next open sweeps the rest."""
        if not target.dies_with_client:
            pytest.skip("its engine keeps a box until its expiry")
        with target.nothing_left():
            word = self._client_gets(signal.SIGKILL, target, tmp_path)
            assert observe.gone(word, within_s=2), observe.processes_with(word)
            anyio.run(_open_and_run, target)

    @staticmethod
    def _client_gets(sent: signal.Signals, target: Target, tmp_path: Path) -> str:
        if not target.on_this_host:
            pytest.skip("the processes of its boxes cannot be seen from here")
        word = observe.marker()
        script = tmp_path / "slow.py"
        script.write_text(SLOW)
        argv = command("run", str(script), "--", word)
        with subprocess.Popen(argv, env=target.command_environment(), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"running\n"
            assert len(observe.processes_with(word)) >= 3
            process.send_signal(sent)
            process.wait(10)
        return word
