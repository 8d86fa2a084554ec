"""Each mode as it is on this machine: how a box is killed from outside, how its engine is restarted, what the engine has.

All of it blocks; the soak calls it from threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil
from tests import clusters, daemons, modes, remotes, services
from tests.engines.docker import binaries
from tests.engines.docker.api import Engine, EngineError
from tests.engines.docker.daemon import Daemon
from tests.engines.docker.private import MARK, START_S, Programs
from tests.engines.kubernetes.cluster import Cluster
from tests.engines.opensandbox.service import Service as Server
from tests.kubernetes import deployment
from tests.kubernetes.deployment import KUBECONFIG

from cloche.backends.docker import manifest as docker
from cloche.backends.kubernetes import names as kubernetes
from cloche.backends.opensandbox import manifest as opensandbox
from cloche.testing.conformance import Target
from cloche.testing.conformance.observe import processes_with
from cloche.testing.conformance.target import PASSED_ON

LAUNCHER = "cloche-guard"
"""The topmost process of a local box, as /proc names it."""
AWAY_S = (0.0, 2.0)
"""For how long an engine stays away when it is restarted."""


class Place:
    """A mode whose engine nobody restarts."""

    restartable = False

    def __init__(self, target: Target) -> None:
        self.target = target

    @property
    def mode(self) -> str:
        """Its name."""
        return self.target.mode

    def kill_box(self, run_id: str, word: str, chance: random.Random) -> str:
        """Kill the box of a run from outside. How; nothing if there is none (yet, or any more)."""
        del run_id
        return kill_local_box(word, chance)

    def restart(self, chance: random.Random) -> str:
        """Restart the engine, and wait until it answers again. How that was done."""
        raise NotImplementedError

    def has(self) -> frozenset[str]:
        """What the engine has that no run may change, or add to: images, volumes, containers of whoever."""
        return frozenset()

    def groups(self) -> frozenset[str]:
        """The engine's cgroups, where they are known: those of boxes come and go with them."""
        return frozenset()

    def close(self) -> None:
        """Give back what it stands on."""


def kill_local_box(word: str, chance: random.Random) -> str:
    """Kill one of the processes that stand between a client of this machine and a script that has the word: the supervisor,
    bubblewrap, or the launcher that watches over it.
    """
    scripts = processes_with(word)
    for pid in scripts:
        above, at = [], pid
        while at > 1:
            name, parent = remotes.stat(at)
            if at not in scripts:
                above.append((at, name))
            if name == LAUNCHER:
                chosen, name = chance.choice(above)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chosen, signal.SIGKILL)
                    return f"SIGKILL of {name}"
            at = parent
    return ""


class DockerPlace(Place):
    """A daemon; the tests' own one is restarted, nobody else's."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._engine = daemons.engine(target.environ["CLOCHE_DOCKER_HOST"])
        folder = self._engine.path.parent
        self._daemon = Daemon("current", folder, owned=False) if _is_private(folder) else None
        self.restartable = self._daemon is not None

    def kill_box(self, run_id: str, word: str, chance: random.Random) -> str:
        """By the daemon, or its first process."""
        del word
        filters = json.dumps({"label": [f"{docker.LABEL_RUN}={run_id}"]})
        for found in self._engine.get("/containers/json", filters=filters):
            how = chance.choice(["kill", "remove"])
            with contextlib.suppress(EngineError):
                if how == "kill":
                    self._engine.ask("POST", f"/containers/{found['Id']}/kill")
                else:
                    self._engine.ask("DELETE", f"/containers/{found['Id']}", {"force": 1})
                return f"{how} of its container"
        return ""

    def restart(self, chance: random.Random) -> str:
        """The daemon alone; containerd and the containers' own processes live on until the daemon ends them."""
        assert self._daemon is not None
        number = chance.choice([signal.SIGTERM, signal.SIGKILL])
        config = str(self._daemon.folder / "daemon.json")
        _end(lambda words: os.path.basename(words[0]) == "dockerd" and config in words, number)
        time.sleep(chance.uniform(*AWAY_S))
        # Not the object's own way: it has not started containerd, and would start another one.
        environ = Programs(binaries.current()).environ()
        service = self._daemon._run(environ, "service.log", "dockerd", "--config-file", config)
        _wait(self._daemon.engine.answers, service, self._daemon.log)
        return f"{number.name} of dockerd"

    def has(self) -> frozenset[str]:
        """Images, volumes and containers, but for the boxes."""
        return frozenset(_docker_things(self._engine))

    def groups(self) -> frozenset[str]:
        """Those of the tests' own daemon."""
        return frozenset() if self._daemon is None else frozenset(_cgroups_below(self._daemon.cgroup))


