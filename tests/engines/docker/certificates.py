"""Certificates for Docker over TLS, as its documentation has one make them: an authority, a server's, a client's."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.engines.docker import host

DAYS = "2"
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Certificates:
    """Files below a folder. The client's folder is what ``DOCKER_CERT_PATH`` names: ca.pem, cert.pem, key.pem."""

    folder: Path

    @property
    def client(self) -> Path:
        """The client's folder."""
        return self.folder / "client"

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.client / "ca.pem"

    @property
    def server_cert(self) -> Path:
        """The server's certificate, for 127.0.0.1 and localhost."""
        return self.folder / "server/cert.pem"

    @property
    def server_key(self) -> Path:
        """Its key."""
        return self.folder / "server/key.pem"


def make(folder: Path) -> Certificates:
    """Make all of them anew, valid for two days."""
    host.need("openssl")
    made = Certificates(folder)
    for name in ("client", "server"):
        (folder / name).mkdir(parents=True)
    authority = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
    _request(made.ca, folder / "ca-key.pem", "/CN=cloche test authority", authority, ())
    signed = ("-CA", str(made.ca), "-CAkey", str(folder / "ca-key.pem"))
    server = ("extendedKeyUsage=serverAuth", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    _request(made.server_cert, made.server_key, "/CN=localhost", (*server, "basicConstraints=CA:FALSE"), signed)
    client = ("extendedKeyUsage=clientAuth", "basicConstraints=CA:FALSE")
    _request(made.client / "cert.pem", made.client / "key.pem", "/CN=client", client, signed)
    return made


def _request(cert: Path, key: Path, subject: str, extensions: tuple[str, ...], signed: tuple[str, ...]) -> None:
    command = ["openssl", "req", "-x509", *KEY, "-keyout", str(key), "-out", str(cert), "-days", DAYS, "-subj", subject]
    for extension in extensions:
        command += ["-addext", extension]
    subprocess.run([*command, *signed], check=True, capture_output=True, timeout=60)
