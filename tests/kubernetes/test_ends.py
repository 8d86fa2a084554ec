"""Every way in which a cluster ends a run, or does not let it begin, provoked for real."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from anyio import to_thread
from tests.engines.kubernetes.cluster import Cluster
from tests.kubernetes.conftest import ABSENT, MALFORMED
from tests.kubernetes.deployment import NAMESPACE, Api, core, jobs

import cloche
from cloche.testing.conformance import Target, assert_exited, shell

pytestmark = pytest.mark.anyio

SLOW = "echo running; sleep 60"
SOON = "6"
"""Seconds of a start that will not come."""


async def refused(target: Target, **overrides: str) -> cloche.ClocheError:
    """The error of a run that cannot begin."""
    async with target.sandbox(**overrides) as sandbox:
        with pytest.raises(cloche.ClocheError) as caught:
            await sandbox.run(shell("echo ran"))
    return caught.value


async def in_the_middle(
    target: Target, act: Callable[[str], object], script: str = SLOW, **fields: Any
) -> cloche.Result | cloche.ClocheError:
    """How a run ends to which something is done once it runs; ``act`` gets its run id."""
    async with target.sandbox() as sandbox:
        run_id = f"middle-{secrets.token_hex(4)}"
        fold = sandbox.fold(run_id)
        try:
            acted = False
            async for event in sandbox.stream(shell(script, timeout=60, **fields), run_id=run_id):
                fold.add(event)
                if isinstance(event, cloche.Output) and not acted:
                    acted = True
                    await to_thread.run_sync(act, run_id)
        except cloche.ClocheError as exc:
            return exc
        return fold.result()


def pod_of(admin: Api, run_id: str) -> str:
    """The name of a run's pod."""
    answer = admin.ask("GET", f"{core('pods')}?labelSelector=cloche.dev/run%3D{run_id}")
    (pod,) = answer.body["items"]
    return str(pod["metadata"]["name"])


@contextmanager
def quota(admin: Api, **hard: str) -> Iterator[Callable[[], object]]:
    """One more quota in the namespace, in force; give what takes it away."""
    name = "test-quota"
    limits = {key.replace("count_", "count/"): value for key, value in hard.items()}
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": name}, "spec": {"hard": limits}}
    path = core("resourcequotas")
    assert admin.ask("POST", path, body).status == 201
    end = time.monotonic() + 20
    while admin.ask("GET", f"{path}/{name}").body.get("status", {}).get("hard") != limits:
        assert time.monotonic() < end
        time.sleep(0.05)
    try:
        yield lambda: admin.ask("DELETE", f"{path}/{name}")
    finally:
        admin.ask("DELETE", f"{path}/{name}")


# --- what cannot begin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "pull", "says"),
    [
        (ABSENT, "missing", "ErrImagePull"),
        (ABSENT, "never", "ErrImageNeverPull"),
        (MALFORMED, "missing", "InvalidImageName"),
    ],
)
async def test_no_image(any_image: Target, image: str, pull: str, says: str) -> None:
    """An image that cannot be had is ``image-unavailable`` as soon as the node says so, not when the start is overdue."""
    begin = time.monotonic()
    error = await refused(any_image, CLOCHE_IMAGE=image, CLOCHE_PULL=pull, CLOCHE_START_TIMEOUT="60")
    assert error.code == "image-unavailable"
    assert says in error.message
    assert time.monotonic() - begin < 20


async def test_unschedulable(kubernetes: Target) -> None:
    """A box that no node takes is ``unschedulable`` when its start is overdue, in the scheduler's words."""
    begin = time.monotonic()
    error = await refused(kubernetes, CLOCHE_KUBE_NODE_SELECTOR="disk=none", CLOCHE_START_TIMEOUT=SOON)
    assert error.code == "unschedulable"
    assert "node(s) didn't match Pod's node affinity/selector" in error.message
    assert error.retryable
    assert time.monotonic() - begin >= float(SOON) - 1


async def test_schedulable_after_a_while(kubernetes: Target, admin: Api) -> None:
    """A box for which there is no room waits, and runs when there is."""
    (node, *_) = admin.ask("GET", "/api/v1/nodes").body["items"]
    path = f"/api/v1/nodes/{node['metadata']['name']}"

    def label(value: str | None) -> None:
        assert admin.ask("PATCH", path, {"metadata": {"labels": {"cloche-test/disk": value}}}).status == 200

    async with kubernetes.sandbox(CLOCHE_KUBE_NODE_SELECTOR="cloche-test/disk=late") as sandbox:
        try:
            async with anyio.create_task_group() as tasks:

                async def later() -> None:
                    await anyio.sleep(3)
                    await to_thread.run_sync(label, "late")

                tasks.start_soon(later)
                result = await sandbox.run(shell("echo ran", timeout=1))
        finally:
            await to_thread.run_sync(label, None)
    assert_exited(result)
    assert (result.timings_ms["start"] or 0) > 2500


