"""A private Docker daemon that a test may start, stop, kill and start again.

containerd runs beside dockerd and not as its child, as where Docker is installed from packages: it lives on when dockerd dies.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tests.engines.docker import binaries, host
from tests.engines.docker.certificates import Certificates
from tests.engines.docker.private import Private, Programs

Flavour = Literal["current", "old"]

BRIDGE = "172.31.77.1/24"
"""The address of docker0; every daemon may have the same, since each has a network of its own."""
ADDRESS = "/run/containerd/containerd.sock"
"""/run is the daemon's own, so short names are free; and nobody else's containerd is taken for it."""
CONTAINERD = """\
version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
address = "{address}"
"""


class Daemon(Private):
    """Docker of a flavour, with all its state in a folder of its own, which must not be used for anything else.

    ``listen`` are further addresses beside the unix socket, such as ``tcp://127.0.0.1:2376``. For these to be reached from a
    test the daemon must live in the machine's own network: say ``private_network=False``, and it makes no bridge and
    touches no firewall, so that its containers have no network but ``none`` and ``host``. ``tls`` is demanded from who
    comes by TCP. With ``live_restore`` its containers outlive :meth:`stop`; they outlive :meth:`kill` in any case, but
    without it the next :meth:`start` ends them, which takes ten seconds for one that ignores SIGTERM.
    """

    def __init__(
        self,
        flavour: Flavour,
        folder: Path,
        *,
        live_restore: bool = False,
        listen: Sequence[str] = (),
        tls: Certificates | None = None,
        private_network: bool = True,
        owned: bool = True,
    ) -> None:
        super().__init__(folder, "docker.sock", network=private_network, owned=owned)
        self.name = f"Docker ({flavour})"
        self.flavour: Flavour = flavour
        self._live_restore = live_restore
        self._listen = listen
        self._tls = tls
        self._private_network = private_network
        self._containerd: subprocess.Popen[bytes] | None = None

    def _launch(self) -> subprocess.Popen[bytes]:
        host.need("ip", "iptables")
        programs = Programs(*binaries.OLD.obtain()) if self.flavour == "old" else Programs(binaries.current())
        environ = programs.environ()
        self._configure(programs)
        if self._containerd is None or self._containerd.poll() is not None:
            config = str(self.folder / "containerd.toml")
            self._containerd = self._run(environ, "containerd.log", "containerd", "--config", config)
            self._others.append(self._containerd)
        return self._run(environ, "service.log", "dockerd", "--config-file", str(self.folder / "daemon.json"))

    def _configure(self, programs: Programs) -> None:
        containerd = CONTAINERD.format(root=self.folder / "containerd", address=ADDRESS)
        self.folder.joinpath("containerd.toml").write_text(containerd)
        options: dict[str, Any] = {
            "hosts": [self.host, *self._listen],
            "data-root": str(self.folder / "data"),
            "exec-root": "/run/docker",
            "pidfile": "/run/docker.pid",
            "containerd": ADDRESS,
            "cgroup-parent": f"/{self.cgroup}",
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "live-restore": self._live_restore,
        }
        if self.flavour == "current":
            # As it comes: systrap, which needs no KVM, and limits by cgroup.
            options |= {"runtimes": {"runsc": {"path": str(programs.find("runsc"))}}}
        if self._private_network:
            options |= {"bip": BRIDGE}
        else:
            options |= {"bridge": "none", "iptables": False, "ip6tables": False}
        if self._tls is not None:
            options |= {
                "tlsverify": True,
                "tlscacert": str(self._tls.ca),
                "tlscert": str(self._tls.server_cert),
                "tlskey": str(self._tls.server_key),
            }
        self.folder.joinpath("daemon.json").write_text(json.dumps(options, indent=1))
