"""The chart in a real cluster: installed, tested, used, upgraded, broken, and gone without a trace."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from tests.chart.live import GONE_S, READY_S, Client, Live, client, until
from tests.chart.rendering import CHART, RELEASE, Helm
from tests.chart.test_templates import KUBERNETES, MATRIX, SANDBOX
from tests.kubernetes import deployment
from tests.kubernetes.deployment import Api, core, jobs

from cloche.testing.conformance import absent

pytestmark = pytest.mark.timeout(600)

DISABLED = {"app.sandbox.mode": "disabled"}
LASTS_S = 30
"""A run of the twenty. A small machine starts them all in that time."""
EXPIRED_S = 300


@pytest.fixture(scope="module")
def cluster(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    try:
        with Live.attach(program, tmp_path_factory.mktemp("live")) as found:
            yield found
    except deployment.AbsentError as exc:
        absent("kubernetes", str(exc))


@pytest.fixture
def place(cluster: Live) -> Iterator[str]:
    """A namespace for a release; its runs are in the one of the same name with ``-runs``."""
    with cluster.namespace() as name:
        yield name


def test_from_disabled_to_kubernetes_and_away(cluster: Live, place: str) -> None:
    """A release that refuses scripts becomes one that runs them as Jobs, keeps its token, and leaves nothing when it goes."""
    runs = f"{place}-runs"
    cluster.install(place, {**cluster.values(runs), **DISABLED})
    cluster.test(place)
    token = cluster.token(place)
    with client(cluster, place) as service:
        status, problem = service.run("print(1)")
        assert (status, problem["code"]) == (403, "sandbox-disabled")
    assert cluster.admin.ask("GET", f"/api/v1/namespaces/{runs}").status == 404

    cluster.install(place, cluster.values(runs))
    cluster.test(place)
    assert cluster.token(place) == token
    with client(cluster, place) as service:
        assert service.get("/readyz")[0] == 200
        _runs_are_jobs(cluster, service, runs)
        assert service.get("/v1/posture")[1]["mode"] == "kubernetes"
    assert until(lambda: not cluster.boxes(runs), GONE_S), cluster.boxes(runs)

    done = cluster.helm.call("uninstall", RELEASE, "--namespace", place, "--wait", "--timeout", f"{GONE_S:.0f}s")
    assert done.returncode == 0, done.stderr
    assert until(lambda: not cluster.made_by(place), GONE_S), cluster.made_by(place)


def _runs_are_jobs(cluster: Live, service: Client, runs: str) -> None:
    """Several at a time, each one a Job of the release's account, under the chart's Role and policies."""
    with ThreadPoolExecutor(3) as pool:
        script = "import sys, time; time.sleep(4); print(6 * 7); sys.exit(3)"
        answers = [pool.submit(service.run, script) for _ in range(3)]
        assert until(lambda: len(cluster.admin.ask("GET", jobs(runs)).body["items"]) == 3, 15)
        for status, result in (each.result() for each in answers):
            assert status == 200, result
            assert (result["outcome"], result["exit_code"], result["stdout"]) == ("exited", 3, "42\n")
            assert (result["mode"], result["isolation"]) == ("kubernetes", "container")


def test_the_service_has_the_roles_rights_and_no_others(cluster: Live, place: str) -> None:
    """Its account may do in the runs' namespace what cloche does, and nothing in its own."""
    runs = f"{place}-runs"
    cluster.install(place, {**cluster.values(runs), "replicaCount": 0})
    account = f"--as=system:serviceaccount:{place}:{RELEASE}"

    def may(verb: str, resource: str, namespace: str) -> bool:
        words = ("auth", "can-i", verb, resource, "--namespace", namespace, account)
        done = subprocess.run(cluster.command(*words), capture_output=True, text=True, check=False)
        return done.stdout.strip() == "yes"

    assert all(may("create", kind, runs) for kind in ("jobs", "configmaps"))
    assert may("get", "pods/log", runs)
    assert not any(may("get", "secrets", namespace) for namespace in (place, runs))
    assert not any(may("create", kind, runs) for kind in ("pods", "pods/exec", "rolebindings"))
    assert not any(may(verb, "jobs", place) for verb in ("create", "list"))
    assert not may("list", "nodes", runs)


