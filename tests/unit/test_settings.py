"""The settings: names, aliases, defaults, and what is said of a broken one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cloche
from cloche._kit.http import Server
from cloche.backends.opensandbox import address
from cloche.backends.opensandbox.allowed import Allowed
from cloche.isolation import Isolation
from cloche.settings import Mode, Settings, extra, parse_duration, resolve, variables
from cloche.spec import Limits, Network, Spec, parse_bytes

ROOT = Path(__file__).parents[2]


def test_defaults() -> None:
    """With an empty environment the settings are those of the documentation."""
    s = Settings.from_env({})
    assert s == Settings()
    assert (s.mode, s.fallback, s.min_isolation) == (Mode.LOCAL, True, Isolation.NAMESPACE)
    assert (s.timeout, s.start_timeout, s.queue_timeout) == (60.0, 120.0, 60.0)
    assert (s.memory, s.cpus, s.pids, s.max_concurrent) == (256 * 2**20, 1.0, 128, 5)
    assert (s.max_script_bytes, s.max_output_bytes, s.max_artifact_bytes) == (512 * 2**10, 2**20, 4 * 2**20)
    assert (s.kube_namespace, s.kube_service_account) == ("cloche-sandbox", "cloche-sandbox-runner")
    assert s.image == "python:3.12-slim"
    assert (s.opensandbox_api_url, s.opensandbox_api_key, s.ssrf_whitelist) == (None, None, ())
    assert s.opensandbox_server_proxy is False


def test_workspace_bound_depends_on_the_mode() -> None:
    """Unset, the workspace's bound is 8 MiB on kubernetes and 64 MiB elsewhere; set, it is what was set."""
    assert Settings().workspace_bytes("kubernetes") == 8 * 2**20
    assert Settings().workspace_bytes("local") == 64 * 2**20
    assert Settings.from_env({"CLOCHE_MAX_WORKSPACE_BYTES": "1Mi"}).workspace_bytes("kubernetes") == 2**20


VALUES: dict[str, tuple[str, Any]] = {
    "mode": ("docker", Mode.DOCKER),
    "fallback": ("false", False),
    "min_isolation": ("kernel", Isolation.KERNEL),
    "prove": ("start", "start"),
    "timeout": ("2m", 120.0),
    "image": ("python:3.13", "python:3.13"),
    "memory": ("1Gi", 2**30),
    "cpus": ("0.5", 0.5),
    "pids": ("64", 64),
    "start_timeout": ("90s", 90.0),
    "queue_timeout": ("0", 0.0),
    "max_concurrent": ("8", 8),
    "max_script_bytes": ("4096", 4096),
    "max_workspace_bytes": ("1Mi", 2**20),
    "max_output_bytes": ("64Ki", 65536),
    "max_artifact_bytes": ("10M", 10_000_000),
    "docker_host": ("tcp://h:2375", "tcp://h:2375"),
    "docker_tls_verify": ("0", True),
    "docker_cert_path": ("/certs", "/certs"),
    "docker_config": ("/home/me/.docker", "/home/me/.docker"),
    "docker_context": ("rootless", "rootless"),
    "docker_runtime": ("runsc", "runsc"),
    "pull": ("never", "never"),
    "kube_namespace": ("runs", "runs"),
    "kube_service_account": ("runner", "runner"),
    "kube_runtime_class": ("gvisor", "gvisor"),
    "kube_node_selector": ("disk=ssd, pool=a", {"disk": "ssd", "pool": "a"}),
    "kube_tolerations": ('[{"key": "a", "operator": "Exists"}]', None),
    "kube_priority_class": ("low", "low"),
    "kube_image_pull_secrets": ("one, two", ("one", "two")),
    "kube_labels": ('{"team": "x"}', {"team": "x"}),
    "kube_annotations": ("a.example/b=any text!", {"a.example/b": "any text!"}),
    "kube_cpu_request": ("0.1", 0.1),
    "kube_memory_request": ("128Mi", 2**27),
    "kube_run_as_user": ("1000650000-1000659999", (1000650000, 1000659999)),
    "kube_host_users": ("false", False),
    "kube_arch": ("aarch64", "aarch64"),
    "kube_config": ("/etc/one:/etc/two", "/etc/one:/etc/two"),
    "kube_context": ("dev", "dev"),
    "kube_api_host": ("10.96.0.1", "10.96.0.1"),
    "kube_api_port": ("6443", 6443),
    "opensandbox_api_url": ("https://sandbox.example/v1", "https://sandbox.example/v1"),
    "opensandbox_api_key": ("hush", None),
    "opensandbox_server_proxy": ("true", True),
    "ssrf_whitelist": ("a.example, *.b.example,10.0.0.0/8", ("a.example", "*.b.example", "10.0.0.0/8")),
    "remote_url": ("https://cloche.example/x", "https://cloche.example/x"),
    "remote_token": ("hush", None),
    "serve_address": ("[::1]:0", "[::1]:0"),
    "serve_tokens": ("search:0123456789abcdef", None),
    "serve_tokens_file": ("/etc/cloche/tokens", "/etc/cloche/tokens"),
    "serve_max_queue": ("0", 0),
    "serve_max_timeout": ("10m", 600.0),
    "serve_max_memory": ("1Gi", 2**30),
    "serve_max_cpus": ("2", 2.0),
    "serve_max_pids": ("64", 64),
    "serve_images": ("a:1, team/*", ("a:1", "team/*")),
    "serve_network": ("open", Network.OPEN),
    "serve_drain": ("2m", 120.0),
    "serve_keep_bytes": ("1Mi", 2**20),
    "sweep_every": ("0", 0.0),
    "log": ("debug", "debug"),
}


