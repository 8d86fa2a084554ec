"""The modes that the suites are run over, and how each is made to work on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
from tests import clusters, daemons, leftovers, remotes, services
from tests.kubernetes import deployment

from cloche.testing.conformance import Target, absent

INTERPRETERS = ("python3", "sh", "bash", "node", "perl", "ruby", "php")


def count_local_boxes() -> int:
    """Boxes of this process: the launchers that it started and that have become bubblewrap. One more stands by.

    Looking through /proc takes a while, in which boxes come and go. Those that are still there after it were all there at
    one moment.
    """
    seen = {int(name): remotes.stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    ours = {pid for pid, (name, parent) in seen.items() if name == "cloche-guard" and parent == os.getpid()}
    boxes = {pid: parent for pid, (name, parent) in seen.items() if name == "bwrap" and parent in ours}
    return len({parent for pid, parent in boxes.items() if remotes.stat(pid) == seen[pid]})


def local() -> Target:
    """bubblewrap on this machine."""
    offered = frozenset(name for name in INTERPRETERS if shutil.which(name) is not None)
    return Target("local", interpreters=offered, count_boxes=count_local_boxes, remains=leftovers.beside_standby)


class Unset(Exception):
    """No environment variable says where the engine is, or it names nothing that answers."""


def _daemon(variable: str, **settings: str) -> Target:
    """A daemon that an environment variable names.

    Raises:
        Unset: it does not.
    """
    host = os.environ.get(variable, "")
    image = os.environ.get("CLOCHE_TEST_DOCKER_IMAGE", "cloche-test/sandbox:1")
    guest = "CLOCHE_DOCKER_RUNTIME" in settings
    if not host or not all(settings.values()):
        unset = variable if not host else "CLOCHE_TEST_DOCKER_RUNTIME"
        raise Unset(f"{unset} is not set (make engines-docker starts daemons for the tests)")
    return Target(
        "docker",
        {"CLOCHE_DOCKER_HOST": host, "CLOCHE_IMAGE": image, "CLOCHE_PULL": "never", **settings},
        interpreters=frozenset({"python3", "sh", "bash", "node", "perl"}),
        on_this_host=not guest and Path(host.removeprefix("unix://")).exists(),
        count_boxes=lambda: daemons.count_boxes(host),
        remains=lambda: frozenset(daemons.remains(host)),
    )


def docker() -> Target:
    """The daemon of CLOCHE_TEST_DOCKER_HOST, with its default runtime."""
    return _daemon("CLOCHE_TEST_DOCKER_HOST")


def docker_guest() -> Target:
    """The same, with the runtime of CLOCHE_TEST_DOCKER_RUNTIME, which has a kernel of its own."""
    runtime = os.environ.get("CLOCHE_TEST_DOCKER_RUNTIME", "")
    return _daemon("CLOCHE_TEST_DOCKER_HOST", CLOCHE_DOCKER_RUNTIME=runtime)


def docker_old() -> Target:
    """The oldest daemon that people still have."""
    return _daemon("CLOCHE_TEST_DOCKER_OLD_HOST")


def podman() -> Target:
    """Podman's compatible socket."""
    return _daemon("CLOCHE_TEST_PODMAN_HOST")


def kubernetes() -> Target:
    """The cluster of CLOCHE_TEST_KUBECONFIG, set up by the manifests of deploy/kubernetes, with no more rights than they give."""
    admin = os.environ.get(deployment.KUBECONFIG, "")
    if not admin:
        raise Unset(f"{deployment.KUBECONFIG} is not set (make engines-kubernetes starts a cluster for the tests)")
    try:
        ours = deployment.deploy(Path(admin))
    except deployment.AbsentError as exc:
        raise Unset(str(exc)) from exc
    return Target(
        "kubernetes",
        {
            "CLOCHE_KUBE_CONFIG": str(ours),
            "CLOCHE_KUBE_NAMESPACE": deployment.NAMESPACE,
            "CLOCHE_IMAGE": os.environ.get("CLOCHE_TEST_KUBERNETES_IMAGE", "cloche-test/sandbox:1"),
        },
        interpreters=frozenset({"python3", "sh", "bash", "node", "perl"}),
        on_this_host="CLOCHE_TEST_KUBERNETES_FOLDER" in os.environ,
        dies_with_client=False,
        seals_workspace=False,
        count_boxes=lambda: clusters.count_boxes(admin),
        remains=lambda: frozenset(clusters.remains(admin)),
    )


def _service(mode: str) -> Target:
    """A service that environment variables name.

    Raises:
        Unset: they do not.
    """
    service = services.find(mode)
    if service is None:
        variable = f"{services.PREFIXES[mode]}_API_URL"
        raise Unset(f"{variable} is not set (make engines-opensandbox starts services for the tests)")
    return Target(
        "opensandbox",
        {
            "CLOCHE_OPENSANDBOX_API_URL": service.url,
            "CLOCHE_OPENSANDBOX_API_KEY": service.key,
            "CLOCHE_IMAGE": os.environ.get("CLOCHE_TEST_OPENSANDBOX_IMAGE", "cloche-test/sandbox-root:1"),
        },
        interpreters=frozenset({"python3", "sh", "bash", "node", "perl"}),
        on_this_host=bool(service.docker_host),
        dies_with_client=False,
        bounds_disks=False,
        count_boxes=lambda: len(service.boxes()),
        remains=lambda: frozenset(services.remains(service)),
    )


def opensandbox() -> Target:
    """The service of CLOCHE_TEST_OPENSANDBOX_API_URL."""
    return _service("opensandbox")


def opensandbox_old() -> Target:
    """One whose execd is as it was up to 1.1.0."""
    return _service("opensandbox-old")


def remote() -> Target:
    """A service on this machine, in the mode local, that is started for the tests.

    How many boxes there are is bounded by the service: a run is over here when its result is known, and its box is removed there.
    """
    try:
        service = remotes.start()
    except remotes.AbsentError as exc:
        raise Unset(str(exc)) from exc
    return Target(
        "remote",
        {"CLOCHE_REMOTE_URL": service.url, "CLOCHE_REMOTE_TOKEN": service.token},
        interpreters=frozenset(name for name in INTERPRETERS if shutil.which(name) is not None),
        remains=service.remains,
    )


MODES: Mapping[str, Callable[[], Target]] = {
    "local": local,
    "docker": docker,
    "docker-guest": docker_guest,
    "docker-old": docker_old,
    "podman": podman,
    "kubernetes": kubernetes,
    "opensandbox": opensandbox,
    "opensandbox-old": opensandbox_old,
    "remote": remote,
}
"""By the name of CLOCHE_MUST_WORK. There can be several targets of one mode."""


def ready(mode: str) -> Target:
    """The target for a mode. Skips the test, or fails it under ``CLOCHE_MUST_WORK``, when its engine is not here."""
    try:
        target = MODES[mode]()
    except Unset as exc:
        absent(mode, str(exc))
        raise

    async def probe() -> str:
        async with target.sandbox() as sandbox:
            posture = await sandbox.posture()
            return "" if posture.available else posture.reason

    from cloche import ClocheError

    try:
        reason = anyio.run(probe)
    except ClocheError as error:
        reason = str(error)
    if reason:
        absent(mode, reason)
    return target
