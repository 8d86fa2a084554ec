"""One run at a service, from our own queue to its end there. Driven by a task of the sandbox; its caller listens.

The service has the clock of the script, and a backstop of its own; the one here is for a service that is lost in a way that looks
like life. Whenever the service has not said itself how the run ended, it is told to kill it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

import anyio
import anyio.to_thread

from cloche._kit import sse
from cloche._kit.fields import parse_json
from cloche._kit.http import Pieces, Stream
from cloche._kit.sse import Message
from cloche.errors import ClocheError, EngineLost, IsolationUnavailable, ProtocolError, StartTimeout
from cloche.events import Finished, Outcome, Started
from cloche.runtime.admission import Admission
from cloche.runtime.course import Course
from cloche.runtime.delivery import Bounds, deliver
from cloche.runtime.remote import answer, request
from cloche.runtime.remote.client import RemoteClient
from cloche.runtime.remote.intake import Bounds as Kept
from cloche.runtime.remote.intake import Intake
from cloche.settings import Mode, Settings, resolve
from cloche.spec import MAX_TIMEOUT_S, Spec
from cloche.wire import event_from_dict

MARGIN_S = 60.0
"""A service that cannot reach its engine any more looks for its last word for so long at most, once a script's time is over."""
STOP_S = 20.0
"""In which a run that was asked to end has to end; engines take up to some seconds to pass that on."""
DRAIN_S = 1.0
"""For the end of the stream behind the last event, so that its connection can be used again, and for the caller to hear the
result: so long the run still counts as one."""
MIN_MESSAGE_BYTES = 32 * 2**20
"""Of an event, at the least, is read: an artifact is one event, and the service's bound is its own."""
_EVENTS = frozenset({"started", "output", "artifact", "finished"})

_log = logging.getLogger("cloche.remote")


