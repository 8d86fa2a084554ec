"""Makes the boxes in which the prober looks, on the path of every run, and has the evidence judged.

One box is looked at from inside, and its bounds are reached; a second one is ended over its memory. Where it is the supervisor
that takes the sockets away, a third one leaves them to the prober, and shows whether the engine has a wall of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import anyio
from anyio import to_thread

from cloche.backends import shape
from cloche.backends.contract import Backend, Examination
from cloche.errors import BackendUnavailable, ClocheError, InterpreterMissing, ProtocolError
from cloche.events import Outcome
from cloche.isolation import Posture
from cloche.result import Result
from cloche.runtime.delivery import ENVIRONMENT, WORKSPACE
from cloche.runtime.life import House, Ready
from cloche.runtime.names import new_run_id
from cloche.runtime.prove import host
from cloche.runtime.prove.case import Case, MemoryRun
from cloche.runtime.prove.host import Listeners
from cloche.runtime.prove.judge import judge
from cloche.runtime.prove.observe import Seen, observe
from cloche.runtime.prove.rules.network import no_sockets
from cloche.spec import Limits
from cloche.supervisor.binary import machine_name, supervisor_path
from cloche.supervisor.bundle import Bundle, File

MIB = 2**20
PROGRAM = "cloche-prober"
ANOTHER = "another-box"
TIMEOUT_S = 30.0
OUTPUT_BYTES = 512 * 1024
MOST_MEMORY, MOST_PIDS, MOST_CPUS = 256 * MIB, 64, 0.25
"""Bounds are reached, so they are kept small: that a bound of this size holds shows that one holds."""
MEMORY_LIMIT, MEMORY_ASKED = 64 * MIB, 128 * MIB
"""For the box that is ended over it, and how much more than its limit a script asks for there."""
SIZE_MORE = 16 * MIB
CPU_MS, CPU_PROCESSES = 500, 2
USAGE_STATUS = 2
LISTEN_PORT, LISTEN_S = 38127, 60.0
"""For the box that listens for another one. The port is an arbitrary one."""

_log = logging.getLogger("cloche.prove")
_progress = logging.getLogger("cloche.progress")


class Start(Protocol):
    """Runs something of cloche's own under a run id, and waits until its box is gone. ``hear`` is told its stdout meanwhile."""

    async def __call__(self, ready: Ready, run_id: str, hear: Callable[[bytes], None] | None = None, /) -> Result:
        """Run it."""
        ...


