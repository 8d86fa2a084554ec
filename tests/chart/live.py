"""The chart in a real cluster: releases, what they made, and the service's API as clients reach it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx2
from tests.chart.front import Front
from tests.chart.rendering import CHART, RELEASE, Helm
from tests.engines.kubernetes.cluster import Cluster
from tests.kubernetes import deployment
from tests.kubernetes.deployment import IMAGES, Api, core

SERVICE_IMAGE = "CLOCHE_TEST_SERVICE_IMAGE"
FOLDER = "CLOCHE_TEST_KUBERNETES_FOLDER"
READY_S = 120.0
GONE_S = 90.0
ANSWER_S = 120.0
KINDS = (
    "deployments,replicasets,pods,services,endpointslices,serviceaccounts,secrets,configmaps,ingresses,networkpolicies,"
    "poddisruptionbudgets,resourcequotas,limitranges,roles,rolebindings,jobs"
)
GLOBAL_KINDS = (
    "namespaces,validatingadmissionpolicies,validatingadmissionpolicybindings,clusterroles,clusterrolebindings"
)


class Live:
    """A cluster with Helm's, kubectl's and its administrator's view of it."""

    def __init__(self, program: Path, kubeconfig: Path, image: str, folder: Path) -> None:
        self.program = program
        self.kubeconfig = kubeconfig
        self.image = image
        self.folder = folder
        self.admin = Api(kubeconfig)
        self.helm = Helm(program, folder, kubeconfig)

    @classmethod
    @contextmanager
    def attach(cls, program: Path, folder: Path) -> Iterator[Live]:
        """The one that the environment names.

        Raises:
            AbsentError: it names none, or not the service's image in it, or there is no kubectl.
        """
        kubeconfig = deployment.admin()
        image = os.environ.get(SERVICE_IMAGE, "")
        if not image:
            raise deployment.AbsentError(f"{SERVICE_IMAGE} is not set (the service's image, which the nodes have)")
        if not _kubectl():
            raise deployment.AbsentError(f"there is no kubectl on the PATH, and {deployment.KUBECTL} is not set")
        found = cls(program, kubeconfig, image, folder)
        with found.admin:
            yield found

    def kubectl(self, *words: str, text: str | None = None) -> str:
        """What kubectl says, as administrator; what it refuses is an error."""
        done = subprocess.run(
            self.command(*words), input=text, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def command(self, *words: str) -> list[str]:
        """A call of kubectl, as administrator."""
        cache = f"--cache-dir={self.folder / 'kubectl'}"
        return [_kubectl(), f"--kubeconfig={self.kubeconfig}", cache, *words]

    def values(self, sandbox: str) -> dict[str, Any]:
        """What every release of a test is given: images that are there, and a namespace for runs."""
        repository, _, tag = self.image.rpartition(":")
        return {
            "image": {"repository": repository, "tag": tag},
            "app.sandbox.image": IMAGES[0],
            "app.sandbox.kubernetes.namespace": sandbox,
        }

    @contextmanager
    def namespace(self) -> Iterator[str]:
        """A namespace for a release, gone afterwards with all that was made from it."""
        name = f"chart-{secrets.token_hex(4)}"
        self.kubectl("create", "namespace", name)
        try:
            # A controller makes it, by and by, and without it there is no pod, and the chart takes the cluster for none.
            assert until(
                lambda: self.admin.ask("GET", f"{core('serviceaccounts', name)}/default").status == 200, READY_S
            )
            yield name
        finally:
            self.helm.call("uninstall", RELEASE, "--namespace", name, "--ignore-not-found")
            for each in (name, f"{name}-runs", f"{name}-given"):
                self.kubectl("delete", "namespace", each, "--ignore-not-found", "--wait=false")

    def forward(self, namespace: str, target: str) -> AbstractContextManager[str]:
        """The address at which a Service or a pod is reached from here."""
        return _forwarded(self.command("--namespace", namespace, "port-forward", target, ":8080"))

    def pods(self, namespace: str) -> list[str]:
        """The service's pods that are ready and not about to go."""
        selector = f"?labelSelector=app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=service"
        found = self.admin.ask("GET", core("pods", namespace) + selector).body["items"]
        return [
            pod["metadata"]["name"] for pod in found if _is_ready(pod) and "deletionTimestamp" not in pod["metadata"]
        ]

    def token(self, namespace: str) -> str:
        """The first token of the release's own."""
        found = self.kubectl("--namespace", namespace, "get", "secret", f"{RELEASE}-tokens", "--output=json")
        return base64.b64decode(json.loads(found)["data"]["tokens"]).decode().partition("\n")[0].split(":")[1]

    def boxes(self, sandbox: str) -> list[str]:
        """All that runs have in their namespace."""
        found = []
        for kind in ("jobs", "pods", "configmaps"):
            path = deployment.jobs(sandbox) if kind == "jobs" else core(kind, sandbox)
            items = self.admin.ask("GET", path).body.get("items", [])
            theirs = (each["metadata"] for each in items if "cloche.dev/run" in each["metadata"].get("labels", {}))
            found += [f"{kind} {metadata['name']}" for metadata in theirs]
        return found

    def made_by(self, namespace: str) -> list[str]:
        """All objects of the release in a namespace, wherever they are, and the namespace of its runs."""
        selector = f"--selector=app.kubernetes.io/managed-by=Helm,app.kubernetes.io/instance={RELEASE}"
        found = self.kubectl("get", KINDS, "--namespace", namespace, selector, "--output=name").split()
        ours = "jsonpath={range .items[*]}{.kind}/{.metadata.name}{'\\n'}{end}"
        names = self.kubectl("get", GLOBAL_KINDS, f"--output={ours}").splitlines()
        return [*found, *(name for name in names if f"{namespace}-runs" in name)]

    def front(self, namespace: str) -> AbstractContextManager[object]:
        """What leads pods to the release's Service, where the cluster has nothing that does."""
        folder = os.environ.get(FOLDER, "")
        return Front(Cluster.attach(Path(folder)), self.admin, namespace, RELEASE) if folder else nullcontext()

    def install(self, namespace: str, values: Mapping[str, Any], *words: str) -> None:
        """Install or upgrade, and wait until its pods are ready."""
        waiting = ("--wait", "--timeout", f"{READY_S:.0f}s")
        done = self.helm.call(
            "upgrade", "--install", RELEASE, str(CHART), "--namespace", namespace, *waiting, *words, values=values
        )
        assert done.returncode == 0, f"{done.stderr}\n{self.state(namespace)}"

    def refusal(self, namespace: str, values: Mapping[str, Any], *words: str, helm: Helm | None = None) -> str:
        """What an installation that cannot be says."""
        command = ("install", RELEASE, str(CHART), "--namespace", namespace, *words)
        done = (helm or self.helm).call(*command, values=values)
        assert done.returncode != 0, "it was installed"
        return done.stderr

    def state(self, namespace: str) -> str:
        """For a message: how the release's pods are, and what they say."""
        with contextlib.suppress(AssertionError):
            told = self.kubectl("--namespace", namespace, "get", "pods,events")
            words = ("logs", f"--selector=app.kubernetes.io/instance={RELEASE}", "--tail=20", "--prefix")
            return told + self.kubectl("--namespace", namespace, *words)
        return ""

    def test(self, namespace: str) -> None:
        """``helm test``, which has to succeed, and to leave no pod."""
        with self.front(namespace):
            done = self.helm.call("test", RELEASE, "--namespace", namespace, "--timeout", f"{READY_S:.0f}s")
        assert done.returncode == 0, done.stdout + done.stderr + self.state(namespace)
        assert re.search(r"Phase:\s+Succeeded", done.stdout), done.stdout
        assert until(lambda: self.admin.ask("GET", f"{core('pods', namespace)}/{RELEASE}-test").status == 404, GONE_S)


class Client:
    """The service's API, with a token."""

    def __init__(self, url: str, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx2.Client(base_url=url, headers=headers, timeout=ANSWER_S, trust_env=False)

    def run(self, content: str, **spec: Any) -> tuple[int, dict[str, Any]]:
        """The status and the body of one run's answer."""
        answer = self._client.post("/v1/runs", json={"name": "a.py", "content": content, **spec})
        return answer.status_code, answer.json()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Anything else."""
        answer = self._client.get(path)
        return answer.status_code, answer.json()

    def close(self) -> None:
        """End its connections."""
        self._client.close()


@contextmanager
def client(live: Live, namespace: str, target: str = f"service/{RELEASE}") -> Iterator[Client]:
    """A client of the Service, or of one pod."""
    with ExitStack() as stack:
        found = Client(stack.enter_context(live.forward(namespace, target)), live.token(namespace))
        stack.callback(found.close)
        yield found


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)


def until(what: Callable[[], Any], within_s: float) -> bool:
    """Whether something comes true in that time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.2)
    return bool(what())


@contextmanager
def _forwarded(command: list[str]) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            port = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert port is not None, "nothing is forwarded"
            yield f"http://127.0.0.1:{port[1]}"
        finally:
            process.kill()


def _kubectl() -> str:
    return os.environ.get(deployment.KUBECTL) or shutil.which("kubectl") or ""