def test_one_of_two_is_killed(cluster: Live, place: str) -> None:
    """Of twenty runs those of the pod that dies end with an error for their clients; the other pod's end as ever; and of what
    was left nothing stays: the cluster or a sweep removes it.
    """
    runs = f"{place}-runs"
    values = {
        **cluster.values(runs),
        "replicaCount": 2,
        f"{KUBERNETES}.maxConcurrentSandboxes": 10,
        # A box's expiry is the sum of these and some seconds.
        "app.sandbox.timeout": 45,
        "app.sandbox.startTimeout": 60,
        "app.sandbox.queueTimeout": 60,
        "app.sweepEvery": 5,
    }
    cluster.install(place, values)
    with ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        dies, lives = cluster.pods(place)
        doomed, lasting = (stack.enter_context(client(cluster, place, f"pod/{name}")) for name in (dies, lives))
        lost = [pool.submit(_answer, doomed) for _ in range(10)]
        kept = [pool.submit(_answer, lasting) for _ in range(10)]
        assert until(lambda: _running(cluster, runs) >= 15, LASTS_S)
        cluster.kubectl("--namespace", place, "delete", "pod", dies, "--grace-period=0", "--force")
        assert {each.result() for each in kept} == {"exited"}
        assert {each.result() for each in lost} == {"lost"}
    assert until(lambda: len(cluster.pods(place)) == 2, READY_S)
    assert until(lambda: not cluster.boxes(runs), EXPIRED_S), cluster.boxes(runs)


def _answer(service: Client) -> str:
    try:
        status, body = service.run(f"import time; time.sleep({LASTS_S})")
    except httpx2.TransportError:
        return "lost"
    return str(body["outcome"] if status == 200 else body["code"])


def _running(cluster: Live, runs: str) -> int:
    pods = cluster.admin.ask("GET", core("pods", runs)).body["items"]
    return sum(pod["status"]["phase"] == "Running" for pod in pods)


def test_an_upgrade_loses_no_run(cluster: Live, place: str) -> None:
    """A pod that is replaced ends its runs first, and their clients get their results."""
    values = cluster.values(f"{place}-runs")
    cluster.install(place, values)
    (before,) = cluster.pods(place)
    with client(cluster, place, f"pod/{before}") as service, ThreadPoolExecutor(1) as pool:
        run = pool.submit(service.run, "import time; time.sleep(15); print('whole')")
        assert until(lambda: _running(cluster, f"{place}-runs"), READY_S)
        cluster.install(place, {**values, "app.sandbox.timeout": 50})
        status, result = run.result()
        assert (status, result["stdout"]) == (200, "whole\n"), result
    assert cluster.pods(place) != [before]


def test_uninstalled_in_the_middle_of_runs(cluster: Live, place: str) -> None:
    """A release that goes while scripts run takes them with it, and nothing is left that nobody can remove."""
    runs = f"{place}-runs"
    cluster.install(place, {**cluster.values(runs), "app.drainSeconds": 1})
    with client(cluster, place) as service, ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(_answer, service)
        assert until(lambda: _running(cluster, runs) == 3, READY_S)
        done = cluster.helm.call("uninstall", RELEASE, "--namespace", place, "--wait", "--timeout", f"{GONE_S:.0f}s")
        assert done.returncode == 0, done.stderr
        assert until(lambda: not cluster.made_by(place), GONE_S), cluster.made_by(place)


def test_two_releases(cluster: Live, place: str) -> None:
    """Two releases are beside each other where each has a namespace of its own for runs, and not where it is one."""
    with cluster.namespace() as other:
        for each in (place, other):
            cluster.install(each, {**cluster.values(f"{each}-runs"), "replicaCount": 0})
        assert len({name for each in (place, other) for name in cluster.made_by(each) if each in name}) == 10
        done = cluster.helm.call(
            "upgrade", RELEASE, str(CHART), "--namespace", other, values=cluster.values(f"{place}-runs")
        )
        assert done.returncode != 0
        assert f'Namespace "{place}-runs"' in done.stderr


