"""A private podman service, which speaks Docker's API too, from Debian's packages."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.engines.docker import binaries, cgroups, host
from tests.engines.docker.private import Private, Programs

GATEWAY = "10.88.0.1"
"""The address of podman0, which comes with the first container that has a network."""
PARENT = "libpod_parent"
"""podman's cgroup for containers that are given none. No option names another, so it may be another podman's as well."""
MARK = Path("/oom")
"""What Debian's conmon 2.1.6 makes when memory runs out. Meant for the container's folder, where podman would look."""
SYSTEM = "/etc/containers"
POLICY = {"default": [{"type": "insecureAcceptAnything"}]}
CONFIG = """\
[containers]
seccomp_profile = "{profile}"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
conmon_path = ["{folder}/conmon"]
helper_binaries_dir = ["{helpers}"]
init_path = "{init}"
runtime = "crun"
[engine.runtimes]
crun = ["{folder}/crun"]
[network]
network_backend = "netavark"
network_config_dir = "/run/networks"
"""
WRAPPER = '#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {program} "$@"\n'
"""podman hands conmon, and so crun, an environment of a few names only."""
PREPARE = """\
set -e
mkdir -p {system}
cp {folder}/policy.json {system}
# crun takes cgroup v1 only without a v2 hierarchy beside it.
if [ -e /sys/fs/cgroup/unified/cgroup.procs ]; then umount /sys/fs/cgroup/unified; fi
"""


class Podman(Private):
    """``podman system service``, with all its state in a folder of its own, which must not be used for anything else."""

    name = "podman"

    def __init__(self, folder: Path, *, owned: bool = True) -> None:
        super().__init__(folder, "podman.sock", owned=owned)

    def close(self) -> None:
        """As every engine does, and remove what podman leaves elsewhere."""
        super().close()
        cgroups.remove(PARENT, ours=False)
        if MARK.is_file() and not MARK.stat().st_size:
            MARK.unlink()

    def _launch(self) -> subprocess.Popen[bytes]:
        host.need("ip", "iptables")
        programs = Programs(*binaries.PODMAN.obtain())
        self._configure(programs)
        prepare = PREPARE.format(system=SYSTEM, folder=self.folder)
        subprocess.run(self.enter("sh", "-c", prepare), check=True, timeout=30)
        temporary = self.folder / "tmp"  # images that are imported stay there
        temporary.mkdir(exist_ok=True)
        own = {"CONTAINERS_CONF": str(self.folder / "containers.conf"), "TMPDIR": str(temporary)}
        environ = programs.environ() | own
        places = ["--root", str(self.folder / "data"), "--runroot", "/run/containers", "--tmpdir", "/run/libpod"]
        command = [str(programs.find("podman")), *places, "--storage-driver", "overlay"]
        return self._run(environ, "service.log", *command, "system", "service", "--time=0", self.host)

    def _configure(self, programs: Programs) -> None:
        libraries = programs.environ()["LD_LIBRARY_PATH"]
        for name in ("conmon", "crun"):
            wrapper = self.folder / name
            wrapper.write_text(WRAPPER.format(libraries=libraries, program=programs.find(name)))
            wrapper.chmod(0o755)
        root = programs.find("podman").parents[2]
        config = CONFIG.format(
            folder=self.folder,
            profile=root / "usr/share/containers/seccomp.json",
            helpers=root / "usr/lib/podman",
            init=binaries.init() / "docker-init",
        )
        self.folder.joinpath("containers.conf").write_text(config)
        self.folder.joinpath("policy.json").write_text(json.dumps(POLICY))
