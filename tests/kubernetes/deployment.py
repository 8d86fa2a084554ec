"""The manifests of deploy/kubernetes on a real cluster, and the credentials that they give to cloche.

The tests of the kubernetes mode use these credentials, and not an administrator's: what cloche can do under them it can do with
any application.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import json
import os
import platform
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx2
import yaml

from cloche.backends.contract import Profile
from cloche.backends.kubernetes import manifest
from cloche.spec import Limits, Network

MANIFESTS = Path(__file__).parents[2] / "deploy" / "kubernetes"
NAMESPACE = "cloche-sandbox"
RUNNER = "cloche-sandbox-runner"
APPLICATION = "cloche"
"""The application's service account, and the namespace of the same name that it is in."""
POLICY = "cloche-sandbox"
DELETION_POLICY = "cloche-sandbox-deletion"
KUBECONFIG = "CLOCHE_TEST_KUBECONFIG"
KUBECTL = "CLOCHE_TEST_KUBECTL"
IMAGES = ("cloche-test/sandbox:1", "cloche-test/tiny:1")
MARK = "cloche-test/deployment:"
"""An image that is on the list for its name only: the policy's refusals show by it which policy is in force. What the other
policy says of a ConfigMap named ``MARKED``.
"""
MARKED = "cloche-test-mark"
IN_FORCE_S = 60.0
TOKEN_S = 12 * 3600


class AbsentError(Exception):
    """There is no cluster here to deploy to, and why."""


class Answer(NamedTuple):
    """What the API server says."""

    status: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        """Why it refuses."""
        return str(self.body.get("message", ""))


class Api:
    """The API server as somebody whom a kubeconfig names, past cloche."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        current = _named(config["contexts"], config["current-context"])["context"]
        cluster = _named(config["clusters"], current["cluster"])["cluster"]
        user = _named(config["users"], current["user"])["user"]
        authority = _content(cluster, "certificate-authority")
        self.server = str(cluster["server"])
        self.authority = authority.decode()
        context = ssl.create_default_context(cadata=self.authority)
        if certificate := _content(user, "client-certificate"):
            with tempfile.NamedTemporaryFile() as both:  # ssl reads these from a file only
                both.write(certificate + b"\n" + _content(user, "client-key"))
                both.flush()
                context.load_cert_chain(both.name)
        headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        self._client = httpx2.Client(base_url=self.server, verify=context, headers=headers, timeout=30, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """One request. A body that is patched with is merged in."""
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        content = None if body is None else json.dumps(body)
        answer = self._client.request(method, path, content=content, headers=headers)
        try:
            found = answer.json()
        except ValueError:
            found = {}
        return Answer(answer.status_code, found if isinstance(found, dict) else {})

    def log(self, namespace: str, pod: str) -> str:
        """What a pod has written."""
        return self._client.get(f"/api/v1/namespaces/{namespace}/pods/{pod}/log").raise_for_status().text


def _named(things: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(thing for thing in things if thing["name"] == name)


def _content(where: dict[str, Any], name: str) -> bytes:
    """What a kubeconfig has itself, or names a file for; nothing if neither."""
    if data := where.get(f"{name}-data"):
        return base64.b64decode(data)
    return Path(where[name]).read_bytes() if name in where else b""


def jobs(namespace: str = NAMESPACE) -> str:
    """The path of Jobs."""
    return f"/apis/batch/v1/namespaces/{namespace}/jobs"


def core(kind: str, namespace: str = NAMESPACE) -> str:
    """The path of pods, ConfigMaps and so on."""
    return f"/api/v1/namespaces/{namespace}/{kind}"


class Run(NamedTuple):
    """What cloche would send to a cluster for a run, as its own code makes it."""

    profile: Profile
    ground: manifest.Ground
    made: manifest.Made

    @property
    def job(self) -> dict[str, Any]:
        """The body of its Job."""
        return manifest.job(self.profile, self.ground, self.made)


def run(name: str = "attempt", *, image: str = IMAGES[0], network: Network = Network.NONE, **ground: Any) -> Run:
    """A run with cloche's defaults. ``ground``: what settings change of its surroundings."""
    expires_at = time.time() + 600
    run_as = 1_234_567_890 if ground.get("host_users", True) else 12_345
    return Run(
        Profile(f"run-{name}", "nobody", expires_at, Limits(), network=network, image=image),
        replace(manifest.Ground(NAMESPACE, f"supervisor-{name}", platform.machine(), RUNNER), **ground),
        manifest.Made(name, run_as, expires_at, deadline_s=600),
    )


