"""Where the daemon is, and what registries want to see: read as Docker's own tools read it."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import cloche
from cloche.backends.docker import address
from cloche.backends.docker.credentials import registry_auth


def write_config(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(auth: str | None) -> dict[str, str]:
    assert auth is not None
    found: dict[str, str] = json.loads(base64.urlsafe_b64decode(auth))
    return found


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def helper(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = folder / "docker-credential-test"
    program.write_text(f"#!/bin/sh\nread -r server\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    "key", ["registry.example:5000", "https://registry.example:5000/v2/", "http://registry.example:5000"]
)
def test_from_the_file(tmp_path: Path, key: str) -> None:
    """User and password of config.json, also under the addresses that older versions wrote."""
    write_config(tmp_path, auths={key: {"auth": encoded("me:pass:word")}})
    found = read(registry_auth(tmp_path, "registry.example:5000"))
    assert found == {"username": "me", "password": "pass:word", "serveraddress": "registry.example:5000"}


def test_the_hub(tmp_path: Path) -> None:
    """Docker Hub's credentials stand under an address of their own."""
    write_config(tmp_path, auths={"https://index.docker.io/v1/": {"auth": encoded("me:x")}})
    assert read(registry_auth(tmp_path, "docker.io"))["username"] == "me"


def test_identity_token(tmp_path: Path) -> None:
    """A token takes the place of user and password."""
    write_config(tmp_path, auths={"r.example": {"auth": encoded("me:"), "identitytoken": "tok"}})
    assert read(registry_auth(tmp_path, "r.example")) == {"identitytoken": "tok", "serveraddress": "r.example"}


@pytest.mark.parametrize("where", [{"credsStore": "test"}, {"credHelpers": {"r.example": "test"}}])
def test_from_a_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: dict[str, Any]) -> None:
    """A credential helper is asked for the registry by its name."""
    write_config(tmp_path, **where)
    helper(
        tmp_path, monkeypatch, 'printf \'{"ServerURL": "%s", "Username": "me", "Secret": "s-%s"}\' "$server" "$server"'
    )
    found = read(registry_auth(tmp_path, "r.example"))
    assert (found["username"], found["password"]) == ("me", "s-r.example")


def test_a_token_of_a_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that names no user gives an identity token."""
    write_config(tmp_path, credsStore="test")
    helper(tmp_path, monkeypatch, 'echo \'{"Username": "<token>", "Secret": "tok"}\'')
    assert read(registry_auth(tmp_path, "r.example")) == {"identitytoken": "tok", "serveraddress": "r.example"}


@pytest.mark.parametrize("body", ["exit 1", "echo nonsense", "echo '{}'", "echo '[1]'"])
def test_a_helper_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A helper that has nothing, or fails, leaves what the file says."""
    write_config(tmp_path, credsStore="test", auths={"r.example": {"auth": encoded("me:x")}})
    helper(tmp_path, monkeypatch, body)
    assert read(registry_auth(tmp_path, "r.example"))["username"] == "me"


@pytest.mark.parametrize("name", ["../../evil", "no-such-helper", "a b", 7, ""])
def test_a_helper_that_is_none(tmp_path: Path, name: Any) -> None:
    """A helper's name is a name, never a path; one that is not there is nothing."""
    write_config(tmp_path, credsStore=name)
    assert registry_auth(tmp_path, "r.example") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        '{"auths": 1}',
        '{"auths": {"r.example": 1}}',
        '{"auths": {"r.example": {"auth": "%%%"}}}',
        '{"auths": {"r.example": {"auth": "\u00e4"}}}',
        "{}",
    ],
)
def test_nothing_to_show(tmp_path: Path, text: str) -> None:
    """A file that is broken, or has nothing for the registry, gives no credentials and no error."""
    (tmp_path / "config.json").write_text(text)
    assert registry_auth(tmp_path, "r.example") is None


def find(tmp_path: Path, **environ: str) -> address.Address:
    return address.find(cloche.Settings.from_env({"DOCKER_CONFIG": str(tmp_path), **environ}))


def test_default(tmp_path: Path) -> None:
    """Where nothing is said, the system's socket."""
    assert find(tmp_path).server.socket == "/var/run/docker.sock"


def test_host(tmp_path: Path) -> None:
    """DOCKER_HOST, and CLOCHE_DOCKER_HOST above it."""
    assert find(tmp_path, DOCKER_HOST="unix:///a").server.socket == "/a"
    assert find(tmp_path, DOCKER_HOST="unix:///a", CLOCHE_DOCKER_HOST="unix:///b").server.socket == "/b"


