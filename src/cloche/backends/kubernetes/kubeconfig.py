"""Where the API server is and who we are to it, as kubectl would find it; or, inside a cluster, as every pod can.

The rules are those of kubernetes.io, "Organizing Cluster Access Using kubeconfig Files", "kubeconfig (v1)", "Authenticating"
(client-go credential plugins) and "Accessing the Kubernetes API from a Pod"; checked with kubernetes/website at 00cce41 and
0189ae0. Blocks where it reads files. YAML is loaded on first use: inside a cluster there is none.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

from cloche.backends.kubernetes.credentials import (
    API_VERSIONS,
    ClientCertificate,
    Credentials,
    Plugin,
    PluginCredentials,
    Renewed,
    WrittenCredentials,
    basic,
    bearer,
    check,
    impersonation,
    load,
    read_file,
    read_token,
    reread,
)
from cloche.errors import BackendUnavailable
from cloche.settings import Settings

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where a container finds the account of its pod."""
PLUGIN_EXTENSION = "client.authentication.k8s.io/exec"
"""The extension of a cluster that its plugins are told."""

_FORM = "A cluster's server is an address such as https://10.0.0.1:6443."
_CONTEXTS = "`kubectl config get-contexts` shows those that there are; choose one with CLOCHE_KUBE_CONTEXT."
_HOST = re.compile(r"[0-9A-Za-z]([0-9A-Za-z._-]{0,251}[0-9A-Za-z.])?")
_PATH = re.compile(r"[\x21-\x7e]*")
_log = logging.getLogger("cloche.kubernetes")


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach an API server, and as whom."""

    base: str
    """https://host:port, and the beginning of all paths where there is one. No slash at its end."""
    text: str
    """For people: the address, and what it is from."""
    credentials: Credentials = field(repr=False)
    server_name: str | None = None
    """The name that the server's certificate has to bear, when it is not the address's host. It is no part of the TLS context:
    whoever connects hands it over."""
    authority: str | None = field(default=None, repr=False)
    """Certificates as PEM, one of which vouches for the server's. None: those that the system trusts."""
    verify: bool = True
    """Whether the server's certificate is checked."""

    def tls(self, certificate: ClientCertificate | None) -> ssl.SSLContext | None:
        """How to connect; None for an address without TLS. Blocks for some milliseconds.

        Raises:
            BackendUnavailable: the certificate cannot be used.
        """
        if not self.base.startswith("https:"):
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # As for Go, whatever the file holds is trusted, be it the root or not.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.authority is not None:
            context.load_verify_locations(cadata=self.authority)
        else:
            context.load_default_certs()
        if certificate is not None:
            try:
                load(context, certificate)
            except OSError as exc:
                check(certificate, "The client certificate")
                raise BackendUnavailable(
                    f"The client certificate cannot be loaded: {exc.strerror or type(exc).__name__}.",
                    hint="Check certificate and key with kubectl.",
                ) from None
        return context


def find(settings: Settings, service_account: Path = SERVICE_ACCOUNT, home: Path | None = None) -> Access:
    """The API server that the settings name: in the given configuration files, else that of the cluster we are in, else in
    ~/.kube/config. A context that is given is one of a file. Certificates in files are read, tokens are not yet.

    Raises:
        BackendUnavailable: there is none, or what says how to reach it cannot be used.
    """
    if settings.kube_config is not None:
        files = tuple(Path(name) for name in settings.kube_config.split(os.pathsep) if name)
        return _from_files(files, settings.kube_context)
    inside = settings.kube_api_host is not None and (service_account / "token").exists()
    if inside and settings.kube_context is None:
        return _from_service_account(settings, service_account)
    default = (Path(os.path.expanduser("~")) if home is None else home) / ".kube" / "config"
    if os.path.lexists(default):
        return _from_files((default,), settings.kube_context)
    if inside:
        raise BackendUnavailable(
            f"CLOCHE_KUBE_CONTEXT={settings.kube_context!r} cannot be used: a pod's service account has no contexts,"
            f" and there is no {default}.",
            hint="Unset CLOCHE_KUBE_CONTEXT, or set KUBECONFIG to a file that has the context.",
        )
    if settings.kube_api_host is not None:
        raise BackendUnavailable(
            f"This is a pod of Kubernetes without a token of a service account in {service_account}.",
            hint="Set automountServiceAccountToken: true in the pod, or KUBECONFIG to a configuration file.",
        )
    raise BackendUnavailable(
        f"Nothing says where Kubernetes is: this is no pod of it, and there is no {default}.",
        hint="Set KUBECONFIG to a configuration file, such as the one that kubectl uses.",
    )


