"""What a sandbox is asked for with, and how the supervisor is started in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloche.backends import shape
from cloche.backends.contract import Profile
from cloche.backends.opensandbox import manifest
from cloche.backends.opensandbox.manifest import Made
from cloche.spec import Limits, Network

PROFILE = Profile("r1", "o1", 2000.5, Limits(), bundle_bytes=10 * 2**20)
MADE = Made(name="t1", access_token="hush", expires_at=2000.9, lifetime_s=180.2)


def body(profile: Profile = PROFILE, made: Made = MADE, place: str | None = "here") -> dict[str, Any]:
    return manifest.sandbox(profile, "python:3.12-slim", place, made)


def test_body() -> None:
    """A sandbox is asked for with its image, a main process that does nothing, its bounds, and whose it is."""
    memory = 256 * 2**20 + 2**20 // 2 + shape.OVERHEAD_BYTES + manifest.EXECD_BYTES + 10 * 2**20
    assert body() == {
        "image": {"uri": "python:3.12-slim"},
        "entrypoint": ["tail", "-f", "/dev/null"],
        "timeout": 181,
        "resourceLimits": {"cpu": "1000m", "memory": f"{memory // 1024}Ki"},
        "env": {"EXECD_ACCESS_TOKEN": "hush", "TMPDIR": "/tmp"},
        "metadata": {
            "cloche-kind": "box",
            "cloche-run": "r1",
            "cloche-owner": "o1",
            "cloche-try": "t1",
            "cloche-expires": "2000",
            "cloche-place": "here",
        },
    }
    assert json.loads(json.dumps(body())) == body()


def test_without_a_lock() -> None:
    """Where no lock tells that the owner lives, no place of one is told."""
    assert "cloche-place" not in body(place=None)["metadata"]


@pytest.mark.parametrize(
    ("lifetime_s", "timeout"),
    [(-5.0, 60), (0.0, 60), (59.9, 60), (60.0, 60), (60.1, 61), (3600.0, 3600), (604_800.5, 604_801)],
)
def test_lifetime(lifetime_s: float, timeout: int) -> None:
    """The service takes whole seconds, and at least a minute; a sandbox never lives shorter than it was meant to."""
    found = body(made=replace(MADE, lifetime_s=lifetime_s))["timeout"]
    assert (found, type(found)) == (timeout, int)


@given(
    st.floats(0.0001, 1024),
    st.integers(16 * 2**20, 2**40),
    st.integers(0, 2**30),
    st.integers(0, 2**30),
)
def test_bounds(cpus: float, memory: int, output: int, bundle: int) -> None:
    """Bounds are strings that the service reads, never 0, and leave the script the memory that it was promised."""
    profile = replace(PROFILE, limits=Limits(cpus=cpus, memory_bytes=memory, output_bytes=output), bundle_bytes=bundle)
    found = body(profile)["resourceLimits"]
    assert found.keys() == {"cpu", "memory"}
    assert re.fullmatch(r"[1-9][0-9]*m", found["cpu"])
    assert re.fullmatch(r"[1-9][0-9]*Ki", found["memory"])
    assert int(found["cpu"][:-1]) == max(10, round(1000 * cpus))
    room = int(found["memory"][:-2]) * 1024 - manifest.memory_bytes(profile)
    assert 0 <= room < 1024
    assert manifest.memory_bytes(profile) >= memory + output // 2 + shape.OVERHEAD_BYTES + manifest.EXECD_BYTES
    assert manifest.memory_bytes(profile) <= memory + output // 2 + 64 * 2**20


def test_a_large_bundle_is_not_all_in_memory() -> None:
    """Of an upload execd keeps no more in memory than its spool has, so no more room is asked for."""
    at_bound = replace(PROFILE, bundle_bytes=manifest.SPOOL_BYTES)
    assert manifest.memory_bytes(replace(PROFILE, bundle_bytes=2**30)) == manifest.memory_bytes(at_bound)


NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def test_metadata_is_what_the_service_takes() -> None:
    """Names and values of the metadata, the longest that there are too, keep to the rules of Kubernetes' labels."""
    profile = replace(PROFILE, run_id="r" * 63, owner="o" + "f" * 16, expires_at=2.0**40)
    made = replace(MADE, name="f" * 32, expires_at=10.0**14)
    for name, text in body(profile, made, place="f" * 16)["metadata"].items():
        assert NAME.fullmatch(name)
        assert NAME.fullmatch(text)


def test_nothing_of_a_script() -> None:
    """Whoever may list sandboxes sees nothing of the script, of its interpreter neither, nor the token in the metadata."""
    made = body(replace(PROFILE, interpreter="/opt/mine/python", image="mine:1"))
    assert "mine" not in json.dumps(made)
    assert "hush" not in json.dumps({**made, "env": {}})
    assert made.keys() == {"image", "entrypoint", "timeout", "resourceLimits", "env", "metadata"}