def test_a_release_that_cannot_run_fails_its_test(cluster: Live, place: str) -> None:
    """``helm test`` fails where scripts cannot run, and its pod stays and says why."""
    cluster.install(place, {**cluster.values(f"{place}-runs"), "app.sandbox.image": "127.0.0.1:1/absent:1"})
    with cluster.front(place):
        done = cluster.helm.call("test", RELEASE, "--namespace", place, "--timeout", f"{READY_S:.0f}s")
    assert done.returncode != 0
    assert '"code": "image-unavailable"' in cluster.kubectl("--namespace", place, "logs", f"{RELEASE}-test")


def test_a_change_of_the_tokens_reaches_the_service(cluster: Live, place: str) -> None:
    """Tokens of the values are the service's after the upgrade, and the one that was made up is no longer; without them, it has
    another one than theirs.
    """
    values = {**cluster.values(f"{place}-runs"), **DISABLED}
    cluster.install(place, values)
    made_up = cluster.token(place)
    given = "0123456789abcdef"
    cluster.install(place, {**values, "tokens.values": [{"name": "agent", "token": given}]})
    assert cluster.token(place) == given
    with cluster.forward(place, f"pod/{cluster.pods(place)[0]}") as url:
        for token, expected in ((given, 403), (made_up, 401)):
            service = Client(url, token)
            assert service.run("print(1)")[0] == expected
            service.close()
    cluster.install(place, values)
    assert cluster.token(place) not in {given, made_up}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_secret_that_is_missing(cluster: Live, place: str) -> None:
    """An installation that names a Secret which is not there, or lacks its key, ends at once, says so, and leaves nothing."""
    values = {**cluster.values(f"{place}-runs"), "tokens.existingSecret": "mine"}
    said = cluster.refusal(place, values)
    assert f'tokens.existingSecret: there is no Secret "mine" in the namespace "{place}"' in said
    assert f"kubectl create secret generic mine --namespace {place} --from-file=tokens=FILE" in said
    cluster.kubectl("--namespace", place, "create", "secret", "generic", "mine", "--from-literal=other=x")
    assert 'tokens.existingSecret: the Secret "mine" has no key "tokens"' in cluster.refusal(place, values)
    theirs = {
        "app.sandbox.mode": "opensandbox",
        "app.sandbox.opensandbox": {"apiURL": "http://sandbox.example", "existingSecret": "their-key"},
    }
    said = cluster.refusal(place, {**cluster.values(f"{place}-runs"), **theirs})
    assert 'app.sandbox.opensandbox.existingSecret: there is no Secret "their-key"' in said
    assert not cluster.made_by(place)


def test_secrets_of_ones_own(cluster: Live, place: str) -> None:
    """Tokens of a Secret that is there are the service's."""
    cluster.kubectl(
        "--namespace",
        place,
        "create",
        "secret",
        "generic",
        "mine",
        "--from-literal=tokens=# ours\nagent:0123456789abcdef\n",
    )
    cluster.install(place, {**cluster.values(f"{place}-runs"), **DISABLED, "tokens.existingSecret": "mine"})
    with cluster.forward(place, f"service/{RELEASE}") as url:
        service = Client(url, "0123456789abcdef")
        assert service.run("print(1)")[1]["code"] == "sandbox-disabled"
        service.close()
    cluster.test(place)


