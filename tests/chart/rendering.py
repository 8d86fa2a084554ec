"""The chart as Helm renders it: documents, or the words with which it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "cloche"
HELM = "CLOCHE_TEST_HELM"
OLDEST = (3, 14)
"""The oldest Helm that the chart was checked with; the first with ``--reset-then-reuse-values``, which its notes tell of."""
RELEASE = "cloche"
NAMESPACE = "cloche"
"""The release's namespace."""
CLUSTER = "1.37.2"
"""The Kubernetes that is rendered for; else it would be what the client libraries of this Helm are of."""
TIMEOUT_S = 120.0

Document = dict[str, Any]


class AbsentError(Exception):
    """There is no Helm here, and why."""


def find() -> Path:
    """The program: what the environment names, else what is on the PATH.

    Raises:
        AbsentError: neither, or too old.
    """
    found = os.environ.get(HELM) or shutil.which("helm")
    if not found:
        raise AbsentError(f"there is no helm on the PATH, and {HELM} is not set")
    try:
        told = subprocess.run([found, "version", "--short"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise AbsentError(f"{found} cannot be run: {error}") from error
    version = tuple(int(number) for number in re.findall(r"\d+", told)[:2])
    if version < OLDEST:
        raise AbsentError(f"{found} is {told.strip()}; the chart needs Helm {'.'.join(map(str, OLDEST))} or newer")
    return Path(found)


class Helm:
    """A helm that keeps nothing in this user's home."""

    def __init__(self, program: Path, folder: Path, kubeconfig: Path | None = None) -> None:
        self.program = program
        # Without a kubeconfig of its own it would take the user's.
        config = folder / "none" if kubeconfig is None else kubeconfig
        homes = {f"HELM_{name}_HOME": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        self._environ = {**os.environ, **homes, "KUBECONFIG": str(config)}

    def call(self, *words: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        """One command, with values in a file, as users give them."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            if values is not None:
                yaml.safe_dump(nested(values), file)
                file.flush()
                words = (*words, "--values", file.name)
            return subprocess.run(
                [self.program, *words],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=TIMEOUT_S * 4,
            )

    def render(
        self, values: Mapping[str, Any] | None = None, *words: str, namespace: str = NAMESPACE
    ) -> list[Document]:
        """The documents of a release with these values, hooks included."""
        done = self._template(*words, values=values or {}, namespace=namespace)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    def refusal(self, values: Mapping[str, Any], *words: str) -> str:
        """What it says about values that it does not take."""
        done = self._template(*words, values=values)
        assert done.returncode != 0, "it was rendered"
        return done.stderr

    def _template(
        self, *words: str, values: Mapping[str, Any], namespace: str = NAMESPACE
    ) -> subprocess.CompletedProcess[str]:
        usual = ("--namespace", namespace, "--kube-version", CLUSTER)
        return self.call("template", RELEASE, str(CHART), *usual, *words, values=values)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"app.sandbox.mode": "local"}`` as a values file has it. Keys without dots stay as they are."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        *above, last = path.split(".")
        place = found
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return found


def only(documents: list[Document], kind: str, name: str | None = None) -> Document:
    """The one document of its kind, or of its kind and name."""
    (found,) = (each for each in documents if each["kind"] == kind and name in {None, each["metadata"]["name"]})
    return found


def kinds(documents: list[Document]) -> set[str]:
    """Which kinds there are."""
    return {each["kind"] for each in documents}


def pod(documents: list[Document]) -> Document:
    """The spec of the service's pods."""
    spec: Document = only(documents, "Deployment")["spec"]["template"]["spec"]
    return spec


def box(documents: list[Document]) -> Document:
    """The service's container."""
    (container,) = pod(documents)["containers"]
    found: Document = container
    return found


def environ(documents: list[Document]) -> dict[str, str]:
    """Its variables that have a value."""
    return {each["name"]: each["value"] for each in box(documents)["env"] if "value" in each}