def test_the_token_is_the_only_variable() -> None:
    """Only execd's token is in the sandbox's environment, so that nothing of this process gets there."""
    assert body()["env"] == {"EXECD_ACCESS_TOKEN": "hush", "TMPDIR": "/tmp"}


def test_supervisor() -> None:
    """The supervisor runs the script as a uid and gid of its own, bounds its files and processes, and finds its bundle."""
    assert manifest.supervisor(PROFILE, 23_456) == [
        "/opt/cloche/supervisor",
        "run",
        "--bundle",
        "/opt/cloche/bundle",
        "--script-uid",
        "23456",
        "--script-gid",
        "23456",
        "--fsize",
        str(64 * 2**20),
        "--nproc",
        "128",
        "--sockets",
        "unix",
    ]


def test_open_network() -> None:
    """Only a run that asks for a network may make other sockets than local ones."""
    closed, opened = PROFILE, replace(PROFILE, network=Network.OPEN)
    assert manifest.supervisor(closed, 20_000)[-2:] == ["--sockets", "unix"]
    assert "--sockets" not in manifest.supervisor(opened, 20_000)
    assert manifest.supervisor(opened, 20_000) == manifest.supervisor(closed, 20_000)[:-2]


def test_uids() -> None:
    """A script's uid is never root's, nor one that an image has, nor one that a user namespace of 65536 lacks."""
    first, last = manifest.SCRIPT_UIDS
    assert 1000 < first <= last < 65_534


def test_upload() -> None:
    """Each file is told about before it comes, with a mode whose digits are decimal ones, and its bytes stay as they are."""
    parts = manifest.upload([("/opt/cloche/supervisor", 0o700, b"\x7fELF"), ("/a\n\"b'é", 0o0600, b"")])
    assert [name for name, _ in parts] == ["metadata", "file", "metadata", "file"]
    about = [json.loads(content) for name, content in parts if name == "metadata"]
    assert about == [{"path": "/opt/cloche/supervisor", "mode": 700}, {"path": "/a\n\"b'é", "mode": 600}]
    assert [content for name, content in parts if name == "file"] == [b"\x7fELF", b""]


@pytest.mark.parametrize(("mode", "digits"), [(0o700, 700), (0o644, 644), (0o4755, 4755), (0o7, 7), (0, 0)])
def test_mode(mode: int, digits: int) -> None:
    """0o700 is sent as 700, of which execd reads the digits as octal ones."""
    (_, about), _ = manifest.upload([("/a", mode, b"")])
    assert json.loads(about)["mode"] == digits


def test_command() -> None:
    """A list of arguments is sent as it is, or as a shell's text where execd takes nothing else; never as both."""
    argv = ["/opt/cloche/supervisor", "run", "--nproc", "7"]
    assert manifest.command(argv, shell=False) == {"argv": argv}
    assert manifest.command(argv, shell=True) == {"command": "exec /opt/cloche/supervisor run --nproc 7"}


PRINTF = shutil.which("printf") or ""


def printed(arguments: list[str]) -> list[str]:
    """The arguments that a program has which a real shell is told to start."""
    text = manifest.command([PRINTF, "%s\\0", *arguments], shell=True)["command"]
    done = subprocess.run(
        ["/bin/sh", "-c", text], check=True, capture_output=True, timeout=30, env={"IFS": "x", "A": "bad"}
    )
    assert done.stderr == b""
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.skipif(not PRINTF, reason="there is no program printf")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), min_size=1, max_size=6
    )
)
@example(["$A", "${A}", "$(echo bad)", "`echo bad`", "'", "''", '"', "\\", "\\'", "'; echo bad; '"])
@example(["", " ", "\n", "a\nb", "\t", "*", "?", "~", "a=b", "#", "!", "!!", ";", "&", "|", ">", "<", "{a,b}", "-n"])
@example(["é", "\u2028", "\U0001f600", "\x01", "\x7f", "%s", "\\0"])
def test_quoting(arguments: list[str]) -> None:
    """A real shell gives a program the very arguments, whatever characters are in them."""
    assert printed(arguments) == arguments


@pytest.mark.parametrize("shell", [True, False])
@pytest.mark.parametrize("argv", [["a", "b\0c"], ["\0"], ["a\0", "b"]], ids=repr)
def test_nul(argv: list[str], *, shell: bool) -> None:
    """No program can have an argument with a NUL, so none is sent."""
    with pytest.raises(ValueError, match="NUL"):
        manifest.command(argv, shell=shell)
