"""Where the daemon is, read as every Docker tool reads it. Blocks where it reads files.

The order is that of Docker's command line (docs.docker.com, "CLI environment variables" and "Docker contexts"; checked with
the source of docker/cli 29): the host that is given, else the context that is given or is current, else the default socket.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cloche._kit.http import Server
from cloche.errors import BackendUnavailable
from cloche.settings import Settings

DEFAULT_SOCKET = "/var/run/docker.sock"
MAX_CONFIG_BYTES = 2**20
_FORMS = "Set DOCKER_HOST to unix:///path/to/socket or tcp://host:port."


@dataclass(frozen=True, slots=True)
class Address:
    """The daemon's address as people write it, and how to speak to it."""

    text: str
    server: Server


def find(settings: Settings) -> Address:
    """The daemon that the settings name.

    Raises:
        BackendUnavailable: the address, the context or the certificates cannot be used.
    """
    config = config_folder(settings)
    host, tls_folder, verify = settings.docker_host, settings.docker_cert_path, settings.docker_tls_verify
    if host is None:
        host, context_tls, skips = _from_context(settings, config)
        if context_tls is not None and tls_folder is None:
            tls_folder, verify = context_tls, verify or not skips
    if host is None:
        host = f"unix://{DEFAULT_SOCKET}"
    return _address(host, tls_folder or (str(config) if verify else None), verify=verify)


def config_folder(settings: Settings) -> Path:
    """The folder of Docker's config.json."""
    return Path(settings.docker_config or os.path.join(os.path.expanduser("~"), ".docker"))


def read_config(folder: Path) -> dict[str, Any]:
    """Docker's config.json; empty where there is none, or none that can be read."""
    try:
        with open(folder / "config.json", "rb") as file:
            data = file.read(MAX_CONFIG_BYTES)
        found = json.loads(data)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _address(host: str, tls_folder: str | None, *, verify: bool) -> Address:
    try:
        parts = urlsplit(host)
        port = parts.port
    except ValueError:
        raise BackendUnavailable(
            f"The address of the Docker daemon, {_without_password(host)!r}, is malformed.", hint=_FORMS
        ) from None
    shown = _without_password(host)
    match parts.scheme:
        case "unix" if not hasattr(socket, "AF_UNIX"):
            raise BackendUnavailable(
                f"This system has no Unix sockets for the Docker daemon at {shown}.",
                hint="Have the daemon listen at tcp://127.0.0.1:2376 with TLS, and set DOCKER_HOST.",
            )
        case "unix":
            path = host.removeprefix("unix://")
            if not path.startswith("/"):
                raise BackendUnavailable(f"The address {host!r} names no absolute path of a socket.", hint=_FORMS)
            return Address(host, Server("http://docker", socket=path))
        case "tcp" | "http" | "https":
            if not parts.hostname:
                raise BackendUnavailable(f"The address {shown!r} names no host.", hint=_FORMS)
            secure = parts.scheme == "https" or tls_folder is not None
            name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            base = f"{'https' if secure else 'http'}://{name}:{port or (2376 if secure else 2375)}"
            tls = _tls(tls_folder, verify=verify) if secure else None
            try:
                return Address(shown, Server(base, tls=tls))
            except ValueError:
                raise BackendUnavailable(f"The address {shown!r} names no host that could be.", hint=_FORMS) from None
        case "ssh":
            raise BackendUnavailable(
                f"cloche does not speak to a Docker daemon by ssh ({shown!r}).",
                hint="Forward its socket, ssh -nNT -L /tmp/docker.sock:/var/run/docker.sock HOST,"
                " and set DOCKER_HOST=unix:///tmp/docker.sock.",
            )
        case _:
            raise BackendUnavailable(
                f"The address of the Docker daemon, {shown!r}, has a form unknown here.", hint=_FORMS
            )


def _without_password(host: str) -> str:
    """An address as it may be shown."""
    scheme, slashes, rest = host.partition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}" if slashes else host


def _tls(folder: str | None, *, verify: bool) -> ssl.SSLContext:
    """As Docker's own client does it: with a folder of certificates and no word of verifying, the server's is not checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if folder is None:
        context.load_default_certs()
        return context
    authority, certificate, key = (os.path.join(folder, name) for name in ("ca.pem", "cert.pem", "key.pem"))
    try:
        if verify:
            context.load_verify_locations(authority)
        else:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if os.path.exists(certificate):
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as exc:
        raise BackendUnavailable(
            f"The certificates for the Docker daemon in {folder!r} cannot be used: {exc}.",
            hint="DOCKER_CERT_PATH is a folder with ca.pem, cert.pem and key.pem, each readable and in PEM form.",
        ) from None
    return context


def _from_context(settings: Settings, config: Path) -> tuple[str | None, str | None, bool]:
    """Host, folder of certificates, and whether they are not to be checked, as the context says; all None without one."""
    name = settings.docker_context or read_config(config).get("currentContext") or "default"
    if name == "default" or not isinstance(name, str):
        return None, None, False
    digest = hashlib.sha256(name.encode()).hexdigest()
    try:
        with open(config / "contexts" / "meta" / digest / "meta.json", "rb") as file:
            endpoint = json.loads(file.read(MAX_CONFIG_BYTES))["Endpoints"]["docker"]
        host, skips = endpoint["Host"], bool(endpoint.get("SkipTLSVerify", False))
        if not isinstance(host, str):
            raise TypeError("the host is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BackendUnavailable(
            f"The Docker context {name!r} cannot be read.",
            hint="`docker context ls` shows those that there are; choose one with DOCKER_CONTEXT, or set DOCKER_HOST.",
        ) from None
    tls = config / "contexts" / "tls" / digest / "docker"
    return host, str(tls) if tls.is_dir() else None, skips
