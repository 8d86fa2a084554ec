"""Network in every form. Listeners on the host are real: what reaches them has escaped."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from tests.escape.attack import attack

import cloche

NETWORK_SAYS_NO = (
    "ENETUNREACH",
    "EHOSTUNREACH",
    "ECONNREFUSED",
    "EAFNOSUPPORT",
    "EADDRNOTAVAIL",
    "EPROTONOSUPPORT",
    "ESOCKTNOSUPPORT",
    "EPROTOTYPE",
    "TimeoutError",
    "gaierror",
    "ENODEV",
    "EOPNOTSUPP",
)


def _own_addresses() -> list[str]:
    """Addresses of this host that a box could know."""
    found = ["127.0.0.1"]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks which address would be used
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys(found))


@dataclass
class Listeners:
    tcp_port: int
    udp_port: int
    abstract: str
    path: str
    heard: list[str] = field(default_factory=list)


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    """A listener of each kind on the host, which answers and remembers."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).chmod(0o755)
        tcp = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("0.0.0.0", 0))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"escape-{secrets.token_hex(8)}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        plain = stack.enter_context(socket.socket(socket.AF_UNIX))
        plain.bind(f"{folder}/socket")
        os.chmod(f"{folder}/socket", 0o777)
        plain.listen()
        made = Listeners(tcp.getsockname()[1], udp.getsockname()[1], name, f"{folder}/socket")

        def serve(what: str, listener: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    if listener is udp:
                        data, peer = listener.recvfrom(100)
                        listener.sendto(b"reached", peer)
                        if data == b"stop":
                            return
                    else:
                        connection, _ = listener.accept()
                        with connection:
                            connection.sendall(b"reached")
                            if connection.recv(4) == b"stop":
                                return
                    made.heard.append(what)

        threads = [
            threading.Thread(target=serve, args=(what, listener))
            for what, listener in {"tcp": tcp, "udp": udp, "abstract": abstract, "path": plain}.items()
        ]
        for thread in threads:
            thread.start()
        yield made
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", made.tcp_port)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", made.udp_port)),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{name}"),
            (socket.AF_UNIX, socket.SOCK_STREAM, made.path),
        ):
            with socket.socket(family, kind) as stopper:
                stopper.connect(address)
                stopper.sendall(b"stop")
                # That the listener answers us shows that it would have answered the box.
                assert stopper.recv(7) == b"reached"
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()


SETUP = r"""
def reach(family, kind, address, data=b"escaped"):
    with socket.socket(family, kind) as s:
        s.settimeout(0.5)
        s.connect(address)
        s.send(data)
        return s.recv(100)

def query(server):
    question = b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\7example\3com\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(0.5)
        s.sendto(question, (server, 53))
        return s.recv(512)

def interfaces_by_netlink():
    # RTM_GETLINK (18), NLM_F_REQUEST and NLM_F_DUMP, then an ifinfomsg of zeros
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
        s.settimeout(1)
        s.send(struct.pack("IHHII", 36, 18, 0x301, 1, 0) + bytes(20))
        data = s.recv(65536)
    names = set()
    while len(data) >= 16:
        length, kind = struct.unpack_from("IH", data)
        if length < 16:
            break
        at = 32
        while kind == 16 and at + 4 <= length:
            size, attribute = struct.unpack_from("HH", data, at)
            if attribute == 3:
                names.add(data[at + 4 : at + size - 1].decode())
            at += max(4, (size + 3) & ~3)
        data = data[(length + 3) & ~3 :]
    return names - {"lo"}

def other_families():
    # AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK are confined by the network namespace, others are not all.
    for family in set(range(1, 48)) - {1, 2, 10, 16}:
        for kind in (1, 2, 3, 5):
            for protocol in (0, 1, 3):
                try:
                    socket.socket(family, kind, protocol).close()
                except OSError:
                    continue
                yield family, kind, protocol
"""


