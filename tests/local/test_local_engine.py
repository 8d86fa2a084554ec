"""What only the local engine has: bubblewraps, cgroups, interpreters, uids, and what the dead leave."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest

from cloche import Outcome, Sandbox, Settings, Spec
from cloche.backends import owners
from cloche.backends.local import probe
from cloche.backends.local.backend import LocalBackend
from cloche.backends.local.cgroup import Flavour
from cloche.backends.local.probe import Bubblewrap
from cloche.errors import BackendUnavailable
from cloche.isolation import State
from cloche.testing.conformance import must_work

pytestmark = pytest.mark.anyio

HOG = "data = []\nwhile True:\n    data.append(bytearray(1 << 20))\n"
BOMB = """
import os, time
made = 0
try:
    for _ in range(2000):
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError as error:
    print("stopped after", made, "by", error.strerror)
"""


def sandbox(**offers: Callable[[], list[Bubblewrap]] | Callable[[], list[Flavour]]) -> Sandbox:
    """A sandbox on a local backend that finds only what it is offered."""
    settings = Settings.from_env({"CLOCHE_MODE": "local"})
    return Sandbox(settings, backends={"local": partial(LocalBackend, **offers)})  # type: ignore[arg-type]


def no_cgroup() -> list[Flavour]:
    return [Flavour("none")]


@pytest.fixture(autouse=True, scope="module")
def _engine() -> None:
    reason = probe.platform_reason() or ("" if list(probe.candidates()) else "there is no bubblewrap")
    if reason:
        (pytest.fail if must_work("local") else pytest.skip)(reason)


async def test_without_a_cgroup_memory_is_watched() -> None:
    """Without a cgroup a memory hog still ends as out_of_memory, and the posture says who watches."""
    async with sandbox(flavours=no_cgroup) as box:
        posture = {g.name: g for g in (await box.posture()).guarantees}
        assert "supervisor" in posture["memory-limit"].evidence
        result = await box.run(Spec(content=HOG, name="hog.py", memory=64 * 2**20, timeout=30))
    assert result.outcome is Outcome.OUT_OF_MEMORY


async def test_without_a_cgroup_children_are_watched_too() -> None:
    """Memory that children take is counted as the run's."""
    script = f"import os\nif os.fork() == 0:\n    exec({HOG!r})\nos.wait()\nimport time; time.sleep(60)\n"
    async with sandbox(flavours=no_cgroup) as box:
        result = await box.run(Spec(content=script, name="hog.py", memory=64 * 2**20, timeout=30))
    assert result.outcome is Outcome.OUT_OF_MEMORY


async def test_the_cgroup_holds_what_was_asked_for() -> None:
    """Where a cgroup bounds a box, memory and CPU time are those of the spec, and swap adds nothing to the memory."""
    hog = """
for name in ("memory/memory.memsw.limit_in_bytes", "memory.swap.max"):
    try: print("more", int(open("/sys/fs/cgroup/" + name).read()))
    except FileNotFoundError: pass
data = []
while True:
    data.append(bytearray(1 << 20))
    print(len(data), flush=True)
"""
    async with sandbox() as box:
        held = {g.name: g for g in (await box.posture()).guarantees}
        if "cgroup" not in held["memory-limit"].evidence:
            pytest.skip("no cgroup can be made here")
        result = await box.run(Spec(content=hog, name="hog.py", memory=64 * 2**20, timeout=30))
        lines = result.stdout.splitlines()
        # Beside the script's memory there is what cloche itself puts into the box, some 9 MiB, and it may use them.
        assert result.outcome is Outcome.OUT_OF_MEMORY
        assert 40 <= int(lines[-1]) <= 76, lines[-1]
        assert all(int(line.split()[1]) <= 76 * 2**20 for line in lines if line.startswith("more"))
        if held["cpu-limit"].state is State.IN_FORCE:
            result = await box.run(Spec(content="while True: pass", name="busy.py", cpus=0.2, timeout=2))
            assert result.outcome is Outcome.TIMED_OUT
            assert result.usage.cpu_ms is not None
            assert 0 < result.usage.cpu_ms < 2000 * 0.2 * 1.5, result.usage


async def test_without_a_cgroup_processes_are_bounded() -> None:
    """Without a cgroup the kernel's own count for the box bounds its processes."""
    async with sandbox(flavours=no_cgroup) as box:
        result = await box.run(Spec(content=BOMB, name="bomb.py", pids=32, timeout=30))
    assert result.ok, result
    assert "Resource temporarily unavailable" in result.stdout
    assert int(result.stdout.split()[2]) <= 32


async def test_without_a_cgroup_memory_cannot_hide() -> None:
    """Where only processes are watched, memory outside of processes (memfd, System V) is refused."""
    script = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