class RemoteRun(Course):
    """One run."""

    def __init__(self, client: RemoteClient, settings: Settings, spec: Spec, run_id: str, admission: Admission) -> None:
        super().__init__(run_id)
        self._client = client
        self._settings = settings
        self._spec = spec
        self._admission = admission
        self._floor = request.floor(spec, settings)
        self._intake = Intake(run_id, Kept(settings.max_output_bytes, settings.max_artifact_bytes))
        self._life = anyio.CancelScope()
        self._talk: anyio.CancelScope | None = None
        self._accepted = False
        """Whether the service has begun with it."""
        self._told = False
        """Whether the service itself has said how it ended, or that it will not begin."""
        self._cancelled = False
        self._started_at: float | None = None

    async def drive(self) -> None:
        """The whole run. Raises nothing of its own: what goes wrong is handed to the listener."""
        try:
            with self._life:
                async with self._admission.place():
                    self._lap("queued")
                    await self._with_place()
        except Exception as exc:  # noqa: BLE001 (it is the listener's, whatever it is, and must not end other runs)
            self._settle(exc)
        finally:
            if not self.settled:
                self._settle(self._cut(Outcome.CANCELLED))
            self.gone.set()

    async def stop(self) -> None:
        """End the run as cancelled: by the service where it has begun with it, else by leaving."""
        self._cancelled = True
        if self._talk is None or not self._accepted:
            self.kill()
        elif not self._told:
            self._talk.deadline = min(self._talk.deadline, anyio.current_time() + STOP_S)
            try:
                await self._client.end(self.run_id, kill=False)
            except ClocheError as exc:
                _log.warning("run %s could not be asked to stop, and is killed: %s", self.run_id, exc.message)
                self.kill()

    def kill(self) -> None:
        """End the run as cancelled, at once."""
        self._cancelled = True
        if not self._told:
            (self._talk or self._life).cancel()

    async def _with_place(self) -> None:
        body = await self._prepare()
        self._lap("prepare")
        settings = self._settings
        ending: Finished | Exception | None = None
        try:
            deadline = anyio.current_time() + settings.queue_timeout + settings.start_timeout
            with anyio.CancelScope(deadline=deadline) as self._talk:
                ending = await self._converse(body)
            if ending is None:
                ending = self._cut(Outcome.CANCELLED) if self._cancelled else self._too_late()
            elif self._cancelled and not self._told:
                ending = self._cut(Outcome.CANCELLED)
            self._settle(ending)
        finally:
            if not self._told:
                await self._have_it_killed()

    async def _prepare(self) -> dict[str, object] | Pieces:
        """Read and check what the spec names, as for any engine, and put it into a request."""
        if self._spec.workspace is None:
            # One small file: reading it takes less than handing it to a thread.
            return self._read()
        return await anyio.to_thread.run_sync(self._read, abandon_on_cancel=True)

    def _read(self) -> dict[str, object] | Pieces:
        settings = self._settings
        bounds = Bounds(settings.max_script_bytes, settings.workspace_bytes(Mode.REMOTE))
        delivery = deliver(self._spec, resolve(self._spec, settings), bounds)
        return request.body(self._spec, settings, delivery.bundle, secrets.token_hex(16))

    async def _converse(self, body: dict[str, object] | Pieces) -> Finished | Exception | None:
        """How it ended, by the service's word or for want of it."""
        try:
            async with self._client.run(self.run_id, body) as stream:
                self._accepted = True
                async with aclosing(self._messages(stream)) as messages:
                    async for message in messages:
                        ending = self._heed(message)
                        if isinstance(ending, Finished):
                            self._settle(ending)
                            with anyio.move_on_after(DRAIN_S):
                                async for _ in messages:
                                    pass
                                await self.heard.wait()
                        if ending is not None:
                            return ending
        except ClocheError as exc:
            # An answer that is no stream is a refusal, and nothing was begun; a connection that broke says nothing.
            self._told = self._told or not (self._accepted or isinstance(exc, EngineLost))
            return exc
        return EngineLost(
            f"The service at {self._client.place.base} ended the run's stream before the run ended.",
            hint="Look at the service's own log; the script may have run in part.",
            retryable=True,
        )

    async def _messages(self, stream: Stream) -> AsyncGenerator[Message, None]:
        # base64 makes four bytes of three; the rest is for the fields beside it.
        decoder = sse.Decoder(max(MIN_MESSAGE_BYTES, self._settings.max_artifact_bytes * 3 // 2))
        async with aclosing(stream.chunks()) as chunks:
            async for chunk in chunks:
                try:
                    messages = decoder.feed(chunk)
                except sse.MessageTooLarge as exc:
                    raise ProtocolError(
                        f"The service sent {exc}.",
                        hint="Raise CLOCHE_MAX_ARTIFACT_BYTES here to what it is there.",
                    ) from None
                for message in messages:
                    yield message

    def _heed(self, message: Message) -> Finished | Exception | None:
        """What one message means: the end, if it is one; else what it tells is handed out.

        Raises:
            ProtocolError: no service says this.
        """
        found = _parsed(message)
        if message.event == "error":
            self._told = True
            return answer.problem(found) or EngineLost("The service failed, and does not say how.")
        try:
            event = event_from_dict(found)
        except OverflowError:
            raise ProtocolError("The service sent an event with a number that is none.") from None
        if isinstance(event, Started):
            self._script_started()
            if event.isolation < self._floor:
                raise IsolationUnavailable(
                    f"The service ran the script with the isolation {event.isolation}, and {self._floor} is required."
                )
        for out in self._intake.add(event):
            if isinstance(out, Finished):
                self._told = True
                self._take_timings(out)
                return out
            self._emit(out)
        return None

    def _script_started(self) -> None:
        self._started_at = anyio.current_time()
        self._lap("start")
        limits = resolve(self._spec, self._settings)
        # Where nobody here says how long it may run, the service does.
        timeout_s = request.given(self._spec, self._settings, "timeout") or MAX_TIMEOUT_S
        if self._talk is not None and not self._cancelled:
            self._talk.deadline = self._started_at + timeout_s + limits.grace_s + MARGIN_S

    def _take_timings(self, event: Finished) -> None:
        """The service's times, and ours where both of us have one: we wait in our queue and then in its."""
        ours, theirs = self._timings, event.timings_ms
        waited = sum(theirs.get(phase) or 0.0 for phase in ("queued", "prepare"))
        for phase in ("queued", "prepare"):
            ours[phase] = round((ours.get(phase) or 0.0) + (theirs.get(phase) or 0.0), 3)
        if ours.get("start") is not None:
            ours["start"] = max(0.0, round((ours["start"] or 0.0) - waited, 3))
        for phase in ("run", "collect", "cleanup"):
            ours[phase] = theirs.get(phase)

    def _too_late(self) -> Exception:
        if self._started_at is None:
            return StartTimeout(
                f"The service at {self._client.place.base} did not start the script in time.",
                hint="Look at the service's load, or raise CLOCHE_QUEUE_TIMEOUT or CLOCHE_START_TIMEOUT.",
            )
        return EngineLost(
            f"The service at {self._client.place.base} did not say in time how the script ended.", retryable=True
        )

    def _cut(self, outcome: Outcome) -> Finished:
        started = self._started_at
        run_ms = 0.0 if started is None else round((anyio.current_time() - started) * 1000, 3)
        if started is not None:
            self._timings["run"] = run_ms
        *before, last = self._intake.cut_short(outcome, run_ms)
        for event in before:
            self._emit(event)
        assert isinstance(last, Finished)
        return last

    async def _have_it_killed(self) -> None:
        """The connection is gone, and a service that notices cancels the run; one that does not is told."""
        with anyio.CancelScope(shield=True):
            try:
                await self._client.end(self.run_id, kill=True)
            except ClocheError as exc:
                _log.info("run %s may go on at the service for a while: %s", self.run_id, exc.message)


def _parsed(message: Message) -> object:
    """Raises: ProtocolError."""
    if message.event not in _EVENTS | {"error"}:
        raise ProtocolError(f"The service sent an event {message.event[:80]!r}, which there is not.")
    try:
        return parse_json(message.data)
    except ValueError:
        raise ProtocolError(f"The service sent an event that is no JSON: {message.data[:80]!r}.") from None
