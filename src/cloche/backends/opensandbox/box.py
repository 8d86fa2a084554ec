"""One sandbox, from the moment that the service has made it to the supervisor's last frame.

The result is there with the last frame. What the stream of the command does after it, and before its end, nobody waits for:
execd up to 1.1.0 keeps it open for a second.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import anyio
from anyio import to_thread

from cloche._kit.fields import shortened
from cloche._kit.http import ConnectFailure, ConnectionLost, HttpFailure, NotAllowed, Stream, TimedOut, TlsFailure
from cloche._kit.places import Place
from cloche._kit.steps import step
from cloche.backends.contract import Fate, FateKind
from cloche.backends.opensandbox import diagnose, facts, manifest
from cloche.backends.opensandbox.address import Endpoint
from cloche.backends.opensandbox.client import OpenSandboxClient, Refused
from cloche.backends.opensandbox.events import Begun, Decoder, Ended, Event, EventError, Printed
from cloche.backends.opensandbox.execd import Execd
from cloche.backends.opensandbox.facts import Sandbox
from cloche.errors import BackendUnavailable, ClocheError, IsolationUnavailable, PermissionDenied, ProtocolError
from cloche.supervisor.bundle import Bundle

READY_STEPS_S = (*[0.005] * 6, *[0.01] * 10, 0.02, 0.03, 0.05, 0.1, 0.2)
"""Between two looks whether execd is there; the last one is repeated."""
LOOK_S = 0.3
"""A sandbox whose execd is not there after so long is looked at, and again after as long: it may be dead."""
INTERRUPT_S = 2.0
"""For a request to end the command to be on its way; its answer comes when the command has ended."""
SETTLE_S, SETTLE_STEP_S = 1.0, 0.1
"""For the service to see that a sandbox has ended whose connection broke, and between two looks."""
WORDS_S = 5.0
"""For what is only asked to explain an error."""
MAX_WORDS = 2000
MAX_UID_DIGITS = 10
KILLED = "code 137"
"""What the service says of a sandbox whose main process was killed by SIGKILL, as the kernel does for want of memory."""
_NO_PROGRAM = frozenset({None, 126, 127})
"""What a shell, or execd itself, says of a program that cannot be started."""

_log = logging.getLogger("cloche.opensandbox")


@dataclass(slots=True)
class Service:
    """What all boxes of a service share."""

    client: OpenSandboxClient
    program: Callable[[str], Awaitable[bytes]]
    """Gives the supervisor for an architecture."""
    proxied: bool
    """Whether execd is reached through the service."""
    argv: bool = True
    """Whether its execd takes a list of arguments; one run finds out that it does not. Up to 1.1.0 it takes a shell's text."""


