"""One container, from its start to its last byte."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

import anyio

from cloche._kit.http import Connection, HttpFailure
from cloche.backends.contract import Fate, FateKind
from cloche.backends.docker.client import DockerClient, Refused
from cloche.backends.docker.demux import Demux, DemuxError
from cloche.errors import ProtocolError
from cloche.supervisor.bundle import Bundle

WRITE_BYTES = 256 * 1024
MESSAGE_BYTES = 4096
END_S = 10.0
"""For the daemon to have noticed that a container whose streams have ended has ended too."""

_log = logging.getLogger("cloche.docker")


class DockerBox:
    """A started container with its streams attached. ``on_silence`` is called when it ended without a word; ``guest`` says
    that it has a kernel of its own.
    """

    def __init__(
        self,
        client: DockerClient,
        name: str,
        connection: Connection,
        on_silence: Callable[[], None],
        *,
        guest: bool = False,
    ) -> None:
        self._guest = guest
        self._client = client
        self._name = name
        self._connection = connection
        self._on_silence = on_silence
        self._answered = self._broken = False
        self._message = bytearray()

    async def feed(self, bundle: Bundle) -> None:
        """Hand the bundle in through the attached stdin, which stays open: its end would end the run."""
        gathered = bytearray()
        try:
            for record in bundle.records():
                gathered += record
                if len(gathered) >= WRITE_BYTES:
                    await self._connection.write(bytes(gathered))
                    gathered.clear()
            await self._connection.write(bytes(gathered))
        except HttpFailure as exc:
            _log.debug("%s took no more of its bundle: %s", self._name, exc)

    async def output(self) -> AsyncIterator[bytes]:
        """The supervisor's stdout, as the daemon passes it on. A connection that breaks is its end: the fate tells why.

        Raises:
            ProtocolError: what comes is no stream of a container's.
        """
        demux = Demux()
        try:
            while data := await self._connection.read():
                for source, piece in demux.feed(data):
                    if source == "stdout":
                        self._answered = True
                        yield piece
                    else:
                        self._message += piece[: MESSAGE_BYTES - len(self._message)]
        except HttpFailure as exc:
            _log.debug("the connection to %s broke: %s", self._name, exc)
            self._broken = True
        except DemuxError as exc:
            raise ProtocolError(f"What the daemon sends is not the stream of a container: {exc}.") from exc

    async def stop(self) -> None:
        """SIGTERM to the supervisor, through the daemon."""
        await self._client.signal(self._name, "SIGTERM")

    async def fate(self, *, ended: bool) -> Fate:
        """The daemon's word on a container."""
        try:
            with anyio.move_on_after(END_S if ended else 0):
                await self._client.wait(self._name)
            state = await self._client.state(self._name)
            # The daemon keeps it in mind when any process of the container was killed for want of memory. If somebody
            # had the container killed after that, that was its end.
            out_of_memory = state is not None and state.oom_killed
            if out_of_memory and not self._guest:
                out_of_memory = not await self._client.was_killed(self._name)
        except HttpFailure as exc:
            return Fate(FateKind.LOST, f"The daemon cannot be reached: {exc}.")
        except Refused as exc:
            if exc.status != 404:
                return Fate(FateKind.LOST, f"The daemon cannot tell: {exc.message}")
            state, out_of_memory = None, False
        if state is None:
            return Fate(FateKind.DELETED, "The container is not there any more.")
        if state.running:
            return Fate(FateKind.LOST, "The container still runs, and its streams have ended.")
        if out_of_memory:
            return Fate(FateKind.OOM_KILLED, "The container ran out of memory.")
        said = self._message.decode("utf-8", "replace").strip() or state.error
        if self._broken and self._answered:
            # Its end may be the connection's doing: without its client a box ends itself.
            return Fate(FateKind.LOST, said or "The connection to the container broke.")
        if not self._answered:
            self._on_silence()
            return Fate(FateKind.NOT_STARTED, said or f"The container ended with {state.exit_code}.")
        return Fate(FateKind.EXITED, said or f"The container's first process ended with {state.exit_code}.")