try:
    os.memfd_create("x"); print("memfd")
except PermissionError: pass
if libc.shmget(0, 1 << 20, 0o1600) >= 0: print("shm")
print("done")
"""
    async with sandbox(flavours=no_cgroup) as box:
        result = await box.run(Spec(content=script, name="hide.py"))
    assert result.stdout == "done\n", result


@pytest.fixture
def bundled() -> list[Bubblewrap]:
    found = [candidate for candidate in probe.candidates() if candidate.folder is not None]
    if not found:
        pytest.skip("no bundled bubblewrap is installed (there is none for this architecture)")
    return found


async def test_the_bundled_bubblewrap_is_used_where_the_system_has_none(bundled: list[Bubblewrap]) -> None:
    """A machine without bubblewrap of its own uses the one that came with cloche."""
    async with sandbox(bubblewraps=lambda: bundled) as box:
        assert "bundled" in (await box.posture()).engine
        result = await box.run(Spec(content="print('hello')", name="hello.py"))
    assert result.stdout == "hello\n"


async def test_a_bubblewrap_that_cannot_make_a_box_is_passed_over(tmp_path: Path) -> None:
    """A first bubblewrap that fails its trial is passed over for the next one."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    fake = Bubblewrap(str(broken), None, (0, 8, 0))
    async with sandbox(bubblewraps=lambda: [fake, *probe.candidates()]) as box:
        assert (await box.run(Spec(content="print(1)", name="one.py"))).ok


async def test_when_no_bubblewrap_works_its_own_words_are_told(tmp_path: Path) -> None:
    """When no box can be made, the error carries what bubblewrap said and what to do."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    with pytest.raises(BackendUnavailable, match="No permissions to create new namespace") as caught:
        async with sandbox(bubblewraps=lambda: [Bubblewrap(str(broken), None, (0, 8, 0))]):
            pass
    assert caught.value.hint


DEPRIVING = """#!/bin/bash
# bubblewrap whose children have no capabilities, as Ubuntu's AppArmor profile for it makes them
for word; do
    if [[ $word == --cap-add ]]; then skip=yes; elif [[ -n $skip ]]; then skip=; else words+=("$word"); fi
done
exec bwrap "${words[@]}"
"""
WRITES = """
import os
def attempt(what, *args):
    try:
        what(*args)
        print("succeeded:", what.__name__, args)
    except OSError as error:
        pass
attempt(open, "/workspace/main.py", "w")
attempt(open, "/workspace/new", "w")
attempt(os.truncate, "/workspace/main.py", 0)
attempt(os.unlink, "/workspace/main.py")
attempt(os.rename, "/workspace/main.py", "/workspace/other.py")
attempt(os.mkdir, "/workspace/folder")
attempt(os.symlink, "/etc/passwd", "/workspace/link")
attempt(os.link, "/workspace/main.py", "/tmp/main.py")
open("/tmp/x", "w").write("x"); os.rename("/tmp/x", "/tmp/y"); os.link("/tmp/y", "/tmp/z")
print("done")
"""


async def test_the_workspace_is_read_only_where_bubblewraps_children_have_no_capabilities(tmp_path: Path) -> None:
    """Where the supervisor cannot seal the mount, Landlock keeps the workspace read-only, and the posture says which."""
    depriving = tmp_path / "bwrap"
    depriving.write_text(DEPRIVING)
    depriving.chmod(0o755)
    async with sandbox(bubblewraps=lambda: [Bubblewrap(str(depriving), None, (0, 11))]) as box:
        posture = {g.name: g for g in (await box.posture()).guarantees}
        assert "Landlock alone" in posture["workspace-read-only"].evidence
        assert posture["file-count-limit"].state is State.NOT_IN_FORCE
        result = await box.run(Spec(content=WRITES, name="main.py"))
    assert (result.stdout, result.stderr) == ("done\n", "")


async def test_an_interpreter_in_a_closed_folder_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The python of a virtual environment inside a folder that only its owner may enter runs the script, and only that
    environment is to be seen of the folder.
    """
    import venv

    with tempfile.TemporaryDirectory(prefix="closed-") as closed:  # made with mode 0700
        Path(closed, "secret").write_text("secret")
        venv.create(Path(closed, "venv"), with_pip=False, symlinks=True)
        package = next(Path(closed, "venv", "lib").glob("python*/site-packages"))
        (package / "only_here.py").write_text("word = 'found'\n")
        monkeypatch.setenv("PATH", f"{closed}/venv/bin:{os.environ['PATH']}")
        script = f"import only_here, os, sys\nprint(only_here.word, sys.executable, os.listdir({closed!r}))"
        async with sandbox() as box:
            result = await box.run(Spec(content=script, name="where.py"))
    assert result.stdout == f"found {closed}/venv/bin/python3 ['venv']\n", result


