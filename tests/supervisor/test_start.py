"""What a script finds when it starts, and what keeps it from being started."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
from tests.supervisor.harness import ENV, PYTHON, Bench, bundle

from cloche.supervisor.bundle import Entry, File, Folder, Link

MAGIC = (b"M", b"cloche-bundle 1")
TIME = (b"L", b"timeout_ms=1000")
TRUE = (b"A", b"true")
END = (b"Z", b"")


def records(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"".join(struct.pack("<cI", kind, len(payload)) + payload for kind, payload in pairs)


def test_arguments_and_environment_are_exact(bench: Bench) -> None:
    """The script gets its arguments and environment byte by byte, and nothing else."""
    args = ["", "a b", "$(id)", "`id`", ";", "'\"", "a\nb", "-x", "\u00fc\U0001f514", "\udcff"]
    env = {**ENV, "EMPTY": "", "EQUALS": "a=b=c", "BYTES": "\udcfe"}
    code = """
import os, sys, json
hexed = lambda text: os.fsencode(text).hex()
print(json.dumps([list(map(hexed, sys.argv[1:])), {hexed(name): hexed(value) for name, value in os.environ.items()}]))
"""
    run = bench.run([PYTHON, "-I", "-c", code, *args], env=env)
    got_args, got_env = json.loads(run.stdout)
    assert got_args == [os.fsencode(arg).hex() for arg in args]
    # Python itself sets LC_CTYPE when there is no locale.
    got_env.pop(b"LC_CTYPE".hex(), None)
    assert got_env == {name.encode().hex(): os.fsencode(value).hex() for name, value in env.items()}


def test_only_three_descriptors_are_open(bench: Bench) -> None:
    """Nothing but stdin, stdout and stderr reaches the script, its stdin is /dev/null when none was sent."""
    engine = ["sh", "-c", 'exec 3</dev/zero 7>/tmp/of-the-engine; exec "$@"', "engine"]  # that leaves some open
    with bench.box(prefix=engine) as box:
        box.feed(bundle(["ls", "-l", "/proc/self/fd"]))
        run = box.finish()
    targets = [line.split(" -> ")[1] for line in run.stdout.decode().splitlines() if " -> " in line]
    assert targets[0] == "/dev/null"
    assert [target.partition(":")[0] for target in targets[1:3]] == ["pipe", "pipe"]
    assert targets[1] != targets[2]
    # The fourth is the folder that ls reads.
    assert len(targets) == 4
    assert targets[3].endswith("/fd")


def test_has_a_session_of_its_own(bench: Bench) -> None:
    """The script leads a session, starts in /workspace, and no signal is blocked or ignored for it."""
    code = """
import os
print(os.getpid() == os.getsid(0) == os.getpgid(0), os.getcwd(), os.umask(0))
print(open('/proc/self/status').read())
"""
    lines = bench.run([PYTHON, "-I", "-c", code]).stdout.decode().splitlines()
    assert lines[0] == f"True /workspace {0o022}"
    masks = dict(line.split(":\t", 1) for line in lines[1:] if line.startswith("Sig"))
    assert int(masks["SigBlk"], 16) == 0
    # Python ignores SIGPIPE and SIGXFSZ by itself.
    assert int(masks["SigIgn"], 16) & ~(1 << 12 | 1 << 24) == 0


def test_files_links_and_modes(bench: Bench) -> None:
    """The workspace has exactly the folders, files, modes and links of the bundle, and cannot be written."""
    entries: list[Entry] = [
        Folder("empty"),
        Folder("deep"),
        Folder("deep/er"),
        File("deep/er/data", bytes(range(256)) * 1000),
        File("run", b"#!/bin/sh\necho ran\n", executable=True),
        File("none", b""),
        File("a b\n\u00fc", b"x"),
        File("x" * 255, b"longest name"),
        Link("link", "deep/er/data"),
        Link("deep/up", "../run"),
        Link("dangling", "nowhere"),
    ]
    code = """
import os, json, hashlib
found = {}
for top, folders, files in os.walk("."):
    for name in folders + files:
        path = os.path.join(top, name)[2:]
        st = os.lstat(path)
        link = os.path.islink(path)
        body = os.readlink(path) if link else "" if os.path.isdir(path) else hashlib.sha256(open(path, "rb").read()).hexdigest()
        found[path] = [oct(st.st_mode), body]
refused = []
for attempt in (lambda: open("new", "w"), lambda: open("none", "w"), lambda: os.chmod("none", 0o777), lambda: os.unlink("none"),
                lambda: os.rename("none", "/tmp/x"), lambda: os.truncate("run", 0), lambda: os.mkdir("empty/x")):
    try:
        attempt()
    except OSError as e:
        refused.append(e.errno)