class Prover:
    """Proves the isolation of one backend's boxes. ``start`` runs the probes as every script is run."""

    def __init__(self, house: House, backend: Backend, start: Start) -> None:
        self._settings = house.settings
        self._backend = backend
        self._start = start
        self._program = b""
        self._run_ids: list[str] = []

    async def prove(self) -> Posture:
        """The posture that the evidence supports.

        Raises:
            ClocheError: no box could be looked at from inside.
        """
        try:
            return await self._prove()
        finally:
            _progress.info("", extra={"done": True})

    async def _prove(self) -> Posture:
        # Not the sandbox's own posture: that may be a proof already, and what it found broken would be no promise any more.
        declared = await self._backend.probe()
        examination = await self._backend.examine()
        facts = await host.facts(here=examination.here, kernel=examination.kernel)
        async with host.listening(here=examination.here) as listeners:
            targets = {**listeners.addresses, **examination.addresses}
            _progress.info("a script looks from inside of a box")
            look, limits = await self._look(examination, targets)
            _progress.info("a script takes more memory than it may")
            memory = await self._exhaust()
            _progress.info("one box listens for another one")
            sockets = await self._with_sockets(targets) if no_sockets(look) else None
            answering = frozenset(targets) | ({ANOTHER} if sockets is not None and sockets[1] else frozenset())
            look = _without_strangers(look, listeners)
        _progress.info("what is left of these boxes is looked for")
        remains = await self._backend.remains(self._run_ids)
        return judge(
            Case(
                declared=declared,
                limits=limits,
                look=look,
                host=facts,
                memory=memory,
                sockets=None if sockets is None else sockets[0],
                answering=answering,
                remains=remains,
            )
        )

    async def _look(self, examination: Examination, targets: dict[str, str]) -> tuple[Seen, Limits]:
        settings = self._settings
        limits = Limits(
            timeout_s=TIMEOUT_S,
            memory_bytes=min(settings.memory, MOST_MEMORY),
            cpus=min(settings.cpus, MOST_CPUS),
            pids=min(settings.pids, MOST_PIDS),
            output_bytes=OUTPUT_BYTES,
        )
        size = shape.writable_bytes(limits) + SIZE_MORE
        options = [*_targets(targets), "--size", f"/tmp,{size}", "--cpu", f"{CPU_MS},{CPU_PROCESSES}"]
        options += ["--processes", str(2 * limits.pids)]
        result = await self._run_any(examination.machine, limits, options)
        return observe(result.stdout_raw), limits

    async def _run_any(self, machine: str | None, limits: Limits, options: list[str]) -> Result:
        """Run the prober for the boxes' architecture; where nobody tells which one that is, for this machine's, then the other.

        Raises:
            ClocheError: neither can be run.
        """
        first = machine_name(machine)
        others = [] if machine else [name for name in ("x86_64", "aarch64") if name != first]
        try:
            return await self._run_for(first, limits, options)
        except InterpreterMissing:
            # Exec format error: an engine on a machine of the other architecture.
            for other in others:
                try:
                    return await self._run_for(other, limits, options)
                except (InterpreterMissing, BackendUnavailable) as exc:
                    _log.info("no prober for %s could be run: %s", other, exc.message)
            raise

    async def _run_for(self, machine: str, limits: Limits, options: list[str]) -> Result:
        self._program = await to_thread.run_sync(supervisor_path(machine).read_bytes)
        return await self._run(limits, options)

    async def _exhaust(self) -> MemoryRun | None:
        limit = min(self._settings.memory, MEMORY_LIMIT)
        asked = limit + MEMORY_ASKED
        limits = Limits(timeout_s=TIMEOUT_S, memory_bytes=limit, output_bytes=OUTPUT_BYTES)
        result = await self._try(limits, ["--no-look", "--memory", str(asked)])
        if result is None or result.outcome == "failed":
            return None
        return MemoryRun(limit, asked, Outcome(result.outcome), result.signal, observe(result.stdout_raw))

    async def _with_sockets(self, targets: dict[str, str]) -> tuple[Seen, bool] | None:
        """What a box sees whose script may make sockets, and whether another one listened for it meanwhile.

        All boxes of an engine can reach each other unless something keeps them from it: in a cluster that is a rule
        (kubernetes.io, "The Kubernetes network model"). So the listener answers, or there is a wall.
        """
        limits = Limits(timeout_s=LISTEN_S, memory_bytes=MEMORY_LIMIT, output_bytes=OUTPUT_BYTES)
        result, heard = None, _Heard()
        async with anyio.create_task_group() as group:
            if self._settings.max_concurrent > 1:
                group.start_soon(self._listen, limits, heard)
                with anyio.move_on_after(self._settings.start_timeout):
                    await heard.told.wait()
            more = {ANOTHER: heard.address} if heard.address else {}
            result = await self._try(limits, _targets({**targets, **more}), sockets=True)
            group.cancel_scope.cancel()
        return None if result is None else (observe(result.stdout_raw), bool(heard.address))

    async def _listen(self, limits: Limits, heard: _Heard) -> None:
        options = ["--no-look", "--listen", f"{LISTEN_PORT},{round(LISTEN_S * 1000)}"]
        await self._try(limits, options, sockets=True, hear=heard.hear)
        heard.told.set()

    async def _try(
        self, limits: Limits, options: list[str], *, sockets: bool = False, hear: Callable[[bytes], None] | None = None
    ) -> Result | None:
        """A run after the first one; what it would have shown is unknown when it cannot happen."""
        try:
            return await self._run(limits, options, sockets=sockets, hear=hear)
        except ClocheError as exc:
            _log.warning("a probe could not be made: %s", exc.message)
            return None

    async def _run(
        self, limits: Limits, options: list[str], *, sockets: bool = False, hear: Callable[[bytes], None] | None = None
    ) -> Result:
        bundle = Bundle(
            argv=[f"{WORKSPACE}/{PROGRAM}", "probe", *options],
            env=ENVIRONMENT,
            limits=limits,
            entries=[File(PROGRAM, self._program, executable=True)],
        )
        run_id = new_run_id()
        self._run_ids.append(run_id)
        result = await self._start(Ready(bundle, limits, sockets), run_id, hear)
        if result.exit_code == USAGE_STATUS:
            raise ProtocolError(f"The prober does not know what it was asked: {result.stderr[:200]!r}.")
        return result


class _Heard:
    """What a listening prober has said so far: where it listens."""

    def __init__(self) -> None:
        self.told = anyio.Event()
        self.address = ""
        self._data = b""

    def hear(self, data: bytes) -> None:
        """Take what it prints; of one that says more than it should, nothing."""
        if len(self._data) > OUTPUT_BYTES:
            return
        self._data += data
        try:
            self.address = observe(self._data).listening
        except ProtocolError as exc:
            _log.warning("a listening prober said: %s", exc.message)
        if self.address:
            self.told.set()


def _targets(targets: dict[str, str]) -> list[str]:
    return [word for name, address in targets.items() for word in ("--tcp", f"{name}={address}")]


def _without_strangers(seen: Seen, listeners: Listeners) -> Seen:
    """Without answers from who is not the listener that is meant: an address can mean something else in the box."""
    meant = [
        c for c in seen.connections if c.errno != 0 or c.name not in listeners.addresses or c.said == listeners.nonce
    ]
    return replace(seen, connections=meant)