@pytest.mark.parametrize("hard", [{"pods": "0"}, {"count_jobs.batch": "0"}, {"count_configmaps": "1"}], ids=str)
async def test_quota(kubernetes: Target, admin: Api, hard: Mapping[str, str]) -> None:
    """Where a quota leaves no room for the pod, its Job or its ConfigMap, a run waits, and is ``quota-exceeded`` when its start
    is overdue, in the quota's words.
    """
    async with kubernetes.sandbox() as sandbox:  # so that the supervisor is there
        assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
    with quota(admin, **hard):
        error = await refused(kubernetes, CLOCHE_START_TIMEOUT=SOON)
    assert error.code == "quota-exceeded"
    assert "exceeded quota: test-quota" in error.message
    assert error.retryable


async def test_quota_that_is_lifted(kubernetes: Target, admin: Api) -> None:
    """A run that waits for a quota runs when there is room again."""
    async with kubernetes.sandbox() as sandbox, anyio.create_task_group() as tasks:
        assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
        with quota(admin, **{"count_jobs.batch": "0"}) as lift:

            async def later() -> None:
                await anyio.sleep(2)
                await to_thread.run_sync(lift)

            tasks.start_soon(later)
            result = await sandbox.run(shell("echo ran"))
    assert_exited(result)
    assert (result.timings_ms["start"] or 0) > 1500


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("CLOCHE_IMAGE", "docker.io/library/other:1", "not on the list"),
        ("CLOCHE_KUBE_RUNTIME_CLASS", "none-such", 'RuntimeClass "none-such" not found'),
        ("CLOCHE_KUBE_PRIORITY_CLASS", "none-such", "no PriorityClass with name none-such was found"),
        ("CLOCHE_MEMORY", "32Gi", "maximum memory usage per Container"),
        ("CLOCHE_KUBE_SERVICE_ACCOUNT", "default", "service account"),
    ],
)
async def test_admission(kubernetes: Target, setting: str, value: str, says: str) -> None:
    """What the cluster's rules forbid is ``permission-denied`` at once, in the rule's words, with a hint what to do."""
    begin = time.monotonic()
    error = await refused(kubernetes, **{setting: value})
    assert error.code == "permission-denied"
    assert says in error.message
    assert error.hint
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"CLOCHE_KUBE_NAMESPACE": "default"}, "In the namespace default"),
        ({"CLOCHE_KUBE_NAMESPACE": "none-such"}, "In the namespace none-such"),
        ({"CLOCHE_KUBE_CONTEXT": "none-such"}, "none-such"),
        ({"CLOCHE_KUBE_CONFIG": "/none/such"}, "/none/such"),
    ],
)
async def test_unavailable(kubernetes: Target, overrides: Mapping[str, str], says: str) -> None:
    """Without rights or a configuration the mode is unavailable, and says why; with fallback on, ``local`` takes its place."""
    with pytest.raises(cloche.ClocheError, match="unavailable") as caught:
        async with kubernetes.sandbox(**overrides):
            pass
    assert caught.value.code == "backend-unavailable"
    assert says in caught.value.message
    assert caught.value.hint
    async with kubernetes.sandbox(CLOCHE_FALLBACK="true", **overrides) as sandbox:
        assert (sandbox.mode, sandbox.fallback_from) == ("local", "kubernetes")


# --- what ends too early -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [None, 0])
async def test_deleted_pod(kubernetes: Target, admin: Api, grace: int | None) -> None:
    """A pod that somebody deletes in the middle of a run, gently or at once, is ``engine-lost``: nobody guesses how it ended."""

    def delete(run_id: str) -> None:
        options = {} if grace is None else {"gracePeriodSeconds": grace}
        assert admin.ask("DELETE", f"{core('pods')}/{pod_of(admin, run_id)}", options).status == 200

    error = await in_the_middle(kubernetes, delete)
    assert isinstance(error, cloche.EngineLost), error
    assert not error.retryable


async def test_deleted_job(kubernetes: Target, admin: Api) -> None:
    """So is a run whose Job somebody deletes, and what belongs to it goes with it."""

    def delete(run_id: str) -> None:
        (job,) = admin.ask("GET", f"{jobs()}?labelSelector=cloche.dev/run%3D{run_id}").body["items"]
        path = f"{jobs()}/{job['metadata']['name']}?propagationPolicy=Background"
        assert admin.ask("DELETE", path).status == 200

    with kubernetes.nothing_left(10):
        error = await in_the_middle(kubernetes, delete)
    assert isinstance(error, cloche.EngineLost), error


async def test_evicted(kubernetes: Target, admin: Api) -> None:
    """A pod that is evicted, as a drained node does, is ``engine-lost``."""

    def evict(run_id: str) -> None:
        name = pod_of(admin, run_id)
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}
        assert admin.ask("POST", f"{core('pods')}/{name}/eviction", body).status == 201

    error = await in_the_middle(kubernetes, evict)
    assert isinstance(error, cloche.EngineLost), error


