"""What a cluster's parts are told: addresses, and the files that they read."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.kubernetes import images
from tests.engines.kubernetes.certificates import Certificates

NODE = "node1"
ADDRESS = "10.251.0.1"
"""The node's, on a bridge without ports that stands for its network card."""
API_PORT = 6443
PODS = "10.244.0.0/24"
GATEWAY = "10.244.0.1"
"""The node's address on the pods' bridge, cni0, once there was a pod."""
SERVICES = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
"""Nobody answers there. It is named so that pods look like those of other clusters."""
SOCKET = "/run/containerd/containerd.sock"
"""/run is the cluster's own."""
TUNABLES = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
"""What a kubelet sets in /proc/sys for the whole machine (pkg/kubelet/cm, setupKernelTunables, 1.37)."""


@dataclass(frozen=True)
class Settings:
    """Where a cluster has its files, and its cgroups."""

    folder: Path
    cgroup: str
    plugins: Path
    """The folder of the CNI plugins."""
    certificates: Certificates

    def kubeconfig(self, user: str) -> Path:
        """The file by which one of the parts reaches the API server from inside."""
        return self.folder / f"{user}.kubeconfig"

    def write(self) -> None:
        """Write all files but the administrator's kubeconfig."""
        for user in ("controller-manager", "scheduler", "kubelet"):
            self.write_kubeconfig(self.kubeconfig(user), user, f"https://{ADDRESS}:{API_PORT}")
        _json(self.folder / "kubelet.json", self._kubelet())
        network = self.folder / "network"
        network.mkdir()
        _json(network / "10-cloche-test.conflist", self._network())
        containerd = CONTAINERD.format(
            root=self.folder / "containerd",
            socket=SOCKET,
            pause=images.PAUSE.name,
            plugins=self.plugins,
            network=network,
        )
        self.folder.joinpath("containerd.toml").write_text(containerd)
        self.folder.joinpath("network.sh").write_text(NETWORK)
        self.folder.joinpath("kubelet.sh").write_text(KUBELET)

    def write_kubeconfig(self, path: Path, user: str, server: str) -> None:
        """Write a kubeconfig that needs no other file."""
        cluster = {"server": server, "certificate-authority-data": _data(self.certificates.authority)}
        proof = {
            "client-certificate-data": _data(self.certificates.cert(user)),
            "client-key-data": _data(self.certificates.key(user)),
        }
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "cloche-test", "cluster": cluster}],
            "users": [{"name": user, "user": proof}],
            "contexts": [{"name": "cloche-test", "context": {"cluster": "cloche-test", "user": user}}],
            "current-context": "cloche-test",
        }
        path.touch(mode=0o600)
        _json(path, content)

    def _kubelet(self) -> dict[str, Any]:
        certificates = self.certificates
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "enforceNodeAllocatable": [],
            "failCgroupV1": False,  # it is what some machines still have
            "failSwapOn": False,
            "oomScoreAdj": 0,  # lower ones need CAP_SYS_RESOURCE
            # A developer's full disk, or small memory, is no reason to end or refuse the pods of a test.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            # Nor to remove the images, which cannot be pulled.
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "podLogsDir": str(self.folder / "pod-logs"),
            "volumePluginDir": str(self.folder / "volume-plugins"),
            "resolvConf": "",
            "clusterDNS": [DNS_SERVICE],
            "clusterDomain": "cluster.local",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(certificates.authority)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(certificates.cert("kubelet-server")),
            "tlsPrivateKeyFile": str(certificates.key("kubelet-server")),
        }

    def _network(self) -> dict[str, Any]:
        addresses = {
            "type": "host-local",
            "dataDir": str(self.folder / "addresses"),
            "ranges": [[{"subnet": PODS, "gateway": GATEWAY}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": addresses}
        return {"cniVersion": "1.0.0", "name": "cloche-test", "plugins": [bridge]}


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1))


def _data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


CONTAINERD = """\
version = 3
root = "{root}"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "docker.io/{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{plugins}"]
    conf_dir = "{network}"
"""
NETWORK = f"""\
# The node's network, and what kube-proxy would do for the services that there are: the API server's, and none.
set -e
ip link add node0 type bridge
ip addr add {ADDRESS}/24 dev node0
ip link set node0 up
ip route add default dev node0
echo 1 > /proc/sys/net/ipv4/ip_forward
for chain in PREROUTING OUTPUT; do
    iptables -t nat -A $chain -d {API_SERVICE} -p tcp --dport 443 -j DNAT --to-destination {ADDRESS}:{API_PORT}
done
iptables -A FORWARD -d {SERVICES} -j REJECT
"""
KUBELET = f"""\
# The kubelet, with files of its own in place of the settings that it changes for the whole machine.
# Nobody else may see them: where something lies over a part of /proc, the kernel lets no user namespace mount a /proc.
set -e
tunables=$1
shift
for name in {" ".join(TUNABLES)}; do
    mkdir -p "$tunables/${{name%/*}}"
    cat "/proc/sys/$name" > "$tunables/$name"
    mount --bind "$tunables/$name" "/proc/sys/$name"
done
exec kubelet "$@"
"""
