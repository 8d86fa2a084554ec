"""What works in the namespace; and why nothing does, in words that tell what to do.

Only rights in that one namespace are asked about: nothing here needs a right in the cluster.
"""

from __future__ import annotations

import anyio

from cloche._kit.http import ConnectFailure, HttpFailure, TlsFailure
from cloche.backends.kubernetes import diagnose
from cloche.backends.kubernetes.client import KubernetesClient, Refused
from cloche.backends.kubernetes.kubeconfig import Access
from cloche.errors import BackendUnavailable, ClocheError
from cloche.isolation import Guarantee, State
from cloche.settings import Settings

NEEDED = (
    ("create", "batch", "jobs"),
    ("delete", "batch", "jobs"),
    ("get", "batch", "jobs"),
    ("list", "batch", "jobs"),
    ("create", "", "configmaps"),
    ("delete", "", "configmaps"),
    ("get", "", "configmaps"),
    ("list", "", "configmaps"),
    ("get", "", "pods"),
    ("list", "", "pods"),
    ("watch", "", "pods"),
    ("get", "", "pods/log"),
    ("list", "", "events"),
)
"""Verb, API group and resource of every right that is used, all of them in the one namespace."""
LOOK_AGAIN_S = (0.3, 0.9)
"""Before each new look at missing rights: a server that has just been started knows nobody's for some tenths of a second."""
USUAL_LOG_BYTES = 10 * 2**20
"""At which a kubelet rotates a log unless told otherwise (kubelet configuration, containerLogMaxSize)."""
_FRAME_OVERHEAD = 1.4
"""base64, and what stands beside it."""


async def look(client: KubernetesClient, access: Access, namespace: str) -> str:
    """Ask whether every right is there that a run needs, and give the cluster's version.

    Raises:
        ClocheError: the cluster cannot be used. Message and hint say why.
    """
    try:
        missing = await _missing(client)
        for pause in LOOK_AGAIN_S if missing else ():
            await anyio.sleep(pause)
            missing = await _missing(client)
            if not missing:
                break
        version = await client.version()
    except HttpFailure as exc:
        raise _unreachable(exc, access) from exc
    except Refused as exc:
        raise _refused(exc, access, namespace) from exc
    if missing:
        raise BackendUnavailable(
            f"In the namespace {namespace} of {access.text} cloche may not {', '.join(missing)}.",
            hint="Bind the Role of deploy/kubernetes to it, or name another namespace with CLOCHE_KUBE_NAMESPACE.",
        )
    return version


async def _missing(client: KubernetesClient) -> list[str]:
    """The rights that are not there, in words."""
    try:
        rules, complete = await client.rules()
        missing = [right for right in NEEDED if not any(rule.allows(*right) for rule in rules)]
        if not complete:
            # An authorizer that does not tell all: what it does not tell, it is asked one by one.
            missing = [right for right in missing if not await client.may(*right)]
    except Refused as exc:
        if exc.code != 403:
            raise
        # Who may not even ask what he may: whether there is a way in at all is all that can be seen.
        await client.look()
        return []
    return [f"{verb} {resource}" for verb, _, resource in missing]


def _unreachable(exc: HttpFailure, access: Access) -> BackendUnavailable:
    match exc:
        case TlsFailure():
            return BackendUnavailable(
                f"The API server at {access.text} and cloche could not agree on TLS: {exc}.",
                hint="Check the certificate authority of the configuration file, and that the address is the server's own.",
            )
        case ConnectFailure():
            return BackendUnavailable(
                f"The API server at {access.text} cannot be reached: {exc}.",
                hint="Check KUBECONFIG and its current context: kubectl get --raw /version has to work.",
            )
        case _:
            return BackendUnavailable(
                f"What listens at {access.text} gives no answer that an API server would give: {exc}.",
                hint="Check KUBECONFIG and its current context: kubectl get --raw /version has to work.",
            )


