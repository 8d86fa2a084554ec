"""The mode that chooses one: what it tries, in which order, what it says of that, and what it does not even ask."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import cloche
from cloche.cli import render
from cloche.isolation import Isolation, Posture
from cloche.runtime import Sandbox, auto
from cloche.settings import Mode, Settings
from cloche.spec import Spec
from cloche.testing.fake import FakeBackend

SPEC = Spec(content="pass", name="main.py")
INSIDE: dict[str, Any] = {"kube_api_host": "10.0.0.1"}
CONFIGURED: dict[str, Any] = {"opensandbox_api_url": "http://127.0.0.1:1"}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with nothing on it."""
    monkeypatch.setattr(auto, "TOKEN", str(tmp_path / "token"))
    monkeypatch.setattr(auto, "DOCKER_SOCKET", str(tmp_path / "docker.sock"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def _token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")


@pytest.fixture
def _socket(tmp_path: Path) -> None:
    (tmp_path / "docker.sock").touch()


def backend(mode: str, isolation: Isolation = Isolation.CONTAINER, *, reason: str = "") -> FakeBackend:
    return FakeBackend(posture=Posture(mode, available=not reason, isolation=isolation, reason=reason))


class Machine:
    """A table of all modes. What is not given works."""

    def __init__(self, **given: FakeBackend) -> None:
        self.backends = {
            "kubernetes": backend("kubernetes"),
            "opensandbox": backend("opensandbox"),
            "docker": backend("docker"),
            "local": backend("local", Isolation.NAMESPACE),
            **given,
        }

    def sandbox(self, **settings: Any) -> Sandbox:
        table = {mode: made.factory for mode, made in self.backends.items()}
        return Sandbox(Settings.model_validate({"mode": "auto", **settings}), backends=table)

    @property
    def asked(self) -> list[str]:
        return [mode for mode, made in self.backends.items() if made.probes]

    @property
    def held(self) -> list[str]:
        """Those that were asked and are not closed."""
        return [mode for mode, made in self.backends.items() if made.probes and not made.closed]


async def test_nothing_but_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    """On a machine with nothing on it local is used, nobody else is asked, and one line says why."""
    machine = Machine()
    with caplog.at_level(logging.INFO, "cloche"):
        async with machine.sandbox() as s:
            assert (s.mode, s.fallback_from) == ("local", None)
            assert machine.asked == machine.held == ["local"]
            result = await s.run(SPEC)
            assert (result.mode, result.fallback_from) == ("local", None)
            said = s.choice
    assert said.startswith("auto: local, because it needs no engine (not kubernetes: this is no pod of a cluster; not ")
    assert "CLOCHE_OPENSANDBOX_API_URL is not set; not docker: there is no /" in said
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO] == [said]


@pytest.mark.usefixtures("_token", "_socket")
async def test_order() -> None:
    """Kubernetes is the first choice, then OpenSandbox, then Docker, then local; those behind it are not asked."""
    everywhere = {**INSIDE, **CONFIGURED}
    for expected in ("kubernetes", "opensandbox", "docker", "local"):
        order = ["kubernetes", "opensandbox", "docker", "local"]
        before = order[: order.index(expected)]
        machine = Machine(**{mode: backend(mode, reason=f"{mode} is ill.") for mode in before})
        async with machine.sandbox(**everywhere) as s:
            assert s.mode == expected
            assert machine.held == [expected]
            assert machine.asked == [*before, expected]
            assert s.choice.startswith(f"auto: {expected}, because ")
            assert all(f"not {mode}: {mode} is ill" in s.choice for mode in before)


@pytest.mark.usefixtures("_socket")
async def test_below_the_floor() -> None:
    """What gives less isolation than is asked for is passed over, and that is said."""
    machine = Machine(docker=backend("docker", Isolation.PROCESS))
    async with machine.sandbox() as s:
        assert s.mode == "local"
        assert "not docker: The mode docker gives the isolation process here, and namespace is required" in s.choice
    assert machine.backends["docker"].closed


async def test_nothing_at_all() -> None:
    """Where nothing can be used, the error has the reason for each, and what to do; nothing is held."""
    machine = Machine(
        opensandbox=backend("opensandbox", reason="nobody listens there."),
        local=backend("local", Isolation.PROCESS),
    )
    with pytest.raises(cloche.BackendUnavailable) as caught:
        async with machine.sandbox(**CONFIGURED):
            pytest.fail("it was entered")
    message = caught.value.message
    for words in (
        "kubernetes: this is no pod of a cluster; ",
        "opensandbox: nobody listens there; ",
        "docker: there is no /",
        "local: The mode local gives the isolation process here, and namespace is required.",
    ):
        assert words in message
    assert "CLOCHE_MODE" in caught.value.hint
    assert machine.held == []


async def test_no_warning_and_no_fallback(caplog: pytest.LogCaptureFixture) -> None:
    """To pass over a candidate is no fallback: nobody is warned, and it happens with fallback switched off too."""
    machine = Machine(opensandbox=backend("opensandbox", reason="nobody listens there."))
    with caplog.at_level(logging.WARNING, "cloche"):
        async with machine.sandbox(fallback=False, **CONFIGURED) as s:
            assert (s.mode, s.fallback_from) == ("local", None)
    assert not caplog.records


async def test_modes_that_are_named_have_no_choice() -> None:
    """Who names a mode is not told how it was chosen."""
    async with Machine().sandbox(mode="docker") as s:
        assert (s.mode, s.choice) == ("docker", "")


def why_not(mode: Mode, **settings: Any) -> str:
    found = auto.candidates(Settings.model_validate({"mode": "auto", **settings}))
    return next(candidate.why_not for candidate in found if candidate.mode is mode)


def test_a_pod_without_a_token() -> None:
    """In a pod that may not speak to its cluster, the cluster is not asked."""
    assert why_not(Mode.KUBERNETES, **INSIDE) == "this pod has no token of a service account"


@pytest.mark.usefixtures("_token")
def test_a_pod() -> None:
    """In a pod with a token the cluster is asked; a token alone is no pod."""
    assert why_not(Mode.KUBERNETES, **INSIDE) == ""
    assert why_not(Mode.KUBERNETES) == "this is no pod of a cluster"


def test_docker_that_is_told(tmp_path: Path) -> None:
    """A daemon may be where a variable, a context or a file of Docker's says; a socket has to be there."""
    assert why_not(Mode.DOCKER) != ""
    assert why_not(Mode.DOCKER, docker_host="tcp://127.0.0.1:2376") == ""
    assert why_not(Mode.DOCKER, docker_context="elsewhere") == ""
    missing = tmp_path / "missing.sock"
    assert why_not(Mode.DOCKER, docker_host=f"unix://{missing}") == f"there is no {missing}"
    missing.touch()
    assert why_not(Mode.DOCKER, docker_host=f"unix://{missing}") == ""
    (tmp_path / "config.json").write_text("{}")
    assert why_not(Mode.DOCKER, docker_config=str(tmp_path)) == ""


def test_shown_on_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Who asks the command what isolation is in force hears first how it came to it."""
    posture = Posture("local", available=True, isolation=Isolation.NAMESPACE, engine="bubblewrap")
    render.say_posture(posture, "auto: local, because it needs no engine")
    render.say_posture(posture)
    mode = "cloche: mode local (bubblewrap), isolation namespace\n"
    assert capfd.readouterr() == ("", f"cloche: auto: local, because it needs no engine\n{mode}{mode}")


async def test_on_this_machine() -> None:
    """Where nothing else is, auto runs scripts as local does, quickly and for real."""
    settings = Settings.model_validate({"mode": "auto", "docker_config": "/nowhere"})
    try:
        async with Sandbox(settings) as s:
            assert s.mode == "local"
            result = await s.run(Spec(content="echo hi", name="main.sh"), wait_cleanup=True)
    except cloche.BackendUnavailable as error:
        pytest.skip(error.message)
    assert (result.stdout, result.mode, result.fallback_from) == ("hi\n", "local", None)