def test_every_field_is_tested() -> None:
    """The table above has every setting."""
    assert VALUES.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize("variable", variables())
def test_each_variable_sets_its_field(variable: str) -> None:
    """Every variable, alias or not, sets its field."""
    field = variables()[variable]
    text, expected = VALUES[field]
    value = getattr(Settings.from_env({variable: text}), field)
    if expected is None:
        assert value is not None
        assert value != getattr(Settings(), field)
    else:
        assert value == expected


def test_tolerations_are_kubernetes_own() -> None:
    """A toleration has the fields of Kubernetes' API."""
    (toleration,) = Settings.from_env({"CLOCHE_KUBE_TOLERATIONS": VALUES["kube_tolerations"][0]}).kube_tolerations
    assert toleration.model_dump(exclude_none=True) == {"key": "a", "operator": "Exists"}


@pytest.mark.parametrize(
    ("environ", "timeout"),
    [
        ({"WEKNORA_SANDBOX_TIMEOUT": "30"}, 30.0),
        ({"WEKNORA_SANDBOX_TIMEOUT": "60s"}, 60.0),
        ({"CLOCHE_TIMEOUT": "1m30s"}, 90.0),
        ({"CLOCHE_TIMEOUT": "5", "WEKNORA_SANDBOX_TIMEOUT": "30"}, 5.0),
        ({"WEKNORA_SANDBOX_TIMEOUT": "30", "CLOCHE_TIMEOUT": "5"}, 5.0),
        ({"CLOCHE_TIMEOUT": "", "WEKNORA_SANDBOX_TIMEOUT": "30"}, 30.0),
    ],
)
def test_alias(environ: dict[str, str], timeout: float) -> None:
    """An alias is accepted, CLOCHE_'s name wins over it in any order, and an empty value counts as unset."""
    assert Settings.from_env(environ).timeout == timeout


def test_first_alias_wins() -> None:
    """Of two aliases the first in the table wins."""
    both = {"WEKNORA_SANDBOX_DOCKER_IMAGE": "b", "WEKNORA_SANDBOX_IMAGE": "a"}
    assert Settings.from_env(both).image == "a"
    assert Settings.from_env({"WEKNORA_SANDBOX_DOCKER_IMAGE": "b"}).image == "b"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("CLOCHE_TIMOUT", "CLOCHE_TIMEOUT"),
        ("CLOCHE_MAX_WORKSPACE", "CLOCHE_MAX_WORKSPACE_BYTES"),
        ("CLOCHE_", "CLOCHE_"),
    ],
)
def test_unknown_name(name: str, near: str) -> None:
    """An unknown CLOCHE_ name is an error that names it and the nearest known one."""
    with pytest.raises(cloche.InvalidSettings, match=name) as caught:
        Settings.from_env({name: "1"})
    assert f"Did you mean {near}" in caught.value.hint
    assert caught.value.code == "invalid-settings"


