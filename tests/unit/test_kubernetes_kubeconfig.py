"""Where the API server is, and who we are to it: found as kubectl finds it, or as every pod can."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

import cloche
from cloche.backends.kubernetes import kubeconfig
from cloche.backends.kubernetes.credentials import ClientCertificate, Identity, load
from cloche.backends.kubernetes.kubeconfig import Access

# Made for these tests: an authority that exists nowhere else; a server named api.example; a client, and one of the past.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBRzCB7aADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB3Rlc3QtY2Ew
IBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBIxEDAOBgNVBAMMB3Rl
c3QtY2EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAS1NTZG+XCCpvLynQdJR4Ds
y5MtArXK4Mr5H6KQBojs8/fdYUwtE+AQher3C/JiJYIQtqcnqjkTKonOuDjrJMHe
ozIwMDAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBScos+E9HZJN96COkZectLg
p1E4vTAKBggqhkjOPQQDAgNJADBGAiEA5JNRUoli8ZbNjT6YNqtY3dZh6benWn7W
lHrVwmEXUpACIQDgehtupppWwVxZF5lOptcxqA5zSQS4UrlriddlHUFEXQ==
-----END CERTIFICATE-----
"""
SERVER = """\
-----BEGIN CERTIFICATE-----
MIIBeDCCAR+gAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAd0ZXN0LWNh
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjARMQ8wDQYDVQQDDAZz
ZXJ2ZXIwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASh07R2O1onN9mU8p9DZ+fZ
WyfsMhLNaiWRsRr/n3Em0MlPp8HMmhdQJI/CVhyGGZXTaGohneYs8DeIR1yddJ64
o2UwYzAJBgNVHRMEAjAAMBYGA1UdEQQPMA2CC2FwaS5leGFtcGxlMB0GA1UdDgQW
BBRaDbdSgDaZIdh84WBUe8RTvDwFtjAfBgNVHSMEGDAWgBScos+E9HZJN96COkZe
ctLgp1E4vTAKBggqhkjOPQQDAgNHADBEAiBLnci8UCO4kKnkO/7Hx4Ea/Y2ja1Ve
c/uZBRTlo4hWKgIgNomMJc0Ff5nkbIwT1RBqXH7HWY/cZJbUuUb4EletaEs=
-----END CERTIFICATE-----
"""
SERVER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgk217bV4C6o2Lmt6B
YwtZvY5A+WiVTxrRL52x7NHUsK2hRANCAASh07R2O1onN9mU8p9DZ+fZWyfsMhLN
aiWRsRr/n3Em0MlPp8HMmhdQJI/CVhyGGZXTaGohneYs8DeIR1yddJ64
-----END PRIVATE KEY-----
"""
CLIENT = """\
-----BEGIN CERTIFICATE-----
MIIBXTCCAQSgAwIBAgIBAzAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAd0ZXN0LWNh
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAOMQwwCgYDVQQDDANk
ZXYwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARXtSocWZrKNd6mbk+1bPt7SdNM
b6mqxSXZPZIPcgOYTxufSRppzI5HZ4/+7X6HPngkFn8T0bgQIA1WaLWN2GEso00w
SzAJBgNVHRMEAjAAMB0GA1UdDgQWBBR3JvUcDjqsuugyHYYHc/KKGHdSRDAfBgNV
HSMEGDAWgBScos+E9HZJN96COkZectLgp1E4vTAKBggqhkjOPQQDAgNHADBEAiBg
Y9WYjr7dWc6jds4NMRVd3NUtydT7fxtmSS6DMWATWwIgQU1SdTjgrNfc8UIwdbsC
SkTN0WsDUcOy1tY16f6PBDI=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgGK/YZ/ECMAMdjWW2
AgFqusateFeU0aTfkxXIgtRpGrOhRANCAARXtSocWZrKNd6mbk+1bPt7SdNMb6mq
xSXZPZIPcgOYTxufSRppzI5HZ4/+7X6HPngkFn8T0bgQIA1WaLWN2GEs
-----END PRIVATE KEY-----
"""
EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBXDCCAQKgAwIBAgIBBDAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAd0ZXN0LWNh
MB4XDTIwMDEwMTAwMDAwMFoXDTIxMDEwMTAwMDAwMFowDjEMMAoGA1UEAwwDZGV2
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEV7UqHFmayjXepm5PtWz7e0nTTG+p
qsUl2T2SD3IDmE8bn0kaacyOR2eP/u1+hz54JBZ/E9G4ECANVmi1jdhhLKNNMEsw
CQYDVR0TBAIwADAdBgNVHQ4EFgQUdyb1HA46rLroMh2GB3Pyihh3UkQwHwYDVR0j
BBgwFoAUnKLPhPR2STfegjpGXnLS4KdROL0wCgYIKoZIzj0EAwIDSAAwRQIgDeP3
bzeYUE2ObS+v1qxtU9zB1IwqhKyiT5aKtA14wigCIQC72qq/WU79YBi0MbJVjnWe
XeoQmKkrkwI7D0iz3ofiKA==
-----END CERTIFICATE-----
"""
V1 = "client.authentication.k8s.io/v1"
NOWHERE = Path("/no/such/folder")


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def config(**parts: Any) -> dict[str, Any]:
    """A configuration with one of each, all named dev."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "dev",
        "contexts": [{"name": "dev", "context": {"cluster": "dev", "user": "dev"}}],
        "clusters": [{"name": "dev", "cluster": {"server": "https://10.0.0.1:6443"}}],
        "users": [{"name": "dev", "user": {"token": "tok"}}],
        **parts,
    }


def write(path: Path, found: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return path


def find(*files: Path, service_account: Path = NOWHERE, home: Path = NOWHERE, **environ: str) -> Access:
    if files:
        environ["KUBECONFIG"] = os.pathsep.join(map(str, files))
    return kubeconfig.find(cloche.Settings.from_env(environ), service_account, home)


def find_cluster(folder: Path, **cluster: Any) -> Access:
    values = {"server": "https://10.0.0.1:6443", **cluster}
    return find(write(folder / "config", config(clusters=[{"name": "dev", "cluster": values}])))


def find_user(folder: Path, **user: Any) -> Access:
    return find(write(folder / "config", config(users=[{"name": "dev", "user": user}])))


def identity(access: Access) -> Identity:
    return anyio.run(access.credentials.identity)


def authorization(access: Access) -> str | None:
    return identity(access).headers.get("Authorization")


# --- in a cluster -----------------------------------------------------------------------------------------------------


def pod(folder: Path) -> Path:
    write(folder / "token", "pod-token\n")
    write(folder / "ca.crt", AUTHORITY)
    return folder


@pytest.mark.parametrize(
    ("host", "port", "base"),
    [
        ("10.96.0.1", "443", "https://10.96.0.1:443"),
        ("10.96.0.1", "", "https://10.96.0.1:443"),
        ("kubernetes.default.svc", "6443", "https://kubernetes.default.svc:6443"),
        ("fd00::1", "443", "https://[fd00::1]:443"),
    ],
)
def test_in_a_cluster(tmp_path: Path, host: str, port: str, base: str) -> None:
    """A pod finds the server in its environment, and authority and token in its mounted files."""
    found = find(service_account=pod(tmp_path), KUBERNETES_SERVICE_HOST=host, KUBERNETES_SERVICE_PORT=port)
    assert found.base == base
    assert found.text == f"{base} (this pod's service account)"
    assert found.authority == AUTHORITY
    assert found.verify
    assert identity(found) == Identity({"Authorization": "Bearer pod-token"})


def test_a_file_before_the_cluster(tmp_path: Path) -> None:
    """A configuration that is named is used in a pod too; ~/.kube/config only where there is no service account."""
    account, home = pod(tmp_path / "account"), tmp_path / "home"
    write(home / ".kube" / "config", config())
    named = write(tmp_path / "config", config(users=[{"name": "dev", "user": {"token": "named"}}]))
    inside = {"KUBERNETES_SERVICE_HOST": "h"}
    assert authorization(find(named, service_account=account, home=home, **inside)) == "Bearer named"
    assert authorization(find(service_account=account, home=home, **inside)) == "Bearer pod-token"
    assert authorization(find(service_account=NOWHERE, home=home, **inside)) == "Bearer tok"
    assert authorization(find(service_account=account, home=home)) == "Bearer tok"


def test_a_context_in_a_cluster(tmp_path: Path) -> None:
    """A context is one of a file: of ~/.kube/config if there is one, else it is an error."""
    account, home = pod(tmp_path / "account"), tmp_path / "home"
    inside = {"KUBERNETES_SERVICE_HOST": "h", "CLOCHE_KUBE_CONTEXT": "dev"}
    with pytest.raises(cloche.BackendUnavailable, match="no contexts") as caught:
        find(service_account=account, home=home, **inside)
    assert "KUBECONFIG" in caught.value.hint
    write(home / ".kube" / "config", config())
    assert authorization(find(service_account=account, home=home, **inside)) == "Bearer tok"


def test_a_pod_without_an_account(tmp_path: Path) -> None:
    """A pod whose token is not mounted is told how to have it mounted."""
    with pytest.raises(cloche.BackendUnavailable, match="without a token") as caught:
        find(service_account=tmp_path, KUBERNETES_SERVICE_HOST="h")
    assert "automountServiceAccountToken" in caught.value.hint


@pytest.mark.parametrize("text", [None, "", "nonsense", KEY])
def test_a_pod_without_an_authority(tmp_path: Path, text: str | None) -> None:
    """Without the cluster's authority nothing is spoken to: the file is named."""
    write(tmp_path / "token", "tok")
    if text is not None:
        write(tmp_path / "ca.crt", text)
    with pytest.raises(cloche.BackendUnavailable, match=r"ca\.crt"):
        find(service_account=tmp_path, KUBERNETES_SERVICE_HOST="h")


