"""Boxes in a real cluster: what is left of them, whoever dies, and what they are made of."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from tests import clusters
from tests.crowds import kill_in_the_middle, leave_nothing, open_and_close, sweep_beside_a_run
from tests.engines.kubernetes.cluster import Cluster
from tests.engines.kubernetes.configuration import ADDRESS
from tests.kubernetes import deployment
from tests.kubernetes.deployment import Api, core, jobs

import cloche
from cloche.backends.kubernetes import names
from cloche.isolation import State
from cloche.testing.conformance import Target, assert_exited, python, shell

pytestmark = pytest.mark.anyio

IMAGES_PYTHON = (3, 11)


def administrator() -> str:
    return os.environ[deployment.KUBECONFIG]


def test_killed_in_the_middle_of_20_runs(kubernetes: Target) -> None:
    """A client killed by SIGKILL in the middle of 20 runs leaves them to the next one, whose sweep leaves nothing of them."""
    with kubernetes.nothing_left(within_s=20):
        kill_in_the_middle(kubernetes, 20)
        assert len(list(clusters.remains(administrator()))) >= 60, "nothing was left to sweep: the test shows nothing"
        anyio.run(open_and_close, kubernetes)
        assert clusters.count_boxes(administrator()) == 0


def test_what_belongs_to_a_job_goes_with_it(kubernetes: Target, admin: Api) -> None:
    """Without any sweep, when a dead client's Job goes, as its deadline has it go, the cluster removes all that belongs to it."""
    with kubernetes.nothing_left(within_s=20):
        kill_in_the_middle(kubernetes, 1)
        left = [thing.split()[0] for thing in clusters.remains(administrator())]
        assert sorted(left) == ["configmap", "job", "pod"]
        (job,) = admin.ask("GET", f"{jobs()}?labelSelector={names.LABEL_RUN.replace('/', '%2F')}").body["items"]
        admin.ask("DELETE", f"{jobs()}/{job['metadata']['name']}?propagationPolicy=Background")
    anyio.run(open_and_close, kubernetes)  # for the dead owner's lock


async def test_sweep_spares_the_living(kubernetes: Target) -> None:
    """While one client's run goes on, another one's sweep removes nothing of it."""
    assert await sweep_beside_a_run(kubernetes, lasts_s=4, after_s=1.5) == "done\n"


async def test_sweep_by_expiry(kubernetes: Target, admin: Api) -> None:
    """What has expired goes, whoever it belonged to; what has not stays, if it is from elsewhere; a supervisor always stays."""
    now = int(time.time())
    for name, expires in (("old", now - 5), ("new", now + 600)):
        metadata = {
            "name": f"cloche-test-{name}",
            "labels": {**names.COMMON_LABELS, names.LABEL_RUN: "r0", names.LABEL_OWNER: "o0"},
            "annotations": {names.PLACE: "elsewhere", names.EXPIRES: str(expires)},
        }
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        assert admin.ask("POST", core("configmaps"), body).status == 201
        job = deployment.run(f"cloche-test-{name}").job
        job["metadata"]["annotations"] = metadata["annotations"]  # its pod waits for its ConfigMaps
        assert admin.ask("POST", jobs(), job).status == 201
    try:
        async with kubernetes.sandbox() as sandbox:
            assert_exited(await sandbox.run(shell("true")))
        there = set(clusters.remains(administrator()))
        for kind in ("job", "configmap"):
            found = [any(f"{kind} cloche-test-{name} " in thing for thing in there) for name in ("old", "new")]
            assert found == [False, True], kind
    finally:
        admin.ask("DELETE", f"{core('configmaps')}/cloche-test-new")
        admin.ask("DELETE", f"{jobs()}/cloche-test-new?propagationPolicy=Background")
    assert supervisors(admin)


def supervisors(admin: Api) -> list[dict[str, Any]]:
    """The ConfigMaps that hold one."""
    path = f"{core('configmaps')}?labelSelector={names.LABEL_SUPERVISOR.replace('/', '%2F')}"
    found: list[dict[str, Any]] = admin.ask("GET", path).body["items"]
    return found


def forget_supervisors(admin: Api) -> None:
    for found in supervisors(admin):
        assert admin.ask("DELETE", f"{core('configmaps')}/{found['metadata']['name']}").status == 200


async def test_the_supervisor_is_put_back(kubernetes: Target, admin: Api) -> None:
    """A supervisor's ConfigMap that somebody deletes under an open sandbox is made again: the next run only takes longer."""
    async with kubernetes.sandbox() as sandbox:
        with kubernetes.nothing_left():  # else the kubelet still has it, for the pod of before
            assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
        await to_thread.run_sync(forget_supervisors, admin)
        assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
    assert len(supervisors(admin)) == 1