async def test_no_network(sandbox: cloche.Sandbox, listeners: Listeners) -> None:
    """With network ``none`` nothing outside is reached or named, over any kind of socket, and no listener hears a thing.

    Guard: an empty network namespace, and the filter on what no namespace confines (vsock); elsewhere the filter on sockets.
    """
    tcp, udp = listeners.tcp_port, listeners.udp_port
    attempts = {}
    for address in _own_addresses():
        attempts[f"tcp to {address}"] = f"reach(socket.AF_INET, socket.SOCK_STREAM, ({address!r}, {tcp}))"
        attempts[f"udp to {address}"] = f"reach(socket.AF_INET, socket.SOCK_DGRAM, ({address!r}, {udp}))"
        attempts[f"dns at {address}"] = f"query({address!r})"
    attempts |= {
        "tcp to ::1": f"reach(socket.AF_INET6, socket.SOCK_STREAM, ('::1', {tcp}))",
        "tcp to mapped loopback": f"reach(socket.AF_INET6, socket.SOCK_STREAM, ('::ffff:127.0.0.1', {tcp}))",
        "tcp to 0.0.0.0": f"reach(socket.AF_INET, socket.SOCK_STREAM, ('0.0.0.0', {tcp}))",
        "tcp to the internet": "reach(socket.AF_INET, socket.SOCK_STREAM, ('192.0.2.1', 80))",
        "tcp to metadata": "reach(socket.AF_INET, socket.SOCK_STREAM, ('169.254.169.254', 80))",
        "dns at a public server": "query('192.0.2.53')",
        "dns by the library": "socket.getaddrinfo('example.com', 80)",
        "multicast": "reach(socket.AF_INET, socket.SOCK_DGRAM, ('224.0.0.251', 5353))",
        "broadcast": "reach(socket.AF_INET, socket.SOCK_DGRAM, ('255.255.255.255', 67))",
        "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
        "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300)",
        "abstract socket": f"reach(socket.AF_UNIX, socket.SOCK_STREAM, '\\0{listeners.abstract}')",
        "socket by its path": f"reach(socket.AF_UNIX, socket.SOCK_STREAM, {listeners.path!r})",
        "vsock of the host": "reach(40, socket.SOCK_STREAM, (2, 52))",
        "vsock of this machine": "reach(40, socket.SOCK_STREAM, (1, 52))",
        "vsock datagrams": "socket.socket(40, socket.SOCK_DGRAM).fileno() + 1",
        "other families": "list(other_families())",
        "interfaces by netlink": "interfaces_by_netlink()",
        "interfaces by name": "[n for _, n in socket.if_nameindex() if n != 'lo']",
        "interfaces in /proc": "[l.split(':')[0] for l in open('/proc/net/dev') if ':' in l and l.split(':')[0].strip() != 'lo']",
        "interfaces in /sys": "[n for n in os.listdir('/sys/class/net') if n != 'lo']",
        "abstract names of the host": f"{listeners.abstract!r} in open('/proc/net/unix').read()",
        "routes": "open('/proc/net/route').read().splitlines()[1:]",
        "tun device": "openable('/dev/net/tun', os.O_RDWR)",
        # TUNSETIFF (linux/if_tun.h) for IFF_TUN | IFF_NO_PI
        "tun interface": (
            "fcntl.ioctl(os.open('/dev/net/tun', os.O_RDWR), 0x400454CA, struct.pack('16sH22x', b'escape', 0x1001))"
        ),
    }
    if sandbox.mode in {"kubernetes", "opensandbox"}:
        # A pod has an interface, which is in plain sight; what there is to make a connection with, the script has not.
        attempts = {
            n: code for n, code in attempts.items() if n not in {"interfaces in /proc", "interfaces in /sys", "routes"}
        }
    await attack(
        sandbox,
        attempts,
        setup=SETUP,
        also_refused=(*NETWORK_SAYS_NO, "EINVAL"),
        no_gain_in_a_guest=("tun device",),
        timeout=30,
    )
    assert listeners.heard == []


def test_the_listeners_hear(listeners: Listeners) -> None:
    """The listeners of the test above do hear whoever reaches them."""
    with socket.create_connection(("127.0.0.1", listeners.tcp_port), timeout=5) as connection:
        connection.sendall(b"escaped")
        assert connection.recv(7) == b"reached"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{listeners.abstract}")
        connection.sendall(b"escaped")
        assert connection.recv(7) == b"reached"


async def test_loopback_of_the_box(sandbox: cloche.Sandbox) -> None:
    """Two runs do not hear each other: an abstract name or port of one box is free in the next.

    Guard: a network namespace per box; where the filter stands in for it, there are no such sockets at all.
    """
    setup = r"""
def held():
    s = socket.socket(socket.AF_UNIX)
    s.bind("\0a-name-that-every-run-takes")
    s.listen()
    held.kept = s
    try:
        t = socket.socket()
        t.bind(("127.0.0.1", 45454))
        t.listen()
        held.also = t
    except PermissionError:
        pass
held()
time.sleep(0.3)
"""
    results = []

    async def one() -> None:
        results.append(await attack(sandbox, {"held": "False"}, setup=setup))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one)
        tasks.start_soon(one)
    assert len(results) == 2
