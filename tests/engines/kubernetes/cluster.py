"""A private cluster of one node, whose parts a test may stop, kill and start again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from tests.engines.docker import cgroups, host
from tests.engines.docker.images import Image
from tests.engines.docker.namespaces import Namespaces, birth
from tests.engines.docker.private import MARK, SYSTEM_PATH
from tests.engines.kubernetes import binaries, certificates, configuration, forwarder, images, parts
from tests.engines.kubernetes.certificates import Certificates
from tests.engines.kubernetes.configuration import NODE, Settings
from tests.engines.kubernetes.forwarder import Forwarder
from tests.engines.kubernetes.parts import Name, Part

START_S = 60.0
GRACE_S = 5.0
"""A part that has not ended by then is killed. An API server never has while somebody watches: it waits for a minute."""
KUBECTL_S = 120.0
TRY_EVERY_S = 0.05
PROGRAMS = ("ip", "iptables", "ebtables", "unshare", "nsenter", "setsid", "openssl")
CLIENTS: tuple[Name, ...] = ("controller-manager", "scheduler", "kubelet")
"""Those that act on what the API server tells them."""
LAUNCHED_S = 0.5
"""How long a program may take from its launch until it bears its name."""


class Cluster:
    """All its state is in a folder of its own, which must not be used for anything else. A context manager.

    An ``owned`` one also ends with the program that made it, however that ends, and then leaves files alone.
    """

    def __init__(self, folder: Path, *, owned: bool = True) -> None:
        self.folder = folder
        self.kubeconfig = folder / "admin.kubeconfig"
        """The administrator's. It needs no other file, and holds on this machine's own network."""
        self._namespaces = Namespaces(folder / "init.pid", owned=owned)
        self._complete = folder / "complete"
        self._attached = False

    @classmethod
    def attach(cls, folder: Path) -> Self:
        """The cluster that is up in a folder, made by another program. As a context manager it leaves it up.

        Raises:
            RuntimeError: none is.
        """
        found = cls(folder, owned=False)
        found._attached = True
        if not found.up():
            raise RuntimeError(f"no cluster is up in {folder}")
        return found

    @property
    def cgroup(self) -> str:
        """A name for cgroups that only this cluster has."""
        return f"cloche-engine-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]}"

    def up(self) -> bool:
        """Whether it was started and not closed. Parts of it may be stopped."""
        return self._namespaces.pid is not None and self._complete.exists()

    def launch(self) -> None:
        """Start it, or what of it does not run, and wait until pods can run.

        Raises:
            MissingError: this machine lacks something for it.
            RuntimeError: it does not start; the message has the end of a log.
        """
        host.need_root()
        host.need(*PROGRAMS)
        if not self.up():
            self.close()
            self._create()
        for part in parts.ALL:
            if not self.runs(part.name):
                self.start(part.name)
        self._wait_for_node()

    def close(self) -> None:
        """End all of it, and remove what it left: processes, mounts, network, cgroups, and its folder.

        Raises:
            ValueError: the folder has files that are no cluster's.
        """
        self._namespaces.stop()
        cgroups.remove(self.cgroup)
        if self.folder.exists():
            if any(self.folder.iterdir()) and not self.folder.joinpath(MARK).exists():
                raise ValueError(f"{self.folder} has files that are no cluster's; give an empty folder")
            shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        if not self._attached:
            try:
                self.launch()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._attached:
            self.close()

    def start(self, name: Name) -> None:
        """Start a part that does not run, and wait until it works. A kubelet works when the API server does.

        Raises:
            RuntimeError: it does not start; the message has the end of its log.
        """
        self._launch(name)
        self._wait_for(name)
        if name == "kubelet" and self._complete.exists():
            self._wait_for_node()

    def stop(self, name: Name) -> None:
        """End a part with SIGTERM, as a service manager would. Containers live on, whichever part it is."""
        self._end(name, signal.SIGTERM)

    def kill(self, name: Name) -> None:
        """End a part as a crash does, with SIGKILL."""
        self._end(name, signal.SIGKILL)

    def settle(self) -> None:
        """Have everyone look at the API server anew.

        Who lost it asks again ever more rarely, up to half a minute apart; until then no job gets its pod, and no pod a
        node. So they are killed and started.
        """
        for name in CLIENTS:
            if any(_part(name).processes(self._namespaces)):
                self.kill(name)
            self.start(name)

    def runs(self, name: Name) -> bool:
        """Whether a part has a process, and works."""
        part = _part(name)
        return any(part.processes(self._namespaces)) and part.works(self._namespaces)

    def log(self, name: str) -> str:
        """What a part has said so far, over all its starts."""
        return self.folder.joinpath("log", f"{name}.log").read_text(errors="replace")

    def enter(self, *command: str) -> list[str]:
        """The command that runs a command among the cluster's own processes, mounts and network.

        The node's address there is ``configuration.ADDRESS``; pods reach what listens on it.
        """
        return self._namespaces.enter(*command)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the cluster's network in the hands of this process, to listen there or to connect."""
        return self._namespaces.socket(family, kind)

    def kubectl(self, *words: str, input: str | None = None) -> str:  # noqa: A002 - subprocess calls it so too
        """What kubectl says, as administrator.

        Raises:
            RuntimeError: it fails; the message is what it says on stderr.
        """
        program = binaries.KUBERNETES.obtain() / "kubectl"
        # Else it keeps a cache in this user's home.
        flags = [f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.folder / 'kubectl'}"]
        done = subprocess.run(
            [program, *flags, *words],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=KUBECTL_S,
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    @property
    def server(self) -> tuple[str, int]:
        """Host and port of the API server on this machine's own network; the same until the cluster is closed."""
        url: str = json.loads(self.kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
        address, _, port = url.removeprefix("https://").partition(":")
        return address, int(port)

    def kubeconfig_through(self, passage: Forwarder) -> Path:
        """The administrator's kubeconfig for who shall go through a forwarder whose target is ``server``."""
        path = self.folder / f"through-{passage.port}.kubeconfig"
        self._settings().write_kubeconfig(path, "admin", f"https://127.0.0.1:{passage.port}")
        return path

    def enforce_network_policy(self, enforced: bool) -> None:
        """Drop all that pods send and what is sent to them, or let it pass again; as if each was denied all.

        The bridge that joins the pods enforces no NetworkPolicy. This stands for a network that does: packets vanish, on
        their way to other pods, to the node and beyond, and nobody is told. Addresses are still found.
        """
        for chain in ("INPUT", "FORWARD", "OUTPUT"):
            self._inside("ebtables", "-F", chain)
            if enforced:
                self._inside("ebtables", "-A", chain, "-p", "!", "ARP", "-j", "DROP")

    def add(self, *wanted: Image) -> None:
        """Give it images."""
        for image in wanted:
            self._add(image)

    def _create(self) -> None:
        # First of all, since it may take minutes.
        binaries.obtain()
        for image in images.ALL:
            image.obtain()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.joinpath(MARK).touch()
        self.folder.joinpath("log").mkdir()
        self._namespaces.start()
        cgroups.make(self.cgroup)
        # What the kubelet mounts for pods must be seen by containerd, though it has mounts of its own.
        self._inside("mount", "--bind", str(self.folder), str(self.folder))
        self._inside("mount", "--make-shared", str(self.folder))
        settings = self._settings()
        certificates.make(settings.certificates.folder, NODE, parts.SERVERS)
        settings.write()
        self._inside("sh", str(self.folder / "network.sh"))
        self._forward()
        with ThreadPoolExecutor(1) as beside:
            self._launch("etcd")
            self._launch("containerd")
            self._wait_for("containerd")
            added: Future[None] = beside.submit(self.add, *images.ALL)
            self._wait_for("etcd")
            self._launch("apiserver")
            self._wait_for("apiserver")
            # These start beside each other.
            for name in CLIENTS:
                self._launch(name)
            added.result()
            for name in CLIENTS:
                self._wait_for(name)
        self._wait_for_node()
        self._complete.touch()

    def _settings(self) -> Settings:
        keys = Certificates(self.folder / "keys")
        return Settings(self.folder, self.cgroup, binaries.CNI.obtain(), keys)

    def _forward(self) -> None:
        """Have a process of the cluster's take connections on this machine's own network."""
        with forwarder.listening() as outside:
            port = outside.getsockname()[1]
            number = str(outside.fileno())
            command = [sys.executable, "-IS", forwarder.__file__, number, "127.0.0.1", str(configuration.API_PORT)]
            self._start("forwarder", self._namespaces.enter_network("setsid", "--fork", *command), outside.fileno())
        self._settings().write_kubeconfig(self.kubeconfig, "admin", f"https://127.0.0.1:{port}")

    def _launch(self, name: Name) -> None:
        if any(_part(name).processes(self._namespaces)):
            raise RuntimeError(f"{name} is running already")
        # It becomes a child of the namespaces' first process, and nothing of it is outside.
        command = self.enter("setsid", "--fork", *_part(name).command(self._settings()))
        self._start(name, command)

    def _start(self, name: str, command: list[str], *descriptors: int) -> None:
        with open(self.folder / "log" / f"{name}.log", "ab") as log:
            subprocess.run(
                command,
                env=self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                check=True,
                timeout=START_S,
            )

    def _wait_for(self, name: Name) -> None:
        part = _part(name)
        begun = time.monotonic()
        while not part.works(self._namespaces):
            took = time.monotonic() - begun
            dead = took > LAUNCHED_S and not any(part.processes(self._namespaces))
            if dead or took > START_S:
                raise RuntimeError(f"{name} does not start; its log ends so:\n{self.log(name)[-3000:]}")
            time.sleep(TRY_EVERY_S)

    def _wait_for_node(self) -> None:
        """Until pods are scheduled and started: what they need from the controller-manager is there too."""
        end = time.monotonic() + START_S
        lacking = "the API server's answer"
        while time.monotonic() < end:
            with contextlib.suppress(RuntimeError):
                lacking = self._lacking()
                if not lacking:
                    return
            time.sleep(TRY_EVERY_S)
        raise RuntimeError(f"the node does not get ready for want of {lacking}; see {self.folder / 'log'}")

    def _lacking(self) -> str:
        node = self._get(f"/api/v1/nodes/{NODE}")
        ready = [condition["status"] for condition in node["status"]["conditions"] if condition["type"] == "Ready"]
        if ready != ["True"]:
            return "readiness"
        if node["spec"].get("taints"):
            return "freedom from taints"
        # A kubelet that has just been started answers 404 to who asks for the log of a pod it has not heard of yet.
        bound = _uids(self._get(f"/api/v1/pods?fieldSelector=spec.nodeName={NODE}"))
        if bound - _uids(self._get(f"/api/v1/nodes/{NODE}/proxy/pods")):
            return "the kubelet's knowledge of its pods"
        self._get("/api/v1/namespaces/default/serviceaccounts/default")
        self._get("/api/v1/namespaces/default/configmaps/kube-root-ca.crt")
        return ""

    def _get(self, path: str) -> Any:
        return json.loads(self.kubectl("get", "--raw", path))

    def _end(self, name: Name, number: signal.Signals) -> None:
        found = list(_part(name).processes(self._namespaces))
        if not found:
            raise RuntimeError(f"{name} is not running")
        for pid, _ in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + GRACE_S
        while any(birth(pid) == born for pid, born in found):
            if number != signal.SIGKILL and time.monotonic() > end:
                self._end(name, signal.SIGKILL)
                return
            time.sleep(TRY_EVERY_S)

    def _add(self, image: Image) -> None:
        command = self.enter("ctr", "--address", configuration.SOCKET, "--namespace", "k8s.io", "images", "import", "-")
        with (
            open(self.folder / "log" / "images.log", "ab") as log,
            subprocess.Popen(command, env=self._environ(), stdin=subprocess.PIPE, stdout=log, stderr=log) as process,
            contextlib.suppress(BrokenPipeError),  # its own words tell more
        ):
            images.write(image, cast("IO[bytes]", process.stdin))
        if process.returncode:
            raise RuntimeError(f"containerd does not take {image.name}:\n{self.log('images')[-3000:]}")

    def _inside(self, *command: str) -> None:
        done = subprocess.run(
            self.enter(*command), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=START_S
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")

    def _environ(self) -> dict[str, str]:
        """The environment in which programs find each other, and nothing of this user's."""
        return {"PATH": ":".join([*map(str, binaries.obtain()), SYSTEM_PATH]), "HOME": "/run"}


def _uids(pods: Any) -> set[str]:
    """Of an API's list of pods; that of a kubelet without any has no items."""
    return {pod["metadata"]["uid"] for pod in pods["items"] or ()}


def _part(name: Name) -> Part:
    return next(part for part in parts.ALL if part.name == name)
