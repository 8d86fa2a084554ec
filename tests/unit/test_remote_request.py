"""What a service is asked for a run: what the caller said, and nothing else."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloche._kit.http import Pieces
from cloche.runtime.delivery import Bounds, deliver
from cloche.runtime.remote.request import MAX_INLINE_STDIN_BYTES, body, tar
from cloche.settings import Settings, resolve
from cloche.spec import Spec
from cloche.supervisor.bundle import Entry, File, Folder, Link

SETTINGS = Settings()
BOUNDS = Bounds(512 * 1024, 64 * 2**20)


def asked(spec: Spec, settings: Settings = SETTINGS) -> dict[str, Any] | Pieces:
    bundle = deliver(spec, resolve(spec, settings), BOUNDS).bundle
    return body(spec, settings, bundle, "BOUNDARY")


def fields(spec: Spec, settings: Settings = SETTINGS) -> dict[str, Any]:
    found = asked(spec, settings)
    assert isinstance(found, dict)
    return found


def parts(spec: Spec, settings: Settings = SETTINGS) -> Mapping[str, bytes]:
    found = asked(spec, settings)
    assert isinstance(found, Pieces)
    assert found.content_type == "multipart/form-data; boundary=BOUNDARY"
    first, *between, last = (b"\r\n" + b"".join(found.pieces)).split(b"\r\n--BOUNDARY")
    assert (first, last) == (b"", b"--\r\n")
    given: dict[str, bytes] = {}
    for part in between:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        match = re.search(rb'form-data; name="(\w+)"; filename="(\w+)"', head)
        assert match is not None
        assert match[1] == match[2]
        given[match[1].decode()] = content
    return given


def test_a_small_one() -> None:
    """A script alone is JSON. What is not said is not sent, but for the floor and the network."""
    assert fields(Spec(content="print('ü')", name="a.py")) == {
        "name": "a.py",
        "content": "print('ü')",
        "network": "none",
        "min_isolation": "namespace",
    }


def test_all_fields() -> None:
    """Every field of a spec is sent as it was said."""
    spec = Spec.model_validate(
        {
            "content": "x",
            "name": "bin/a",
            "interpreter": "python3",
            "args": ["a b", "\udcff"],
            "env": {"A": "1"},
            "stdin": b"\x00\xff",
            "timeout": 5,
            "memory": "32Mi",
            "cpus": 0.5,
            "pids": 9,
            "network": "open",
            "image": "i",
            "min_isolation": "container",
        }
    )
    sent = fields(spec)
    assert sent == {
        "name": "bin/a",
        "content": "x",
        "interpreter": "python3",
        "args": ["a b", "\udcff"],
        "env": {"A": "1"},
        "stdin": "AP8=",
        "timeout": 5.0,
        "memory": 32 * 2**20,
        "cpus": 0.5,
        "pids": 9,
        "network": "open",
        "image": "i",
        "min_isolation": "container",
    }
    # Whoever reads it there gets the same spec: a byte that is no text is still that byte.
    again = Spec.model_validate({**json.loads(json.dumps(sent)), "stdin": b"\x00\xff"})
    assert again == spec
    assert set(Spec.model_fields) - set(sent) == {"script", "workspace"}


def test_settings_that_are_set() -> None:
    """A setting that is set here is the caller's word; one that is not leaves it to the service; a spec is above both."""
    settings = Settings.from_env({"CLOCHE_TIMEOUT": "7", "CLOCHE_MEMORY": "64Mi", "CLOCHE_MIN_ISOLATION": "container"})
    sent = fields(Spec(content="x", name="a.py", memory="32Mi"), settings)
    assert (sent["timeout"], sent["memory"], sent["min_isolation"]) == (7.0, 32 * 2**20, "container")
    assert not {"cpus", "pids", "image"} & set(sent)


def test_a_script_of_the_host(tmp_path: Path) -> None:
    """A script that is a file is sent under its own name; its place on this machine is nobody's business."""
    (tmp_path / "report.py").write_text("pass")
    sent = fields(Spec(script=str(tmp_path / "report.py")))
    assert (sent["name"], sent["content"]) == ("report.py", "pass")
    assert str(tmp_path) not in json.dumps(sent)