def test_a_host_that_is_none(tmp_path: Path) -> None:
    """A host with a port in it is an error that names the variable."""
    with pytest.raises(cloche.BackendUnavailable, match="KUBERNETES_SERVICE_HOST"):
        find(service_account=pod(tmp_path), KUBERNETES_SERVICE_HOST="h:443")


def test_a_pod_needs_no_yaml(tmp_path: Path) -> None:
    """In a cluster YAML is not loaded."""
    source = f"""
import sys
from pathlib import Path
import cloche
from cloche.backends.kubernetes import kubeconfig
kubeconfig.find(cloche.Settings.from_env({{"KUBERNETES_SERVICE_HOST": "h"}}), Path({str(pod(tmp_path))!r}))
assert "yaml" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)


def test_nothing(tmp_path: Path) -> None:
    """Where there is nothing, the error says what to set."""
    with pytest.raises(cloche.BackendUnavailable, match="no pod") as caught:
        find(home=tmp_path)
    assert str(tmp_path / ".kube" / "config") in caught.value.message
    assert "KUBECONFIG" in caught.value.hint


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_default_file(tmp_path: Path) -> None:
    """Outside of a cluster ~/.kube/config is read, and the text says what was taken."""
    path = write(tmp_path / ".kube" / "config", config())
    found = find(home=tmp_path)
    assert found.base == "https://10.0.0.1:6443"
    assert found.text == f"https://10.0.0.1:6443 (context dev of {path})"
    assert (found.authority, found.server_name, found.verify) == (None, None, True)
    assert identity(found) == Identity({"Authorization": "Bearer tok"})


def test_yaml(tmp_path: Path) -> None:
    """A configuration as kubectl writes it is read."""
    text = """\