async def test_another_supervisor(kubernetes: Target, admin: Api) -> None:
    """A ConfigMap of the supervisor's name with something else in it is not run: the sandbox says so, and what to do."""
    async with kubernetes.sandbox() as sandbox:
        assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
    (found,) = supervisors(admin)
    forget_supervisors(admin)
    evil = base64.b64encode(b"#!/bin/sh\necho evil\n").decode()
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "immutable": True,
        "metadata": {"name": found["metadata"]["name"], "labels": found["metadata"]["labels"]},
        "binaryData": {"supervisor": evil},
    }
    assert admin.ask("POST", core("configmaps"), body).status == 201
    try:
        async with kubernetes.sandbox() as sandbox:
            with pytest.raises(cloche.BackendUnavailable, match="does not hold what it should") as caught:
                await sandbox.run(shell("true"))
        assert f"kubectl delete configmap {found['metadata']['name']}" in caught.value.hint
    finally:
        forget_supervisors(admin)


async def test_many_make_the_supervisors_map_at_once(kubernetes: Target, admin: Api) -> None:
    """Ten sandboxes that open at once in a namespace without a supervisor all run, and there is one."""
    forget_supervisors(admin)

    async def one() -> None:
        async with kubernetes.sandbox() as sandbox:
            assert_exited(await sandbox.run(shell("true")))

    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(one)
    (found,) = supervisors(admin)
    assert found["immutable"] is True


async def test_100_runs(kubernetes: Target) -> None:
    """100 runs, 10 at a time, leave nothing in the cluster and nothing in the client: memory and descriptors stay flat."""
    with kubernetes.nothing_left(within_s=15):
        await leave_nothing(kubernetes, runs=100, warm_up=20, at_once=10, kept_fds=20)


async def test_a_large_workspace(kubernetes: Target, tmp_path: Path) -> None:
    """7 MiB in several ConfigMaps, one file of 3 MiB among them, arrive byte for byte, and go again."""
    blobs = {f"blob{i}": os.urandom(size) for i, size in enumerate((3 * 2**20, 2**20, 2**20 + 1, 2 * 2**20 - 1))}
    for name, data in blobs.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty").mkdir()
    (tmp_path / "main.py").write_text(
        "import hashlib, os, sys\n"
        "for n in sorted(os.listdir('.')):\n"
        "    if n.startswith('blob'): print(n, hashlib.sha256(open(n, 'rb').read()).hexdigest())\n"
        "print(os.listdir('empty'), hashlib.sha256(sys.stdin.buffer.read()).hexdigest())\n"
    )
    stdin = os.urandom(2**19)
    with kubernetes.nothing_left(within_s=10):
        async with kubernetes.sandbox() as sandbox:
            result = await sandbox.run(cloche.Spec(script="main.py", workspace=tmp_path, stdin=stdin))
    assert_exited(result)
    expected = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(blobs.items())]
    assert result.stdout.splitlines() == [*expected, f"[] {hashlib.sha256(stdin).hexdigest()}"]


async def test_an_image_without_a_shell(kubernetes: Target, tmp_path: Path) -> None:
    """An image with one static program and no shell runs that program."""
    (tmp_path / "file").write_text("hello")
    async with kubernetes.sandbox(CLOCHE_IMAGE="cloche-test/tiny:1") as sandbox:
        result = await sandbox.run(cloche.Spec(script="file", workspace=tmp_path, interpreter="tiny", timeout=10))
    assert_exited(result)
    assert result.stdout == "hello"


async def test_a_uid_of_its_own(kubernetes: Target) -> None:
    """Each box has a uid and a gid that no other has, out of the range of the settings, and no further groups."""
    source = "import os; print(os.getuid(), os.getgid(), *set(os.getgroups()) - {os.getgid()})"
    async with kubernetes.sandbox() as sandbox:
        said = [(await sandbox.run(python(source))).stdout.split() for _ in range(3)]
    assert all(len(ids) == 2 and ids[0] == ids[1] for ids in said)
    assert len({uid for uid, _ in said}) == 3
    assert all(10**9 <= int(uid) < 2 * 10**9 for uid, _ in said)


async def test_host_users(kubernetes: Target) -> None:
    """With CLOCHE_KUBE_HOST_USERS=false a box has a user namespace of its own, where the node can make one."""
    async with kubernetes.sandbox(CLOCHE_KUBE_HOST_USERS="false") as sandbox:
        result = await sandbox.run(shell("cat /proc/self/uid_map"))
        guarantees = {g.name: g.state for g in (await sandbox.posture()).guarantees}
    assert_exited(result)
    inside, outside, count = map(int, result.stdout.split())
    assert (inside, count) == (0, 65536)
    assert outside >= 65536
    assert guarantees["user-namespace"] is State.IN_FORCE


