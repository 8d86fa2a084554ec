"""What works at the service, and why nothing does, in words that tell what to do."""

from __future__ import annotations

import secrets

from cloche._kit.http import HttpFailure
from cloche.backends.opensandbox import diagnose
from cloche.backends.opensandbox.client import OpenSandboxClient, Refused
from cloche.errors import BackendUnavailable
from cloche.isolation import Guarantee, State


async def look(client: OpenSandboxClient) -> str:
    """The service's version, empty where it does not tell; after it has shown that it is well and that it takes the key.

    Raises:
        BackendUnavailable: it has not.
    """
    where = client.place.base
    try:
        if not await client.healthy():
            raise BackendUnavailable(
                f"What answers at {where} is no OpenSandbox service, or says that it is not well.",
                hint="Check CLOCHE_OPENSANDBOX_API_URL, and the service's own log: GET /health has to say healthy.",
            )
        # Health needs no key; to ask for what nobody made costs the service least of what does.
        await client.sandbox(f"none-{secrets.token_hex(8)}")
    except HttpFailure as exc:
        raise diagnose.unreachable(exc, client.place, "tell how it is") from exc
    except Refused as exc:
        if exc.status in {401, 403}:
            raise BackendUnavailable(
                f"The OpenSandbox service at {where} does not take the key: {exc}.", hint=diagnose.KEY_HINT
            ) from exc
        raise BackendUnavailable(
            f"The OpenSandbox service at {where} does not work: {exc}.", hint="Look at the service's own log."
        ) from exc
    return await client.version()


def guarantees() -> tuple[Guarantee, ...]:
    """What a sandbox of the service gives, and from where that is known. How the service makes it is not ours to see."""
    checked = "the supervisor checks it in every run"
    theirs = "the service makes the sandbox, and does not say"
    return (
        Guarantee(
            "process-tree",
            State.IN_FORCE,
            "a helper with the script's uid, which nothing else in the sandbox has, kills all of it; then the sandbox goes",
        ),
        Guarantee(
            "network",
            State.IN_FORCE,
            "no network unless network is open: only sockets of the Unix family, by the supervisor's filter;"
            f" open is what the service gives; {checked}",
        ),
        Guarantee(
            "identity", State.IN_FORCE, f"a uid of the run's own, the supervisor and execd have another; {checked}"
        ),
        Guarantee("no-capabilities", State.IN_FORCE, f"no capability is left to the script; {checked}"),
        Guarantee("no-new-privileges", State.IN_FORCE, f"set by the supervisor; {checked}"),
        Guarantee("system-call-filter", State.IN_FORCE, f"the supervisor's own filter; {checked}"),
        Guarantee("engine-call-filter", State.UNKNOWN, theirs),
        Guarantee(
            "read-only-root",
            State.NOT_IN_FORCE,
            "the image's files belong to root, and only their modes (and Landlock) keep the script from writing",
        ),
        Guarantee("workspace-read-only", State.IN_FORCE, "it belongs to the supervisor's uid"),
        Guarantee(
            "disk-limit",
            State.NOT_IN_FORCE,
            "/output and /tmp are on the disk of the service's machine: one file has 64 MiB at most, all together as much as"
            " there is",
            "Give the service's containers a quota of the disk.",
        ),
        Guarantee("landlock", State.UNKNOWN, "every run tries it; the kernel is the service's"),
        Guarantee(
            "memory-limit",
            State.IN_FORCE,
            "asked of the service with each sandbox (resourceLimits); Docker and Kubernetes keep it",
        ),
        Guarantee("process-limit", State.IN_FORCE, f"by a uid of the run's own (RLIMIT_NPROC); {checked}"),
        Guarantee("cpu-limit", State.IN_FORCE, "asked of the service with each sandbox (resourceLimits)"),
        Guarantee("user-namespace", State.UNKNOWN, theirs),
    )