apiVersion: v1
clusters:
- cluster:
    server: https://h:6443/prefix/
  name: arn:aws:eks:eu-1:1:cluster/a
contexts:
- context: {cluster: "arn:aws:eks:eu-1:1:cluster/a", user: ""}
  name: x
current-context: x
kind: Config
preferences: {}
users: null
"""
    found = find(write(tmp_path / "config", text))
    assert found.base == "https://h:6443/prefix"
    assert identity(found) == Identity({})


def test_the_context(tmp_path: Path) -> None:
    """CLOCHE_KUBE_CONTEXT goes before the current context."""
    contexts = [{"name": name, "context": {"cluster": "dev", "user": name}} for name in ("dev", "prod")]
    users = [{"name": name, "user": {"token": name}} for name in ("dev", "prod")]
    path = write(tmp_path / "config", config(contexts=contexts, users=users))
    assert authorization(find(path)) == "Bearer dev"
    found = find(path, CLOCHE_KUBE_CONTEXT="prod")
    assert authorization(found) == "Bearer prod"
    assert "context prod" in found.text


def test_several_files(tmp_path: Path) -> None:
    """The first file that sets the current context, or has a name, wins; entries of one name are not mixed."""
    one = write(
        tmp_path / "one" / "config",
        {
            "current-context": "",
            "users": [{"name": "dev", "user": {"tokenFile": "token"}}],
            "contexts": [{"name": "other", "context": {"cluster": "none", "user": "none"}}],
        },
    )
    two = write(tmp_path / "two" / "config", config(users=[{"name": "dev", "user": {"as": "x", "token": "two"}}]))
    three = write(tmp_path / "three", config(**{"current-context": "other", "clusters": []}))
    write(tmp_path / "one" / "token", "from-one")
    found = find(one, two, three)
    assert identity(found).headers == {"Authorization": "Bearer from-one"}
    assert f"context dev of {two}" in found.text
    assert authorization(find(two, one)) == "Bearer two"


def test_missing_files(tmp_path: Path) -> None:
    """Files that are missing, and empty names, are passed over; when all are, that is an error with their paths."""
    path, gone = write(tmp_path / "config", config()), tmp_path / "gone"
    empty = write(tmp_path / "empty", "")
    settings = cloche.Settings.from_env({"KUBECONFIG": f"{os.pathsep}{gone}{os.pathsep}{empty}{os.pathsep}{path}"})
    assert authorization(kubeconfig.find(settings)) == "Bearer tok"
    with pytest.raises(cloche.BackendUnavailable, match="no Kubernetes configuration") as caught:
        find(gone, tmp_path / "gone too")
    assert f"{gone}{os.pathsep}{gone} too" in caught.value.message
    with pytest.raises(cloche.BackendUnavailable, match="no Kubernetes configuration"):
        kubeconfig.find(cloche.Settings.from_env({"KUBECONFIG": os.pathsep}))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is there and cannot be read, or is too large, is an error, not passed over."""
    path, folder = write(tmp_path / "config", config()), tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(cloche.BackendUnavailable, match=r"folder, cannot be read: Is a directory"):
        find(folder, path)
    dangling = tmp_path / "dangling"
    dangling.symlink_to("gone")
    with pytest.raises(cloche.BackendUnavailable, match="dangling, cannot be read"):
        find(dangling, path)
    with pytest.raises(cloche.BackendUnavailable, match="1048576 bytes"):
        find(write(tmp_path / "large", "#" * (2**20 + 1)), path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_others(tmp_path: Path) -> None:
    """A file that this user may not read is an error, not passed over."""
    path = write(tmp_path / "config", config())
    path.chmod(0)
    with pytest.raises(cloche.BackendUnavailable, match="Permission denied"):
        find(path, write(tmp_path / "other", config()))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: b\nusers: [\npassword: hush\n", ", line 4,"),
        ("a: b\npassword: *hush\n", ", line 2,"),
        ("token: !hush x\n", ", line 1,"),
        ("a: b\n\tc: hush\n", ", line 2,"),
        ("token: @hush\n", ", line 1,"),
        ("{? [hush]: 1, ? {a: hush}: 2}", ", line 1,"),
        ("a: \x07hush\n", ""),
        ("date: 2024-99-99\n", ""),
        ("[" * 900 + "]" * 900, ""),
        ("- hush\n", ""),
        ("hush", ""),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, line: str) -> None:
    """A file that is no YAML, or no configuration, is named, with the line where it is known, and not quoted."""
    path = write(tmp_path / "config", text)
    with pytest.raises(cloche.BackendUnavailable) as caught:
        find(path)
    assert f"{path}{line} " in caught.value.message
    assert "hush" not in str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"current-context": None}, "No context is chosen"),
        ({"current-context": "gone"}, "no context 'gone'"),
        ({"current-context": 7}, "current-context is no text"),
        ({"contexts": None}, "no context 'dev'"),
        ({"contexts": {"dev": {}}}, "contexts is no list"),
        ({"contexts": ["dev"]}, "contexts is no list of mappings"),
        ({"contexts": [{"name": "dev", "context": "x"}]}, "context is no mapping"),
        ({"contexts": [{"name": "dev"}]}, "no cluster ''"),
        ({"contexts": [{"name": "dev", "context": {"cluster": "gone"}}]}, "no cluster 'gone'"),
        ({"contexts": [{"name": "dev", "context": {"cluster": "dev", "user": "gone"}}]}, "no user 'gone'"),
        ({"contexts": [{"name": "dev", "context": {"cluster": "dev", "user": 7}}]}, "user is no text"),
        ({"users": [{"name": "dev"}, {"name": "dev"}]}, "two users are named 'dev'"),
        ({"clusters": [{"name": "dev"}]}, "server is missing"),
    ],
)
def test_names_that_lead_nowhere(tmp_path: Path, parts: dict[str, Any], match: str) -> None:
    """What is missing on the way from the context to the server is named, with the file."""
    path = write(tmp_path / "config", config(**parts))
    with pytest.raises(cloche.BackendUnavailable, match=match) as caught:
        find(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


# --- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "base"),
    [
        ("https://h", "https://h"),
        ("https://h/", "https://h"),
        ("https://H.example:6443/k8s/clusters/c-1", "https://h.example:6443/k8s/clusters/c-1"),
        ("https://[::1]:6443", "https://[::1]:6443"),
        ("http://127.0.0.1:8001", "http://127.0.0.1:8001"),
    ],
)
def test_addresses(tmp_path: Path, server: str, base: str) -> None:
    """An address may have a port and a prefix."""
    assert find_cluster(tmp_path, server=server).base == base