def test_a_namespace_that_is_there(cluster: Live, place: str) -> None:
    """Somebody's namespace is not taken over; with createNamespace off it is used, and stays."""
    given = f"{place}-given"
    cluster.kubectl("create", "namespace", given)
    values = {**cluster.values(given), "replicaCount": 0}
    said = cluster.refusal(place, values)
    assert f'Namespace "{given}"' in said
    assert "exists and cannot be imported into the current release" in said
    cluster.install(place, {**values, f"{KUBERNETES}.createNamespace": False})
    assert cluster.admin.ask("GET", f"{core('resourcequotas', given)}/{given}").status == 200
    cluster.helm.call("uninstall", RELEASE, "--namespace", place, "--wait")
    assert cluster.admin.ask("GET", f"{core('resourcequotas', given)}/{given}").status == 404
    assert cluster.admin.ask("GET", f"/api/v1/namespaces/{given}").body["status"]["phase"] == "Active"


def test_a_namespace_that_is_not_there(cluster: Live, place: str) -> None:
    """With createNamespace off and no namespace the API server's word is the end."""
    values = {**cluster.values(f"{place}-absent"), f"{KUBERNETES}.createNamespace": False}
    assert f'namespaces "{place}-absent" not found' in cluster.refusal(place, values)


def test_no_rights(cluster: Live, place: str, tmp_path: Path) -> None:
    """Who may do all in two namespaces, and nothing in the cluster, reads what he may not; and can install the rest of it."""
    given = f"{place}-given"
    cluster.kubectl("create", "namespace", given)
    cluster.kubectl("--namespace", place, "create", "serviceaccount", "installer")
    for namespace in (place, given):
        words = ("--clusterrole=admin", f"--serviceaccount={place}:installer")
        cluster.kubectl("--namespace", namespace, "create", "rolebinding", "installer", *words)
    helm = Helm(cluster.program, tmp_path, _kubeconfig(cluster, place, tmp_path))
    values = {**cluster.values(given), "replicaCount": 0}
    said = cluster.refusal(place, {**values, **cluster.values(f"{place}-runs")}, helm=helm)
    assert "is forbidden" in said
    assert f'User "system:serviceaccount:{place}:installer" cannot' in said
    mine = {
        f"{KUBERNETES}.createNamespace": False,
        f"{KUBERNETES}.admissionPolicy.enabled": False,
        f"{KUBERNETES}.quota.enabled": False,
        f"{KUBERNETES}.limitRange.enabled": False,
    }
    said = helm.call("upgrade", "--install", RELEASE, *_chart(place), values={**values, **mine}).stderr
    assert cluster.admin.ask("GET", core("services", place)).body["items"], said
    assert "is forbidden" not in said


def _chart(place: str) -> tuple[str, ...]:
    return (str(CHART), "--namespace", place)


def _kubeconfig(cluster: Live, place: str, folder: Path) -> Path:
    """The installer's, with a token."""
    token = cluster.kubectl("--namespace", place, "create", "token", "installer").strip()
    with Api(cluster.kubeconfig) as api:
        authority = base64.b64encode(api.authority.encode()).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "a", "cluster": {"server": api.server, "certificate-authority-data": authority}}],
            "users": [{"name": "a", "user": {"token": token}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "current-context": "a",
        }
    path = folder / "kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config))
    return path


# --- every document ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_the_api_server_takes_every_document(cluster: Live, helm: Helm, values: dict[str, Any], place: str) -> None:
    """Each is valid to the letter: no field that the cluster does not know, no expression that it does not understand, no pod
    that the Pod Security Standard `restricted` would not have.
    """
    runs = f"{place}-runs"
    cluster.kubectl("create", "namespace", runs)
    strict = (f"pod-security.kubernetes.io/{way}=restricted" for way in ("enforce", "warn"))
    cluster.kubectl("label", "namespace", place, *strict)
    documents = helm.render({**values, f"{KUBERNETES}.namespace": runs}, namespace=place)
    text = yaml.safe_dump_all(documents)
    assert SANDBOX not in text.replace(f"{SANDBOX}-runner", "")
    # Of a Deployment's pods there is only a warning.
    has_socket = "app.sandbox.docker.socket.hostPath" in values
    words = ("--dry-run=server", "--validate=strict", f"--warnings-as-errors={str(not has_socket).lower()}")
    cluster.kubectl("apply", *words, "--filename=-", text=text)
