"""The settings: read once, from the environment. ``docs/settings.md`` is made from the fields below.

Every field says its unit, what it means to leave it unset, and why its default is what it is. A variable that is set to
nothing (``CLOCHE_IMAGE=``, as compose files and charts write for "not given") counts as unset.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from cloche._kit.places import parse
from cloche.errors import InvalidSettings
from cloche.isolation import Isolation
from cloche.spec import MAX_TIMEOUT_S, MIN_MEMORY_BYTES, ByteSize, Limits, Network, Spec

PREFIX = "CLOCHE_"

# What Kubernetes puts into every container beside a Service called "cloche" (kubernetes.io, "Accessing the Service",
# environment variables; Docker's old links use the same names).
_INJECTED = re.compile(r"CLOCHE_PORT(_.*)?|CLOCHE_SERVICE_.*")
# Read by cloche's own tests and build, not by the program.
_DEVELOPMENT = re.compile(r"CLOCHE_MUST_WORK|CLOCHE_BUILD_.*|CLOCHE_TEST_.*")

_MAX_WAIT_S = 7 * 24 * 3600.0
_MAX_BYTES = 2**40


class Mode(StrEnum):
    """The ways to run a script that have a name. Which of them this version has, :mod:`cloche.backends` tells."""

    DISABLED = "disabled"
    LOCAL = "local"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"
    OPENSANDBOX = "opensandbox"
    REMOTE = "remote"
    AUTO = "auto"


_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|m|s|us|µs|ns)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def parse_duration(value: Any) -> Any:
    """Seconds from a plain number (``"60"``, ``1.5``) or a Go duration (``"60s"``, ``"1m30s"``); anything else is handed on
    to be refused.

    Raises:
        ValueError: a string that is neither.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _DURATION.fullmatch(text):
        return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{value!r} is not an amount of time such as 60, 1.5 or 2m") from None


def _parse_any(value: Any) -> Any:
    """Yes for any text: the empty one counts as unset."""
    return True if isinstance(value, str) else value


