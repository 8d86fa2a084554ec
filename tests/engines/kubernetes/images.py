"""The test images as a cluster takes them: archives in the form of ``docker save``, made from root folders on their way.

They are those of the docker engines, and ``cloche-test/pause:1``, whose one process holds a pod's namespaces.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import IO, Any

from tests.engines.docker import host, images
from tests.engines.docker.images import SANDBOX, TINY, Image

SOURCE = Path(__file__).with_name("pause.c")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Go's names for processors, which images use."""


class Pause(Image):
    """Also made of its own source."""

    @property
    def recipe(self) -> str:
        """All that decides what is in it."""
        return f"{super().recipe}\n{SOURCE.read_text()}"


def _make_pause(tree: Path) -> None:
    host.need("gcc", "/usr/include/stdio.h")
    program = str(tree / "pause")
    host.run("gcc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o", program, str(SOURCE))


PAUSE = Pause("cloche-test/pause:1", ("USER 65535:65535", 'ENTRYPOINT ["/pause"]'), _make_pause)
ALL = (PAUSE, TINY, SANDBOX)


def write(image: Image, into: IO[bytes]) -> None:
    """Write an image's archive to a stream, such as a pipe."""
    root = image.obtain()
    with open(root, "rb") as layer:
        digest = hashlib.file_digest(layer, "sha256").hexdigest()
    machine = platform.machine()
    config = {
        "architecture": MACHINES.get(machine, machine),
        "os": "linux",
        "config": {**_config(image.changes), "Labels": image.labels},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    described = json.dumps(config).encode()
    name = f"{hashlib.sha256(described).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [image.name], "Layers": [f"{digest}/layer.tar"]}]
    with tarfile.open(fileobj=into, mode="w|", bufsize=1024 * 1024) as archive:
        _add(archive, name, described)
        layer_info = tarfile.TarInfo(f"{digest}/layer.tar")
        layer_info.size = root.stat().st_size
        with open(root, "rb") as layer:
            archive.addfile(layer_info, layer)
        _add(archive, "manifest.json", json.dumps(manifest).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _config(changes: tuple[str, ...]) -> dict[str, Any]:
    """What lines of a Dockerfile say, as the configuration of an image: as many kinds of lines as our images have."""
    # What Docker gives to every image that says nothing else.
    found: dict[str, Any] = {"Env": [images.ENVIRONMENT.removeprefix("ENV ")]}
    for change in changes:
        word, _, value = change.partition(" ")
        match word:
            case "USER":
                found["User"] = value
            case "ENV":
                found["Env"] = [value]
            case "ENTRYPOINT":
                found["Entrypoint"] = json.loads(value)
            case _:
                raise ValueError(f"an image with {change!r} cannot be made for a cluster yet")
    return found