def admin() -> Path:
    """The kubeconfig of an administrator, which the environment names.

    Raises:
        AbsentError: it does not.
    """
    found = os.environ.get(KUBECONFIG, "")
    if not found:
        raise AbsentError(f"{KUBECONFIG} is not set (the kubeconfig of a cluster's administrator)")
    return Path(found)


def deploy(kubeconfig: Path, folder: Path | None = None, images: Sequence[str] = IMAGES) -> Path:
    """Apply the manifests, with these images allowed, and wait until they are in force.

    Returns:
        A kubeconfig with the application's credentials, in the folder, or in one that goes with this process.

    Raises:
        AbsentError: there is no kubectl, or the cluster does not answer it.
    """
    kubectl = os.environ.get(KUBECTL) or shutil.which("kubectl")
    if kubectl is None:
        raise AbsentError(f"there is no kubectl on the PATH, and {KUBECTL} is not set")
    asked = [kubectl, "--kubeconfig", str(kubeconfig), "--request-timeout", "30s"]
    mark = MARK + _digest(images)
    with tempfile.TemporaryDirectory() as overlay:
        _write_overlay(Path(overlay), images, mark)
        _call(*asked, "apply", "--server-side", "--force-conflicts", "--kustomize", overlay)
    token = _call(*asked, "create", "token", APPLICATION, "--namespace", APPLICATION, "--duration", f"{TOKEN_S}s")
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="kubeconfig-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with Api(kubeconfig) as api:
        found = _write_kubeconfig(folder, api, token.strip())
    _wait(found, mark, images[0])
    return found


def _digest(images: Sequence[str]) -> str:
    texts = (path.read_bytes() for path in sorted(MANIFESTS.glob("*.yaml")))
    return hashlib.sha256(b"\0".join([*texts, "\0".join(images).encode()])).hexdigest()[:12]


def _write_overlay(folder: Path, images: Sequence[str], mark: str) -> None:
    """A kustomization as users write it; the comment in kustomization.yaml shows one."""
    listed = ", ".join(f"'{image}'" for image in [*images, mark])
    refusal = {"expression": f"variables.isRemoved || variables.name != '{MARKED}'", "message": mark}
    patches = {
        POLICY: {"op": "replace", "path": "/spec/variables/0/expression", "value": f"[{listed}]"},
        DELETION_POLICY: {"op": "add", "path": "/spec/validations/-", "value": refusal},
    }
    kustomization = {
        # kustomize takes no absolute path.
        "resources": [os.path.relpath(MANIFESTS.resolve(), folder.resolve())],
        "patches": [
            {"target": {"kind": "ValidatingAdmissionPolicy", "name": name}, "patch": yaml.safe_dump([patch])}
            for name, patch in patches.items()
        ],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))


def _write_kubeconfig(folder: Path, api: Api, token: str) -> Path:
    authority = base64.b64encode(api.authority.encode()).decode()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": api.server, "certificate-authority-data": authority}}],
        "users": [{"name": APPLICATION, "user": {"token": token}}],
        "contexts": [
            {"name": "test", "context": {"cluster": "test", "user": APPLICATION, "namespace": NAMESPACE}},
        ],
        "current-context": "test",
    }
    found = folder / "application.kubeconfig"
    found.touch(mode=0o600)
    found.write_text(yaml.safe_dump(config))
    return found


def _wait(kubeconfig: Path, mark: str, image: str) -> None:
    """Until a Job is refused by this very policy and a ConfigMap by the other one, and a Job of cloche's is admitted.

    The API server learns of a policy some time after it has been applied, and refuses everything that a quota counts until the
    quota's controller has counted once.
    """
    path = f"{jobs()}?dryRun=All"
    marked = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": MARKED}}
    end = time.monotonic() + IN_FORCE_S
    with Api(kubeconfig) as api:
        while True:
            refused = api.ask("POST", path, run(image="cloche-test/refused:1").job)
            also = api.ask("POST", f"{core('configmaps')}?dryRun=All", marked)
            admitted = api.ask("POST", path, run(image=image).job)
            if mark in refused.message and mark in also.message and admitted.status == 201:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"not in force after {IN_FORCE_S:.0f} s: {refused.body} {also.body} {admitted.body}")
            time.sleep(0.05)


def _call(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except OSError as exc:
        raise AbsentError(f"{command[0]} cannot be run: {exc.strerror}") from exc
    if done.returncode != 0:
        said = done.stderr.strip()
        if any(word in said for word in ("connection to the server", "Unable to connect", "no such file")):
            raise AbsentError(said)
        raise RuntimeError(f"{' '.join(command[:1] + command[5:])}: {said}")
    return done.stdout