def _parse_list(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _parse_pairs(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
    if any(not sign or not name for name, sign, _ in pairs):
        raise ValueError(f"{value!r} is not a list such as name=value,other=value")
    return {name.strip(): text.strip() for name, _, text in pairs}


def _parse_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


Seconds = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds; accepts ``"90"`` and ``"1m30s"``."""
Names = Annotated[tuple[str, ...], BeforeValidator(_parse_list)]
"""Names with commas between them."""
Pairs = Annotated[dict[str, str], BeforeValidator(_parse_pairs)]
"""``name=value`` with commas between, or a JSON object."""


def _is_label_name(name: str) -> bool:
    """Whether Kubernetes takes it as the name of a label or an annotation: an optional domain, and a word of 63 at most."""
    domain, slash, word = name.rpartition("/")
    return bool(_LABEL_WORD.fullmatch(word)) and (not slash or (len(domain) <= 253 and bool(_DOMAIN.fullmatch(domain))))


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for name, text in labels.items():
        if not _is_label_name(name) or (text and not _LABEL_WORD.fullmatch(text)):
            raise ValueError(f"{name}={text} is no label that Kubernetes takes")
    return labels


def _check_annotations(annotations: dict[str, str]) -> dict[str, str]:
    for name in annotations:
        if not _is_label_name(name):
            raise ValueError(f"{name} is no name of an annotation that Kubernetes takes")
    return annotations


def _check_hosts(entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        # What ends in a number is an address to whoever looks names up.
        if "/" in entry or ":" in entry or entry.rpartition(".")[2].isdecimal():
            ipaddress.ip_network(entry.strip("[]"), strict=False)
        elif not _HOST.fullmatch(entry):
            raise ValueError(f"{entry} is neither a host nor a network")
    return entries


def _check_address(text: str) -> str:
    place = parse(text, "https")
    if not text.isprintable() or not _PATH.fullmatch(place.path) or (place.user and "://" not in text):
        raise ValueError("no address")
    if place.authority.startswith("["):
        ipaddress.IPv6Address(place.host)
    elif place.host.rpartition(".")[2].isdecimal():
        ipaddress.IPv4Address(place.authority.partition(":")[0])  # what ends in a number is no name to anybody
    return text


def _check_listener(text: str) -> str:
    split_address(text)
    return text


_LISTENER = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<v4>[0-9.]+)|(?P<name>localhost)):(?P<port>\d{1,5})")


def split_address(text: str) -> tuple[str, int]:
    """The address and the port of ``127.0.0.1:8080``, ``[::1]:8080`` or ``localhost:8080``.

    Raises:
        ValueError: it is none of them.
    """
    match = _LISTENER.fullmatch(text)
    if match is None or (port := int(match["port"])) > 65535:
        raise ValueError(f"{text!r} is not an address and a port such as 127.0.0.1:8080")
    if match["name"]:
        return "127.0.0.1", port
    return str(ipaddress.ip_address(match["v6"] or match["v4"])), port


_PATH = re.compile(r"[A-Za-z0-9._~/-]*")
_HOST = re.compile(r"\*|(\*\.)?[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})")
_LABEL_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(DNS_NAME, name):
            raise ValueError(f"{name} is no name of a thing in Kubernetes")
    return names


Address = Annotated[str, Field(max_length=1024), AfterValidator(_check_address)]
"""Where a server is, with or without ``http://`` or ``https://``."""
Labels = Annotated[Pairs, AfterValidator(_check_labels)]
"""Labels of Kubernetes' objects."""
Annotations = Annotated[Pairs, AfterValidator(_check_annotations)]
"""Annotations of Kubernetes' objects."""
MAX_UID = 2**31 - 2


def _parse_uids(value: Any) -> Any:
    """``"1000"`` or ``"1000650000-1000659999"``."""
    if not isinstance(value, str):
        return value
    first, _, last = value.partition("-")
    return (int(first), int(last or first))


def _check_uids(value: tuple[int, int]) -> tuple[int, int]:
    first, last = value
    if not 0 < first <= last <= MAX_UID:
        raise ValueError("0 is never allowed, and the first uid comes before the last")
    return value


Uids = Annotated[tuple[int, int], BeforeValidator(_parse_uids), AfterValidator(_check_uids)]
"""The first and the last uid of a range."""


class Toleration(BaseModel):
    """A toleration of a pod, in Kubernetes' own words (core/v1 Toleration)."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None  # noqa: N815 (the name in Kubernetes' API)


def _setting(
    default: Any, about: str, *, allowed: str, unset: str = "", why: str, alias: tuple[str, ...] = (), **bounds: Any
) -> Any:
    """One setting. ``allowed`` completes the sentence "allowed is …" in the error for a broken value."""
    extra: dict[str, JsonValue] = {"allowed": allowed, "unset": unset, "why": why, "aliases": [*alias]}
    return Field(default=default, description=about, json_schema_extra=extra, **bounds)


_AMOUNT = "an amount of bytes such as 256Mi, 1G or 4096"
_TIME = "seconds above 0 such as 60 or 1.5, or a duration such as 2m"
_WEKNORA = "WEKNORA_SANDBOX_"


class Settings(BaseModel):
    """Everything that can be set. Frozen; made from the environment with :meth:`from_env`, or by hand.

    Raises:
        InvalidSettings: a value is not allowed. The message names it and says what is.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    mode: Mode = _setting(
        Mode.LOCAL,
        "Where scripts run.",
        allowed=", ".join(Mode),
        why="it needs no daemon, no cluster and no account",
        alias=(_WEKNORA + "MODE",),
    )
    fallback: bool = _setting(
        True,
        "Whether `local` is used, with one warning, when the chosen engine is unavailable at the start.",
        allowed="true or false",
        why="scripts go on running when a cluster is away; never below the isolation floor",
    )
    min_isolation: Isolation = _setting(
        Isolation.NAMESPACE,
        "The isolation floor: a run that would get less is refused. A spec can ask for another one.",
        allowed=", ".join(Isolation),
        why="below it a script sees the host's files, processes and network",
    )
    prove: Literal["off", "start"] = _setting(
        "off",
        "When isolation is proved: with `start`, a script looks from inside of a box when a sandbox opens, and the floor is "
        "compared with what it finds.",
        allowed="off or start",
        why="it takes seconds, and some boxes; `cloche doctor` does it when you ask",
    )
    timeout: Seconds = _setting(
        60.0,
        "Seconds that a script may run, from its own start, when its spec does not say.",
        allowed=f"{_TIME}, at most {MAX_TIMEOUT_S:.0f}",
        why="long enough for a report, short enough for a user who waits",
        alias=(_WEKNORA + "TIMEOUT",),
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
    )
    image: str = _setting(
        "python:3.12-slim",
        "Image of the box, on engines that have images.",
        allowed="the name of an image",
        why="small, official, and has Python; until cloche publishes one",
        alias=(_WEKNORA + "IMAGE", _WEKNORA + "DOCKER_IMAGE"),
        min_length=1,
        max_length=512,
    )
    memory: ByteSize = _setting(
        256 * 2**20,
        "Bytes of memory that a box may use.",
        allowed=f"{_AMOUNT}, at least 16Mi",
        why="room for an interpreter and a small table of data; a laptop holds five of them",
        ge=MIN_MEMORY_BYTES,
        le=2**44,
    )
    cpus: float = _setting(
        1.0,
        "CPUs that a box may use; fractions are allowed.",
        allowed="a number above 0, at most 1024",
        why="most scripts have one thread",
        gt=0,
        le=1024,
        allow_inf_nan=False,
    )
    pids: int = _setting(
        128,
        "Processes and threads that a box may hold, the supervisor included.",
        allowed="a whole number from 4 to 4194304",
        why="enough for a pool of workers, too few to disturb the host",
        ge=4,
        le=2**22,
    )
    start_timeout: Seconds = _setting(
        120.0,
        "Seconds from asking the engine for a box to the start of the script.",
        allowed=_TIME,
        why="a cluster may first have to pull an image",
        gt=0,
        le=_MAX_WAIT_S,
        allow_inf_nan=False,
    )
    queue_timeout: Seconds = _setting(
        60.0,
        "Seconds that a run waits for a free place; 0: it does not wait.",
        allowed="seconds such as 0, 60 or 1.5, or a duration such as 2m",
        why="a caller that waited for a minute wants to know",
        ge=0,
        le=_MAX_WAIT_S,
        allow_inf_nan=False,
    )
    max_concurrent: int = _setting(
        5,
        "Boxes that one process has at a time. Others wait in a queue, first come, first served.",
        allowed="a whole number from 1 to 10000",
        why="with the default memory it fits a small machine",
        alias=(_WEKNORA + "MAX_CONCURRENT",),
        ge=1,
        le=10_000,
    )
    max_script_bytes: ByteSize = _setting(
        512 * 2**10,
        "Bytes of the largest script.",
        allowed=_AMOUNT,
        why="source text is smaller; what is larger is data and belongs into the workspace",
        ge=1,
        le=_MAX_BYTES,
    )
    max_workspace_bytes: ByteSize | None = _setting(
        None,
        "Bytes of workspace and stdin together.",
        allowed=_AMOUNT,
        unset="8Mi on kubernetes, 64Mi elsewhere",
        why="a cluster keeps what is delivered in its database; elsewhere it is the box's memory",
        ge=1,
        le=_MAX_BYTES,
    )
    max_output_bytes: ByteSize = _setting(
        2**20,
        "Bytes kept of each of stdout and stderr, head and tail together.",
        allowed=f"{_AMOUNT}, from 1Ki to 1Gi",
        why="more than anyone reads; what is over it is counted and flagged",
        ge=2**10,
        le=2**30,
    )
    max_artifact_bytes: ByteSize = _setting(
        4 * 2**20,
        "Bytes collected from /output, per file and in all.",
        allowed=f"{_AMOUNT}, at most 1Gi",
        why="charts and documents fit, and so does a pod's log",
        ge=0,
        le=2**30,
    )
    docker_host: str | None = _setting(
        None,
        "Address of the Docker daemon (or of Podman's socket). Read in the mode docker only, like all `CLOCHE_DOCKER_…`.",
        allowed="unix:///path/to/socket or tcp://host:port",
        unset="what Docker's current context says, else unix:///var/run/docker.sock",
        why="where every Docker tool looks",
        alias=("DOCKER_HOST",),
        min_length=1,
        max_length=4096,
    )
    docker_tls_verify: Annotated[bool, BeforeValidator(_parse_any)] = _setting(
        False,
        "Whether a daemon at `tcp://` has to show a certificate of the authority in `CLOCHE_DOCKER_CERT_PATH`. Any value "
        "that is not empty means yes, as for Docker's own tools.",
        allowed="1, or nothing",
        why="a tcp:// address without any of the two is plain HTTP",
        alias=("DOCKER_TLS_VERIFY",),
    )
    docker_cert_path: str | None = _setting(
        None,
        "Folder with ca.pem, cert.pem and key.pem for a daemon at `tcp://`. Set alone, TLS is used and the daemon's "
        "certificate is not checked.",
        allowed="the path of a folder",
        unset="`CLOCHE_DOCKER_CONFIG`, when a certificate is asked for",
        why="where Docker's own tools keep them",
        alias=("DOCKER_CERT_PATH",),
        min_length=1,
        max_length=4096,
    )
    docker_config: str | None = _setting(
        None,
        "Folder of Docker's config.json: credentials for registries, and contexts.",
        allowed="the path of a folder",
        unset="~/.docker",
        why="where `docker login` writes them",
        alias=("DOCKER_CONFIG",),
        min_length=1,
        max_length=4096,
    )
    docker_context: str | None = _setting(
        None,
        "Docker context whose daemon is used, when no host is given.",
        allowed="the name of a context",
        unset="the current one of config.json",
        why="`docker context use` then holds for cloche too",
        alias=("DOCKER_CONTEXT",),
        min_length=1,
        max_length=255,
    )
    docker_runtime: str | None = _setting(
        None,
        "Runtime of the containers, such as runsc (gVisor) or kata. One with a kernel of its own raises the isolation to "
        "`kernel`, once a trial box has shown that kernel.",
        allowed="the name of a runtime that the daemon knows",
        unset="the daemon's default",
        why="no other name is the same everywhere",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$",
    )
    pull: Literal["missing", "always", "never"] = _setting(
        "missing",
        "When an engine pulls the image: if it is missing, always (Docker once per sandbox, Kubernetes for each pod), or never.",
        allowed="missing, always or never",
        why="the first run works without a word, the others do not wait",
    )
    kube_namespace: str = _setting(
        "cloche-sandbox",
        "Namespace in which Jobs are made.",
        allowed="the name of a namespace",
        why="a namespace of its own can be locked down",
        alias=(_WEKNORA + "KUBE_NAMESPACE",),
        pattern=DNS_LABEL,
    )
    kube_service_account: str = _setting(
        "cloche-sandbox-runner",
        "Service account of the pods. It needs no rights.",
        allowed="the name of a service account",
        why="the namespace's default account may have rights",
        alias=(_WEKNORA + "KUBE_SERVICE_ACCOUNT",),
        pattern=DNS_NAME,
    )
    kube_runtime_class: str | None = _setting(
        None,
        "Runtime class of the pods, such as gvisor or kata.",
        allowed="the name of a runtime class",
        unset="the cluster's own runtime",
        why="no name is the same on all clusters",
        pattern=DNS_NAME,
    )
    kube_node_selector: Labels = _setting(
        {},
        "Labels that a node must have, as `name=value,…` or JSON.",
        allowed="a list such as disk=ssd,pool=sandbox, or a JSON object",
        unset="any node",
        why="no label is the same on all clusters",
    )
    kube_tolerations: Annotated[tuple[Toleration, ...], BeforeValidator(_parse_json)] = _setting(
        (),
        "Tolerations of the pods, as a JSON list.",
        allowed='a JSON list such as [{"key": "sandbox", "operator": "Exists", "effect": "NoSchedule"}]',
        unset="none",
        why="no taint is the same on all clusters",
    )
    kube_priority_class: str | None = _setting(
        None,
        "Priority class of the pods.",
        allowed="the name of a priority class",
        unset="the cluster's default",
        why="no name is the same on all clusters",
        pattern=DNS_NAME,
    )
    kube_image_pull_secrets: Annotated[Names, AfterValidator(_check_names)] = _setting(
        (),
        "Secrets with which the image is pulled, with commas between.",
        allowed="names of secrets with commas between",
        unset="none",
        why="public images need none",
    )
    kube_labels: Labels = _setting(
        {},
        "More labels for Jobs, pods and ConfigMaps, as `name=value,…` or JSON. A queue such as Kueue finds its name here.",
        allowed="a list such as team=search,env=prod, or a JSON object, of labels that Kubernetes takes",
        unset="none",
        why="cloche's own labels are enough for cloche",
    )
    kube_annotations: Annotations = _setting(
        {},
        "More annotations for Jobs, pods and ConfigMaps, as `name=value,…` or JSON.",
        allowed="a list such as team=search, or a JSON object, of annotations that Kubernetes takes",
        unset="none",
        why="cloche needs none",
    )
    kube_cpu_request: float = _setting(
        0.05,
        "CPUs that the scheduler sets aside for a box; never more than its limit.",
        allowed="a number from 0.001 to 1024",
        why="most scripts wait; what is requested and not used is room that others lack",
        ge=0.001,
        le=1024,
        allow_inf_nan=False,
    )
    kube_memory_request: ByteSize = _setting(
        64 * 2**20,
        "Bytes of memory that the scheduler sets aside for a box; never more than its limit.",
        allowed=f"{_AMOUNT}, at least 1Mi",
        why="an interpreter and a little data; raise it to the limit where nodes run full",
        ge=2**20,
        le=2**44,
    )
    kube_run_as_user: Uids = _setting(
        (1_000_000_000, 1_999_999_999),
        "The uids of which each box gets one of its own, as uid and gid, by chance: a first and a last one. The kernel counts "
        "processes by uid, so boxes that share one share `CLOCHE_PIDS` too.",
        allowed="a uid such as 65532 or a range such as 1000650000-1000659999, without 0",
        why="no user of a node is there, and no range of subordinate uids",
    )
    kube_host_users: bool = _setting(
        True,
        "Whether boxes share the node's user namespace. false: each has one of its own (`hostUsers: false`), where uids are "
        "below 65536: a range of `CLOCHE_KUBE_RUN_AS_USER` above that becomes 1000 to 65533.",
        allowed="true or false",
        why="it takes a node whose kernel, runtime and file systems can do it",
    )
    kube_arch: Literal["x86_64", "aarch64"] | None = _setting(
        None,
        "Architecture of the nodes that boxes go to, of which the supervisor is.",
        allowed="x86_64 or aarch64",
        unset="that of this machine",
        why="a cluster mostly has one, and cloche runs in it",
    )
    kube_config: str | None = _setting(
        None,
        "Kubernetes' configuration file, or several with colons between, for a process outside of a cluster.",
        allowed="paths of files",
        unset="inside a cluster the pod's own service account, else ~/.kube/config",
        why="where every tool for Kubernetes looks",
        alias=("KUBECONFIG",),
        min_length=1,
        max_length=16384,
    )
    kube_context: str | None = _setting(
        None,
        "Context of the configuration file whose cluster and user are taken.",
        allowed="the name of a context",
        unset="the current one of the file",
        why="`kubectl config use-context` then holds for cloche too",
        min_length=1,
        max_length=1024,
    )
    kube_api_host: str | None = _setting(
        None,
        "Address of the API server for a process inside the cluster. Kubernetes sets it in every container.",
        allowed="a host name or an address",
        unset="this process is not inside a cluster",
        why="only Kubernetes knows",
        alias=("KUBERNETES_SERVICE_HOST",),
        pattern=r"^[0-9A-Za-z.:-]{1,253}$",
    )
    kube_api_port: int = _setting(
        443,
        "Its port.",
        allowed="a whole number from 1 to 65535",
        why="what a cluster's own Service has",
        alias=("KUBERNETES_SERVICE_PORT",),
        ge=1,
        le=65535,
    )
    opensandbox_api_url: Address | None = _setting(
        None,
        "Address of the OpenSandbox service.",
        allowed="an address such as https://sandbox.example, http://10.1.2.3:8080 or sandbox.example, which means https",
        unset="the mode opensandbox is unavailable",
        why="there is no public service",
        alias=(_WEKNORA + "OPENSANDBOX_API_URL",),
        repr=False,  # an address may hold a password
    )
    opensandbox_api_key: SecretStr | None = _setting(
        None,
        "Key for the OpenSandbox service. Never printed.",
        allowed="the key as text",
        unset="requests carry no key",
        why="a secret has no default",
        alias=(_WEKNORA + "OPENSANDBOX_API_KEY",),
    )
    opensandbox_server_proxy: bool = _setting(
        False,
        "Whether sandboxes are reached through the OpenSandbox service itself rather than at the address that it tells for each.",
        allowed="true or false",
        why="the direct way is quicker, and the service's own has 100 connections for all its users",
    )
    ssrf_whitelist: Annotated[Names, AfterValidator(_check_hosts)] = _setting(
        (),
        "Where else than at its own host an OpenSandbox service may say that a sandbox is, with commas between: hosts, all hosts "
        "below a name (only at public addresses), addresses and networks.",
        allowed="a list such as box.example,*.boxes.example,10.1.0.0/16",
        unset="only at the host of `CLOCHE_OPENSANDBOX_API_URL`",
        why="a service that lies must not send cloche into a private network",
        alias=("SSRF_WHITELIST",),
    )
    remote_url: Address | None = _setting(
        None,
        "Address of the cloche service that the mode `remote` has its scripts run by.",
        allowed="an address such as https://cloche.example, http://127.0.0.1:8080 or cloche.example, which means https",
        unset="the mode remote is unavailable",
        why="there is no public service",
        repr=False,  # an address may hold a password
    )
    remote_token: SecretStr | None = _setting(
        None,
        "Token for that service. Never printed.",
        allowed="the token as text",
        unset="requests carry no token",
        why="a secret has no default",
    )
    serve_address: Annotated[str, AfterValidator(_check_listener)] = _setting(
        "127.0.0.1:8080",
        "Where `cloche serve` listens. Port 0 means any free one. Without tokens it listens on loopback only.",
        allowed="an address and a port such as 127.0.0.1:8080, 0.0.0.0:8080 or [::1]:8080",
        why="whoever reaches it can run programs",
    )
    serve_tokens: SecretStr | None = _setting(
        None,
        "The tokens that `cloche serve` takes, `name:token` or `name:token:limit`, with commas or new lines between; the limit "
        "is how many runs this token may have at a time, queued ones included. Never printed.",
        allowed="a list such as search:6f0c9e…:10; a token has 16 to 512 letters, digits and . _ ~ + / = -",
        unset="what `CLOCHE_SERVE_TOKENS_FILE` holds; if that is unset too, nobody needs a token",
        why="a secret has no default",
    )
    serve_tokens_file: str | None = _setting(
        None,
        "A file with more of them, one in a line; a line that begins with `#` is a remark. Read once, at the start.",
        allowed="the path of a file",
        unset="only `CLOCHE_SERVE_TOKENS`",
        why="where orchestrators mount a secret",
        min_length=1,
        max_length=4096,
    )
    serve_max_queue: int = _setting(
        256,
        "Runs that may wait for a place in `cloche serve`; the next one is refused with 429.",
        allowed="a whole number from 0 to 100000",
        why="who is refused at once can go elsewhere; a run that waits holds what it brought",
        ge=0,
        le=100_000,
    )
    serve_max_timeout: Seconds = _setting(
        3600.0,
        "Seconds that a request to `cloche serve` may ask for at most. Of this and the next four what the service's own settings "
        "say is always allowed.",
        allowed=f"{_TIME}, at most {MAX_TIMEOUT_S:.0f}",
        why="a forgotten script must not hold a place for a day",
        gt=0,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
    )
    serve_max_memory: ByteSize = _setting(
        4 * 2**30,
        "Bytes of memory that a request to `cloche serve` may ask for at most.",
        allowed=f"{_AMOUNT}, at least 16Mi",
        why="what one run may take of the machine is the operator's to say; as in deploy/kubernetes",
        ge=MIN_MEMORY_BYTES,
        le=2**44,
    )
    serve_max_cpus: float = _setting(
        4.0,
        "CPUs that a request to `cloche serve` may ask for at most.",
        allowed="a number above 0, at most 1024",
        why="as with memory",
        gt=0,
        le=1024,
        allow_inf_nan=False,
    )
    serve_max_pids: int = _setting(
        1024,
        "Processes and threads that a request to `cloche serve` may ask for at most.",
        allowed="a whole number from 4 to 4194304",
        why="as with memory",
        ge=4,
        le=2**22,
    )
    serve_images: Names = _setting(
        (),
        "Images that a request to `cloche serve` may name beside `CLOCHE_IMAGE`, with commas between; what ends in `*` stands "
        "for all that begin so, and `*` alone for any.",
        allowed="a list such as python:3.13-slim,registry.example/team/*",
        unset="no other",
        why="an image is a program of somebody's, pulled with the service's own credentials",
    )
    serve_network: Network = _setting(
        Network.NONE,
        "What a request to `cloche serve` may ask for: nothing, or an open network.",
        allowed="none or open",
        why="an open network is the service's own, which reaches what its callers may not",
    )
    serve_drain: Seconds = _setting(
        30.0,
        "Seconds that `cloche serve` lets runs go on when it was asked to end; then it cancels them.",
        allowed="seconds such as 0, 30 or 1.5, or a duration such as 2m",
        why="with the time to cancel and remove, it fits into a minute",
        ge=0,
        le=_MAX_WAIT_S,
        allow_inf_nan=False,
    )
    serve_keep_bytes: ByteSize = _setting(
        64 * 2**20,
        "Bytes of ended runs, results and artifacts, that `cloche serve` keeps for those who ask later; the oldest go first.",
        allowed=_AMOUNT,
        why="an answer to a client that lost its connection, in memory that a small server has",
        ge=0,
        le=_MAX_BYTES,
    )
    sweep_every: Seconds = _setting(
        60.0,
        "Seconds between two sweeps for what the dead left, half to one and a half times as many by chance; 0: only at first.",
        allowed="seconds such as 0, 60 or 1.5, or a duration such as 2m",
        why="a box lives for minutes, and many processes must not ask an engine at the same moment",
        ge=0,
        le=_MAX_WAIT_S,
        allow_inf_nan=False,
    )
    log: Literal["debug", "info", "warning", "error", "critical"] = _setting(
        "warning",
        "Least level of what the command line logs to stderr. A program that uses the library configures `logging` itself.",
        allowed="debug, info, warning, error or critical",
        why="a run that goes well says nothing",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo[Any]) -> Self:
        # An error that is no ValueError passes through pydantic as it is, so that making Settings raises ours.
        try:
            return handler(data)
        except ValidationError as exc:
            raise _broken(exc, info.context or {}) from None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
        """The settings in ``environ`` (None: this process's environment), with fields in ``given`` above them.

        A ``CLOCHE_`` name wins over its aliases.

        Raises:
            InvalidSettings: a name that begins with ``CLOCHE_`` is unknown, or a value is not allowed.
        """
        environ = os.environ if environ is None else environ
        known = variables()
        for name in environ:
            if name.startswith(PREFIX) and name not in known:
                _refuse_unknown(name)
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, field in known.items():
            # The names of a field come with CLOCHE_'s first, so the first one that is set wins.
            text = environ.get(name, "").strip()
            if text and field not in values:
                values[field], sources[field] = text, f"{name}={_shown(field, text)}"
        for field, value in given.items():
            values[field], sources[field] = value, f"{field}={_shown(field, value)}"
        return cls.model_validate(values, context=sources)

    def workspace_bytes(self, mode: str) -> int:
        """The bound of workspace and stdin together in this mode, in bytes."""
        if self.max_workspace_bytes is not None:
            return self.max_workspace_bytes
        return (8 if mode == Mode.KUBERNETES else 64) * 2**20


def variables() -> dict[str, str]:
    """Every variable that is read, with the field that it sets; of one field CLOCHE_'s name comes first."""
    found: dict[str, str] = {}
    for name, field in Settings.model_fields.items():
        found[PREFIX + name.upper()] = name
        found.update(dict.fromkeys(extra(field)["aliases"], name))
    return found


def extra(field: FieldInfo) -> dict[str, Any]:
    """What a setting says of itself: allowed, unset, why, aliases."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def resolve(spec: Spec, settings: Settings) -> Limits:
    """Every bound of one run: what the spec says, else what the settings say. Pure."""
    return Limits(
        timeout_s=settings.timeout if spec.timeout is None else spec.timeout,
        memory_bytes=settings.memory if spec.memory is None else spec.memory,
        cpus=settings.cpus if spec.cpus is None else spec.cpus,
        pids=settings.pids if spec.pids is None else spec.pids,
        output_bytes=settings.max_output_bytes,
        artifact_bytes=settings.max_artifact_bytes,
    )


def _refuse_unknown(name: str) -> None:
    if _INJECTED.fullmatch(name) or _DEVELOPMENT.fullmatch(name):
        return
    ours = [known for known in variables() if known.startswith(PREFIX)]
    near = difflib.get_close_matches(name, ours, n=1, cutoff=0)
    raise InvalidSettings(
        f"{name} is not a setting of cloche.",
        hint=f"Did you mean {near[0]}? Correct the name or unset it; docs/settings.md lists them all.",
    )


def _broken(exc: ValidationError, sources: Mapping[str, str]) -> InvalidSettings:
    """Our error for pydantic's, about the first value that is not allowed."""
    error = exc.errors(include_url=False, include_context=False)[0]
    name = str(error["loc"][0]) if error["loc"] else "settings"
    field = Settings.model_fields.get(name)
    if field is None:
        return InvalidSettings(f"{name} is not a setting of cloche.")
    source = sources.get(name) or f"{name}={_shown(name, error['input'])}"
    return InvalidSettings(f"{source} is not allowed.", hint=f"Allowed is {extra(field)['allowed']}.")


def _shown(field: str, value: Any) -> str:
    """A value in an error: never a secret (an address may hold one), never at length."""
    if field.startswith(("opensandbox", "remote", "serve_tokens")):
        return "…"
    text = str(value)
    return repr(text if len(text) <= 80 else text[:80] + "…")
