"""The doctor before a Docker daemon: healthy, and behind somebody who weakens each container on its way to the daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.doctor import meddler
from tests.doctor.ask import broken, doctor, states
from tests.doctor.meddler import Change, host_config, meddling
from tests.modes import ready
from tests.supervisor.harness import public_folder

from cloche.testing.conformance import Target


def no_bound_of_processes(body: dict[str, Any]) -> None:
    """Neither when it is made nor after that."""
    body.get("HostConfig", body)["PidsLimit"] = -1


def unbounded_tmp(body: dict[str, Any]) -> None:
    if mounts := body.get("HostConfig", {}).get("Tmpfs"):  # the container that fills the supervisor's volume has none
        mounts["/tmp"] = ",".join(word for word in mounts["/tmp"].split(",") if not word.startswith("size="))


def root_for_the_script(body: dict[str, Any]) -> None:
    command = body.get("Entrypoint", ())
    if "--script-uid" in command:
        command[command.index("--script-uid") + 1] = "0"


WEAK: Mapping[str, tuple[Change, set[str], str]] = {
    **meddler.WEAK,
    "privileged": (
        host_config(Privileged=True),
        {"engine-call-filter", "kernel-files", "devices"},
        "namespace",
    ),
    "host network": (host_config(NetworkMode="host"), {"network"}, "process"),
    "bridge": (host_config(NetworkMode="bridge"), {"network"}, "process"),
    "no seccomp": (host_config(SecurityOpt=["seccomp=unconfined"]), {"engine-call-filter"}, "namespace"),
    "writable root": (host_config(ReadonlyRootfs=False), {"read-only-root"}, "namespace"),
    "no bound of processes": (no_bound_of_processes, {"process-limit"}, "container"),
    "unbounded /tmp": (unbounded_tmp, {"disk-limit"}, "container"),
}
"""What is changed behind cloche's back, what the doctor then finds broken, and the level that is left."""


@pytest.fixture(scope="module")
def healthy() -> Target:
    return ready("docker")


@pytest.fixture
def folder() -> Iterator[Path]:
    with public_folder() as path:
        yield path


def ask(target: Target, *options: str, **settings: str) -> tuple[int, Any]:
    return doctor("docker", *options, settings={**target.environ, **settings})


def test_healthy(healthy: Target) -> None:
    """Everything is in force; whose kernel it is is seen, and asking for more than there is fails."""
    status, report = ask(healthy)
    assert broken(report) == set()
    assert (status, report["ok"], report["level"]) == (0, True, "container")
    assert states(report)["own-kernel"] == "not-in-force"
    assert [check["name"] for check in report["checks"] if check["verdict"] != "ok"] == []
    status, report = ask(healthy, "--require", "kernel")
    assert (status, report["ok"], report["level"]) == (1, False, "container")


def test_a_meddler_who_changes_nothing(healthy: Target, folder: Path) -> None:
    """The detour itself breaks nothing: what the tests below find is what was changed on it."""
    with meddling(healthy.environ["CLOCHE_DOCKER_HOST"], folder, lambda _: None) as host:
        status, report = ask(healthy, CLOCHE_DOCKER_HOST=host)
    assert (status, broken(report)) == (0, set())


@pytest.mark.parametrize("name", WEAK)
def test_weakened(healthy: Target, folder: Path, name: str) -> None:
    """One thing is changed: that is found, and nothing else."""
    change, expected, level = WEAK[name]
    with meddling(healthy.environ["CLOCHE_DOCKER_HOST"], folder, change) as host:
        status, report = ask(healthy, CLOCHE_DOCKER_HOST=host)
    assert report["error"] is None, report["error"]
    found = broken(report)
    if name == "host network":
        found.discard("namespaces")  # the daemon's host may be one whose namespaces are not this machine's
    assert found == expected, [g for g in report["guarantees"] if g["name"] in found ^ expected]
    assert (status, report["ok"], report["level"]) == (1, False, level)


def test_root_is_refused(healthy: Target, folder: Path) -> None:
    """A script that would be root is not started, so there is nothing to look at: the doctor says why."""
    with meddling(healthy.environ["CLOCHE_DOCKER_HOST"], folder, root_for_the_script) as host:
        status, report = ask(healthy, CLOCHE_DOCKER_HOST=host)
    assert (status, report["ok"]) == (125, False)
    assert "uid 0" in report["error"]["message"]


def test_a_kernel_of_its_own() -> None:
    """With gVisor the level is the kernel's, since its kernel was seen."""
    target = ready("docker-guest")
    status, report = ask(target, "--require", "kernel")
    assert broken(report) == set()
    assert (status, report["ok"], report["level"]) == (0, True, "kernel")
    assert states(report)["own-kernel"] == "in-force"


def test_no_daemon() -> None:
    """What cannot be reached is told with the reason, step by step."""
    status, report = doctor("docker", settings={"CLOCHE_DOCKER_HOST": f"unix://{os.devnull}/nowhere"})
    assert (status, report["ok"], report["level"]) == (125, False, None)
    assert report["error"]["code"] == "backend-unavailable"
    assert [check["name"] for check in report["checks"] if check["verdict"] == "not-ok"] == ["daemon"]