print(json.dumps([found, refused, os.popen("./run").read()]))
"""
    run = bench.run([PYTHON, "-I", "-c", code], entries=entries)
    found, refused, ran = json.loads(run.stdout)
    want = {}
    for entry in entries:
        match entry:
            case Folder(path=path):
                want[path] = ["0o40755", ""]
            case File(path=path, data=data, executable=executable):
                want[path] = ["0o100755" if executable else "0o100644", hashlib.sha256(data).hexdigest()]
            case Link(path=path, target=target):
                want[path] = ["0o120777", target]
    assert found == want
    assert len(refused) == 7
    assert ran == "ran\n"


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 5 * 2**20])
def test_stdin_is_exact_and_sealed(bench: Bench, size: int) -> None:
    """The script reads exactly the stdin that was sent, and can neither write nor grow it."""
    stdin = os.urandom(size)
    code = """
import os, sys, hashlib
data = sys.stdin.buffer.read()
print(len(data), hashlib.sha256(data).hexdigest())
for attempt in (lambda: os.write(0, b"x"), lambda: os.ftruncate(0, 1 << 20), lambda: os.ftruncate(0, 0),
                lambda: os.write(os.open("/proc/self/fd/0", os.O_RDWR), b"x")):
    try:
        print("gained", attempt())
    except OSError as e:
        print(e.errno)
