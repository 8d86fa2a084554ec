"""The script's bytes reach the reader exactly, and a reader who is slow or gone stops nothing."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from cloche.cli import writer as module
from cloche.cli.writer import Writer, write_all


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with suppress(OSError):
            os.close(fd)


def test_write_all_to_a_pipe_that_does_not_block(pipe: tuple[int, int]) -> None:
    """Everything is written, also when the pipe is full for a while and does not block."""
    reader, target = pipe
    fcntl.fcntl(target, fcntl.F_SETFL, fcntl.fcntl(target, fcntl.F_GETFL) | os.O_NONBLOCK)
    data = bytes(range(256)) * 2000
    got = bytearray()

    def read() -> None:
        while len(got) < len(data):
            time.sleep(0.001)
            got.extend(os.read(reader, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    write_all(target, data)
    thread.join()
    assert got == data


async def test_order_and_drain(pipe: tuple[int, int]) -> None:
    """What was put is written in order by the time drain returns."""
    reader, target = pipe
    writer = Writer(lambda: None)
    for i in range(100):
        writer.put(target, b"%d," % i)
    await writer.drain(asyncio.get_running_loop().call_soon_threadsafe)
    writer.close()
    assert os.read(reader, 65536) == b"".join(b"%d," % i for i in range(100))


async def test_slow_reader(pipe: tuple[int, int]) -> None:
    """Putting never waits for the reader."""
    _, target = pipe
    writer = Writer(lambda: None)
    started = time.perf_counter()
    for _ in range(20):
        writer.put(target, b"x" * 65536)  # the pipe holds 64 KiB
    assert time.perf_counter() - started < 0.5
    writer.close()


async def test_broken_stdout(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody reads stdout any more the writer tells it, once, and drops what follows."""
    reader, target = pipe
    monkeypatch.setattr(module, "STDOUT", target)
    broken: list[bool] = []
    writer = Writer(lambda: broken.append(True))
    os.close(reader)
    for _ in range(3):
        writer.put(target, b"x")
    await writer.drain(asyncio.get_running_loop().call_soon_threadsafe)
    writer.close()
    assert (broken, writer.broken, writer.failures) == ([True], True, {})


async def test_full_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """When stdout cannot be written for another reason than a missing reader, the writer says which."""
    target = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(module, "STDOUT", target)
    broken: list[bool] = []
    writer = Writer(lambda: broken.append(True))
    writer.put(target, b"x")
    await writer.drain(asyncio.get_running_loop().call_soon_threadsafe)
    writer.close()
    os.close(target)
    assert (broken, writer.failures[target].errno) == ([True], errno.ENOSPC)


async def test_broken_stderr(pipe: tuple[int, int]) -> None:
    """When nobody reads stderr any more the run goes on."""
    reader, target = pipe
    writer = Writer(lambda: pytest.fail("it is not stdout"))
    os.close(reader)
    writer.put(target, b"x")
    await writer.drain(asyncio.get_running_loop().call_soon_threadsafe)
    writer.close()
    assert not writer.broken