@pytest.mark.parametrize(
    "name",
    [
        "CLOCHE_PORT",
        "CLOCHE_PORT_8080_TCP_ADDR",
        "CLOCHE_SERVICE_HOST",
        "CLOCHE_SERVICE_PORT_HTTP",
        "CLOCHE_MUST_WORK",
        "CLOCHES",
        "PATH",
    ],
)
def test_names_that_are_not_settings(name: str) -> None:
    """What Kubernetes injects for a Service called cloche, what the tests read, and others' names are ignored."""
    assert Settings.from_env({name: "tcp://10.0.0.1:80"}) == Settings()


BROKEN = [
    ("CLOCHE_KUBE_NAMESPACE", "a/b", "the name of a namespace"),
    ("CLOCHE_KUBE_NAMESPACE", "..", "the name of a namespace"),
    ("CLOCHE_KUBE_SERVICE_ACCOUNT", "A B", "the name of a service account"),
    ("CLOCHE_KUBE_LABELS", "a b=c", "labels that Kubernetes takes"),
    ("CLOCHE_KUBE_LABELS", "a=" + 64 * "b", "labels that Kubernetes takes"),
    ("CLOCHE_KUBE_ANNOTATIONS", "a/b/c=d", "annotations that Kubernetes takes"),
    ("CLOCHE_KUBE_NODE_SELECTOR", "disk=a/b", "such as disk=ssd"),
    ("CLOCHE_KUBE_IMAGE_PULL_SECRETS", "one,../two", "names of secrets"),
    ("CLOCHE_KUBE_RUN_AS_USER", "0", "without 0"),
    ("CLOCHE_KUBE_RUN_AS_USER", "2000-1000", "without 0"),
    ("CLOCHE_KUBE_RUN_AS_USER", "1-99999999999", "without 0"),
    ("CLOCHE_KUBE_CPU_REQUEST", "0", "from 0.001"),
    ("CLOCHE_KUBE_ARCH", "riscv64", "x86_64 or aarch64"),
    ("CLOCHE_MODE", "dokcer", "disabled, local, docker, kubernetes, opensandbox"),
    ("CLOCHE_FALLBACK", "perhaps", "true or false"),
    ("CLOCHE_MIN_ISOLATION", "strong", "none, process, namespace, container, kernel"),
    ("CLOCHE_TIMEOUT", "-1", "seconds above 0"),
    ("CLOCHE_TIMEOUT", "nan", "seconds above 0"),
    ("CLOCHE_TIMEOUT", "inf", "seconds above 0"),
    ("CLOCHE_TIMEOUT", "1 fortnight", "seconds above 0"),
    ("WEKNORA_SANDBOX_TIMEOUT", "soon", "seconds above 0"),
    ("CLOCHE_MEMORY", "1Mi", "at least 16Mi"),
    ("CLOCHE_MEMORY", "lots", "256Mi"),
    ("CLOCHE_CPUS", "0", "above 0"),
    ("CLOCHE_PIDS", "3.5", "whole number"),
    ("CLOCHE_MAX_CONCURRENT", "0", "from 1 to"),
    ("CLOCHE_MAX_OUTPUT_BYTES", "2Gi", "1Gi"),
    ("CLOCHE_KUBE_NODE_SELECTOR", "ssd", "disk=ssd"),
    ("CLOCHE_KUBE_NODE_SELECTOR", "{", "disk=ssd"),
    ("CLOCHE_KUBE_TOLERATIONS", "all", "a JSON list"),
    ("CLOCHE_KUBE_TOLERATIONS", '[{"kee": "a"}]', "a JSON list"),
    ("CLOCHE_OPENSANDBOX_API_URL", "ftp://x", "http://"),
    ("CLOCHE_OPENSANDBOX_SERVER_PROXY", "perhaps", "true or false"),
    ("CLOCHE_SSRF_WHITELIST", "a.example;b.example", "*.boxes.example,10.1.0.0/16"),
    ("SSRF_WHITELIST", "10.0.0.0/33", "*.boxes.example,10.1.0.0/16"),
    ("CLOCHE_REMOTE_URL", "ftp://x", "https://cloche.example"),
    ("CLOCHE_SERVE_ADDRESS", "8080", "127.0.0.1:8080"),
    ("CLOCHE_SERVE_ADDRESS", "localhost", "127.0.0.1:8080"),
    ("CLOCHE_SERVE_ADDRESS", "cloche.example:8080", "127.0.0.1:8080"),
    ("CLOCHE_SERVE_ADDRESS", "127.0.0.1:65536", "127.0.0.1:8080"),
    ("CLOCHE_SERVE_ADDRESS", "127.0.0.256:80", "127.0.0.1:8080"),
    ("CLOCHE_SERVE_ADDRESS", "::1:80", "127.0.0.1:8080"),
    ("CLOCHE_SERVE_MAX_QUEUE", "-1", "from 0 to"),
    ("CLOCHE_SERVE_DRAIN", "soon", "0, 30 or 1.5"),
    ("CLOCHE_SERVE_KEEP_BYTES", "-1", "256Mi"),
    ("CLOCHE_SWEEP_EVERY", "-1", "0, 60 or 1.5"),
    ("CLOCHE_LOG", "loud", "debug, info"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BROKEN)
def test_broken_value(name: str, value: str, allowed: str) -> None:
    """A broken value is an error that names the variable as it was set, and tells what is allowed."""
    with pytest.raises(cloche.InvalidSettings, match=name) as caught:
        Settings.from_env({name: value})
    assert allowed in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "https://sandbox.example",
        "http://sandbox.example:8080/",
        "sandbox.example",
        "sandbox.example:8080",
        "sandbox.example/v1",
        "sandbox.example.",
        "my_box",
        "10.1.2.3:65535",
        "http://10.1.2.3:8080/api/v1",
        "[::1]",
        "[::1]:8080",
        "http://[fd00::1]:8080/v1",
        "http://[::ffff:10.1.2.3]",
        "https://user:pass@sandbox.example",
        "https://user:p%40ss;é[!]@sandbox.example:1/v1",
    ],
)
def test_address_of_opensandbox(text: str) -> None:
    """The service's address may leave its scheme out, and may bear a port, a path, and behind a scheme a user."""
    assert Settings.from_env({"CLOCHE_OPENSANDBOX_API_URL": f" {text} "}).opensandbox_api_url == text
    assert address.api(text).scheme == ("http" if text.startswith("http:") else "https")