def _is_private(folder: Path) -> bool:
    return (folder / MARK).exists() and (folder / "daemon.json").exists()


def _docker_things(engine: Engine) -> Iterator[str]:
    for image in engine.get("/images/json", all=1):
        yield f"image {image['Id'][7:19]} {' '.join(sorted(image['RepoTags'] or []))}"
    for volume in engine.get("/volumes")["Volumes"] or []:
        yield f"volume {volume['Name']}"
    for network in engine.get("/networks"):
        yield f"network {network['Name']}"
    for container in engine.get("/containers/json", all=1):
        if docker.LABEL_EXPIRES not in container["Labels"]:
            yield f"container {container['Names'][0]}"


def _cgroups_below(name: str) -> Iterator[str]:
    """What an engine of the tests' own has in the kernel's cgroups, in whichever hierarchy."""
    top = Path("/sys/fs/cgroup")
    for hierarchy in (top, *top.iterdir()):
        for folder, folders, _ in os.walk(hierarchy / name):
            yield from (f"cgroup {Path(folder, each).relative_to(hierarchy)}" for each in folders)


class KubernetesPlace(Place):
    """A cluster; parts of the tests' own one are restarted."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._admin = clusters.administrator(os.environ[KUBECONFIG])
        folder = os.environ.get("CLOCHE_TEST_KUBERNETES_FOLDER", "")
        self._cluster = Cluster.attach(Path(folder)) if folder else None
        self.restartable = self._cluster is not None

    def kill_box(self, run_id: str, word: str, chance: random.Random) -> str:
        """By deleting its pod, without any grace."""
        del word, chance
        pods = deployment.core("pods")
        found = self._admin.ask("GET", f"{pods}?labelSelector={kubernetes.LABEL_RUN.replace('/', '%2F')}%3D{run_id}")
        for pod in found.body.get("items", []):
            if pod["status"].get("phase") in {"Pending", "Running"}:
                self._admin.ask("DELETE", f"{pods}/{pod['metadata']['name']}?gracePeriodSeconds=0")
                return "deletion of its pod"
        return ""

    def restart(self, chance: random.Random) -> str:
        """The API server or the kubelet."""
        assert self._cluster is not None
        part: Literal["apiserver", "kubelet"] = chance.choice(["apiserver", "kubelet"])
        how = chance.choice(["stop", "kill"])
        (self._cluster.stop if how == "stop" else self._cluster.kill)(part)
        time.sleep(chance.uniform(*AWAY_S))
        self._cluster.start(part)
        if part == "apiserver":
            self._cluster.settle()  # else nothing goes on for up to a minute, and the plan is over before much has happened
        return f"{how} of the {part}"

    def has(self) -> frozenset[str]:
        """What is in the namespace but for runs' own; and the nodes' images."""
        found = set()
        for kind in ("configmaps", "secrets", "pods", "services", "serviceaccounts", "persistentvolumeclaims"):
            for item in self._admin.ask("GET", deployment.core(kind)).body["items"]:
                if kubernetes.LABEL_RUN not in (item["metadata"].get("labels") or {}):
                    found.add(f"{kind.removesuffix('s')} {item['metadata']['name']}")
        for node in self._admin.ask("GET", "/api/v1/nodes").body["items"]:
            for image in node["status"].get("images", []):
                found.add(f"image {min(image['names'])}")
        return frozenset(found)

    def groups(self) -> frozenset[str]:
        """Those of the tests' own cluster, which removes a pod's some time after the pod."""
        return frozenset() if self._cluster is None else frozenset(_cgroups_below(self._cluster.cgroup))


class OpenSandboxPlace(Place):
    """A service; the tests' own server is restarted."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        service = services.find("opensandbox")
        assert service is not None
        self._service = service
        self._daemon = daemons.engine(service.docker_host) if service.docker_host else None
        folder = os.environ.get("CLOCHE_TEST_OPENSANDBOX_FOLDER", "")
        self._server = Server("current", Path(folder), owned=False) if folder else None
        self.restartable = self._server is not None

    def kill_box(self, run_id: str, word: str, chance: random.Random) -> str:
        """By the service, or behind its back."""
        del word
        for box in self._service.boxes():
            if box["metadata"].get(opensandbox.META_RUN) == run_id:
                if self._daemon is not None and chance.random() < 0.5:
                    with contextlib.suppress(EngineError):
                        self._daemon.ask("POST", f"/containers/sandbox-{box['id']}/kill")
                        return "kill of its container"
                    return ""
                self._service.ask("DELETE", f"/sandboxes/{box['id']}")
                return "deletion of its sandbox"
        return ""

    def restart(self, chance: random.Random) -> str:
        """The server; its daemon and the sandboxes live on."""
        assert self._server is not None
        self._server.kill_server()
        time.sleep(chance.uniform(*AWAY_S))
        self._server.start_server()
        return "SIGKILL of the server"

    def has(self) -> frozenset[str]:
        """What its daemon has, containers of sandboxes included: the service knows only of those that it has made well."""
        return frozenset() if self._daemon is None else frozenset(_docker_things(self._daemon))

    def groups(self) -> frozenset[str]:
        """Those of the daemon of the tests' own server."""
        return frozenset() if self._server is None else frozenset(_cgroups_below(self._server.cgroup))

    def close(self) -> None:
        """Leave the server running."""
        if self._server is not None:
            self._server.leave()


