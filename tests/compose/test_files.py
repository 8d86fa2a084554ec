"""What the compose files and .env.example say, without a daemon."""

from __future__ import annotations

import itertools
import re
import tomllib

import pytest
from tests.compose.conftest import Make
from tests.compose.project import FILES, TOKEN

from cloche.settings import Settings, variables

GIVEN = {"CLOCHE_SERVE_TOKENS": f"tests:{TOKEN}"}
SOCKET = {
    "COMPOSE_FILE": "docker-compose.yml:docker-socket.yml",
    "DOCKER_SOCKET": "/run/user/1000/docker.sock",
    "DOCKER_SOCKET_GROUP": "998",
}
NOT_PASSED_ON = {
    # To Compose they say which daemon a file is for; their paths are those of the machine, not of the container.
    "DOCKER_HOST": "Compose's own",
    "DOCKER_TLS_VERIFY": "Compose's own",
    "DOCKER_CERT_PATH": "Compose's own",
    "DOCKER_CONFIG": "Compose's own",
    "DOCKER_CONTEXT": "Compose's own",
    "KUBECONFIG": "a path of the machine",
    "KUBERNETES_SERVICE_HOST": "set by Kubernetes in its containers",
    "KUBERNETES_SERVICE_PORT": "set by Kubernetes in its containers",
}
"""Aliases that have a meaning of their own outside of the container. Their CLOCHE_ names are passed on."""
FIXED = {"CLOCHE_SERVE_ADDRESS": "0.0.0.0:8080"}
"""The container's own business; PUBLISH is the user's."""
OTHER_DEFAULTS = {
    "CLOCHE_MODE": "disabled",  # `local` cannot work there
    "CLOCHE_FALLBACK": "false",  # nor as a fallback
    "CLOCHE_LOG": "info",  # what the service logs where nothing is said
    "CLOCHE_OPENSANDBOX_API_URL": "http://opensandbox:8080",  # the profile's server, as by `depends_on`
    "CLOCHE_OPENSANDBOX_SERVER_PROXY": "true",  # and the way to its sandboxes
}
"""Where a container wants something else than cloche by itself."""
_LINE = re.compile(r"#?([A-Z][A-Z0-9_]+)=(.*)")
EXAMPLE = FILES.joinpath(".env.example").read_text()


def example() -> list[tuple[str, str]]:
    """Each variable of .env.example with its value, set or shown."""
    return [(match[1], match[2]) for line in EXAMPLE.splitlines() if (match := _LINE.fullmatch(line))]


def test_every_setting_is_passed_on(make: Make) -> None:
    """Each variable that cloche reads gets into the container as .env says it, by cloche's name and by the original's."""
    names = [name for name in variables() if name not in NOT_PASSED_ON and name not in FIXED]
    project = make(**{**{name: f"value of {name}" for name in names}, **GIVEN})
    environment = project.config()["services"]["cloche"]["environment"]
    assert environment == {**{name: f"value of {name}" for name in names}, **GIVEN, **FIXED}


def test_what_is_not_set_stays_unset(make: Make) -> None:
    """A container gets none of the variables that nobody has set, but for those that a container wants otherwise."""
    environment = make(**GIVEN).config()["services"]["cloche"]["environment"]
    given = {name: value for name, value in environment.items() if value is not None}
    wanted = {name: value for name, value in OTHER_DEFAULTS.items() if name != "CLOCHE_LOG"}
    assert given == {**GIVEN, **FIXED, **wanted}
    assert Settings.from_env(given).mode == "disabled"


@pytest.mark.parametrize(
    ("original", "value", "name"),
    [
        ("WEKNORA_SANDBOX_MODE", "kubernetes", "CLOCHE_MODE"),
        ("WEKNORA_SANDBOX_OPENSANDBOX_API_URL", "https://sandbox.example", "CLOCHE_OPENSANDBOX_API_URL"),
    ],
)
def test_the_originals_names_beat_our_defaults(make: Make, original: str, value: str, name: str) -> None:
    """Where these files have a default of their own, the original's name still has its way, and cloche's beats both."""
    project = make(**GIVEN, **{original: value})
    assert project.config()["services"]["cloche"]["environment"][name] == value
    assert project.config(**{name: "x"})["services"]["cloche"]["environment"][name] == "x"


def test_no_token(make: Make) -> None:
    """Without tokens nothing is made, and the error says what to set and how; a file with tokens does as well."""
    project = make()
    done = project.compose("config", "--quiet")
    assert done.returncode != 0
    assert "set CLOCHE_SERVE_TOKENS to name:token" in done.stderr
    assert project.compose("config", "--quiet", CLOCHE_SERVE_TOKENS_FILE="/tokens").returncode == 0


@pytest.mark.parametrize("name", ["DOCKER_SOCKET", "DOCKER_SOCKET_GROUP"])
def test_no_socket(make: Make, name: str) -> None:
    """Who wants the daemon's socket handed in has to say which it is, and whose."""
    project = make(**GIVEN, **{key: value for key, value in SOCKET.items() if key != name})
    done = project.compose("config", "--quiet")
    assert done.returncode != 0
    assert f"set {name} to" in done.stderr