@pytest.mark.parametrize(
    "text",
    [
        "ftp://x",
        "HTTPS://x",
        "unix:///run/x.sock",
        "//x",
        "http://",
        "http:///x",
        "https://x,https://y",
        "user:pass@host",
        "user@host",
        "https://user:pass@",
        "https://a@b@c",
        "https://a\\b@c",
        "https://a\x01@c",
        "https://a b@c",
        "https://a/b@c",
        "a b",
        "https://x /",
        "https://x/a b",
        "x\ny",
        "x?a=b",
        "x/?a",
        "x#a",
        "x\\y",
        "x/%2e",
        "x/..",
        "x/../y",
        "x/./y",
        "x:",
        "x:0",
        "x:65536",
        "x:99999",
        "http://999.1.1.1",
        "10.1.2.3.",
        "x:123456",
        "x:y",
        "x:\u0664",
        "b\u00f6x",
        ".",
        "..",
        "::1",
        "[::1",
        "[]",
        "[::::]",
        "[1.2.3.4]",
        "[fe80::1%25eth0]",
        "x" * 1025,
    ],
    ids=lambda text: repr(text[:40]),
)
def test_no_address_of_opensandbox(text: str) -> None:
    """What is no address that a request could be made from is refused before any is, and not shown: it may hold a password."""
    with pytest.raises(cloche.InvalidSettings, match="CLOCHE_OPENSANDBOX_API_URL=…") as caught:
        Settings.from_env({"CLOCHE_OPENSANDBOX_API_URL": text})
    assert "sandbox.example, which means https" in caught.value.hint