@pytest.mark.skipif(os.geteuid() != 0, reason="only a root cloche changes uids")
async def test_each_run_of_root_has_a_host_uid_of_its_own() -> None:
    """When cloche is root, a box's processes are on the host neither root's nor those of another box."""
    script = "import time; print(flush=True); time.sleep(1)"
    seen: list[set[int]] = []

    async def look(box: Sandbox) -> None:
        with anyio.move_on_after(20):
            while len(seen) == 0:
                uids = {uid for name, uid in box_processes() if name == "python3"}
                if len(uids) == 2:
                    seen.append(uids)
                await anyio.sleep(0.02)

    def box_processes() -> Iterator[tuple[str, int]]:
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if "/workspace/same.py" in Path(entry.path, "cmdline").read_text():
                        yield "python3", entry.stat().st_uid

    async with sandbox() as box, anyio.create_task_group() as group:
        group.start_soon(look, box)
        for _ in range(2):
            group.start_soon(box.run, Spec(content=script, name="same.py"))
    assert seen, "two boxes with uids of their own were never seen at once"
    (uids,) = seen
    assert all(uid >= 0x7000_0000 for uid in uids)


def cgroups_of(owner: str) -> list[str]:
    return glob.glob(f"/sys/fs/cgroup/**/cloche-{owner}.*", recursive=True)


CLIENT = """
import sys, anyio, cloche
async def main():
    async with cloche.Sandbox(cloche.Settings.from_env({"CLOCHE_MODE": "local"})) as box:
        print(box.owner, flush=True)
        async for event in box.stream(cloche.Spec(content="import time; print('up', flush=True); time.sleep(60)", name="s.py")):
            if isinstance(event, cloche.Output):
                print("running", flush=True)
anyio.run(main)
"""


def start_client() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CLIENT], stdout=subprocess.PIPE, text=True)


async def test_what_a_killed_client_left_goes_at_the_next_open() -> None:
    """After kill -9 of the client its box dies at once; its cgroup and its file go when the next sandbox opens, while the
    box of a living client stays.
    """
    state = await anyio.to_thread.run_sync(owners.state_folder)
    clients = [start_client() for _ in range(2)]
    try:
        names = []
        for client in clients:
            assert client.stdout is not None
            names.append(client.stdout.readline().strip())
            assert client.stdout.readline() == "running\n"
        box_processes = psutil.Process(clients[0].pid).children(recursive=True)
        assert "bwrap" in {process.name() for process in box_processes}
        clients[0].send_signal(signal.SIGKILL)
        clients[0].wait()
        _, alive = psutil.wait_procs(box_processes, timeout=2)
        assert not alive
        before = cgroups_of(names[1])
        async with sandbox() as box:
            await box.run(Spec(content="", name="x.py"))
        assert cgroups_of(names[0]) == []
        assert cgroups_of(names[1]) == before
        assert {path.stem for path in state.glob("*.owner")} & set(names) == {names[1]}
        assert clients[1].poll() is None
    finally:
        for client in clients:
            client.kill()
            client.communicate()
    async with sandbox():
        pass  # sweeps what the second one left


def test_a_parent_that_ignores_its_children_does_no_harm() -> None:
    """Started by a program that ignores SIGCHLD, as some daemons do, a run still ends, and so does its box."""
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "import cloche; print(cloche.run(content='print(1)', name='one.py', timeout=10).stdout)"
    )
    environ = {**os.environ, "CLOCHE_MODE": "local"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, b"1\n\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's namespace is what every box has")
def test_root_of_a_user_namespace_can_run() -> None:
    """Root in a user namespace, as in a rootless container, has no other uids to give away, and runs as what it is."""
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", "cloche", "run", "--json", "-"]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "one.sh")
        script.write_text("id -u")
        environ = {**os.environ, "CLOCHE_MODE": "local", "XDG_RUNTIME_DIR": folder}
        done = subprocess.run([*command[:-1], str(script)], env=environ, capture_output=True, timeout=60, check=False)
    assert json.loads(done.stdout)["stdout"] == "1000\n", done


async def test_a_virtual_environment_whose_python_is_a_link_to_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every link between an environment's python and the program that it is leads somewhere in the box."""
    import venv

    program = os.path.realpath(sys.executable)
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(program if name == "first" else "first")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python3"
    python.unlink()
    python.symlink_to(tmp_path / "second")
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    async with sandbox() as box:
        result = await box.run(Spec(content="import json, sys; print(sys.prefix)", name="where.py"))
    assert result.stdout == f"{tmp_path / 'venv'}\n", result