async def test_as_the_cluster_sees_it(kubernetes: Target, admin: Api) -> None:
    """A Job bears the net under the run's clock: a deadline beyond it, no second try, one second's grace."""
    found: list[dict[str, Any]] = []

    def look(run_id: str) -> None:
        found.extend(admin.ask("GET", f"{jobs()}?labelSelector=cloche.dev/run%3D{run_id}").body["items"])

    result = await in_the_middle(kubernetes, look, script="echo running; sleep 1")
    assert isinstance(result, cloche.Result)
    assert_exited(result)
    (job,) = found
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert 180 < spec["activeDeadlineSeconds"] < 300  # 120 to start, 60 to run, and clocks that differ
    assert (spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (0, 120)
    assert (pod["terminationGracePeriodSeconds"], pod["automountServiceAccountToken"]) == (1, False)
    assert "running" not in json.dumps(job)


# --- what goes on ------------------------------------------------------------------------------------------------------

COUNT = (
    "for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i; echo error $i >&2; sleep 1; done; echo kept > /output/kept; exit 3"
)


@pytest.fixture
def settled(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, which is brought back to what it was: its parts wait long for each other after an outage."""
    yield cluster
    for part in ("apiserver", "kubelet", "controller-manager", "scheduler", "containerd"):
        if not cluster.runs(part):
            cluster.start(part)
    cluster.settle()


@pytest.mark.parametrize("part", ["apiserver", "kubelet"])
@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_restarted(kubernetes: Target, settled: Cluster, part: Any, how: str) -> None:
    """An API server or a kubelet that is restarted in the middle of a run costs nothing of its result."""

    def restart(run_id: str) -> None:
        del run_id
        getattr(settled, how)(part)
        time.sleep(1)
        settled.start(part)

    result = await in_the_middle(kubernetes, restart, script=COUNT)
    assert isinstance(result, cloche.Result), result
    assert_exited(result, 3)
    assert result.stdout == "".join(f"line {i}\n" for i in range(1, 11))
    assert result.stderr == "".join(f"error {i}\n" for i in range(1, 11))
    assert [(a.path, a.data) for a in result.artifacts] == [("kept", b"kept\n")]


async def test_api_server_that_stays_away(kubernetes: Target, settled: Cluster) -> None:
    """Where the API server is gone when a run's time is over, nobody knows how it ended: ``engine-lost``, and retryable."""
    async with kubernetes.sandbox() as sandbox:
        error: cloche.ClocheError | None = None
        try:
            async for event in sandbox.stream(shell("echo running; sleep 3", timeout=5)):
                if isinstance(event, cloche.Output):
                    await to_thread.run_sync(settled.kill, "apiserver")
        except cloche.ClocheError as exc:
            error = exc
        assert isinstance(error, cloche.EngineLost)
        assert error.retryable
        await to_thread.run_sync(settled.start, "apiserver")


async def test_token_that_rotates(kubernetes: Target, cluster: Cluster, tmp_path: Path) -> None:
    """A token that is replaced in its file, and does not hold any more, costs no run anything: it is read anew at once."""
    token, secret = tmp_path / "token", "cloche-test-token"
    bind = ("--bound-object-kind", "Secret", "--bound-object-name")

    def renew(number: int) -> None:
        name = f"{secret}-{number}"
        cluster.kubectl("create", "secret", "generic", name, "--namespace", "cloche")
        made = cluster.kubectl("create", "token", "cloche", "--namespace", "cloche", *bind, name)
        (tmp_path / "new").write_text(made.strip())
        (tmp_path / "new").rename(token)

    def forget(number: int) -> None:
        cluster.kubectl("delete", "secret", f"{secret}-{number}", "--namespace", "cloche", "--ignore-not-found")

    config = yaml.safe_load(Path(kubernetes.environ["CLOCHE_KUBE_CONFIG"]).read_text())
    config["users"][0]["user"] = {"tokenFile": str(token)}
    (tmp_path / "config").write_text(json.dumps(config))
    try:
        await to_thread.run_sync(renew, 1)
        async with kubernetes.sandbox(CLOCHE_KUBE_CONFIG=str(tmp_path / "config")) as sandbox:
            async for event in sandbox.stream(shell("echo running; sleep 14; echo done", timeout=60)):
                if isinstance(event, cloche.Output) and event.data == b"running\n":
                    await to_thread.run_sync(renew, 2)
                    await to_thread.run_sync(forget, 1)
                if isinstance(event, cloche.Finished):
                    assert event.exit_code == 0
            # By now the API server has forgotten that it once knew the first token.
            assert_exited(await sandbox.run(shell("true"), wait_cleanup=True))
    finally:
        for number in (1, 2):
            await to_thread.run_sync(forget, number)