@pytest.mark.parametrize(
    "server",
    [
        "h:6443",
        "10.0.0.1",
        "ftp://h",
        "https://",
        "https://h:port",
        "https://h:99999",
        "https://h:0",
        "https://me:hush@h",
        "https://hush@h",
        "https://h?x=hush",
        "https://h#hush",
        "https://h/a b",
        "https://\u2603",
        "https://[::1",
        "https://[hush]",
        "https://a_b..\x7f",
        7,
    ],
)
def test_addresses_that_cannot_be(tmp_path: Path, server: Any) -> None:
    """An address that is malformed, or holds a password, is an error that does not repeat it."""
    with pytest.raises(cloche.BackendUnavailable, match="cluster 'dev': server") as caught:
        find_cluster(tmp_path, server=server)
    assert "hush" not in str(caught.value)


def test_authorities(tmp_path: Path) -> None:
    """An authority is read from its file, relative to the configuration, or from the data, which goes first."""
    write(tmp_path / "pki" / "ca.crt", "# für alle\n" + AUTHORITY)
    found = find_cluster(tmp_path, **{"certificate-authority": "pki/ca.crt"})
    assert found.authority is not None
    assert AUTHORITY in found.authority
    both = {"certificate-authority": "gone", "certificate-authority-data": encoded(AUTHORITY)}
    assert find_cluster(tmp_path, **both).authority == AUTHORITY