@pytest.mark.parametrize(
    ("host", "base"),
    [
        ("tcp://h", "http://h:2375"),
        ("tcp://h:99", "http://h:99"),
        ("http://h:99", "http://h:99"),
        ("https://h", "https://h:2376"),
        ("tcp://[::1]:99", "http://[::1]:99"),
    ],
)
def test_tcp(tmp_path: Path, host: str, base: str) -> None:
    """tcp:// is plain HTTP at 2375 unless certificates come into play."""
    assert find(tmp_path, DOCKER_HOST=host).server.base == base


def test_certificates_are_missing(tmp_path: Path) -> None:
    """Who asks to verify and has no authority's certificate is told which folder was looked at."""
    with pytest.raises(cloche.BackendUnavailable, match="certificates") as caught:
        find(tmp_path, DOCKER_HOST="tcp://h", DOCKER_TLS_VERIFY="1")
    assert str(tmp_path) in caught.value.message
    assert "DOCKER_CERT_PATH" in caught.value.hint


def test_certificates_without_verifying(tmp_path: Path) -> None:
    """A folder of certificates alone means TLS, as for Docker itself."""
    found = find(tmp_path, DOCKER_HOST="tcp://h", DOCKER_CERT_PATH=str(tmp_path))
    assert found.server.base == "https://h:2376"


@pytest.mark.parametrize(
    "host", ["ssh://h", "npipe:////./pipe/docker", "h:2375", "unix://docker.sock", "tcp://", "tcp://h:x"]
)
def test_addresses_that_cannot_be(tmp_path: Path, host: str) -> None:
    """An address that is malformed or of a form that is not spoken says so, with the forms that are."""
    with pytest.raises(cloche.BackendUnavailable) as caught:
        find(tmp_path, DOCKER_HOST=host)
    assert repr(host)[1:-1] in caught.value.message
    assert "unix:///" in caught.value.hint


@pytest.mark.parametrize("host", ["tcp://\u2603", "tcp://h\u00f6st..x", "tcp://\x7f"])
def test_hosts_that_cannot_be(tmp_path: Path, host: str) -> None:
    """A host that no resolver would take is an error of cloche's."""
    with pytest.raises(cloche.BackendUnavailable):
        find(tmp_path, DOCKER_HOST=host)


@pytest.mark.parametrize("host", ["ssh://me:hush@h", "tcp://me:hush@", "tcp://me:hush@h:x", "ftp://me:hush@h"])
def test_passwords_are_not_shown(tmp_path: Path, host: str) -> None:
    """A password in an address is in no error."""
    with pytest.raises(cloche.BackendUnavailable) as caught:
        find(tmp_path, DOCKER_HOST=host)
    assert "hush" not in str(caught.value)
    assert "hush" not in find(tmp_path, DOCKER_HOST="tcp://me:hush@h").text


def write_context(folder: Path, name: str, endpoint: Any) -> None:
    path = folder / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"Name": name, "Endpoints": {"docker": endpoint}}))


def test_current_context(tmp_path: Path) -> None:
    """The current context's daemon is used, one that is named before it, and a host before both."""
    write_config(tmp_path, currentContext="rootless")
    write_context(tmp_path, "rootless", {"Host": "unix:///run/user/7/docker.sock"})
    write_context(tmp_path, "other", {"Host": "unix:///other.sock"})
    assert find(tmp_path).server.socket == "/run/user/7/docker.sock"
    assert find(tmp_path, DOCKER_CONTEXT="other").server.socket == "/other.sock"
    assert find(tmp_path, DOCKER_CONTEXT="default").server.socket == "/var/run/docker.sock"
    assert find(tmp_path, DOCKER_HOST="unix:///a").server.socket == "/a"


@pytest.mark.parametrize("endpoint", [None, {}, {"Host": 7}, "x"])
def test_broken_context(tmp_path: Path, endpoint: Any) -> None:
    """A context that cannot be read is an error with a hint, not the default daemon."""
    write_config(tmp_path, currentContext="broken")
    write_context(tmp_path, "broken", endpoint)
    with pytest.raises(cloche.BackendUnavailable, match="broken") as caught:
        find(tmp_path)
    assert "docker context" in caught.value.hint


def test_missing_context(tmp_path: Path) -> None:
    """So is one that is not there."""
    with pytest.raises(cloche.BackendUnavailable, match="gone"):
        find(tmp_path, DOCKER_CONTEXT="gone")