class RemotePlace(Place):
    """A service of the soak's own on this machine, in the mode local. Its boxes descend from this process."""

    restartable = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        token = secrets.token_urlsafe(24)
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self._environ: Mapping[str, str] = {
            **passed,
            "CLOCHE_MODE": "local",
            "CLOCHE_FALLBACK": "false",
            "CLOCHE_MAX_CONCURRENT": "6",
            "CLOCHE_SERVE_ADDRESS": address,
            "CLOCHE_SERVE_TOKENS": f"soak:{token}",
            "TMPDIR": str(folder),
        }
        super().__init__(Target("remote", {"CLOCHE_REMOTE_URL": f"http://{address}", "CLOCHE_REMOTE_TOKEN": token}))
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def restart(self, chance: random.Random) -> str:
        """The service, by SIGKILL: what it had is left to the next one."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        time.sleep(chance.uniform(*AWAY_S))
        self._start()
        return "SIGKILL of cloche serve"

    def close(self) -> None:
        """End it in order.

        Raises:
            RuntimeError: it does not end, or not well.
        """
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"cloche serve does not end; its log ends so:\n{self._log()}") from None
        if code:
            raise RuntimeError(f"cloche serve ended with {code}; its log ends so:\n{self._log()}")

    def _start(self) -> None:
        with (self._folder.parent / "serve.log").open("ab") as log:
            command = [sys.executable, "-m", "cloche", "serve"]
            self._process = subprocess.Popen(
                command, env=self._environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )
        _wait(self._answers, self._process, self._log)

    def _answers(self) -> bool:
        host, _, port = self._address.partition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return True
        return False

    def _log(self) -> str:
        return (self._folder.parent / "serve.log").read_text(errors="replace")[-3000:]


def _end(is_it: Callable[[Sequence[str]], bool], number: signal.Signals) -> None:
    """End a process that is known by its words, and wait until it is gone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if (words := process.cmdline()) and is_it(words):
                process.send_signal(number)
                found.append(process)
    if not found:
        raise RuntimeError("the process that is to be restarted does not run")
    _, alive = psutil.wait_procs(found, START_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, START_S)


def _wait(answers: Callable[[], bool], process: subprocess.Popen[bytes], log: Callable[[], str]) -> None:
    end = time.monotonic() + START_S
    while not answers():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"it does not start again; its log ends so:\n{log()[-3000:]}")
        time.sleep(0.05)


MODES = ("local", "docker", "kubernetes", "opensandbox", "remote")


def find(mode: str, folder: Path) -> Place:
    """The place of a mode.

    Raises:
        modes.Unset: its engine is not here.
    """
    match mode:
        case "docker":
            return DockerPlace(modes.docker())
        case "kubernetes":
            return KubernetesPlace(modes.kubernetes())
        case "opensandbox":
            return OpenSandboxPlace(modes.opensandbox())
        case "remote":
            return RemotePlace(folder / "serve")
        case _:
            return Place(modes.local())