@pytest.mark.parametrize(
    ("cluster", "match"),
    [
        ({"certificate-authority": "gone"}, "certificate-authority of cluster 'dev' in .*/gone, cannot be read"),
        ({"certificate-authority-data": "%%%"}, "certificate-authority-data is no base64"),
        ({"certificate-authority-data": "\u00e4"}, "certificate-authority-data is no base64"),
        (
            {"certificate-authority-data": encoded("nonsense")},
            "certificate-authority of cluster 'dev' .* no certificates",
        ),
        ({"certificate-authority-data": encoded(AUTHORITY), "insecure-skip-tls-verify": True}, "contradict"),
        ({"insecure-skip-tls-verify": "yes"}, "insecure-skip-tls-verify is neither"),
        ({"proxy-url": "http://me:hush@proxy"}, "proxy-url is not supported"),
        ({"tls-server-name": "a b"}, "tls-server-name"),
    ],
)
def test_clusters_that_cannot_be_used(tmp_path: Path, cluster: dict[str, Any], match: str) -> None:
    """What is wrong with a cluster is said with its name and the field."""
    with pytest.raises(cloche.BackendUnavailable, match=match) as caught:
        find_cluster(tmp_path, **cluster)
    assert "hush" not in str(caught.value)


def handshake(client: ssl.SSLContext, name: str) -> bytes | None:
    """Client and server meet in memory. Gives the certificate that the client showed."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load(server, ClientCertificate(SERVER.encode(), SERVER_KEY.encode()))
    server.verify_mode = ssl.CERT_OPTIONAL
    server.load_verify_locations(cadata=AUTHORITY)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[1].getpeercert(binary_form=True)


def test_tls(tmp_path: Path) -> None:
    """The server's certificate has to be of the authority and bear the name; the client's is shown."""
    data = {"certificate-authority-data": encoded(AUTHORITY), "tls-server-name": "api.example"}
    found = find_cluster(tmp_path, **data)
    assert found.server_name == "api.example"
    context = found.tls(ClientCertificate(CLIENT.encode(), KEY.encode()))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert handshake(context, "api.example") == ssl.PEM_cert_to_DER_cert(CLIENT)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, "10.0.0.1")
    strict = find_cluster(tmp_path).tls(None)  # trusts what the system trusts
    assert strict is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(strict, "api.example")


def test_tls_unchecked(tmp_path: Path) -> None:
    """Who asks for it gets no check of the server."""
    context = find_cluster(tmp_path, **{"insecure-skip-tls-verify": True}).tls(None)
    assert context is not None
    assert handshake(context, "10.0.0.1") is None


def test_tls_with_a_part_of_the_chain(tmp_path: Path) -> None:
    """As for kubectl, an authority need not be a root: the server's own certificate will do."""
    context = find_cluster(tmp_path, **{"certificate-authority-data": encoded(SERVER)}).tls(None)
    assert context is not None
    handshake(context, "api.example")