"""
    run = bench.python(code, stdin=stdin)
    first, *attempts = run.stdout.decode().splitlines()
    assert first == f"{size} {hashlib.sha256(stdin).hexdigest()}"
    # To cut an empty one to nothing is no change.
    refused = [line for i, line in enumerate(attempts) if size > 0 or i != 2]
    assert all(line in {"1", "13"} for line in refused), attempts


@pytest.mark.parametrize("cuts", [[1], [4, 5, 6], [100, 100, 101], [7, 300, 65536 + 400]])
def test_bundle_from_several_files(bench: Bench, folder: Path, cuts: list[int]) -> None:
    """A bundle may come in several files, cut anywhere, in the order of the arguments."""
    data = os.urandom(200_000)
    whole = bundle(["sh", "-c", "cat data; cat >&2"], entries=[File("data", data)], stdin=data[:1000])
    place = folder / f"cut-{bench.build.name}-{len(os.listdir(folder))}"
    place.mkdir()
    options, binds = [], []
    for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(whole)], strict=True)):
        (place / str(i)).write_bytes(whole[start:end])
        binds.append((place / str(i), f"/run/bundle/{i}"))
        options += ["--bundle", f"/run/bundle/{i}"]
    with bench.box(*options, binds=binds) as box:
        run = box.finish()
    assert run.stdout == data
    assert run.stderr == data[:1000]


def test_bundle_begins_in_stdin(bench: Bench, folder: Path) -> None:
    """Stdin may be one of several sources, and the script still does not get what is left of it."""
    whole = bundle(["sh", "-c", "cat; ls -l /proc/self/fd/0"])
    rest = folder / f"rest-{bench.build.name}"
    rest.write_bytes(whole[50:])
    with bench.box("--bundle", "-", "--bundle", "/run/rest", binds=[(rest, "/run/rest")]) as box:
        box.feed(whole[:50])
        run = box.finish()
    assert run.stdout.endswith(b"-> /dev/null\n")
    assert run.end.exit_code == 0


def test_closed_stdin_does_no_harm(bench: Bench, folder: Path) -> None:
    """A supervisor that was started without any stdin works, hears signals, and so does its script."""
    source = folder / f"whole-{bench.build.name}"
    source.write_bytes(
        bundle(["sh", "-c", "trap 'exit 3' TERM; readlink /proc/self/fd/0; while :; do sleep 0.02; done"])
    )
    closed = ["sh", "-c", 'exec "$@" <&-', "sh"]
    with bench.box("--bundle", "/run/whole", binds=[(source, "/run/whole")], prefix=closed) as box:
        box.read_until(b" o ")
        box.stop()
        run = box.finish()
    assert run.stdout == b"/dev/null\n"
    assert (run.end.exit_code, run.end.cause) == (3, "cancel")


def test_a_box_can_wait_for_its_bundle(bench: Bench) -> None:
    """The supervisor says hello before it has its bundle, and takes a bundle that comes byte by byte."""
    with bench.box() as box:
        box.read_until(b"hello")
        whole = bundle(["true"])
        for i in range(len(whole)):
            box.input.write(whole[i : i + 1])
            box.input.flush()
        assert box.finish().end.exit_code == 0


MALFORMED = {
    "empty": (b"", "it ended too early"),
    "foreign": (b"PK\3\4" * 100, "an over-long record"),
    "other version": (records((b"M", b"cloche-bundle 2")), "not a bundle of this version"),
    "no magic": (records(TIME), "not a bundle of this version"),
    "cut": (records(MAGIC, TIME, TRUE), "it ended too early"),
    "cut in a header": (records(MAGIC, TIME) + b"A\1", "it ended too early"),
    "over-long": (records(MAGIC) + struct.pack("<cI", b"A", 256 * 1024 + 1), "an over-long record"),
    "unknown record": (records(MAGIC, (b"?", b"")), "an unknown record"),
    "second magic": (records(MAGIC, MAGIC), "an unknown record"),
    "bytes first": (records(MAGIC, (b"C", b"x")), "bytes without a file"),
    "bytes after a folder": (records(MAGIC, (b"F", b"-f"), (b"D", b"d"), (b"C", b"x")), "bytes without a file"),
    "limit without number": (records(MAGIC, (b"L", b"timeout_ms=")), "a malformed limit"),
    "limit without name": (records(MAGIC, (b"L", b"timeout_ms")), "a malformed limit"),
    "negative limit": (records(MAGIC, (b"L", b"timeout_ms=-1")), "a malformed limit"),
    "absurd limit": (records(MAGIC, (b"L", b"timeout_ms=1099511627777")), "a malformed limit"),
    "hexadecimal limit": (records(MAGIC, (b"L", b"timeout_ms=0x10")), "a malformed limit"),
    "unknown limit": (records(MAGIC, (b"L", b"timeout=1")), "an unknown limit"),
    "NUL in an argument": (records(MAGIC, (b"A", b"a\0b")), "a NUL in an argument or in the environment"),
    "NUL in the environment": (records(MAGIC, (b"E", b"A=\0")), "a NUL in an argument or in the environment"),
    "too many arguments": (
        records(MAGIC, *[TRUE] * 16385),
        "too many arguments or too large an environment",
    ),
    "too large an environment": (
        records(MAGIC, *[(b"E", b"A=" + b"x" * 250_000)] * 30),
        "too many arguments or too large an environment",
    ),
    "variable without =": (records(MAGIC, (b"E", b"A")), "a malformed environment variable"),
    "variable without name": (records(MAGIC, (b"E", b"=A")), "a malformed environment variable"),
    "empty variable": (records(MAGIC, (b"E", b"")), "a malformed environment variable"),
    "no arguments": (records(MAGIC, TIME, END), "an incomplete plan"),
    "no time": (records(MAGIC, TRUE, END), "an incomplete plan"),
    "a last record that says something": (records(MAGIC, TIME, TRUE, (b"Z", b"x")), "an incomplete plan"),
    "more after the last": (records(MAGIC, TIME, TRUE, END, TRUE), "a record after the last one"),
    "stdin that says something": (records(MAGIC, (b"I", b"x")), "a malformed stdin record"),
    "file without kind": (records(MAGIC, (b"F", b"f")), "a file's path"),
    "file of unknown kind": (records(MAGIC, (b"F", b"sf")), "a file's path"),
    "folder after a link": (records(MAGIC, (b"S", b"x\0l"), (b"D", b"d")), "a folder's path"),
    "file after a link": (records(MAGIC, (b"S", b"x\0l"), (b"F", b"-f")), "a file's path"),
    "link without target": (records(MAGIC, (b"S", b"\0l")), "a link's path or target"),
    "link without path": (records(MAGIC, (b"S", b"x")), "a link's path or target"),
    "link to the root": (records(MAGIC, (b"S", b"/etc\0l")), "a link's path or target"),
    "link above the workspace": (records(MAGIC, (b"S", b"../x\0l")), "a link's path or target"),
    "link that climbs later": (records(MAGIC, (b"S", b"a/../../x\0l")), "a link's path or target"),
    "folder twice": (records(MAGIC, (b"D", b"d"), (b"D", b"d")), "mkdir: File exists"),
    "file twice": (records(MAGIC, (b"F", b"-f"), (b"F", b"-f")), "create: File exists"),
    "file without its folder": (records(MAGIC, (b"F", b"-d/f")), "create: No such file or directory"),
    "file below a file": (records(MAGIC, (b"F", b"-f"), (b"F", b"-f/g")), "create: Not a directory"),
    "link over a file": (records(MAGIC, (b"F", b"-f"), (b"S", b"x\0f")), "symlink: File exists"),
    "link through a link": (
        records(MAGIC, (b"D", b"d"), (b"S", b"d\0l"), (b"S", b"x\0l/m")),
        "symlink: Not a directory",
    ),
    "stdin twice": (records(MAGIC, (b"I", b""), (b"I", b"")), "stdin: File exists"),
} | {
    f"path {path!r}": (records(MAGIC, (b"F", b"-" + path)), "a file's path")
    for path in (
        b"",
        b"/etc/x",
        b"..",
        b"../x",
        b"a/../b",
        b"a/..",
        b".",
        b"./a",
        b"a//b",
        b"a/",
        b"x" * 256,
        b"a\0b",
        b"a/" * 2001,
    )
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bundle(bench: Bench, name: str) -> None:
    """A bundle that is not exactly right is refused with the reason, and nothing is started."""
    data, why = MALFORMED[name]
    with bench.box() as box:
        box.feed(data)
        run = box.finish()
    assert run.fail.code == "protocol-error"
    assert run.fail.message == f"The bundle cannot be read: {why}."
    assert not run.started
    assert run.status == 1


def test_missing_bundle_file(bench: Bench) -> None:
    """A bundle file that is not there is told."""
    with bench.box("--bundle", "/run/nowhere") as box:
        run = box.finish()
    assert run.fail.message == "The bundle cannot be read: it cannot be opened."


def test_workspace_that_does_not_fit(bench: Bench) -> None:
    """A workspace larger than its mount is an error of its own."""
    run = bench.run(["true"], entries=[File(f"f{i}", bytes(2**20)) for i in range(70)])
    assert run.fail.code == "workspace-too-large"
    assert not run.started


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["no-such-program"], "interpreter-missing", "no-such-program is not on the box's PATH."),
        (["/no/such/program"], "interpreter-missing", "/no/such/program is not on the box's PATH."),
        ([""], "interpreter-missing", " cannot be started in the box: Permission denied."),
        (
            ["/workspace/plain"],
            "interpreter-missing",
            "/workspace/plain cannot be started in the box: Permission denied.",
        ),
        (
            ["/workspace/junk"],
            "interpreter-missing",
            "/workspace/junk cannot be started in the box: Exec format error.",
        ),
        (
            ["true", *["x" * 100_000] * 25],
            "invalid-spec",
            "Arguments and environment together are larger than the kernel takes.",
        ),
    ],
)
def test_program_that_cannot_start(bench: Bench, argv: list[str], code: str, message: str) -> None:
    """A program that cannot be executed is an error that names it, not an exit code."""
    run = bench.run(argv, entries=[File("plain", b"x"), File("junk", b"\0\1\2", executable=True)])
    assert (run.fail.code, run.fail.message) == (code, message)
    assert not run.started


def test_path_of_the_script(bench: Bench) -> None:
    """The program is looked up on the script's own PATH, where only absolute folders count."""
    program = [File("tool", b"#!/bin/sh\necho found $0\n", executable=True)]
    run = bench.run(["tool"], entries=program, env={"PATH": "/nowhere:/workspace:/usr/bin"})
    assert run.stdout == b"found /workspace/tool\n"
    for path in ("", ".", ":", "workspace"):
        assert bench.run(["tool"], entries=program, env={"PATH": path}).fail.code == "interpreter-missing"
    assert bench.run(["sh", "-c", "echo default"], env={}).stdout == b"default\n"


def test_program_elsewhere(bench: Bench) -> None:
    """An interpreter that is not on the PATH is started from the place that the backend names, under that name."""
    run = bench.run(
        ["snake", "-c", "import sys; print(sys.executable)"], "--program", "snake", "--program-path", PYTHON
    )
    assert run.stdout.decode().strip() == PYTHON


@pytest.mark.parametrize(
    "options",
    [
        ["--nonsense", "1"],
        ["--nofile"],
        ["--nofile", "many"],
        ["--nofile", "-1"],
        ["--sockets", "all"],
        ["--script-uid", "5"],
        ["--script-uid", "4294967295", "--script-gid", "5"],
        ["--script-uid", "4294967296", "--script-gid", "5"],
        ["--program", "x"],
        ["--bundle", "-"] * 65,
    ],
)
def test_wrong_options(bench: Bench, options: list[str]) -> None:
    """Options that the supervisor does not know are a usage error: it never runs with less than it was asked for."""
    with bench.box(*options) as box:
        box.feed(b"")
        run = box.finish()
    assert run.status == 2
    assert run.raw == b""
    assert run.errors.startswith("usage:")