@pytest.fixture
def listener(cluster: Cluster) -> Iterator[int]:
    """The port of a program that answers in the network of the node."""
    with cluster.socket() as listening:
        listening.bind((ADDRESS, 0))
        listening.listen()
        thread = threading.Thread(target=_answer, args=(listening,), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def _answer(listening: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"hello")


REACH = """
    import socket, sys
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as connection:
            print(connection.recv(10).decode())
    except OSError as exc:
        print(type(exc).__name__)
"""


@pytest.mark.parametrize(("network", "said"), [("none", "PermissionError"), ("open", "hello")])
async def test_network(kubernetes: Target, listener: int, network: str, said: str) -> None:
    """Where the cluster enforces no network policy, a script with no network has none all the same; with an open one it has."""
    async with kubernetes.sandbox() as sandbox:
        result = await sandbox.run(python(REACH, args=[ADDRESS, str(listener)], network=network))
    assert_exited(result)
    assert result.stdout == f"{said}\n"


async def test_enforced_network_policy(kubernetes: Target, cluster: Cluster, listener: int) -> None:
    """Where it does, runs go as ever, for nothing of cloche's passes a pod's network, and the policy is a wall of its own."""
    await to_thread.run_sync(lambda: cluster.enforce_network_policy(enforced=True))
    try:
        async with kubernetes.sandbox() as sandbox:
            assert_exited(await sandbox.run(shell("echo made > /output/made")))
            result = await sandbox.run(python(REACH, args=[ADDRESS, str(listener)], network="open"))
    finally:
        await to_thread.run_sync(lambda: cluster.enforce_network_policy(enforced=False))
    assert_exited(result)
    assert result.stdout == "TimeoutError\n"


def test_in_a_pod(kubernetes: Target, admin: Api, cluster: Cluster) -> None:
    """In a pod with the service account that the manifests bind, cloche needs no configuration but the mode and an image."""
    del cluster  # whose node is this machine: the pod finds cloche in its folders
    if sys.version_info[:2] != IMAGES_PYTHON:
        pytest.skip("what is installed here is for another Python than the image's")
    source, packages = Path(cloche.__file__).parents[1], Path(anyio.__file__).parents[1]
    image = kubernetes.environ["CLOCHE_IMAGE"]
    environ = {"CLOCHE_MODE": "kubernetes", "CLOCHE_FALLBACK": "false", "CLOCHE_IMAGE": image}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "cloche-test-application"},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": deployment.APPLICATION,
            "volumes": [
                {"name": "source", "hostPath": {"path": str(source)}},
                {"name": "packages", "hostPath": {"path": str(packages)}},
            ],
            "containers": [
                {
                    "name": "application",
                    "image": image,
                    "command": [
                        "sh",
                        "-c",
                        "echo 'print(6 * 7)' > /tmp/a.py && exec python3 -m cloche run --json /tmp/a.py",
                    ],
                    "env": [
                        {"name": name, "value": value}
                        for name, value in {**environ, "PYTHONPATH": "/source:/packages", "HOME": "/tmp"}.items()
                    ],
                    "volumeMounts": [
                        {"name": "source", "mountPath": "/source", "readOnly": True},
                        {"name": "packages", "mountPath": "/packages", "readOnly": True},
                    ],
                }
            ],
        },
    }
    path = core("pods", deployment.APPLICATION)
    assert admin.ask("POST", path, pod).status == 201
    try:
        end = time.monotonic() + 60
        while True:
            status = admin.ask("GET", f"{path}/cloche-test-application").body["status"]
            if status["phase"] in {"Succeeded", "Failed"} or time.monotonic() > end:
                break
            time.sleep(0.2)
        said = admin.log(deployment.APPLICATION, "cloche-test-application")
    finally:
        admin.ask("DELETE", f"{path}/cloche-test-application?gracePeriodSeconds=0")
    result = json.loads(said)
    assert (result["outcome"], result["stdout"], result["mode"]) == ("exited", "42\n", "kubernetes"), said


async def test_posture(kubernetes: Target) -> None:
    """The posture names the engine, and every promise with its evidence; none that should hold does not."""
    async with kubernetes.sandbox() as sandbox:
        posture = await sandbox.posture()
    assert posture.engine.startswith("Kubernetes v1.")
    assert posture.isolation is cloche.Isolation.CONTAINER
    assert {g.name for g in posture.guarantees if g.state is State.NOT_IN_FORCE} == {
        "user-namespace",
        "file-count-limit",
    }
    assert all(g.evidence for g in posture.guarantees)