def test_a_script_that_is_no_text(tmp_path: Path) -> None:
    """A script that JSON cannot carry is sent as the one file of a workspace."""
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nprint('\xe9')\n")
    sent = parts(Spec(script=str(tmp_path / "latin.py")))
    assert json.loads(sent["spec"])["script"] == "latin.py"
    with tarfile.open(fileobj=io.BytesIO(sent["workspace"])) as archive:
        file = archive.extractfile("latin.py")
        assert file is not None
        assert b"\xe9" in file.read()


def test_a_large_stdin() -> None:
    """Much of stdin is sent as it is."""
    stdin = bytes(MAX_INLINE_STDIN_BYTES + 1)
    sent = parts(Spec(content="x", name="a.py", stdin=stdin))
    assert sent["stdin"] == stdin
    assert "stdin" not in json.loads(sent["spec"])


def test_a_workspace(tmp_path: Path) -> None:
    """A folder is sent as a tar, with the script in it; links and modes stay what they are."""
    (tmp_path / "a/empty").mkdir(parents=True)
    (tmp_path / "a/run").write_text("#!/bin/sh\n")
    (tmp_path / "a/run").chmod(0o755)
    (tmp_path / "link").symlink_to("a/run")
    (tmp_path / "new\nline ü").write_text("x" * 1000)
    sent = parts(Spec(content="pass", name="b/main.py", workspace=tmp_path, stdin=b""))
    assert json.loads(sent["spec"])["script"] == "b/main.py"
    assert "content" not in json.loads(sent["spec"])
    assert str(tmp_path).encode() not in b"".join(sent.values())
    assert sent["stdin"] == b""
    with tarfile.open(fileobj=io.BytesIO(sent["workspace"])) as archive:
        found = {m.name: (m.type, oct(m.mode), m.linkname, m.size) for m in archive.getmembers()}
    assert found == {
        "a": (tarfile.DIRTYPE, "0o755", "", 0),
        "a/empty": (tarfile.DIRTYPE, "0o755", "", 0),
        "a/run": (tarfile.REGTYPE, "0o755", "", 10),
        "link": (tarfile.SYMTYPE, "0o777", "a/run", 0),
        "new\nline ü": (tarfile.REGTYPE, "0o644", "", 1000),
        "b": (tarfile.DIRTYPE, "0o755", "", 0),
        "b/main.py": (tarfile.REGTYPE, "0o644", "", 4),
    }


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0") | st.sampled_from("\udc80\udcff"), min_size=1
).filter(lambda name: name not in {".", ".."})
ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    st.builds(File, NAMES, st.binary(max_size=2000), st.booleans()),
    st.builds(Folder, NAMES),
    st.builds(Link, NAMES, NAMES),
)


@given(st.lists(ENTRIES, max_size=8, unique_by=lambda entry: entry.path))
def test_any_tar(entries: list[Entry]) -> None:
    """Whatever is in a workspace, with names of any length and of any bytes, comes out of the tar as it went in."""
    read: list[Entry] = []
    with tarfile.open(
        fileobj=io.BytesIO(b"".join(tar(entries))), encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for member in archive.getmembers():
            if member.issym():
                read.append(Link(member.name, member.linkname))
            elif member.isdir():
                read.append(Folder(member.name))
            else:
                file = archive.extractfile(member)
                assert file is not None
                read.append(File(member.name, file.read(), bool(member.mode & 0o111)))
    assert read == entries


@pytest.mark.parametrize("sizes", [[], [0], [1, 0, 70_000], [200_000]])
def test_pieces(sizes: list[int]) -> None:
    """A body in pieces is sent in chunks, and is all of it."""
    pieces = [bytes([i]) * size for i, size in enumerate(sizes)]

    async def chunks() -> list[bytes]:
        return [chunk async for chunk in Pieces("x/y", pieces).chunks()]

    sent = anyio.run(chunks)
    assert b"".join(sent) == b"".join(pieces)
    assert all(0 < len(chunk) <= 64 * 1024 for chunk in sent)