@pytest.mark.parametrize("key", [SERVER_KEY, "nonsense"])
def test_tls_with_a_certificate_that_cannot_be_used(tmp_path: Path, key: str) -> None:
    """A certificate that does not work is an error of cloche's."""
    with pytest.raises(cloche.BackendUnavailable, match="client certificate"):
        find_cluster(tmp_path).tls(ClientCertificate(CLIENT.encode(), key.encode()))


def test_no_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An address without TLS needs no context and, as by kubectl, is told no secret; that is said once."""
    with caplog.at_level(logging.WARNING, "cloche.kubernetes"):
        found = find_cluster(tmp_path, server="http://127.0.0.1:8001")
    assert found.tls(None) is None
    assert identity(found) == Identity({})
    assert [record.getMessage() for record in caplog.records] == [
        "The credentials of user 'dev' are not sent: http://127.0.0.1:8001 is an address without TLS."
    ]


# --- users ------------------------------------------------------------------------------------------------------------


def test_tokens(tmp_path: Path) -> None:
    """A token's file, relative to the configuration, goes before a token."""
    assert authorization(find_user(tmp_path, token="tok")) == "Bearer tok"
    write(tmp_path / "secret" / "token", "from-file\n")
    assert authorization(find_user(tmp_path, token="tok", tokenFile="secret/token")) == "Bearer from-file"


def test_name_and_password(tmp_path: Path) -> None:
    """A name and a password are sent as Basic, in UTF-8."""
    found = find_user(tmp_path, username="me", password="p\u00e4ss:word")
    assert authorization(found) == "Basic " + encoded("me:p\u00e4ss:word")


