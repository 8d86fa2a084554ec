"""The published binary for aarch64, under qemu's user emulation: as far as that goes, which is to the script's start."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import time
from pathlib import Path

import pytest
from tests.supervisor import builds
from tests.supervisor.harness import Bench, Live, Run, bundle
from tests.supervisor.test_start import MALFORMED

from cloche.supervisor.bundle import Entry, File, Folder, Link

# zig builds its C library on first use.
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        platform.machine() == "aarch64", reason="here it is the shipped binary, which all other tests run"
    ),
]


@pytest.fixture(scope="module")
def arm(folder: Path) -> Bench:
    """Boxes whose supervisor is emulated; bubblewrap and its launcher are the machine's own."""
    place = folder / "aarch64"
    place.mkdir()
    return Bench(builds.aarch64(place), place, launcher=builds.shipped(place).path, emulator=Path(builds.qemu()))


def refused(run: Run) -> str:
    """The message of a run that ended before the script was started."""
    assert not run.started
    assert run.status == 1
    assert run.hello.pid == 1
    return run.fail.message


def test_is_a_static_program_for_aarch64(arm: Bench) -> None:
    """The file is an ELF for aarch64 that asks for no loader."""
    data = arm.build.path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    assert struct.unpack_from("<H", data, 18)[0] == 183
    offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    kinds = [struct.unpack_from("<I", data, offset + i * size)[0] for i in range(count)]
    assert 3 not in kinds, "it has a PT_INTERP"


def test_version(arm: Bench) -> None:
    """It starts, and says what it speaks."""
    done = subprocess.run([builds.qemu(), arm.build.path, "version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cloche-supervisor, frames 1, kernel ")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bundle(arm: Bench, name: str) -> None:
    """It refuses what the other one refuses, in the same words."""
    data, why = MALFORMED[name]
    with arm.box() as box:
        box.feed(data)
        assert refused(box.finish()) == f"The bundle cannot be read: {why}."


def test_unpacks_and_refuses_to_start_without_its_filter(arm: Bench) -> None:
    """It unpacks a workspace as it was sent; since the emulation has no system call filter, no script is started."""
    data = os.urandom(300_000)
    entries: list[Entry] = [
        Folder("d"),
        File("d/f", data),
        File("run", b"#!/bin/sh\n", executable=True),
        Link("d/l", "f"),
    ]
    whole = bundle(["true"], entries=entries, stdin=b"input")
    with arm.box() as box:
        box.read_until(b"hello")
        # All but the last record: it has unpacked what came, and waits.
        box.input.write(whole[:-5])
        box.input.flush()
        root = workspace(box)
        await_file(root / "run", len(b"#!/bin/sh\n"))
        assert (root / "d" / "f").read_bytes() == data
        assert (root / "run").stat().st_mode & 0o777 == 0o755
        assert (root / "d" / "f").stat().st_mode & 0o777 == 0o644
        assert (root / "d" / "l").readlink() == Path("f")
        box.feed(whole[-5:])
        message = refused(box.finish())
    assert message.startswith("The script was not started: seccomp: ")


def workspace(box: Live) -> Path:
    return Path(f"/proc/{box.pid}/root/workspace")


def await_file(path: Path, size: int) -> None:
    """Until it is there and whole, and the link that comes after it."""
    end = time.monotonic() + 10
    while not path.exists() or path.stat().st_size < size or not (path.parent / "d" / "l").is_symlink():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_refusals(arm: Bench) -> None:
    """It refuses to protect badly, as the other one does."""
    assert "may not give the script a uid of its own" in refused(
        arm.shell("true", "--script-uid", "5", "--script-gid", "5")
    )
    run = arm.run(["true"], entries=[File(f"f{i}", bytes(2**20)) for i in range(70)])
    assert run.fail.code == "workspace-too-large"