class OpenSandboxBox:
    """A sandbox. ``command`` is the supervisor's; ``reach`` makes a client of its execd at a place."""

    def __init__(
        self,
        service: Service,
        name: str,
        command: Sequence[str],
        reach: Callable[[Place, Mapping[str, str]], Awaitable[Execd]],
    ) -> None:
        self._service = service
        self._client = service.client
        self._name = name
        self._argv = command
        self._reach = reach
        self._execd: Execd | None = None
        self._fed = anyio.Event()
        self._dead = False
        """Whether it was so before it had taken the whole bundle."""
        self._stopped = anyio.Event()
        self._command = ""
        self._ended: Ended | None = None
        self._words = ""
        """What the command wrote to stderr: the supervisor itself writes nothing there."""
        self._begun = False
        """Whether the supervisor has written anything."""
        self._trouble = ""
        """What went wrong last."""
        self._broken = False
        """Whether that was the end of a connection, and not silence."""

    async def aclose(self) -> None:
        """Close the connections to the sandbox."""
        if self._execd is not None:
            await self._execd.aclose()

    async def feed(self, bundle: Bundle) -> None:
        """Upload the supervisor and the bundle, once execd is there.

        Raises:
            ClocheError: the sandbox does not come up, or cannot be reached, or does not take them.
        """
        try:
            execd = self._execd = await self._connect()
            program = await self._service.program(await self._inspect(execd))
            records = await to_thread.run_sync(b"".join, bundle.records())
            await execd.upload(
                manifest.upload([(manifest.SUPERVISOR, 0o700, program), (manifest.BUNDLE, 0o600, records)])
            )
        except Refused as exc:
            raise await self._not_taken(exc) from exc
        except HttpFailure as exc:
            self._trouble = str(exc)
            sandbox = await self._look()
            if sandbox is not None and not sandbox.dead:
                raise BackendUnavailable(
                    f"The sandbox {self._name} was lost while it was being fed: {exc}.",
                    hint="Run again; look at the service's log if it lasts.",
                    retryable=True,
                ) from exc
            self._dead = True
        self._fed.set()

    async def _connect(self) -> Execd:
        """Wait for execd.

        Raises:
            ClocheError: it will not come.
        """
        endpoint: Endpoint | None = None
        looked_at, looks = anyio.current_time(), 0
        while True:
            try:
                if endpoint is None:
                    endpoint = await self._client.endpoint(self._name, proxied=self._service.proxied)
                if (execd := await self._try(endpoint)) is not None:
                    self._trouble = ""
                    return execd
            except ValueError as exc:
                raise ProtocolError(
                    f"The service says something that is no address of the sandbox {self._name}: {exc}.",
                    hint=f"Look at the service's eip and host_ip ({diagnose.DOCS}).",
                ) from exc
            except (Refused, HttpFailure) as exc:
                self._trouble = str(exc)
                if isinstance(exc, Refused) and exc.status in {401, 403}:
                    raise diagnose.refusal(exc, "tell where the sandbox is") from exc
            await anyio.sleep(step(READY_STEPS_S, looks))
            looks += 1
            if anyio.current_time() - looked_at >= LOOK_S:
                looked_at = anyio.current_time()
                await self._check_alive()

    async def _try(self, endpoint: Endpoint) -> Execd | None:
        """Whether execd answers at one of the places. None: not yet.

        Raises:
            ClocheError: it never will.
        """
        refusals: list[Refused] = []
        for place in endpoint.places:
            try:
                return await self._answering(place, endpoint.headers)
            except NotAllowed as exc:
                raise diagnose.not_allowed(exc) from exc
            except TlsFailure as exc:
                raise diagnose.not_spoken_to(exc, self._name, place) from exc
            except (HttpFailure, Refused) as exc:
                self._trouble = f"{place.base} does not answer: {exc}"
                if isinstance(exc, Refused) and exc.status in {401, 403}:
                    refusals.append(exc)
        if len(refusals) == len(endpoint.places):
            raise self._refused(refusals[-1])
        return None

    async def _answering(self, place: Place, headers: Mapping[str, str]) -> Execd:
        """execd at a place, once it has answered.

        Raises:
            Refused, HttpFailure: it does not; nothing is left open.
        """
        execd = await self._reach(place, headers)
        try:
            await execd.ping()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await execd.aclose()
            raise
        return execd

    def _refused(self, exc: Refused) -> ClocheError:
        """Whoever answers for the sandbox does not take what we show. Only the service's own errors have a code then."""
        return diagnose.refusal(exc, "let us into the sandbox") if exc.code else _another_ones(self._name, str(exc))

    async def _inspect(self, execd: Execd) -> str:
        """The architecture of the sandbox, once it has shown that it is the one that was made for this run.

        Raises:
            HttpFailure.
            PermissionDenied: it takes commands from whoever comes.
        """
        ours = False
        problems: list[HttpFailure] = []

        async def knock() -> None:
            nonlocal ours
            try:
                ours = await execd.knows_its_own()
            except HttpFailure as exc:
                problems.append(exc)

        machine = ""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(knock)
            try:
                machine = await execd.machine()
            except HttpFailure as exc:
                problems.append(exc)
        if problems:
            raise problems[0]
        if not ours:
            raise _another_ones(self._name, "it takes requests without any")
        return machine

    async def _check_alive(self) -> None:
        """Raises: BackendUnavailable: the sandbox is dead, or gone."""
        sandbox = await self._look()
        if sandbox is None:
            raise BackendUnavailable(f"The sandbox {self._name} was removed before it was ready.", retryable=True)
        if sandbox.dead:
            raise BackendUnavailable(
                f"The sandbox {self._name} ended before it was ready: {_said(sandbox)}.",
                hint="Its image needs /bin/sh, and tail, mkdir, touch, dirname, printf, tr and id on its PATH.",
            )

    async def _look(self) -> Sandbox | None:
        """The sandbox; of one that cannot be asked for we know only its name. None: it is gone."""
        try:
            return await self._client.sandbox(self._name)
        except (Refused, HttpFailure) as exc:
            _log.debug("the service does not tell of %s: %s", self._name, exc)
            return Sandbox(self._name)

    async def _not_taken(self, exc: Refused) -> ClocheError:
        """Why execd takes no files."""
        if exc.status in {401, 403}:
            return self._refused(exc)
        uid = ""
        try:
            if self._execd is not None:
                with anyio.move_on_after(WORDS_S):
                    uid = await self._execd.says("id -u")
        except (Refused, HttpFailure) as problem:
            _log.debug("who execd runs as is not known: %s", problem)
        if uid.isdecimal() and uid != "0" and len(uid) <= MAX_UID_DIGITS:
            return _no_root(uid)
        return BackendUnavailable(
            f"The sandbox {self._name} does not take the supervisor: {exc}.",
            hint="Look at the room on the service's disks.",
        )

    async def output(self) -> AsyncGenerator[bytes, None]:
        """What the supervisor writes, once it has been fed, up to the end of the command.

        Raises:
            ClocheError: the command is not started, or what comes is no stream of events.
        """
        await self._fed.wait()
        if self._execd is None or self._dead or self._stopped.is_set():
            return
        # execd up to 1.1.0 answers a list of arguments with 400: it misses the text for a shell.
        try:
            for shell in (False, True) if self._service.argv else (True,):
                try:
                    async with self._execd.command(manifest.command(self._argv, shell=shell)) as stream:
                        self._service.argv = not shell
                        async with aclosing(self._frames(stream)) as frames:
                            async for chunk in frames:
                                yield chunk
                except Refused as exc:
                    if shell or exc.status != 400:
                        raise
                    if self._stopped.is_set():
                        return
                else:
                    return
        except Refused as exc:
            raise BackendUnavailable(f"The sandbox {self._name} does not start the supervisor: {exc}.") from exc
        except HttpFailure as exc:
            # The service may know what became of the sandbox.
            self._trouble, self._broken = str(exc), not isinstance(exc, TimedOut)
        except EventError as exc:
            raise ProtocolError(f"What comes from the sandbox {self._name} is no stream of events: {exc}.") from exc

    async def _frames(self, stream: Stream) -> AsyncGenerator[bytes, None]:
        """The lines that the supervisor wrote. Its frames are such lines, so that nothing depends on whether execd leaves their
        ends in the text.
        """
        events = Decoder()
        async with aclosing(stream.chunks()) as chunks:
            async for chunk in chunks:
                for event in events.feed(chunk):
                    if (line := await self._take(event)) is not None:
                        yield line
                if self._ended is not None:
                    return
        try:
            last = list(events.finish())
        except EventError:
            last = []  # a proxy may end an answer that was cut off as if it were whole
        for event in last:
            if (line := await self._take(event)) is not None:
                yield line
        if self._ended is None:
            self._trouble, self._broken = "the command's stream ended before the command", True

    async def _take(self, event: Event) -> bytes | None:
        match event:
            case Begun(command=command):
                self._command = command if facts.is_id(command) else ""
                if self._stopped.is_set():
                    await self._interrupt()
            case Printed(stream="stdout", text=text):
                self._begun = True
                line = text.encode("utf-8", "replace")
                return line if line.endswith(b"\n") else line + b"\n"
            case Printed(text=text):
                self._words = (self._words + text)[:MAX_WORDS]
            case Ended():
                self._ended = event
        return None

    async def stop(self) -> None:
        """Have the supervisor sent SIGTERM; one that has not been started yet never is."""
        self._stopped.set()
        if not self._fed.is_set():
            self._fed.set()
        else:
            await self._interrupt()

    async def _interrupt(self) -> None:
        if self._execd is None or not self._command:
            return
        with anyio.move_on_after(INTERRUPT_S):
            try:
                await self._execd.interrupt(self._command)
            except (Refused, HttpFailure) as exc:
                _log.debug("the command of %s is not interrupted: %s", self._name, exc)

    async def fate(self, *, ended: bool) -> Fate:
        """The service's word. Where the connection broke it is given a moment to see that the sandbox has ended."""
        until = anyio.current_time() + (SETTLE_S if ended and self._trouble and self._ended is None else 0.0)
        while True:
            try:
                sandbox = await self._client.sandbox(self._name)
            except (Refused, HttpFailure) as exc:
                trouble = self._trouble or "the sandbox says nothing"
                return Fate(FateKind.LOST, f"{trouble}; the service cannot tell why: {exc}.")
            if sandbox is None:
                return Fate(FateKind.DELETED, f"The sandbox {self._name} is gone.")
            if sandbox.dead:
                if KILLED in sandbox.message and await self._out_of_memory():
                    return Fate(FateKind.OOM_KILLED, f"The sandbox {self._name} ran out of memory.")
                return Fate(FateKind.EXITED, f"The sandbox {self._name} has ended: {_said(sandbox)}.")
            if (known := await self._fate_of_the_living()) is not None:
                return known
            if anyio.current_time() >= until or sandbox.state == "Paused":
                state = f"The sandbox {self._name} is {sandbox.state or 'in no known state'}"
                return Fate(FateKind.LOST, f"{state}; {self._trouble}." if self._trouble else f"{state}.")
            await anyio.sleep(SETTLE_STEP_S)

    async def _fate_of_the_living(self) -> Fate | None:
        """What became of a command whose sandbox goes on; None: nothing shows it.

        That something was killed for want of memory the engine remembers for good. It explains what a script cannot have done
        otherwise: an end by SIGKILL of the script that the supervisor tells of, or of the supervisor, and the death of execd.
        """
        if self._ended is None:
            dead = self._broken and await self._execd_is_dead()
            if (dead or not self._trouble) and await self._out_of_memory():
                return Fate(FateKind.OOM_KILLED, f"Memory ran out in the sandbox {self._name}.")
            return None
        code = self._ended.exit_code
        if code in {0, -1} and await self._out_of_memory():
            return Fate(FateKind.OOM_KILLED, f"Memory ran out in the sandbox {self._name}.")
        words = shortened(self._words) or shortened(self._ended.message).strip(": ") or "it gives no reason"
        if code in _NO_PROGRAM and not self._begun:
            return Fate(FateKind.NOT_STARTED, f"The supervisor cannot be started in the sandbox: {words}.")
        if code is None:
            return Fate(FateKind.LOST, f"execd lost the command: {words}.")
        return Fate(FateKind.EXITED, f"The supervisor ended with {code}: {words}.")

    async def _execd_is_dead(self) -> bool:
        """At its bound not only the script is refused memory: execd, which is not ours to spare, may end then."""
        if self._execd is None:
            return False
        try:
            await self._execd.ping()
        except (ConnectFailure, ConnectionLost):  # who forwards a port may take connections that nobody answers
            return True
        except (Refused, HttpFailure):
            pass  # it is there
        return False

    async def _out_of_memory(self) -> bool:
        try:
            return await self._client.out_of_memory(self._name)
        except (Refused, HttpFailure) as exc:
            _log.debug("the service does not tell what happened in %s: %s", self._name, exc)
            return False


def _said(sandbox: Sandbox) -> str:
    return (sandbox.message or sandbox.reason or sandbox.state).rstrip(".")


def _another_ones(name: str, why: str) -> PermissionDenied:
    return PermissionDenied(
        f"What answers for the sandbox {name} does not know its token: {why}.",
        hint="It may be another sandbox: where the service runs in Docker's host mode, all share one port. Set its network_mode"
        f" to bridge ({diagnose.DOCS}).",
    )


def _no_root(uid: str) -> IsolationUnavailable:
    return IsolationUnavailable(
        f"The image starts as uid {uid}, so that the supervisor and execd would be within the script's reach.",
        hint="Use an image without a USER, or with USER root: the script gets a uid of its own all the same.",
    )
