"""The events of a service → those that are handed out. Pure. Whatever a service says, no more is kept than may be kept here, and
it tells of one run, in order.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import assert_never

from cloche._kit.signals import signal_number
from cloche.errors import ProtocolError
from cloche.events import Artifact, Event, Finished, Outcome, Output, Started, StreamName
from cloche.settings import Mode
from cloche.spec import check_inside

MAX_EVENTS = 250_000
"""Of one run. A supervisor gathers small writes into fewer frames than that."""
MAX_ARTIFACTS = 256
"""As a supervisor has it."""
MAX_GUARANTEES = 100
_NAME = re.compile(r"[a-z0-9-]{1,64}")
"""Of a mode or a guarantee. They are shown to people, so nothing else gets through."""
_NO_SERVICE = "Check that CLOCHE_REMOTE_URL is a cloche service, and that it is of this version."


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be kept, in bytes."""

    output: int
    """Of each of stdout and stderr, head and tail together."""
    artifacts: int
    """Of all together."""


class _Stream:
    """What comes of stdout or stderr: the head is handed out as it comes, of what follows the tail is kept until the end.

    The shares are those of the supervisor (``c/pump.c``), so that a service with the same bound has nothing cut here.
    """

    def __init__(self, name: StreamName, bound: int) -> None:
        self._name = name
        self._tail_bound = bound // 4
        self._head_left = bound - self._tail_bound
        self._tail: deque[Output] = deque()
        self._tail_bytes = 0
        self.came = 0
        self.end = 0
        self.cut = False

    def take(self, event: Output) -> Iterator[Output]:
        if event.offset < self.end:
            raise _wrong(f"bytes of {self._name} twice")
        self.came += len(event.data)
        self.end = event.offset + len(event.data)
        head, rest = event.data[: self._head_left], event.data[self._head_left :]
        self._head_left -= len(head)
        if head:
            yield replace(event, data=head)
        if rest:
            self._tail.append(Output(event.stream, event.offset + len(head), rest))
            self._tail_bytes += len(rest)
            self._cut()

    def _cut(self) -> None:
        while (over := self._tail_bytes - self._tail_bound) > 0:
            self.cut = True
            first = self._tail.popleft()
            dropped = min(over, len(first.data))
            self._tail_bytes -= dropped
            if dropped < len(first.data):
                self._tail.appendleft(Output(first.stream, first.offset + dropped, first.data[dropped:]))

    def rest(self) -> Iterator[Output]:
        """What was kept back."""
        self._tail_bound -= self._tail_bytes
        self._tail_bytes = 0
        yield from self._tail
        self._tail.clear()


class Intake:
    """Takes the events of one run, in order."""

    def __init__(self, run_id: str, bounds: Bounds) -> None:
        self._run_id = run_id
        self._artifact_bytes_left = bounds.artifacts
        self._streams: dict[StreamName, _Stream] = {name: _Stream(name, bounds.output) for name in ("stdout", "stderr")}
        self._events = 0
        self._artifacts = 0
        self._skipped = 0
        self._started = False

    def add(self, event: Event) -> Iterator[Event]:
        """The events that are handed out for this one; ``Finished`` is the last one.

        Raises:
            ProtocolError: no service says this.
        """
        self._events += 1
        if self._events > MAX_EVENTS:
            raise _wrong(f"more than {MAX_EVENTS} events")
        match event:
            case Started():
                yield self._start(event)
            case Output():
                self._check_started()
                if event.data:
                    yield from self._streams[event.stream].take(event)
            case Artifact():
                self._check_started()
                yield from self._rest()
                yield from self._artifact(event)
            case Finished():
                _check_ending(event)
                yield from self._rest()
                yield self._finish(event)
            case _:
                assert_never(event)

    def cut_short(self, outcome: Outcome, run_ms: float) -> Iterator[Event]:
        """The events that end a run whose last one will not come: what came so far is kept."""
        yield from self._rest()
        stdout, stderr = self._streams["stdout"], self._streams["stderr"]
        yield Finished(
            outcome,
            stdout_bytes=stdout.end,
            stderr_bytes=stderr.end,
            stdout_truncated=stdout.cut or stdout.came < stdout.end,
            stderr_truncated=stderr.cut or stderr.came < stderr.end,
            artifacts_skipped=self._skipped,
            run_ms=run_ms,
        )

    def _start(self, event: Started) -> Started:
        if self._started or event.run_id != self._run_id:
            raise _wrong("that a run started which is not this one, or a second time")
        self._started = True
        instead_of = event.fallback_from
        return replace(
            event,
            mode=str(Mode.REMOTE),
            fallback_from=instead_of if instead_of and _NAME.fullmatch(instead_of) else None,
            guarantees=tuple(filter(_NAME.fullmatch, event.guarantees[:MAX_GUARANTEES])),
        )

    def _check_started(self) -> None:
        if not self._started:
            raise _wrong("what a script did that has not started")

    def _rest(self) -> Iterator[Output]:
        for stream in self._streams.values():
            yield from stream.rest()

    def _artifact(self, event: Artifact) -> Iterator[Artifact]:
        try:
            check_inside(event.path, "an artifact's path")
        except ValueError:
            raise _wrong(f"that an artifact is called {event.path[:80]!r}") from None
        whole = len(event.data) == event.size
        if "\0" in event.path or len(event.data) > event.size or not (whole or event.truncated):
            raise _wrong("that an artifact has another size than it has")
        data = event.data[: self._artifact_bytes_left]
        self._artifacts += 1
        if self._artifacts > MAX_ARTIFACTS or (event.data and not data):
            self._skipped += 1
            return
        self._artifact_bytes_left -= len(data)
        yield replace(event, data=data, truncated=event.truncated or len(data) < len(event.data))

    def _finish(self, event: Finished) -> Finished:
        for total, truncated, stream in (
            (event.stdout_bytes, event.stdout_truncated, self._streams["stdout"]),
            (event.stderr_bytes, event.stderr_truncated, self._streams["stderr"]),
        ):
            if stream.end > total or (not truncated and stream.came != total):
                raise _wrong("another number of bytes than it sent")
        return replace(
            event,
            stdout_truncated=event.stdout_truncated or self._streams["stdout"].cut,
            stderr_truncated=event.stderr_truncated or self._streams["stderr"].cut,
            artifacts_skipped=event.artifacts_skipped + self._skipped,
        )


def _check_ending(event: Finished) -> None:
    """Raises: ProtocolError: no program ends so."""
    exited, signaled = event.outcome is Outcome.EXITED, event.outcome is Outcome.SIGNALED
    times = [event.run_ms, event.usage.cpu_ms, *event.timings_ms.values()]
    if not all(time is None or math.isfinite(time) for time in times):
        raise _wrong("of a time without end")
    fits = exited is (event.exit_code is not None) and signaled is (event.signal is not None)
    if not fits or not 0 <= (event.exit_code or 0) <= 255:
        raise _wrong("an ending that contradicts itself")
    try:
        signal_number(event.signal or "SIGKILL")
    except ValueError:
        raise _wrong("a signal that there is not") from None


def _wrong(what: str) -> ProtocolError:
    return ProtocolError(f"The service tells {what}.", hint=_NO_SERVICE)
