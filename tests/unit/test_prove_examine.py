"""The steps of the way to a box, as far as they are judged without asking anybody."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cloche.backends.contract import Profile
from cloche.backends.docker import examine as docker
from cloche.backends.docker.facts import Info, Version
from cloche.backends.docker.probe import Daemon
from cloche.backends.kubernetes import examine as kubernetes
from cloche.backends.kubernetes import manifest as kubernetes_manifest
from cloche.backends.kubernetes.facts import Rule
from cloche.backends.local import examine as local
from cloche.backends.local.cgroup import Flavour
from cloche.backends.opensandbox import examine as opensandbox
from cloche.backends.opensandbox import manifest as opensandbox_manifest
from cloche.isolation import Isolation, Posture, Verdict
from cloche.settings import Settings
from cloche.spec import Limits, Network

VERSION = Version("Docker", "29.0", (1, 52), (1, 24), "linux", "amd64", "6.1.0")
INFO = Info(
    runtimes=frozenset({"runc"}),
    default_runtime="runc",
    security=frozenset({"seccomp"}),
    cpus=2,
    memory_limit=True,
    swap_limit=True,
    pids_limit=True,
    cpu_limit=True,
)
WELL = Posture("local", available=True, isolation=Isolation.NAMESPACE, engine="bubblewrap 0.11")


def rule(verbs: str, group: str, resources: str) -> Rule:
    return Rule(frozenset(verbs.split()), frozenset({group}), frozenset(resources.split()))


def test_rights_that_are_used_are_not_too_many() -> None:
    """The Role of deploy/kubernetes, and what Kubernetes gives everybody, are no excess."""
    rules = [
        rule("create delete get list", "batch", "jobs"),
        rule("create delete get list", "", "configmaps"),
        rule("get list watch", "", "pods"),
        rule("get", "", "pods/log"),
        rule("list", "", "events"),
        rule("create", "authorization.k8s.io", "selfsubjectrulesreviews selfsubjectaccessreviews"),
        rule("get list watch", "certificates.k8s.io", "clustertrustbundles"),
    ]
    assert kubernetes.excess(rules) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (rule("get list", "", "secrets"), "get/list secrets"),
        (rule("create", "", "pods/exec"), "create pods/exec"),
        (rule("patch get", "batch", "jobs"), "patch jobs.batch"),
        (rule("*", "*", "*"), "* everything"),
    ],
)
def test_rights_that_are_too_many(more: Rule, said: str) -> None:
    """Each is told by its verbs and its resource, without those that are used."""
    (told,) = kubernetes.excess([more])
    assert told.startswith(said)


@pytest.mark.parametrize(
    ("base", "address"),
    [
        ("https://10.0.0.1:6443", "10.0.0.1:6443"),
        ("https://10.0.0.1", "10.0.0.1:443"),
        ("https://[fd00::1]:6443/k8s", "[fd00::1]:6443"),
        ("https://127.0.0.1:6443", None),
        ("https://[::1]:6443", None),
        ("https://api.example.org", None),
    ],
)
def test_addresses_that_mean_the_same_in_a_pod(base: str, address: str | None) -> None:
    """A loopback is the box's own there, and a name may be another's."""
    found = kubernetes.addresses(type("Access", (), {"base": base})())
    assert found == ({} if address is None else {"kubernetes-api": address})


@pytest.mark.parametrize(
    ("info", "runtime", "wrong"),
    [
        (INFO, None, set()),
        (INFO, "runsc", {"runtime"}),
        (replace(INFO, memory_limit=False), None, {"limits"}),
    ],
)
def test_a_daemon(info: Info, runtime: str | None, wrong: set[str]) -> None:
    """A runtime that is not there and a bound that cannot be kept are found before a box shows it."""
    checks = docker.daemon(Daemon(VERSION, info), "unix:///x", runtime)
    assert {check.name for check in checks if check.verdict is not Verdict.OK} == wrong
    assert all(check.advice for check in checks if check.verdict is Verdict.NOT_OK)


def test_this_machine() -> None:
    """Without a cgroup a box is bounded in other ways: told, and nothing fails over it."""
    checks = {check.name: check for check in local.checks(WELL, Flavour("none"), 1000)}
    assert checks["cgroup"].verdict is Verdict.NOT_OK
    assert not checks["cgroup"].needed
    assert "uid 1000" in checks["user"].evidence
    away = local.checks(replace(WELL, available=False, reason="It is forbidden.", hint="Allow it."), None, 0)
    assert {check.name: check.verdict for check in away}["user-namespaces"] is Verdict.NOT_OK


def test_a_service() -> None:
    """One that wants no key takes anybody's requests: told, and nothing fails over it."""
    posture = replace(WELL, mode="opensandbox", engine="OpenSandbox 1")
    checks = {check.name: check for check in opensandbox.checks(Settings(), posture, "http://x")}
    assert checks["service"].verdict is Verdict.OK
    assert checks["rights"].verdict is Verdict.NOT_OK
    assert not checks["rights"].needed


@pytest.mark.parametrize(
    ("network", "sockets", "filtered"),
    [(Network.NONE, False, True), (Network.NONE, True, False), (Network.OPEN, False, False)],
)
def test_who_may_make_sockets(network: Network, sockets: bool, filtered: bool) -> None:
    """Only a box of the prober's own is left its sockets where there is to be no network; its labels stay those of none."""
    profile = Profile("r", "o", math.inf, Limits(), network=network, image="i", delivery_bytes=1, sockets=sockets)
    ground = kubernetes_manifest.Ground(namespace="n", supervisor="s", machine="x86_64", service_account="a")
    job = kubernetes_manifest.job(profile, ground, kubernetes_manifest.Made("j", 1, 1.0, 1.0))
    template = job["spec"]["template"]
    assert ("--sockets" in template["spec"]["containers"][0]["command"]) is filtered
    assert template["metadata"]["labels"]["cloche.dev/network"] == str(network)
    assert ("--sockets" in opensandbox_manifest.supervisor(profile, 20_000)) is filtered
