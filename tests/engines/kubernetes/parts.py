"""The programs that make a cluster: how each is started, and how it tells that it works."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.engines.docker.namespaces import Namespaces, birth
from tests.engines.kubernetes.configuration import ADDRESS, API_PORT, API_SERVICE, NODE, SERVICES, SOCKET, Settings

Name = Literal["containerd", "etcd", "apiserver", "controller-manager", "scheduler", "kubelet"]
HEALTH_S = 5.0

SERVERS = {
    "apiserver": f"IP:127.0.0.1,IP:{ADDRESS},IP:{API_SERVICE},DNS:localhost,DNS:kubernetes.default.svc,DNS:kubernetes",
    "kubelet-server": f"IP:{ADDRESS},DNS:{NODE}",
}
"""Who listens with a certificate, and its alternative names."""


@dataclass(frozen=True)
class Health:
    """Where a part answers 200 when it works, on the node's loopback device."""

    port: int
    path: str
    tls: bool = True


@dataclass(frozen=True)
class Part:
    """A program of the cluster."""

    name: Name
    program: str
    command: Callable[[Settings], list[str]]
    health: Health | None
    """None: it works when it takes connections to its socket."""

    def works(self, inside: Namespaces) -> bool:
        """Whether it says so."""
        try:
            if self.health is None:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(f"/proc/{inside.pid}/root{SOCKET}")
                return True
            with warnings.catch_warnings():
                # Python 3.11's wrap_socket forgets a socket whose other side reset it in that very moment, as a server does
                # that is killed.
                warnings.simplefilter("ignore", ResourceWarning)
                return _answers(inside, self.health)
        except OSError:
            return False

    def processes(self, inside: Namespaces) -> Iterator[tuple[int, int]]:
        """Its processes, as seen from outside: numbers and births. None when it does not run."""
        with contextlib.suppress(OSError):
            home = os.readlink(f"/proc/{inside.pid}/ns/pid")
            for entry in Path("/proc").iterdir():
                # Others come and go meanwhile; and threads of the kernel have no program.
                with contextlib.suppress(OSError):
                    if (
                        entry.name.isdigit()
                        and os.path.basename(os.readlink(entry / "exe")) == self.program
                        and os.readlink(entry / "ns/pid") == home
                        and (born := birth(int(entry.name))) is not None
                    ):
                        yield int(entry.name), born


def _answers(inside: Namespaces, health: Health) -> bool:
    try:
        return _ask(inside, health)
    except (OSError, http.client.HTTPException):
        return False


def _ask(inside: Namespaces, health: Health) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", health.port, timeout=HEALTH_S)
    with contextlib.ExitStack() as stack:
        connection.sock = stack.enter_context(inside.socket())
        connection.sock.settimeout(HEALTH_S)
        connection.sock.connect(("127.0.0.1", health.port))
        if health.tls:
            # Controller-manager and scheduler sign their own; and whoever listens here is ours.
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            secured = context.wrap_socket(connection.sock, do_handshake_on_connect=False)
            connection.sock = stack.enter_context(secured)
            secured.do_handshake()
        connection.request("GET", health.path)
        with connection.getresponse() as answer:
            return answer.status == http.client.OK


def _containerd(settings: Settings) -> list[str]:
    return ["containerd", "--config", str(settings.folder / "containerd.toml")]


def _etcd(settings: Settings) -> list[str]:
    return ["etcd", "--name", NODE, "--data-dir", str(settings.folder / "etcd"), "--log-level", "warn"]


def _apiserver(settings: Settings) -> list[str]:
    certificates = settings.certificates
    return [
        "kube-apiserver",
        f"--advertise-address={ADDRESS}",
        f"--secure-port={API_PORT}",
        "--etcd-servers=http://127.0.0.1:2379",
        f"--service-cluster-ip-range={SERVICES}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",  # beside the usual ones, as kubeadm has it
        "--allow-privileged=true",
        f"--client-ca-file={certificates.authority}",
        f"--tls-cert-file={certificates.cert('apiserver')}",
        f"--tls-private-key-file={certificates.key('apiserver')}",
        f"--kubelet-client-certificate={certificates.cert('apiserver-kubelet')}",
        f"--kubelet-client-key={certificates.key('apiserver-kubelet')}",
        f"--kubelet-certificate-authority={certificates.authority}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={certificates.tokens}",
        f"--service-account-signing-key-file={certificates.tokens}",
        # Else pods' tokens live a year whatever was asked for.
        "--service-account-extend-token-expiration=false",
    ]


def _controller_manager(settings: Settings) -> list[str]:
    return [
        "kube-controller-manager",
        *_known_by(settings.kubeconfig("controller-manager")),
        f"--service-account-private-key-file={settings.certificates.tokens}",
        f"--root-ca-file={settings.certificates.authority}",
        "--use-service-account-credentials=true",
        f"--flex-volume-plugin-dir={settings.folder / 'volume-plugins'}",
        # There is one; after a crash it would wait for its own lease to expire.
        "--leader-elect=false",
    ]


def _scheduler(settings: Settings) -> list[str]:
    return ["kube-scheduler", *_known_by(settings.kubeconfig("scheduler")), "--leader-elect=false"]


def _known_by(kubeconfig: Path) -> list[str]:
    """As whom a part asks the API server, also about those who ask the part for its metrics."""
    return [f"--{purpose}kubeconfig={kubeconfig}" for purpose in ("", "authentication-", "authorization-")]


def _kubelet(settings: Settings) -> list[str]:
    return [
        *("unshare", "--mount", "--propagation", "unchanged"),
        *("sh", str(settings.folder / "kubelet.sh"), str(settings.folder / "tunables")),
        f"--kubeconfig={settings.kubeconfig('kubelet')}",
        f"--config={settings.folder / 'kubelet.json'}",
        f"--root-dir={settings.folder / 'kubelet'}",
        f"--hostname-override={NODE}",
        f"--node-ip={ADDRESS}",
    ]


ALL = (
    Part("containerd", "containerd", _containerd, None),
    Part("etcd", "etcd", _etcd, Health(2379, "/health", tls=False)),
    Part("apiserver", "kube-apiserver", _apiserver, Health(API_PORT, "/readyz")),
    Part("controller-manager", "kube-controller-manager", _controller_manager, Health(10257, "/healthz")),
    Part("scheduler", "kube-scheduler", _scheduler, Health(10259, "/readyz")),
    Part("kubelet", "kubelet", _kubelet, Health(10248, "/healthz", tls=False)),
)
"""In the order in which they are started."""
