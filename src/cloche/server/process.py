"""The process of the service: it listens, and ends in order when it is asked to."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import structlog
import uvicorn
from fastapi import FastAPI

from cloche.errors import InvalidSettings
from cloche.runtime import Sandbox
from cloche.server import logs
from cloche.server.app import open_service
from cloche.server.auth import Doorkeeper, doorkeeper
from cloche.server.connections import IDLE_S, Connection
from cloche.server.runs import Runs
from cloche.settings import Settings, split_address

BACKLOG = 1024
"""Connections that wait to be accepted."""
LAST_WORDS_S = 5
"""For answers to reach their clients once all runs are over."""

_log = structlog.get_logger("cloche.server")


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends all runs at once.

    Raises:
        InvalidSettings: the address or the tokens cannot be used.
        BackendUnavailable, IsolationUnavailable: no engine can be used as the settings want it.
    """
    anyio.run(_serve, settings)


async def _serve(settings: Settings) -> None:
    door = doorkeeper(settings)
    listener = _listen(settings.serve_address, door)
    try:
        logs.configure(settings)
        async with Sandbox(settings) as sandbox, open_service(sandbox, door) as (app, runs):
            await _Process(app, runs, listener, settings.serve_drain).run(sandbox, door)
    finally:
        listener.close()


class _Process:
    """uvicorn, and what ends it."""

    def __init__(self, app: FastAPI, runs: Runs, listener: socket.socket, drain_s: float) -> None:
        self._runs = runs
        self._listener = listener
        self._drain_s = drain_s
        self._server = make_server(app)

    async def run(self, sandbox: Sandbox, door: Doorkeeper) -> None:
        """Serve until a signal comes."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._server.serve, [self._listener])
                host, port = self._listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                _log.info(
                    "listening",
                    address=f"http://{shown}:{port}",
                    mode=sandbox.mode,
                    fallback_from=sandbox.fallback_from,
                    tokens=door.needs_tokens,
                )
                if not door.needs_tokens:
                    _log.warning(
                        "no tokens are set: whoever reaches this address can run programs; it listens on loopback only"
                    )
                async for _ in signals:
                    break
                _log.info("ending", drain_s=self._drain_s)
                async with anyio.create_task_group() as ending:
                    ending.start_soon(self._hurry, signals)
                    await self._runs.drain(self._drain_s)
                    ending.cancel_scope.cancel()
                self._server.should_exit = True
        _log.info("ended")

    async def _hurry(self, signals: object) -> None:
        async for _ in signals:  # type: ignore[attr-defined]
            self._runs.kill_all()


def make_server(app: FastAPI) -> uvicorn.Server:
    """uvicorn for the application, as the service has it."""
    return _Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
    )


class _Server(uvicorn.Server):
    """uvicorn without its handlers of signals: it would end the process with the signal, and leave the boxes."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def _listen(address: str, door: Doorkeeper) -> socket.socket:
    """Raises: InvalidSettings: nothing can listen there, or nothing must."""
    host, port = split_address(address)
    if not door.needs_tokens and not ipaddress.ip_address(host).is_loopback:
        raise InvalidSettings(
            f"Without tokens the service listens on loopback only, not at {address}: whoever reached it could run programs.",
            hint="Set CLOCHE_SERVE_TOKENS or CLOCHE_SERVE_TOKENS_FILE, or listen at 127.0.0.1.",
        )
    # With its protocol named: only then does asyncio send small pieces at once, and not 40 ms later.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)  # noqa: FBT003 (the socket's own signature)
    except OSError as exc:
        listener.close()
        raise InvalidSettings(
            f"The service cannot listen at {address}: {exc.strerror}.",
            hint="Choose another address with CLOCHE_SERVE_ADDRESS.",
        ) from None
    return listener
