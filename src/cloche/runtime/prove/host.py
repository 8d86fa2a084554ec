"""What of this machine a box must not share and must not reach."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from anyio import to_thread
from anyio.abc import SocketAttribute, SocketStream

from cloche.runtime.prove.case import Host

NOBODY = "192.0.2.1"
"""Never anybody's (RFC 5737): asked for the address that this machine would use, nothing is sent."""
_NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup", "time")


@dataclass(frozen=True, slots=True)
class Listeners:
    """Listeners of this machine, by what they stand for, and what each of them says first."""

    addresses: Mapping[str, str]
    nonce: str


async def facts(*, here: bool, kernel: str) -> Host:
    """What is known of the engine's host. ``kernel`` is the engine's own word."""
    return await to_thread.run_sync(_this_machine, kernel) if here else Host(release=kernel)


def _this_machine(kernel: str) -> Host:
    found, boot_id = {}, ""
    for name in _NAMESPACES:
        with contextlib.suppress(OSError):
            found[name] = os.stat(f"/proc/self/ns/{name}").st_ino
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return Host(here=True, release=kernel, boot_id=boot_id, namespaces=found)


@asynccontextmanager
async def listening(*, here: bool) -> AsyncIterator[Listeners]:
    """Listeners on this machine's loopback and on its own address, for as long as boxes try to reach them; elsewhere none."""
    nonce = secrets.token_hex(16)
    addresses: dict[str, str] = {}

    async def greet(stream: SocketStream) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with stream:
                await stream.send(nonce.encode())

    group = anyio.create_task_group()
    await group.__aenter__()
    try:
        own = await to_thread.run_sync(_own_address) if here else None
        wanted = {"host-loopback": "127.0.0.1", "host-network": own} if here else {}
        for name, address in wanted.items():
            if address is None:
                continue
            with contextlib.suppress(OSError):
                listener = await anyio.create_tcp_listener(local_host=address)
                addresses[name] = f"{address}:{listener.extra(SocketAttribute.local_port)}"  # noqa: S610 - no Django
                group.start_soon(listener.serve, greet)
        yield Listeners(addresses, nonce)
    finally:
        group.cancel_scope.cancel()
        # Without what was raised inside, which the group would wrap into a group: its own tasks raise nothing.
        await group.__aexit__(None, None, None)


def _own_address() -> str | None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((NOBODY, 9))
        address: str = probe.getsockname()[0]
        return address if not address.startswith("127.") else None
    return None
