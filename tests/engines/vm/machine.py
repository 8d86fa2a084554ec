"""Boots the two disks with qemu, passes on what the guest says, and brings its results back."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from tests.engines.vm.image import Image

QEMU = "qemu-system-x86_64"
MEMORY = "1536M"
CPUS = "2"
KERNEL_SPEAKS_S = 20.0
"""For the first line of a kernel under KVM; it takes a second where KVM works."""
ACCELERATORS = {
    "kvm": ("-accel", "kvm", "-cpu", "host"),
    # la57 (paging in five levels) is dear to emulate and tells nothing.
    "tcg": ("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,la57=off"),
}


def may_have_kvm() -> bool:
    """Whether it is worth trying: the device, and a processor that says it can.

    Inside another virtual machine there may be a /dev/kvm without the latter, which takes only kernels made for it.
    """
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and bool(flags & {"vmx", "svm"})


def accelerator(image: Image) -> str:
    """``kvm`` where it boots this kernel, else ``tcg``."""
    if not may_have_kvm():
        return "tcg"
    with tempfile.NamedTemporaryFile(prefix="cloche-vm-") as console:
        command = _command(image, "kvm", "panic=-1 root=/dev/none", Path(console.name))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            end = time.monotonic() + KERNEL_SPEAKS_S
            speaks = False
            while not speaks and process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                speaks = b"Linux version" in Path(console.name).read_bytes()
            process.kill()
    return "kvm" if speaks else "tcg"


def boot(image: Image, project: Path, accel: str, results: Path, timeout_s: float) -> bool:
    """Run the guest to its end. Its words go to our stdout, a tar of its results to ``results``.

    Gives whether it came to its end by itself.
    """
    console = results.with_suffix(".console")
    command = _command(image, accel, "root=/dev/vda quiet panic=-1", console)
    command += ["-drive", f"file={image.disk},if=virtio,format=raw,snapshot=on"]
    command += ["-drive", f"file={project},if=virtio,format=raw,readonly=on"]
    command += ["-device", "virtio-serial"]
    command += [
        "-chardev",
        "file,id=said,path=/dev/fd/1,append=on",
        "-device",
        "virtserialport,chardev=said,name=cloche.said",
    ]
    command += ["-chardev", f"file,id=made,path={results}", "-device", "virtserialport,chardev=made,name=cloche.made"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        alarm = threading.Timer(timeout_s, process.kill)
        alarm.start()
        try:
            for line in process.stdout:
                print(line.decode(errors="replace"), end="", flush=True)
            ended = process.wait() == 0
        finally:
            alarm.cancel()
            process.kill()
    if not ended or not results.stat().st_size:
        print("the end of the machine's console:\n" + console.read_text(errors="replace")[-4000:], flush=True)
    return ended


def _command(image: Image, accel: str, kernel_words: str, console: Path) -> list[str]:
    command = [QEMU, *ACCELERATORS[accel], "-smp", CPUS, "-m", MEMORY, "-nodefaults", "-no-user-config", "-no-reboot"]
    command += ["-display", "none", "-serial", f"file:{console}", "-device", "virtio-rng-pci"]
    return [
        *command,
        "-kernel",
        str(image.kernel),
        "-initrd",
        str(image.initrd),
        "-append",
        f"console=ttyS0 {kernel_words}",
    ]
