"""What the chart has from elsewhere is what is there: the manifests of deploy/kubernetes, its table of values, its versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version
from tests.chart import refresh
from tests.chart.rendering import CHART, CLUSTER, NAMESPACE, RELEASE, Document, Helm, kinds

import cloche
from cloche.settings import Settings

REMADE = "run python -m tests.chart.refresh"
KUBERNETES = "app.sandbox.kubernetes"


def _manifests() -> list[Document]:
    kustomization = yaml.safe_load((refresh.MANIFESTS / "kustomization.yaml").read_text())
    texts = [(refresh.MANIFESTS / name).read_text() for name in kustomization["resources"]]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def _by_name(documents: list[Document]) -> dict[tuple[str, str], Document]:
    """Without the labels that Helm's objects bear, and without what is the application's own."""
    found = {}
    for each in documents:
        place = each["metadata"].get("namespace", each["metadata"]["name"])
        if place.startswith("cloche-sandbox"):
            labels = each["metadata"].pop("labels", {})
            ours = {name: text for name, text in labels.items() if name.startswith("pod-security.")}
            found[each["kind"], each["metadata"]["name"]] = {**each, "labels": ours}
    return found


def test_the_same_objects_as_without_helm(helm: Helm) -> None:
    """In the namespace of runs, and around it, the chart makes what deploy/kubernetes makes: Role, policies, quota and all."""
    # There the list of images has both of the default's names.
    given = helm.render({f"{KUBERNETES}.admissionPolicy.images": ["docker.io/library/python:3.12-slim"]})
    chart, manifests = _by_name(given), _by_name(_manifests())
    assert chart.keys() == manifests.keys()
    for name, expected in manifests.items():
        assert chart[name] == expected, name


def test_the_same_rights_as_without_helm(helm: Helm) -> None:
    """The Role of the chart has the rights of deploy/kubernetes/role.yaml, not one more or fewer, whatever it is called."""
    values = {"fullnameOverride": "other", f"{KUBERNETES}.namespace": "elsewhere"}
    (rules,) = (each["rules"] for each in helm.render(values) if each["kind"] == "Role")
    (expected,) = (each["rules"] for each in _manifests() if each["kind"] == "Role")
    assert rules == expected
    assert not kinds(helm.render(values)) & {"ClusterRole", "ClusterRoleBinding"}


@pytest.mark.parametrize("name", refresh.COPIED)
def test_copies(name: str) -> None:
    """The manifests in the chart's folder are those of deploy/kubernetes."""
    assert (CHART / "files" / name).read_bytes() == (refresh.MANIFESTS / name).read_bytes(), REMADE


def test_the_table_of_values() -> None:
    """The README's table is what the comments in values.yaml say."""
    assert (CHART / "README.md").read_text() == refresh.readme(), REMADE


def test_every_value_has_a_comment() -> None:
    """There is no value without a word about it, or about the value that it is part of."""
    told = {row.path for row in refresh.rows()}
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    untold = [path for path in refresh.leaves(values) if not any(f"{path}.".startswith(f"{each}.") for each in told)]
    assert not untold


def test_every_value_has_a_schema() -> None:
    """The schema knows each value by name."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    unknown = [row.path for row in refresh.rows() if not _has(schema, row.path.split("."))]
    assert not unknown


def _has(schema: dict[str, Any], names: list[str]) -> bool:
    for name in names:
        if name not in schema.get("properties", {}):
            return False
        schema = schema["properties"][name]
    return True


def test_defaults_are_cloches() -> None:
    """Where values.yaml repeats a default of cloche's own, it is the same."""
    sandbox = yaml.safe_load((CHART / "values.yaml").read_text())["app"]["sandbox"]
    kubernetes, settings = sandbox["kubernetes"], Settings()
    assert sandbox["timeout"] == settings.timeout
    assert sandbox["image"] == settings.image
    assert sandbox["pull"] == settings.pull
    assert kubernetes["namespace"] == settings.kube_namespace
    assert kubernetes["serviceAccount"] == settings.kube_service_account
    assert kubernetes["maxConcurrentSandboxes"] == settings.max_concurrent
    assert tuple(kubernetes["runAsUser"].values()) == settings.kube_run_as_user
    assert kubernetes["hostUsers"] == settings.kube_host_users
    assert kubernetes["podResources"]["limits"] == {"memory": "256Mi", "cpu": "1"}
    assert (settings.memory, settings.cpus) == (256 * 2**20, 1)
    assert kubernetes["podResources"]["requests"] == {"memory": "64Mi", "cpu": "50m"}
    assert (settings.kube_memory_request, settings.kube_cpu_request) == (64 * 2**20, 0.05)


def test_versions() -> None:
    """The chart installs this version of cloche."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert Version(chart["appVersion"]) == Version(cloche.__version__)


def test_lint(helm: Helm) -> None:
    """Helm finds no fault in the chart, in any mode."""
    modes: list[dict[str, Any]] = [
        {},
        {"app.sandbox.mode": "disabled"},
        {"ingress": {"enabled": True, "hosts": [{"host": "a.example"}]}},
    ]
    for values in modes:
        done = helm.call("lint", "--strict", str(CHART), values=values)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[WARNING]" not in done.stdout


def test_package(helm: Helm, tmp_path: Path) -> None:
    """The chart can be packed, and what is packed renders alike."""
    done = helm.call("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (packed,) = tmp_path.glob("cloche-*.tgz")
    usual = ("--namespace", NAMESPACE, "--kube-version", CLUSTER)
    rendered = helm.call("template", RELEASE, str(packed), *usual).stdout
    both = [[each for each in yaml.safe_load_all(rendered) if each], helm.render()]
    first, second = ([each for each in documents if each["kind"] != "Secret"] for documents in both)
    assert first == second


def test_notes(helm: Helm) -> None:
    """The notes tell what was made, what to be wary of, and how to check it, without a token."""
    usual = _notes(helm, {})
    assert "helm test cloche --namespace cloche" in usual
    assert "Every run is a Job in the namespace cloche-sandbox" in usual
    assert "room for 20 runs at a time" in usual
    assert "WARNING" not in usual
    assert "sandbox-disabled" in _notes(helm, {"app.sandbox.mode": "disabled"})
    assert "no admission policy" in _notes(helm, {f"{KUBERNETES}.admissionPolicy.enabled": False})
    assert "more than the quota's 20" in _notes(helm, {"replicaCount": 5})
    assert "in the service's own pod when the engine is away" in _notes(helm, {"app.sandbox.fallback": True})
    secret = {"app.sandbox.mode": "opensandbox", "app.sandbox.opensandbox": {"apiURL": "http://a", "apiKey": "s3cret"}}
    notes = _notes(helm, {**secret, "tokens.values": [{"name": "a", "token": "0123456789abcdef"}]})
    assert "existingSecret" in notes
    assert "s3cret" not in notes
    assert "0123456789abcdef" not in notes


def _notes(helm: Helm, values: dict[str, Any]) -> str:
    words = ("install", "cloche", str(CHART), "--namespace", "cloche", "--dry-run=client")
    done = helm.call(*words, values=values)
    if "cluster unreachable" in done.stderr:
        pytest.skip("this Helm shows no notes without a cluster")
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]
