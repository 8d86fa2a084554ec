"""Daemons that are not there, may not be used, are something else, or want TLS: each said in its own words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.docker.conftest import private
from tests.engines.docker import certificates, images
from tests.engines.docker.certificates import Certificates
from tests.engines.docker.daemon import Daemon

import cloche
from cloche.testing.conformance import Target, assert_exited, shell

pytestmark = pytest.mark.anyio


async def refused(**environ: str) -> cloche.BackendUnavailable:
    with pytest.raises(cloche.BackendUnavailable) as caught:
        async with cloche.Sandbox.from_env({"CLOCHE_MODE": "docker", "CLOCHE_FALLBACK": "false", **environ}):
            pass
    assert caught.value.hint
    return caught.value


async def test_no_daemon(tmp_path: Path) -> None:
    """No socket: the path is named, and how to start a daemon or to name another one."""
    error = await refused(DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert f"{tmp_path}/none.sock is not there" in error.message
    assert "DOCKER_HOST" in error.hint


async def test_nobody_listens(tmp_path: Path) -> None:
    """A socket that a dead daemon left, a file in its place, and a port where nothing is."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{tmp_path}/left.sock")
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for host in (f"unix://{tmp_path}/left.sock", f"unix://{tmp_path}/file", f"tcp://127.0.0.1:{port}"):
        error = await refused(DOCKER_HOST=host)
        assert "No Docker daemon listens" in error.message
        assert host in error.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_no_permission(tmp_path: Path) -> None:
    """A socket that this user may not use is told from one that is not there, with the group and what it means."""
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:3]:
        folder.chmod(folder.stat().st_mode | 0o011)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/docker.sock")
        listening.listen()
        os.chmod(f"{tmp_path}/docker.sock", 0o600)
        code = (
            # All is imported by then: the interpreter's files may be root's alone.
            "import cloche, os, anyio, httpx2._transports.default, cloche.runtime, cloche.backends.docker.backend\n"
            "anyio.run(anyio.sleep, 0)\n"
            "os.seteuid(65534)\n"
            "try:\n    cloche.run(name='a.sh', content='true')\n"
            "except cloche.BackendUnavailable as exc:\n    print(exc.message, '|', exc.hint)"
        )
        environ = {"CLOCHE_MODE": "docker", "CLOCHE_FALLBACK": "false", "DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False
        )
    message, _, hint = done.stdout.partition("|")
    assert "may not use" in message, done.stderr
    assert "group" in hint
    assert "rootless" in hint


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """Something else on a socket: it answers every request with a page."""
    path = str(tmp_path / "web.sock")
    page = b"<html>hello</html>"
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    if connection.recv(65536) == b"stop":
                        return
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"unix://{path}"
        with socket.socket(socket.AF_UNIX) as stopper:
            stopper.connect(path)
            stopper.sendall(b"stop")
        thread.join(5)


async def test_something_else(web_server: str) -> None:
    """A server that is no Docker daemon is told as that."""
    error = await refused(DOCKER_HOST=web_server)
    assert "is no Docker daemon" in error.message
    assert web_server in error.message


async def test_unknown_runtime(docker: Target) -> None:
    """A runtime that the daemon does not have is refused, with the setting to change."""
    error = await refused(**docker.settings(CLOCHE_DOCKER_RUNTIME="warp"))
    assert "warp" in error.message
    assert "CLOCHE_DOCKER_RUNTIME" in error.hint


def test_fallback(tmp_path: Path) -> None:
    """Without a daemon ``local`` takes its place, with one warning that says why, and the result says so too."""
    environ = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "CLOCHE_MODE": "docker",
        "DOCKER_HOST": f"unix://{tmp_path}/none.sock",
    }
    script = tmp_path / "a.sh"
    script.write_text("echo fine")
    command = [sys.executable, "-m", "cloche", "run", "--json", str(script)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    result = json.loads(done.stdout)
    assert (result["mode"], result["fallback_from"], result["stdout"]) == ("local", "docker", "fine\n")
    (warning,) = done.stderr.splitlines()
    assert "none.sock is not there" in warning
    assert "local instead" in warning


# --- TLS -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Certificates, str]]:
    """A daemon behind TLS on a port of the loopback, its certificates, and its address."""
    import tempfile

    made = certificates.make(tmp_path_factory.mktemp("tls"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="cloche-engines-", dir="/tmp") as folder:
        daemon = private(Daemon("current", Path(folder, "d"), listen=[address], tls=made, private_network=False))
        try:
            daemon.add(images.SANDBOX)
            yield daemon, made, address
        finally:
            daemon.close()


async def test_tls(secure: tuple[Daemon, Certificates, str]) -> None:
    """With the certificates of Docker's own variables a daemon behind TLS runs scripts."""
    _, made, address = secure
    environ = {
        "CLOCHE_MODE": "docker",
        "CLOCHE_FALLBACK": "false",
        "CLOCHE_IMAGE": images.SANDBOX.name,
        "DOCKER_HOST": address,
        "DOCKER_TLS_VERIFY": "1",
        "DOCKER_CERT_PATH": str(made.client),
    }
    async with cloche.Sandbox.from_env(environ) as sandbox:
        result = await sandbox.run(shell("cat", stdin=b"x" * 3_000_000, timeout=30))
    assert_exited(result)
    assert result.stdout_bytes == 3_000_000


async def test_tls_not_used(secure: tuple[Daemon, Certificates, str]) -> None:
    """A daemon that wants TLS and gets none: the variables to set are named."""
    error = await refused(DOCKER_HOST=secure[2])
    assert "wants TLS" in error.message
    assert "DOCKER_TLS_VERIFY" in error.hint


async def test_tls_of_another_authority(secure: tuple[Daemon, Certificates, str], tmp_path: Path) -> None:
    """A daemon whose certificate another authority signed is not spoken to."""
    other = certificates.make(tmp_path / "other")
    error = await refused(DOCKER_HOST=secure[2], DOCKER_TLS_VERIFY="1", DOCKER_CERT_PATH=str(other.client))
    assert "TLS" in error.message
    assert "certificate" in error.message


async def test_tls_without_a_client_certificate(secure: tuple[Daemon, Certificates, str], tmp_path: Path) -> None:
    """A client that shows no certificate is refused by the daemon, and told so."""
    (tmp_path / "ca.pem").write_bytes(secure[1].ca.read_bytes())
    error = await refused(DOCKER_HOST=secure[2], DOCKER_TLS_VERIFY="1", DOCKER_CERT_PATH=str(tmp_path))
    assert "certificate required" in error.message
    assert "DOCKER_CERT_PATH" in error.hint


async def test_tls_where_there_is_none(folder: Path, tmp_path: Path) -> None:
    """TLS spoken to a daemon without it."""
    made = certificates.make(tmp_path / "tls")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    daemon = private(Daemon("current", folder / "d", listen=[address], private_network=False))
    try:
        error = await refused(DOCKER_HOST=address, DOCKER_TLS_VERIFY="1", DOCKER_CERT_PATH=str(made.client))
    finally:
        daemon.close()
    assert "TLS" in error.message
    assert "unset both" in error.hint