@pytest.mark.parametrize("as_data", [True, False])
def test_client_certificates(tmp_path: Path, *, as_data: bool) -> None:
    """Certificate and key are read from files, relative to the configuration, or from the data, which goes first."""
    user = {"client-certificate": "pki/client.crt", "client-key": "pki/client.key"}
    if as_data:
        user |= {"client-certificate-data": encoded(CLIENT), "client-key-data": encoded(KEY)}
    else:
        write(tmp_path / "pki" / "client.crt", CLIENT)
        write(tmp_path / "pki" / "client.key", KEY)
    found = find_user(tmp_path, token="tok", **user)
    expected = ClientCertificate(CLIENT.encode(), KEY.encode())
    assert identity(found) == Identity({"Authorization": "Bearer tok"}, expected)


def test_a_client_certificate_that_is_renewed(tmp_path: Path) -> None:
    """Certificates in files are read again, at once after a refusal."""
    write(tmp_path / "crt", CLIENT)
    write(tmp_path / "key", KEY)
    found = find_user(tmp_path, **{"client-certificate": "crt", "client-key": "key"})

    async def ask() -> None:
        before = await found.credentials.identity()
        write(tmp_path / "crt", CLIENT + AUTHORITY)
        assert await found.credentials.identity() == before
        after = await found.credentials.identity(after_refusal=True)
        assert after.certificate == ClientCertificate((CLIENT + AUTHORITY).encode(), KEY.encode())

    anyio.run(ask)


@pytest.mark.parametrize(
    ("user", "match"),
    [
        ({"token": 12345678}, "user 'dev': token is no text"),
        ({"token": "hush\nhush"}, "token of user 'dev' of .* characters"),
        ({"token": "hush", "username": "me"}, "a token and a username and password, and only one"),
        ({"token": "hush", "exec": {}}, "a token and exec, and only one"),
        ({"username": "me:hush", "password": "x"}, "cannot be sent"),
        ({"username": "me", "password": "hush\r\n"}, "cannot be sent"),
        ({"client-certificate-data": encoded(CLIENT)}, "client-key is missing"),
        ({"client-key": "key"}, "client-certificate is missing"),
        (
            {"client-certificate": "gone", "client-key": "gone"},
            "client-certificate of user 'dev' .*gone, cannot be read",
        ),
        ({"client-certificate-data": "%%%", "client-key-data": encoded(KEY)}, "client-certificate-data is no base64"),
        ({"client-certificate-data": encoded(CLIENT), "client-key-data": "hush!"}, "client-key-data is no base64"),
        (
            {"client-certificate-data": encoded(CLIENT), "client-key-data": encoded(SERVER_KEY)},
            "client-certificate of user 'dev' in .* does not fit its key",
        ),
        (
            {"client-certificate-data": encoded(EXPIRED), "client-key-data": encoded(KEY)},
            "client-certificate of user 'dev' in .* expired at 2021",
        ),
        ({"auth-provider": {"name": "gcp", "config": {"access-token": "hush"}}}, "auth-provider 'gcp'"),
        ({"as-groups": ["a"]}, "need a user"),
        ({"as": "jane", "as-groups": "a"}, "as-groups is no list"),
        ({"as": "jane", "as-groups": [7]}, "as-groups is no list of texts"),
        ({"as": "jane\n"}, "as, as-uid"),
        ({"as": "jane", "as-user-extra": ["a"]}, "as-user-extra is no mapping"),
    ],
)
def test_users_that_cannot_be(tmp_path: Path, user: dict[str, Any], match: str) -> None:
    """What is wrong with a user is said with its name and the field, and without any secret."""
    with pytest.raises(cloche.BackendUnavailable, match=match) as caught:
        find_user(tmp_path, **user)
    assert "hush" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)
    assert str(tmp_path / "config") in caught.value.message


