"""Keys and certificates of a cluster: one authority, a server's for each who listens, a client's for each who asks."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.engines.docker import host

DAYS = "30"
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
CLIENTS: Mapping[str, str] = {
    "admin": "/O=system:masters/CN=admin",
    "apiserver-kubelet": "/O=system:masters/CN=kube-apiserver-kubelet-client",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "kubelet": "/O=system:nodes/CN=system:node:{node}",
}
"""Who asks the API server, or a kubelet, and as whom: the names that the built-in roles are bound to, as kubeadm's are."""


@dataclass(frozen=True)
class Certificates:
    """Files in a folder: NAME.crt and NAME.key."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The certificate that all are signed with."""
        return self.cert("authority")

    @property
    def tokens(self) -> Path:
        """The private key that signs ServiceAccounts' tokens."""
        return self.key("tokens")

    def cert(self, name: str) -> Path:
        """A certificate."""
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        """Its key."""
        return self.folder / f"{name}.key"


def make(folder: Path, node: str, servers: Mapping[str, str]) -> Certificates:
    """Make all of them anew, valid for thirty days: those of ``CLIENTS``, and of ``servers`` by their alternative names."""
    host.need("openssl")
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    made = Certificates(folder)
    authority = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
    _request(made, "authority", "/CN=cloche test cluster", authority, ())
    signed = ("-CA", str(made.authority), "-CAkey", str(made.key("authority")))
    for name, names in servers.items():
        server = ("extendedKeyUsage=serverAuth", f"subjectAltName={names}", "basicConstraints=CA:FALSE")
        _request(made, name, f"/CN={name}", server, signed)
    for name, subject in CLIENTS.items():
        client = ("extendedKeyUsage=clientAuth", "basicConstraints=CA:FALSE")
        _request(made, name, subject.format(node=node), client, signed)
    # RSA as on most clusters, so that tokens are as long as theirs.
    _openssl("genrsa", "-out", str(made.tokens), "2048")
    return made


def _request(made: Certificates, name: str, subject: str, extensions: tuple[str, ...], signed: tuple[str, ...]) -> None:
    command = ["req", "-x509", *KEY, "-keyout", str(made.key(name)), "-out", str(made.cert(name)), "-days", DAYS]
    for extension in extensions:
        command += ["-addext", extension]
    _openssl(*command, "-subj", subject, *signed)


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)