def _from_service_account(settings: Settings, folder: Path) -> Access:
    host = settings.kube_api_host or ""
    try:
        name = f"[{ipaddress.IPv6Address(host)}]" if ":" in host else host
    except ValueError:
        raise BackendUnavailable(
            f"KUBERNETES_SERVICE_HOST={host!r} is no host.",
            hint="It is a name or an address without a port; Kubernetes sets it in every container.",
        ) from None
    base = f"https://{name}:{settings.kube_api_port}"
    path = folder / "ca.crt"
    what = "The cluster's certificate authority"
    authority = _authority(read_file(path, what), f"{what}, {path},")
    token = reread(partial(read_token, folder / "token", "The token of this pod's service account"))
    return Access(base, f"{base} (this pod's service account)", WrittenCredentials(token=token), authority=authority)


def _authority(data: bytes, where: str) -> str:
    """PEM that can be used."""
    text = data.decode("ascii", "backslashreplace")  # comments may have any letters
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise BackendUnavailable(
            f"{where} holds no certificates in PEM form.", hint="It begins with a line of -----BEGIN CERTIFICATE-----."
        ) from None
    return text


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """A mapping of a file, and where it stands."""

    values: Mapping[str, Any] = field(repr=False)
    file: Path
    name: str
    """For people: user 'dev'."""

    def broken(self, words: str, hint: str = "Correct the file; `kubectl config view` shows it.") -> BackendUnavailable:
        """Our error for a part of which ``words`` are true."""
        return BackendUnavailable(f"In {self.file}, {self.name}: {words}.", hint=hint)

    def text(self, key: str) -> str:
        """A text; empty where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.broken(f"{key} is no text", "Put it in quotes.")
        return value or ""

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.broken(f"{key} is neither true nor false")
        return bool(value)

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._list(key)
        if not all(isinstance(one, str) for one in values):
            raise self.broken(f"{key} is no list of texts", "Put each in quotes.")
        return tuple(values)

    def part(self, key: str, name: str = "") -> _Part | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.broken(f"{key} is no mapping")
        return _Part(cast("dict[str, Any]", value), self.file, name or f"{key} of {self.name}")

    def parts(self, key: str) -> tuple[_Part, ...]:
        """A list of mappings."""
        values = self._list(key)
        if not all(isinstance(one, dict) for one in values):
            raise self.broken(f"{key} is no list of mappings")
        return tuple(_Part(one, self.file, f"{key} of {self.name}") for one in values)

    def _list(self, key: str) -> list[Any]:
        if self.values.get(key) is None:
            return []
        if not isinstance(self.values[key], list):
            raise self.broken(f"{key} is no list")
        return cast("list[Any]", self.values[key])

    def path(self, key: str) -> Path | None:
        """A path; one that is relative begins where the file is."""
        name = self.text(key)
        return Path(os.path.abspath(self.file.parent / name)) if name else None

    def data(self, key: str) -> bytes:
        """What stands in base64."""
        try:
            return base64.b64decode("".join(self.text(key).split()), validate=True)
        except (binascii.Error, ValueError):
            raise self.broken(f"{key} is no base64") from None

    def pem(self, key: str) -> bytes:
        """What stands in ``key``-data, else in the file that ``key`` names; empty where there is neither. Blocks."""
        if data := self.data(f"{key}-data"):
            return data
        path = self.path(key)
        return read_file(path, f"The {key} of {self.name} in {self.file}") if path is not None else b""


def _read(file: Path) -> _Part | None:
    """A configuration file; None: there is none."""
    if not os.path.lexists(file):
        return None
    data = read_file(file, "The Kubernetes configuration")
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        found: Any = yaml.load(data, loader)  # noqa: S506 (both are safe ones)
    except yaml.YAMLError as exc:
        # What else it says may quote the line, and the line may hold a password.
        mark = getattr(exc, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark is not None else ""
        raise BackendUnavailable(f"{file}{line} is no YAML.", hint="Correct the file.") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        # PyYAML lets them through: a date without such a day, lists a thousand deep.
        raise BackendUnavailable(f"{file} has values that cannot be.", hint="Correct the file.") from None
    if found is not None and not isinstance(found, dict):
        raise BackendUnavailable(
            f"{file} is no configuration of Kubernetes.", hint="KUBECONFIG names files as kubectl has them."
        )
    return _Part(cast("dict[str, Any]", found or {}), file, "the file")


def _from_files(names: tuple[Path, ...], wanted: str | None) -> Access:
    """The first file that sets a value, or has a name, wins. Those that are missing are passed over."""
    shown = os.pathsep.join(str(name) for name in names)
    files = [file for name in names if (file := _read(name)) is not None]
    if not files:
        raise BackendUnavailable(
            f"There is no Kubernetes configuration at {shown or 'the paths of KUBECONFIG'}.",
            hint="Set KUBECONFIG to a configuration file, such as the one that kubectl uses.",
        )
    name = wanted or next((text for file in files if (text := file.text("current-context"))), None)
    if name is None:
        raise BackendUnavailable(
            f"No context is chosen in {shown}.", hint=f"Choose one: kubectl config use-context. {_CONTEXTS}"
        )
    context = _named(files, "contexts", "context", name)
    if context is None:
        raise BackendUnavailable(f"There is no context {name!r} in {shown}.", hint=_CONTEXTS)
    cluster = _named(files, "clusters", "cluster", context.text("cluster"))
    if cluster is None:
        raise context.broken(f"there is no cluster {context.text('cluster')!r}", _CONTEXTS)
    user_name = context.text("user")
    user = _named(files, "users", "user", user_name) if user_name else None
    if user_name and user is None:
        raise context.broken(f"there is no user {user_name!r}", _CONTEXTS)
    return _access(f"context {name} of {context.file}", cluster, user)


def _named(files: list[_Part], group: str, kind: str, name: str) -> _Part | None:
    """What bears the name, in the first file in which something does."""
    for file in files:
        found = [entry for entry in file.parts(group) if entry.values.get("name") == name]
        if len(found) > 1:
            raise file.broken(f"two {group} are named {name!r}", "Rename one.")
        if found:
            what = f"{kind} {name!r}"
            return found[0].part(kind, what) or _Part({}, file.file, what)
    return None


def _access(text: str, cluster: _Part, user: _Part | None) -> Access:
    base = _server(cluster)
    if cluster.text("proxy-url"):
        raise cluster.broken("proxy-url is not supported", "Let this process reach the server without a proxy.")
    skips = cluster.flag("insecure-skip-tls-verify")
    pem = cluster.pem("certificate-authority")
    if skips and pem:
        raise cluster.broken(
            "insecure-skip-tls-verify and a certificate-authority contradict each other",
            "Remove insecure-skip-tls-verify.",
        )
    where = f"The certificate-authority of {cluster.name} in {cluster.file}"
    authority = _authority(pem, where) if pem else None
    server_name = cluster.text("tls-server-name")
    if server_name and _HOST.fullmatch(server_name) is None:
        raise cluster.broken("tls-server-name is no name of a host")
    secure = base.startswith("https:")
    if not secure and user is not None and user.values:
        # As kubectl does: nothing is told to who may be anyone.
        _log.warning("The credentials of %s are not sent: %s is an address without TLS.", user.name, base)
    credentials = _credentials(user, cluster, pem) if secure and user is not None else WrittenCredentials()
    return Access(base, f"{base} ({text})", credentials, server_name or None, authority, verify=not skips)


def _server(cluster: _Part) -> str:
    def wrong(words: str) -> NoReturn:
        raise cluster.broken(f"server {words}", _FORM)  # the address is not shown: it may hold a password

    text = cluster.text("server").strip()
    if not text:
        wrong("is missing")
    try:
        parts = urlsplit(text)
        port = parts.port
        host = parts.hostname or ""
        name = f"[{ipaddress.IPv6Address(host)}]" if ":" in host else host
    except ValueError:
        wrong("is no address")
    if parts.scheme not in {"https", "http"}:
        wrong("does not begin with https:// (or http://)")
    if parts.username is not None or parts.password is not None:
        wrong("holds a user or a password")
    if parts.query or parts.fragment:
        wrong("has something behind a ? or a #")
    if (":" not in host and _HOST.fullmatch(host) is None) or port == 0 or _PATH.fullmatch(parts.path) is None:
        wrong("is no address")
    return f"{parts.scheme}://{name}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


# --- users ------------------------------------------------------------------------------------------------------------


def _credentials(user: _Part, cluster: _Part, authority: bytes) -> Credentials:
    where = f"{user.name} of {user.file}"
    if (old := user.part("auth-provider")) is not None:
        raise user.broken(
            f"auth-provider {old.text('name')!r} is not supported; Kubernetes 1.26 removed them",
            "Use a credential plugin (exec) instead, such as kubelogin or gke-gcloud-auth-plugin.",
        )
    headers = _impersonation(user)
    token, token_file = user.text("token"), user.path("tokenFile")
    name, password = user.text("username"), user.text("password")
    plugin = user.part("exec")
    ways = {"a token": token or token_file, "a username and password": name or password, "exec": plugin}
    if len(used := [way for way, there in ways.items() if there]) > 1:
        raise user.broken(f"there is {' and '.join(used)}, and only one way is allowed", "Remove the others.")
    certificate = _certificate(user)
    if plugin is not None:
        return PluginCredentials(_plugin(plugin, where, cluster, authority), headers, certificate)
    if token_file is not None:
        read = partial(read_token, token_file, f"The tokenFile of {where}")
        return WrittenCredentials(headers, reread(read), certificate)
    if token:
        headers["Authorization"] = bearer(token, f"The token of {where}")
    elif name or password:
        if ":" in name or any(ord(c) < 0x20 or ord(c) == 0x7F for c in name + password):
            raise user.broken("username or password has characters that cannot be sent")
        headers["Authorization"] = basic(name, password)
    return WrittenCredentials(headers, certificate=certificate)


def _impersonation(user: _Part) -> dict[str, str]:
    name, uid, groups = user.text("as"), user.text("as-uid"), user.texts("as-groups")
    extra = user.part("as-user-extra")
    more = {key: extra.texts(key) for key in extra.values} if extra is not None else {}
    if not name and (uid or groups or more):
        raise user.broken("as-uid, as-groups and as-user-extra need a user to act as", "Add as: and the user's name.")
    try:
        return impersonation(name, uid, groups, more)
    except ValueError as exc:
        raise user.broken(f"a value of as, as-uid, as-groups or as-user-extra cannot be sent: {exc}") from None


def _certificate(user: _Part) -> Renewed[ClientCertificate] | None:
    """Read once now, so that what is wrong is said early; then again as it grows old."""
    has = {key: bool(user.text(key) or user.text(f"{key}-data")) for key in ("client-certificate", "client-key")}
    if not any(has.values()):
        return None
    if not all(has.values()):
        lacking = next(key for key, there in has.items() if not there)
        raise user.broken(f"{lacking} is missing", "Give certificate and key, or neither.")

    def read() -> ClientCertificate:
        pair = ClientCertificate(user.pem("client-certificate"), user.pem("client-key"))
        check(pair, f"The client-certificate of {user.name} in {user.file}")
        return pair

    read()
    return reread(read)


def _plugin(part: _Part, where: str, cluster: _Part, authority: bytes) -> Plugin:
    version, command = part.text("apiVersion"), part.text("command")
    if version not in API_VERSIONS:
        raise part.broken(
            f"apiVersion {version!r} is not supported",
            f"Update the plugin, and write one of {' and '.join(API_VERSIONS)}.",
        )
    if not command:
        raise part.broken("command is missing")
    match part.text("interactiveMode"):
        case "" | "Never" | "IfAvailable":
            pass
        case "Always":
            raise part.broken(
                "interactiveMode is Always: the plugin wants a person at a terminal, and cloche has none",
                "Use credentials that need nobody, such as the token of a service account.",
            )
        case _:
            raise part.broken("interactiveMode is none of Never, IfAvailable and Always")
    if os.sep in command or (os.altsep and os.altsep in command):
        command = os.path.abspath(part.file.parent / command)
    env = {entry.text("name"): entry.text("value") for entry in part.parts("env")}
    if "" in env:
        raise part.broken("a variable of env has no name")
    told = _told(cluster, authority) if part.flag("provideClusterInfo") else None
    return Plugin(command, version, where, part.texts("args"), env, told, part.text("installHint").strip())


def _told(cluster: _Part, authority: bytes) -> dict[str, Any]:
    """``spec.cluster`` of kubernetes.io, "Client Authentication (v1)"."""
    told: dict[str, Any] = {"server": cluster.text("server")}
    if name := cluster.text("tls-server-name"):
        told["tls-server-name"] = name
    if cluster.flag("insecure-skip-tls-verify"):
        told["insecure-skip-tls-verify"] = True
    if authority:
        told["certificate-authority-data"] = base64.b64encode(authority).decode()
    if cluster.flag("disable-compression"):
        told["disable-compression"] = True
    for entry in cluster.parts("extensions"):
        if entry.values.get("name") == PLUGIN_EXTENSION:
            told["config"] = entry.values.get("extension")
            break
    return told
