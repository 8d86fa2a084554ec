"""Images: pulled from a real registry, or not, and what is said when they cannot be had or be run."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from tests import daemons, modes
from tests.docker.conftest import private
from tests.engines.docker import images
from tests.engines.docker.daemon import Daemon
from tests.engines.docker.registry import Registry

import cloche
from cloche.testing.conformance import Target, assert_exited
from cloche.testing.conformance.terminal import command, on_terminal

pytestmark = pytest.mark.anyio

USER, PASSWORD = "reader", "not-a-secret"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Registry]]:
    """A daemon with a registry beside it that wants a password, and has the tiny image."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="cloche-engines-", dir="/tmp") as folder:
        daemon = private(Daemon("current", Path(folder, "d")))
        try:
            with Registry(daemon, tmp_path_factory.mktemp("registry"), user=USER, password=PASSWORD) as registry:
                registry.push(images.TINY, "private/tiny:1")
                yield daemon, registry
        finally:
            daemon.close()


@pytest.fixture
def reference(hub: tuple[Daemon, Registry]) -> Iterator[str]:
    """The image's name in the registry; the daemon does not have it at first."""
    daemon, registry = hub
    name = f"{registry.address}/private/tiny:1"
    yield name
    if _has(daemon, name):
        daemon.engine.ask("DELETE", f"/images/{name}", {"force": 1})


def _has(daemon: Daemon, name: str) -> bool:
    return any(name in (found["RepoTags"] or ()) for found in daemon.engine.get("/images/json"))


def sandbox(hub: tuple[Daemon, Registry], image: str, config: Path, **overrides: str) -> cloche.Sandbox:
    environ = {
        "CLOCHE_MODE": "docker",
        "CLOCHE_FALLBACK": "false",
        "CLOCHE_DOCKER_HOST": hub[0].host,
        "CLOCHE_IMAGE": image,
        "DOCKER_CONFIG": str(config),
    }
    return cloche.Sandbox.from_env({**environ, **overrides})


def log_in(folder: Path, registry: Registry, password: str = PASSWORD) -> Path:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": auth}}}))
    return folder


def tiny(**fields: object) -> cloche.Spec:
    return cloche.Spec.model_validate({"name": "a.txt", "content": "hello\n", "interpreter": "tiny", **fields})