def test_no_socket_unless_asked(make: Make) -> None:
    """As it comes no container gets the daemon's socket, and the service's port is this machine's alone."""
    services = make(**GIVEN).config()["services"]
    assert set(services) == {"cloche"}
    assert "volumes" not in services["cloche"]
    assert [port["host_ip"] for port in services["cloche"]["ports"]] == ["127.0.0.1"]


def test_socket(make: Make) -> None:
    """With docker-socket.yml the service has the socket of that path and its group, and the mode is docker."""
    service = make(**GIVEN, **SOCKET).config()["services"]["cloche"]
    (mount,) = service["volumes"]
    assert (mount["source"], mount["target"]) == (SOCKET["DOCKER_SOCKET"], "/run/docker.sock")
    assert mount["bind"]["create_host_path"] is False
    assert service["group_add"] == ["998"]
    settings = Settings.from_env({name: value for name, value in service["environment"].items() if value is not None})
    assert (settings.mode, settings.docker_host) == ("docker", "unix:///run/docker.sock")


def test_least_rights(make: Make) -> None:
    """No container may gain a right, and each has a bound for memory and processes; the service's root is read-only."""
    services = make(**GIVEN).config("--profile", "opensandbox")["services"]
    assert set(services) == {"cloche", "opensandbox"}
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) <= 2**30, name
        assert service["pids_limit"] <= 512, name
        assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & set(service), name
    assert services["cloche"]["read_only"] is True
    assert services["cloche"]["tmpfs"] == ["/tmp:mode=1777,size=512m"]


def test_opensandbox_networks(make: Make) -> None:
    """The service is in no network of the sandboxes; the server is in it, and the sandboxes are made in it."""
    config = make(**GIVEN).config("--profile", "opensandbox")
    assert set(config["services"]["cloche"]["networks"]) == {"default"}
    assert set(config["services"]["opensandbox"]["networks"]) == {"default", "sandboxes"}
    server = tomllib.loads(config["configs"]["opensandbox"]["content"])
    assert server["docker"]["network_mode"] == config["networks"]["sandboxes"]["name"]
    # The server looks a network up by its name in small letters.
    assert server["docker"]["network_mode"].islower()
    assert "ports" not in config["services"]["opensandbox"]


def test_opensandbox_key(make: Make) -> None:
    """Server and service have the same key, by whichever name it is given."""
    project = make(**GIVEN)
    for name in ("CLOCHE_OPENSANDBOX_API_KEY", "WEKNORA_SANDBOX_OPENSANDBOX_API_KEY"):
        services = project.config("--profile", "opensandbox", **{name: "secret"})["services"]
        assert services["opensandbox"]["environment"]["OPENSANDBOX_SERVER_API_KEY"] == "secret"
        assert services["cloche"]["environment"][name] == "secret"


def test_example_is_complete() -> None:
    """.env.example has each variable that the files read, once, and no other."""
    text = "".join(path.read_text() for path in FILES.glob("*.yml"))
    read = {*re.findall(r"\$\{(\w+)", text), *re.findall(r"^ +- ([A-Z_]+)$", text, re.MULTILINE)}
    read |= {"COMPOSE_FILE", "COMPOSE_PROFILES"}
    read -= {"COMPOSE_PROJECT_NAME"}  # Compose's own, from `name`
    names = [name for name, _ in example()]
    assert set(names) == read
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"CLOCHE_MODE"}, "one of several choices, and as it comes"
    assert {name for name in variables() if name not in NOT_PASSED_ON and name not in FIXED} <= read


def test_example_explains() -> None:
    """Each variable of .env.example stands below a remark, alone or with others that it belongs to."""
    lines = ["", *EXAMPLE.splitlines()]
    for above, line in itertools.pairwise(lines):
        assert above or not _LINE.fullmatch(line), line


def test_example_shows_defaults() -> None:
    """What .env.example shows for a setting is what it is when nothing is said."""
    shown = dict(reversed(example()))
    shown["CLOCHE_MODE"] = "disabled"
    known = {name: shown[name] for name in shown if name in variables()}
    for name, value in OTHER_DEFAULTS.items():
        assert known.pop(name) == value, name
    assert Settings.from_env(known) == Settings()


def test_example_as_it_is(make: Make) -> None:
    """A copy of .env.example in which only the token is filled in is enough."""
    project = make()
    project.folder.joinpath(".env").write_text(EXAMPLE)
    assert "set CLOCHE_SERVE_TOKENS" in project.compose("config", "--quiet").stderr
    project.folder.joinpath(".env").write_text(EXAMPLE.replace("TOKENS=\n", f"TOKENS=tests:{TOKEN}\n", 1))
    assert set(project.config()["services"]) == {"cloche"}