def _refused(exc: Refused, access: Access, namespace: str) -> ClocheError:
    if exc.code == 401:
        return BackendUnavailable(
            f"The API server at {access.text} does not know who we are: {exc.message.rstrip('.')}.",
            hint="Renew the credentials of the configuration file's user; a service account's token may have expired.",
        )
    if exc.code == 403:
        return BackendUnavailable(
            f"In the namespace {namespace} of {access.text} cloche has no rights: {exc.message.rstrip('.')}.",
            hint="Bind the Role of deploy/kubernetes to it, or name another namespace with CLOCHE_KUBE_NAMESPACE.",
        )
    return diagnose.refusal(exc, "be asked what cloche may do")


def guarantees(settings: Settings) -> tuple[Guarantee, ...]:
    """What a box of the cluster gives. Much of it the supervisor checks in every run: what it cannot do then, it refuses the
    run for.
    """
    checked = "the supervisor checks it in every run"
    kept = 2 * settings.max_output_bytes + settings.max_artifact_bytes
    fits = kept * _FRAME_OVERHEAD < USUAL_LOG_BYTES
    return (
        Guarantee("process-tree", State.IN_FORCE, "the supervisor is PID 1 of the container"),
        Guarantee(
            "network",
            State.IN_FORCE,
            "the script can make no sockets but local ones, unless network is open; a NetworkPolicy is a second wall where"
            " the cluster enforces it",
        ),
        Guarantee("identity", State.IN_FORCE, f"a uid and gid of the run's own, never 0; {checked}"),
        Guarantee("no-capabilities", State.IN_FORCE, f"the container has none, and may not gain any; {checked}"),
        Guarantee("no-new-privileges", State.IN_FORCE, f"set by the runtime and by the supervisor; {checked}"),
        Guarantee("system-call-filter", State.IN_FORCE, f"the supervisor's own filter; {checked}"),
        Guarantee("engine-call-filter", State.IN_FORCE, "the runtime's default profile as well; the pod asks for it"),
        Guarantee(
            "read-only-root", State.IN_FORCE, "the image's files cannot be changed; no path of the node is mounted"
        ),
        Guarantee(
            "workspace-read-only",
            State.IN_FORCE,
            f"by Landlock; {checked}. Modes and times of what was delivered are the script's to change: it has one uid with its"
            " guard",
        ),
        Guarantee("landlock", State.IN_FORCE, "a box without it refuses to run a script"),
        Guarantee(
            "memory-limit", State.IN_FORCE, "a cgroup of the kubelet's bounds memory; no swap unless the node has it"
        ),
        Guarantee("cpu-limit", State.IN_FORCE, "a cgroup of the kubelet's bounds CPU time"),
        Guarantee(
            "process-limit",
            State.IN_FORCE,
            f"RLIMIT_NPROC, for a uid that the box has by chance, of a range; {checked}",
        )
        if settings.kube_run_as_user[0] != settings.kube_run_as_user[1]
        else Guarantee(
            "process-limit",
            State.NOT_IN_FORCE,
            "all boxes have one uid, by which the kernel counts: together they may have as many processes as one",
            "Give CLOCHE_KUBE_RUN_AS_USER a range.",
        ),
        Guarantee(
            "file-count-limit",
            State.NOT_IN_FORCE,
            "Kubernetes bounds the bytes of a volume, not its files: the memory limit alone bounds empty files",
        ),
        Guarantee("user-namespace", State.IN_FORCE, "hostUsers is false: its uids are nobody's on the node")
        if not settings.kube_host_users
        else Guarantee(
            "user-namespace",
            State.NOT_IN_FORCE,
            "uids in the box are the node's",
            "Set CLOCHE_KUBE_HOST_USERS=false where nodes can do it: it gives one more wall.",
        ),
        Guarantee(
            "log-size", State.IN_FORCE, "all that a run may print fits into a log of 10 MiB, the kubelet's usual bound"
        )
        if fits
        else Guarantee(
            "log-size",
            State.NOT_IN_FORCE,
            f"a run may print {kept} bytes, and a kubelet rotates a log at 10 MiB: a connection that is lost then is not found"
            " again",
            "Lower CLOCHE_MAX_OUTPUT_BYTES or CLOCHE_MAX_ARTIFACT_BYTES, or raise containerLogMaxSize on the nodes.",
        ),
    )