async def test_pulled_when_missing(
    hub: tuple[Daemon, Registry], reference: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing image is pulled with the credentials of Docker's own file, told as progress; the next run finds it there."""
    caplog.set_level(logging.INFO, "cloche.progress")
    async with sandbox(hub, reference, log_in(tmp_path, hub[1])) as opened:
        result = await opened.run(tiny(args=["4"]))
        assert_exited(result, 4)
        assert (result.stdout, result.stderr) == ("hello\n", "tiny: 1 args\n")
    said = [record.getMessage() for record in caplog.records if record.name == "cloche.progress"]
    assert said[0] == f"pulling {reference}"
    assert said[-1] == ""
    caplog.clear()
    async with sandbox(hub, reference, tmp_path) as opened:
        assert_exited(await opened.run(tiny()))
    assert not [record for record in caplog.records if record.name == "cloche.progress"]


async def test_begun_when_the_sandbox_opens(hub: tuple[Daemon, Registry], reference: str, tmp_path: Path) -> None:
    """The pull does not wait for the first run."""
    async with sandbox(hub, reference, log_in(tmp_path, hub[1])):
        with anyio.fail_after(30):
            while not _has(hub[0], reference):  # noqa: ASYNC110 (the daemon tells nobody)
                await anyio.sleep(0.1)


def test_progress_on_a_terminal(hub: tuple[Daemon, Registry], reference: str, tmp_path: Path) -> None:
    """A person sees that an image is being pulled; a pipe on stderr, or --quiet, sees nothing of it."""
    script = tmp_path / "a.txt"
    script.write_text("hello\n")
    environ = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "CLOCHE_MODE": "docker",
        "CLOCHE_FALLBACK": "false",
        "CLOCHE_DOCKER_HOST": hub[0].host,
        "CLOCHE_IMAGE": reference,
        "DOCKER_CONFIG": str(log_in(tmp_path, hub[1])),
    }
    line = f"pulling {reference}".encode()
    for quiet in ([], ["--quiet"]):
        with on_terminal(command("run", *quiet, "--interpreter", "tiny", str(script)), environ) as terminal:
            shown = terminal.read(None, within_s=60)
            assert terminal.process.wait(10) == 0, shown
        assert (line in shown) is not bool(quiet)
        assert b"hello" in shown
        hub[0].engine.ask("DELETE", f"/images/{reference}", {"force": 1})
    done = subprocess.run(
        command("run", "--interpreter", "tiny", str(script)), env=environ, capture_output=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == (b"hello\n", b"tiny: 0 args\n")


@pytest.mark.parametrize("password", ["", "wrong"])
async def test_credentials(hub: tuple[Daemon, Registry], reference: str, tmp_path: Path, password: str) -> None:
    """Without credentials, or with wrong ones, the error names the image and what the registry said, and never a password."""
    config = log_in(tmp_path, hub[1], password) if password else tmp_path
    async with sandbox(hub, reference, config) as opened:
        with pytest.raises(cloche.ImageUnavailable) as caught:
            await opened.run(tiny())
    assert reference in caught.value.message
    assert "auth" in caught.value.message
    assert ("docker login" in caught.value.hint) is not bool(password)
    assert "wrong" not in str(caught.value)


async def test_no_such_image(hub: tuple[Daemon, Registry], tmp_path: Path) -> None:
    """An image that the registry does not have, and a registry that is not there: each named in its error."""
    there, away = f"{hub[1].address}/private/none:1", "127.0.0.1:9/none:1"
    async with sandbox(hub, there, log_in(tmp_path, hub[1])) as opened:
        for image in (there, away):
            with pytest.raises(cloche.ImageUnavailable) as caught:
                await opened.run(tiny(image=image))
            assert image in caught.value.message
            assert caught.value.hint


async def test_never(hub: tuple[Daemon, Registry], reference: str, tmp_path: Path) -> None:
    """With CLOCHE_PULL=never a missing image is an error at once, though the registry has it."""
    async with sandbox(hub, reference, log_in(tmp_path, hub[1]), CLOCHE_PULL="never") as opened:
        with pytest.raises(cloche.ImageUnavailable, match="CLOCHE_PULL=never") as caught:
            await opened.run(tiny())
    assert f"docker pull {reference}" in caught.value.hint


async def test_always(hub: tuple[Daemon, Registry], reference: str, tmp_path: Path) -> None:
    """With CLOCHE_PULL=always an image that is there is pulled anew: one that the registry does not have is refused."""
    daemon, registry = hub
    log_in(tmp_path, registry)
    daemon.add(images.TINY)
    daemon.engine.ask(
        "POST", f"/images/{images.TINY.name}/tag", {"repo": f"{registry.address}/private/local", "tag": "1"}
    )
    local = f"{registry.address}/private/local:1"
    async with sandbox(hub, reference, tmp_path, CLOCHE_PULL="always") as opened:
        assert_exited(await opened.run(tiny()))
        with pytest.raises(cloche.ImageUnavailable):
            await opened.run(tiny(image=local))
    async with sandbox(hub, reference, tmp_path) as opened:
        assert_exited(await opened.run(tiny(image=local)))


@pytest.mark.parametrize("image", ["UPPER", "a b", "a:b:c", "../x", "a?b", "x" * 300])
async def test_no_name_of_an_image(hub: tuple[Daemon, Registry], tmp_path: Path, image: str) -> None:
    """What is no name of an image is refused as such by the daemon, and reaches no other of its addresses."""
    async with sandbox(hub, images.TINY.name, tmp_path) as opened:
        with pytest.raises(cloche.ImageUnavailable) as caught:
            await opened.run(tiny(image=image))
    assert image in caught.value.message


@pytest.fixture
def guest() -> Target:
    """The daemon with a runtime that has a kernel of its own."""
    return modes.ready("docker-guest")


async def test_no_image_for_the_trial(guest: Target) -> None:
    """A default image that is missing makes a runtime no less available: a run with an image that is there tries it then."""
    async with guest.sandbox(CLOCHE_IMAGE="cloche-test/none:1") as opened:
        posture = await opened.posture()
        assert posture.isolation is cloche.Isolation.CONTAINER
        assert "cloche-test/none:1" in posture.reason
        with pytest.raises(cloche.ImageUnavailable):
            await opened.run(tiny())
        source = "import os; print(os.uname().release)"
        result = await opened.run(cloche.Spec(name="a.py", content=source, image=guest.environ["CLOCHE_IMAGE"]))
        assert "gvisor" in result.stdout
        with pytest.raises(cloche.IsolationUnavailable):
            await opened.run(tiny(min_isolation="kernel"))


async def test_another_architecture(docker: Target) -> None:
    """An image for another architecture is refused before anything is made, with both architectures named."""
    engine = daemons.engine(docker.environ["CLOCHE_DOCKER_HOST"])
    with open(images.TINY.obtain(), "rb") as file:  # noqa: ASYNC230 (a test may touch the disk)
        query = {"fromSrc": "-", "repo": "cloche-test/other-arch", "tag": "1", "platform": "linux/arm64"}
        engine.ask("POST", "/images/create", query, file)
    try:
        if engine.get("/images/cloche-test/other-arch:1/json")["Architecture"] != "arm64":
            pytest.skip("this daemon makes no image for another architecture")
        async with docker.sandbox() as sandbox:
            with pytest.raises(cloche.ImageUnavailable) as caught:
                await sandbox.run(tiny(image="cloche-test/other-arch:1"))
    finally:
        engine.ask("DELETE", "/images/cloche-test/other-arch:1", {"force": 1})
    assert "arm64" in caught.value.message
    assert "amd64" in caught.value.message
    assert caught.value.hint


async def test_an_image_with_nothing_but_a_program(anywhere: Target) -> None:
    """The supervisor needs neither shell nor Python nor anything else of an image: arguments, stdin, output, artifacts."""
    async with anywhere.sandbox(CLOCHE_IMAGE="cloche-test/tiny:1") as sandbox:
        result = await sandbox.run(tiny(args=["7", "x"], stdin=b"given"))
        assert_exited(result, 7)
        assert (result.stdout, result.stderr) == ("hello\n", "tiny: 2 args\n")
        assert [(a.path, a.data) for a in result.artifacts] == [("stdin", b"given")]
        with pytest.raises(cloche.InterpreterMissing, match="python3") as caught:
            await sandbox.run(cloche.Spec(name="a.py", content="pass"))
    assert "image" in caught.value.hint
