"""The real server from its package, on a private Docker daemon, in that daemon's network.

A pair of devices joins that network to this machine's: the server and the ports that it publishes for its sandboxes are at one
address there, which nobody but this machine reaches. It goes with the daemon's namespaces.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.engines.docker import cache, host
from tests.engines.docker import images as docker_images
from tests.engines.docker.daemon import Daemon
from tests.engines.docker.private import START_S
from tests.engines.opensandbox import images
from tests.engines.opensandbox.images import Generation

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PORT = 8080
INSIDE = "outside0"
"""The device's name in the daemon's network."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever proxy this user has: it does not reach the service."""
CONFIG = """\
[server]
host = "{address}"
port = {port}
api_key = "{key}"
[runtime]
type = "docker"
execd_image = "{execd}"
[docker]
network_mode = "bridge"
publish_host = "{address}"
[store]
path = "{store}"
"""


@dataclass(frozen=True)
class Link:
    """The way from this machine to a service: a device, this machine's address, and the service's."""

    device: str
    here: str
    there: str


LINKS: Mapping[Generation, Link] = {
    "current": Link("cloche-osb0", "172.31.78.1", "172.31.78.2"),
    "old": Link("cloche-osb1", "172.31.79.1", "172.31.79.2"),
}
"""One service of each generation can be up at a time."""


def python() -> Path:
    """The interpreter of an environment that has the server."""
    recipe = REQUIREMENTS.read_text() + sys.version + sys.base_prefix
    return cache.obtain("opensandbox", recipe, _install) / "bin/python"


def _install(folder: Path) -> None:
    host.say("installing the OpenSandbox server")
    host.run(sys.executable, "-m", "venv", str(folder))
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    host.run(*pip, "--requirement", str(REQUIREMENTS))


class Service(Daemon):
    """An OpenSandbox server and its Docker daemon."""

    def __init__(self, generation: Generation, folder: Path, *, owned: bool = True) -> None:
        super().__init__("current", folder, owned=owned)
        self.generation: Generation = generation
        self.link = LINKS[generation]
        self.url = f"http://{self.link.there}:{PORT}"

    @property
    def _config(self) -> Path:
        return self.folder / "server.toml"

    @property
    def key(self) -> str:
        """What its users have to show."""
        return self.folder.joinpath("key").read_text()

    def start(self) -> None:
        """Start the daemon and the server, or what of them is not running, and wait until both answer.

        Raises:
            MissingError: this machine lacks something for them.
            RuntimeError: one does not start; the message has the end of its log.
        """
        super().start()
        self.add(images.SANDBOX, *docker_images.ALL, images.execd(self.generation))
        self._join()
        self.start_server()

    def close(self) -> None:
        """End all of it. The way to it goes with its network, which takes its time, so it is removed at once."""
        super().close()
        self._leave_link()

    def _leave_link(self) -> None:
        subprocess.run(["ip", "link", "delete", self.link.device], capture_output=True, check=False)

    def _join(self) -> None:
        look = self.enter("ip", "link", "show", INSIDE)
        if subprocess.run(look, capture_output=True, check=False).returncode == 0:
            return
        self._leave_link()  # that of a service that was killed
        inside = str(self._namespaces.pid)
        host.run("ip", "link", "add", self.link.device, "type", "veth", "peer", "name", INSIDE, "netns", inside)
        host.run("ip", "address", "add", f"{self.link.here}/24", "dev", self.link.device)
        host.run("ip", "link", "set", self.link.device, "up")
        host.run(*self.enter("ip", "address", "add", f"{self.link.there}/24", "dev", INSIDE))
        host.run(*self.enter("ip", "link", "set", INSIDE, "up"))

    def kill_server(self) -> None:
        """Kill the server alone, by SIGKILL: its daemon and the sandboxes live on."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if str(self._config) in words and words[0] == str(python()):
                    process.kill()
        while self.server_answers():
            time.sleep(0.01)

    def start_server(self, *, daemon: str = "") -> None:
        """Start the server, if it is not running. ``daemon``: the address of another one than its own.

        Raises:
            RuntimeError: it does not start; the message has the end of its log.
        """
        if self.server_answers():
            return
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        if not self.folder.joinpath("key").exists():
            self.folder.joinpath("key").write_text(secrets.token_hex(16))
        self._config.write_text(
            CONFIG.format(
                address=self.link.there,
                port=PORT,
                key=self.key,
                execd=images.execd(self.generation).name,
                store=home / "opensandbox.db",
            )
        )
        program = ("-c", "import sys; from opensandbox_server.cli import main; sys.exit(main())")
        environ = {"PATH": os.environ["PATH"], "HOME": str(home), "DOCKER_HOST": daemon or self.host}
        server = self._run(environ, "server.log", str(python()), *program, "--config", str(self._config))
        self._others.append(server)
        end = time.monotonic() + START_S
        while not self.server_answers():
            if server.poll() is not None or time.monotonic() > end:
                said = self.folder.joinpath("server.log").read_text(errors="replace")
                raise RuntimeError(f"the OpenSandbox server does not start; its log ends so:\n{said[-3000:]}")
            time.sleep(0.05)

    def leave(self) -> None:
        """Forget the processes that this object started: they go on when its program ends."""
        for process in self._others:
            process.returncode = 0  # nobody waits for it
        self._others.clear()

    def server_answers(self) -> bool:
        """Whether the server is there."""
        try:
            with _DIRECT.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