def test_address_by_hand() -> None:
    """An address that is made by hand is checked alike: nothing behind its end, and none is none."""
    for text in ("https://x\n", "https://x ", "", " "):
        with pytest.raises(cloche.InvalidSettings):
            Settings(opensandbox_api_url=text)
    assert Settings(opensandbox_api_url=None).opensandbox_api_url is None


@given(
    st.one_of(
        st.text("ab.1:/@[]\\%\u0664\u00e9-_~", max_size=20).map("http://".__add__),
        st.text("ab.1:/@[]\\%\u0664\u00e9-_~\x01", max_size=20),
    )
)
@example("http://[1::1:1]:1/.a/..b")
def test_each_address_can_be_used(text: str) -> None:
    """Whatever address the settings take, a request can be made from it, and goes to its host."""
    try:
        found = Settings(opensandbox_api_url=text).opensandbox_api_url
    except cloche.InvalidSettings:
        return
    assert found is not None
    place = address.api(found)
    assert Server(place.base).base == place.base
    assert place.host in found.lower()


@pytest.mark.parametrize(
    "entry",
    [
        "box.example",
        "Box.Example.",
        "my_box",
        "localhost",
        "7.example",
        "*.boxes.example",
        "*",
        "10.1.2.3",
        "10.1.0.0/16",
        "10.1.2.3/16",
        "10.1.0.0/255.255.0.0",
        "0.0.0.0/0",
        "::1",
        "[::1]",
        "fd00::/8",
        "FD00::1",
        "::ffff:10.0.0.0/104",
    ],
)
def test_whitelist(entry: str) -> None:
    """Hosts, hosts below a name, addresses and networks may be on the allow-list, and are kept as they were written."""
    found = Settings.from_env({"CLOCHE_SSRF_WHITELIST": f"a.example, {entry} ,"}).ssrf_whitelist
    assert found == ("a.example", entry)
    Allowed.of("api.example", found)


@pytest.mark.parametrize(
    "entry",
    [
        "a b",
        "a;b",
        "-a",
        ".example",
        "b\u00f6x.example",
        "user@box.example",
        "box.example:8080",
        "box.example/",
        "https://box.example",
        "10.1.2.3:80",
        "[::1]:80",
        "*.",
        "*example",
        "**.example",
        "*.*.example",
        "a.*.example",
        "box.*",
        "10.0.0.0/33",
        "10.0.0.0/",
        "10.0.0.0/8/8",
        "10.0.0.0-10.0.0.9",
        "10.0.0.300",
        "10.0.0",
        "10.0.0.0.0",
        "1234",
        "*.10.0.0.1",
        "fd00::/129",
        "fd00:::1",
        "::g",
        "a" * 254,
    ],
)
def test_no_entry_of_a_whitelist(entry: str) -> None:
    """An entry that is neither a host nor a network is refused, rather than allow something else or nothing."""
    for text in (entry, f"a.example,{entry}"):
        with pytest.raises(cloche.InvalidSettings, match="CLOCHE_SSRF_WHITELIST") as caught:
            Settings.from_env({"CLOCHE_SSRF_WHITELIST": text})
        assert "box.example,*.boxes.example,10.1.0.0/16" in caught.value.hint
    with pytest.raises(cloche.InvalidSettings, match="ssrf_whitelist"):
        Settings(ssrf_whitelist=(entry,))


def test_by_hand() -> None:
    """Settings that are made by hand are checked alike, and unknown fields refused."""
    assert Settings(timeout=5, memory=2**30).timeout == 5.0
    with pytest.raises(cloche.InvalidSettings, match=r"timeout='-5'"):
        Settings(timeout=-5)
    with pytest.raises(cloche.InvalidSettings, match="tiemout"):
        Settings.model_validate({"tiemout": 5})
    with pytest.raises(cloche.InvalidSettings, match="mode='x'"):
        Settings.from_env({"CLOCHE_MODE": "also wrong"}, mode="x")