def test_impersonation(tmp_path: Path) -> None:
    """Other users, their groups and more are asked for by headers, beside our own credentials."""
    more = {"as": "jane", "as-uid": "42", "as-groups": ["a", "b"], "as-user-extra": {"scopes": ["x"]}}
    headers = identity(find_user(tmp_path, token="tok", **more)).headers
    assert headers["Authorization"] == "Bearer tok"
    assert headers["Impersonate-User"] == "jane"
    assert headers["Impersonate-Uid"] == "42"
    assert {value for name, value in headers.items() if name.lower() == "impersonate-group"} == {"a", "b"}
    assert headers["Impersonate-Extra-scopes"] == "x"


def test_secrets_have_no_repr(tmp_path: Path) -> None:
    """What was found can be shown."""
    assert "hush" not in repr(find_user(tmp_path, token="hush"))


def plugin(folder: Path, version: str = V1) -> str:
    """A plugin that gives what it was told as its token."""
    path = folder / "bin" / "plugin"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"""#!/bin/sh
told=$(printf '%s|' "$@" "$ONE" "$KUBERNETES_EXEC_INFO" | base64 | tr -d '\\n')
echo '{{"apiVersion": "{version}", "kind": "ExecCredential", "status": {{"token": "'$told'"}}}}'
""")
    path.chmod(0o755)
    return "bin/plugin"


@pytest.mark.parametrize("version", [V1, "client.authentication.k8s.io/v1beta1"])
@pytest.mark.parametrize("informed", [True, False])
def test_plugins(tmp_path: Path, version: str, *, informed: bool) -> None:
    """A plugin is started from beside the configuration, with its arguments and variables, and told of the cluster."""
    made = {
        "apiVersion": version,
        "command": plugin(tmp_path, version),
        "args": ["get-token"],
        "env": [{"name": "ONE", "value": "1"}],
        "interactiveMode": "IfAvailable",
        "provideClusterInfo": informed,
    }
    cluster = {
        "server": "https://h:6443",
        "certificate-authority": "ca.crt",
        "tls-server-name": "api.example",
        "extensions": [
            {"name": "other", "extension": 7},
            {"name": "client.authentication.k8s.io/exec", "extension": {"audience": "x"}},
        ],
    }
    write(tmp_path / "ca.crt", AUTHORITY)
    users, clusters = [{"name": "dev", "user": {"exec": made}}], [{"name": "dev", "cluster": cluster}]
    said = authorization(find(write(tmp_path / "config", config(users=users, clusters=clusters)))) or ""
    args, one, info, _ = base64.b64decode(said.removeprefix("Bearer ")).decode().split("|")
    assert (args, one) == ("get-token", "1")
    spec: dict[str, Any] = {"interactive": False}
    if informed:
        spec["cluster"] = {
            "server": "https://h:6443",
            "certificate-authority-data": encoded(AUTHORITY),
            "tls-server-name": "api.example",
            "config": {"audience": "x"},
        }
    assert json.loads(info) == {"kind": "ExecCredential", "apiVersion": version, "spec": spec}


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({"apiVersion": "client.authentication.k8s.io/v1alpha1"}, "v1alpha1' is not supported"),
        ({"apiVersion": None}, "apiVersion '' is not supported"),
        ({"command": ""}, "command is missing"),
        ({"interactiveMode": "Always"}, "interactiveMode is Always"),
        ({"interactiveMode": "Sometimes"}, "interactiveMode is none of"),
        ({"args": "hush"}, "args is no list"),
        ({"env": {"A": "hush"}}, "env is no list"),
        ({"env": [{"value": "hush"}]}, "no name"),
        ({"env": [{"name": "A", "value": 7}]}, "value is no text"),
        ({"provideClusterInfo": 1}, "provideClusterInfo is neither"),
    ],
)
def test_plugins_that_cannot_be(tmp_path: Path, made: dict[str, Any], match: str) -> None:
    """What is wrong with a plugin's entry is said before it is started."""
    with pytest.raises(cloche.BackendUnavailable, match=match) as caught:
        find_user(tmp_path, exec={"apiVersion": V1, "command": "plugin", **made})
    assert "exec of user 'dev'" in caught.value.message
    assert "hush" not in str(caught.value)
