"""Images of several layers, in the form of ``docker save``, which every engine loads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tests.engines.docker import api, cache, host
from tests.engines.docker.images import Image
from tests.engines.kubernetes import configuration
from tests.engines.kubernetes.cluster import Cluster
from tests.engines.kubernetes.images import MACHINES

BLOCK = 1024 * 1024


@dataclass(frozen=True)
class Layered:
    """An image, and what it is made of."""

    name: str
    layers: tuple[Image, ...]
    """The lowest first."""
    config: Mapping[str, Any]
    """As engines keep it: User, Env, Entrypoint…"""

    @property
    def labels(self) -> dict[str, str]:
        """Its own, and one that tells it from an image of the same name that an older recipe gave."""
        recipe = "\n".join([*(layer.recipe for layer in self.layers), json.dumps(self.config, sort_keys=True)])
        return {**self.config.get("Labels", {}), "cloche-test.recipe": cache.key(recipe)}

    def build(self) -> list[Path]:
        """The tar files of its layers."""
        return [layer.obtain() for layer in self.layers]

    def write(self, into: IO[bytes]) -> None:
        """Write its archive to a stream, such as a pipe."""
        layers = {_digest(path): path for path in self.build()}
        machine = platform.machine()
        config = {
            "architecture": MACHINES.get(machine, machine),
            "os": "linux",
            "config": {**self.config, "Labels": self.labels},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in layers]},
        }
        described = json.dumps(config).encode()
        name = f"{hashlib.sha256(described).hexdigest()}.json"
        places = [f"{digest}/layer.tar" for digest in layers]
        manifest = [{"Config": name, "RepoTags": [self.name], "Layers": places}]
        with tarfile.open(fileobj=into, mode="w|", bufsize=BLOCK) as archive:
            _add(archive, name, described)
            for place, path in zip(places, layers.values(), strict=True):
                info = tarfile.TarInfo(place)
                info.size = path.stat().st_size
                with open(path, "rb") as layer:
                    archive.addfile(info, layer)
            _add(archive, "manifest.json", json.dumps(manifest).encode())

    def load(self, engine: api.Engine) -> None:
        """Give it to a Docker daemon, unless that has it from the same recipe.

        Raises:
            EngineError: the daemon does not take it.
        """
        labels = self.labels
        try:
            has: dict[str, str] = engine.get(f"/images/{self.name}/json")["Config"]["Labels"] or {}
        except api.EngineError:
            has = {}
        if labels.items() <= has.items():
            return
        self.build()
        host.say(f"loading the image {self.name}")
        with tempfile.TemporaryFile(dir=cache.home()) as file:
            self.write(file)
            file.seek(0)
            with open(file.fileno(), "rb", closefd=False) as archive:
                engine._watch(engine.ask("POST", "/images/load", {"quiet": 1}, archive))

    def add_to(self, cluster: Cluster) -> None:
        """Give it to a cluster's containerd, from where pods have it without a pull.

        Raises:
            RuntimeError: it does not take it, or there is no cluster.
        """
        ctr = ("ctr", "--address", configuration.SOCKET, "--namespace", "k8s.io", "images", "import", "-")
        command, environ = cluster.enter(*ctr), cluster._environ()
        with tempfile.TemporaryFile() as log:
            with (
                subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=log, stderr=log) as process,
                contextlib.suppress(BrokenPipeError),  # its own words tell more
            ):
                self.write(cast("IO[bytes]", process.stdin))
            if process.returncode:
                log.seek(0)
                said = log.read().decode(errors="replace")
                raise RuntimeError(f"containerd does not take {self.name}:\n{said[-3000:]}")


def _digest(path: Path) -> str:
    with open(path, "rb") as layer:
        return hashlib.file_digest(layer, "sha256").hexdigest()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