def test_secrets_are_not_printed() -> None:
    """Neither the settings nor an error about them show a secret."""
    environ = {"CLOCHE_OPENSANDBOX_API_KEY": "hush", "CLOCHE_OPENSANDBOX_API_URL": "https://user:pass@host"}
    settings = Settings.from_env(environ)
    for shown in (repr(settings), str(settings), settings.model_dump_json(include={"opensandbox_api_key"})):
        assert "hush" not in shown
    assert settings.opensandbox_api_key is not None
    assert settings.opensandbox_api_key.get_secret_value() == "hush"
    with pytest.raises(cloche.InvalidSettings) as caught:
        Settings.from_env({"CLOCHE_OPENSANDBOX_API_URL": "user:pass@host"})
    assert "pass" not in str(caught.value)


def test_resolve() -> None:
    """A spec's limits win over the settings', which win over nothing."""
    settings = Settings(timeout=7, memory=2**28, max_output_bytes=4096, max_artifact_bytes=8192)
    assert resolve(Spec(script="a.py"), settings) == Limits(
        timeout_s=7.0, memory_bytes=2**28, cpus=1.0, pids=128, output_bytes=4096, artifact_bytes=8192
    )
    spec = Spec.model_validate({"script": "a.py", "timeout": 1.5, "memory": "32Mi", "cpus": 2, "pids": 9})
    limits = resolve(spec, settings)
    assert (limits.timeout_s, limits.memory_bytes, limits.cpus, limits.pids) == (1.5, 32 * 2**20, 2.0, 9)


def test_every_field_documents_itself() -> None:
    """Every field says what it is, what is allowed, and why its default is what it is; unset is said where it is None."""
    for name, field in Settings.model_fields.items():
        about = extra(field)
        assert field.description, name
        assert about["allowed"], name
        assert about["why"], name
        if field.default in (None, (), {}):
            assert about["unset"], name


def test_page_is_up_to_date() -> None:
    """docs/settings.md is what ``python docs/check.py --write`` makes of the fields."""
    spec = importlib.util.spec_from_file_location("docs_check", ROOT / "docs" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == check.settings_page()


@given(st.integers(0, 10**15 - 1), st.sampled_from(["", "k", "K", "M", "G", "Ki", "Mi", "Gi"]), st.booleans())
def test_amounts_of_bytes(number: int, unit: str, with_b: bool) -> None:
    """An amount is its number times its unit, decimal without an i and binary with it."""
    factor = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}[unit.lower()]
    assert parse_bytes(f" {number}{unit}{'B' * with_b}") == number * factor


@given(st.text(max_size=12))
def test_other_texts_are_no_amounts(text: str) -> None:
    """Whatever is typed, the answer is a whole number that is not negative, or a refusal."""
    for parse in (parse_bytes, parse_duration):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert parse is parse_duration or (isinstance(value, int) and value >= 0)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_durations(hours: int, minutes: int, seconds: int, ms: int) -> None:
    """A Go duration is the sum of its parts."""
    total = hours * 3600 + minutes * 60 + seconds + ms / 1000
    assert parse_duration(f"{hours}h{minutes}m{seconds}s{ms}ms") == pytest.approx(total)
    assert parse_duration(f"{total}") == pytest.approx(total)


@given(
    st.dictionaries(st.sampled_from(list(variables())), st.text(st.characters(exclude_characters="\0"), max_size=20))
)
def test_any_environment(environ: dict[str, str]) -> None:
    """Whatever the variables hold, there are settings or an InvalidSettings that names one of them."""
    try:
        assert isinstance(Settings.from_env(environ), Settings)
    except cloche.InvalidSettings as error:
        assert any(name in error.message for name in environ)  # noqa: PT017 (either end is right)


def test_os_environ_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument the process's own environment is read."""
    for name in variables():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOCHE_PIDS", "77")
    assert Settings.from_env().pids == 77
    assert sys.modules["cloche.settings"].Settings is Settings


def test_address_is_not_in_the_repr() -> None:
    """An address may hold a password, so the repr leaves it out."""
    assert "hush" not in repr(Settings(opensandbox_api_url="https://user:hush@sandbox.example"))
