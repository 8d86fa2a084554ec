"""``deploy/compose`` as somebody uses it: a folder with its files and an .env, and Compose in that folder."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.docker.namespaces import Namespaces

FILES = Path(__file__).parents[2] / "deploy" / "compose"
TOKEN = "0123456789abcdef"
WITHIN_S = 120.0


@dataclass(frozen=True)
class Answer:
    """What the service answered."""

    status: int
    body: Any


@dataclass(frozen=True)
class Project:
    """One that can be brought up on a daemon. Its name is the folder's own, so that several do not meet."""

    program: Path
    folder: Path
    docker_host: str = ""

    @classmethod
    def make(cls, program: Path, folder: Path, docker_host: str = "", **variables: str) -> Project:
        """Lay the files out, with an .env that says these variables."""
        shutil.copytree(FILES, folder)
        made = cls(program, folder, docker_host)
        made.set(**variables)
        return made

    def set(self, **variables: str) -> None:
        """Write the .env."""
        self.folder.joinpath(".env").write_text("".join(f"{name}='{value}'\n" for name, value in variables.items()))

    def compose(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run Compose, with nothing of this user's environment or configuration."""
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "COMPOSE_PROJECT_NAME": self.folder.name}
        if self.docker_host:
            clean["DOCKER_HOST"] = self.docker_host
        return subprocess.run(
            [self.program, *words],
            cwd=self.folder,
            env={**clean, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=WITHIN_S,
        )

    def config(self, *words: str, **environ: str) -> dict[str, Any]:
        """What the files come to."""
        done = self.compose(*words, "config", "--format", "json", **environ)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def up(self) -> subprocess.CompletedProcess[str]:
        """Bring it up, and wait until it is healthy or has failed."""
        return self.compose("up", "--detach", "--wait", "--wait-timeout", "60", "--pull", "never")

    def down(self) -> None:
        """Take it down, with its networks and volumes."""
        done = self.compose("--profile", "*", "down", "--volumes", "--timeout", "10")
        assert done.returncode == 0, done.stderr

    def logs(self, service: str = "cloche") -> str:
        """What a container of it wrote."""
        return self.compose("logs", "--no-color", "--no-log-prefix", service).stdout

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Ask the service, by the port that the daemon published for it."""
        told = self.compose("port", "cloche", "8080")
        assert told.returncode == 0, told.stderr
        address, _, port = told.stdout.strip().rpartition(":")
        headers = {
            "Authorization": f"Bearer {TOKEN}",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        connection = http.client.HTTPConnection(address, int(port), timeout=WITHIN_S)
        connection.sock = self._connect(address, int(port))
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Answer(answer.status, json.loads(answer.read()))
        finally:
            connection.close()

    def run(self, content: str, *, prefer: str = "", **fields: object) -> Answer:
        """Have a script run by the service, a shell's unless the fields of the spec say otherwise."""
        spec = {"name": "main", "content": content, "interpreter": "sh", **fields}
        return self.ask("POST", "/v1/runs", json.dumps(spec).encode(), Content_Type="application/json", Prefer=prefer)

    def upload(self, files: Mapping[str, bytes], **fields: object) -> Answer:
        """Have a script run by the service that is one of these files."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        parts = {"spec": json.dumps(fields).encode(), "workspace": packed.getvalue()}
        border = "----border"
        body = b"".join(
            f'--{border}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode()
            + part
            + b"\r\n"
            for name, part in parts.items()
        )
        kind = f"multipart/form-data; boundary={border}"
        return self.ask("POST", "/v1/runs", body + f"--{border}--\r\n".encode(), Content_Type=kind)

    def _connect(self, address: str, port: int) -> socket.socket:
        # A private daemon publishes ports in the network that is its own.
        note = Path(self.docker_host.removeprefix("unix://")).with_name("init.pid")
        opened = Namespaces(note, owned=False).socket() if note.exists() else socket.socket()
        opened.settimeout(WITHIN_S)
        opened.connect((address, port))
        return opened
