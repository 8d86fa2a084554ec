"""The scenes: who runs cloche, under which manager and with which rights, and what is to be chosen there."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path("/srv/cloche")
GUEST = "tests/engines/vm/guest"
PYTHON = "/opt/cloche/bin/python"
UNIT = ("systemd-run", "--quiet", "--wait", "--pipe", "--collect")

Launch = Callable[[str, str], Sequence[str]]
"""User and shell command → the vector that runs it."""


def service(*properties: str) -> Launch:
    """A service of the system's manager."""
    options = [f"--property={p}" for p in ("KillMode=mixed", *properties)]
    return lambda user, command: [*UNIT, f"--property=User={user}", *options, "--", "/bin/sh", "-c", command]


def login(user: str, command: str) -> Sequence[str]:
    """A session of its own, as by ssh: a scope beside the user's manager, not below it."""
    return ["su", "--login", user, "--command", command]


def user_service(*properties: str) -> Launch:
    """A service of the user's own manager."""
    options = [f"--property={p}" for p in properties]

    def vector(user: str, command: str) -> Sequence[str]:
        runtime = f"XDG_RUNTIME_DIR=/run/user/{pwd.getpwnam(user).pw_uid}"
        return ["runuser", "-u", user, "--", "env", runtime, *UNIT, "--user", *options, "--", "/bin/sh", "-c", command]

    return vector


def plain(user: str, command: str) -> Sequence[str]:
    """No session: another uid in the cgroup of the service that plays the scenes, without a way to any manager."""
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--", "/bin/sh", "-c", command]


@contextmanager
def sysctl(name: str, value: str) -> Iterator[None]:
    """A kernel setting, for a while."""
    file = Path("/proc/sys", name)
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)


PROFILE = Path("/usr/share/apparmor/extra-profiles/bwrap-userns-restrict")
"""AppArmor's own for bubblewrap: it may make user namespaces, but what it starts has no capabilities in them. Ubuntu uses it."""


@contextmanager
def apparmor() -> Iterator[None]:
    """bubblewrap under that profile, for a while."""
    subprocess.run(["apparmor_parser", "--replace", str(PROFILE)], check=True)
    try:
        yield
    finally:
        subprocess.run(["apparmor_parser", "--remove", str(PROFILE)], check=True)


@dataclass(frozen=True)
class Scene:
    """One place in which cloche is used."""

    name: str
    user: str
    launch: Launch
    own: str
    """A regular expression for the cgroup that the scene is in: that it is what it is meant to be."""
    chosen: str
    """``v2``, ``systemd`` or ``none``; or ``refused:`` and a word of the hint."""
    tests: tuple[str, ...] = (f"{GUEST}/test_choice.py", f"{GUEST}/test_bounds.py")
    needs: Callable[[], str] = lambda: ""
    """Why the scene cannot be had in this machine, if it cannot."""
    around: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    long: bool = False
    """Whether it is left out on an emulated machine, unless it is named."""


def _systemd() -> int:
    return int(subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1])


def _before(version: int) -> Callable[[], str]:
    return lambda: f"needs systemd {version}, this is {_systemd()}" if _systemd() < version else ""


def _without(name: str) -> Callable[[], str]:
    return lambda: "" if Path("/proc/sys", name).exists() else f"this kernel has no {name.replace('/', '.')}"


CHOICE = (f"{GUEST}/test_choice.py",)
SUITES = ("tests/conformance", "tests/escape")
FORBIDDEN = (
    ("clone", "kernel/unprivileged_userns_clone", "kernel.unprivileged_userns_clone=1"),
    ("count", "user/max_user_namespaces", "user.max_user_namespaces"),
)
"""Ways to forbid user namespaces: a word for the scene's name, the setting that is 0, and what the hint must name."""


def _refused(user: str, launch: Launch, word: str, setting: str, hint: str) -> Scene:
    return Scene(
        f"no-user-namespaces-{user}-{word}",
        user,
        launch,
        r"/.*",
        f"refused:{hint}",
        (f"{GUEST}/test_refusal.py",),
        needs=_without(setting),
        around=lambda: sysctl(setting, "0"),
    )


SCENES = (
    Scene("root-service", "root", service(), r"/system\.slice/run-.*\.service", "v2"),
    Scene("root-login", "root", login, r"/user\.slice/user-0\.slice/session-.*\.scope", "v2"),
    Scene("root-delegated", "root", service("Delegate=yes"), r"/system\.slice/run-.*\.service(/main)?", "v2", CHOICE),
    Scene("user-login", "alice", login, r"/user\.slice/user-1000\.slice/session-.*\.scope", "systemd"),
    Scene(
        "user-manager", "alice", user_service(), r"/user\.slice/user-1000\.slice/user@1000\.service/app\.slice/.*", "v2"
    ),
    Scene(
        "user-manager-delegated",
        "alice",
        user_service("Delegate=yes"),
        r"/user\.slice/user-1000\.slice/user@1000\.service/app\.slice/.*",
        "v2",
        CHOICE,
    ),
    Scene("user-delegated", "alice", service("Delegate=yes"), r"/system\.slice/run-.*\.service(/main)?", "v2"),
    Scene(
        "user-delegated-subgroup",
        "bob",
        service("Delegate=yes", "DelegateSubgroup=main"),
        r"/system\.slice/run-.*\.service/main",
        "v2",
        needs=_before(254),
    ),
    Scene("user-alone", "bob", plain, r"/system\.slice/cloche-vm\.service", "none"),
    *(
        _refused(user, launch, *setting)
        for user, launch in (("root", service()), ("alice", login))
        for setting in FORBIDDEN
    ),
    *(
        Scene(
            f"apparmor-{user}",
            user,
            launch,
            r"/.*",
            chosen,
            needs=lambda: "" if PROFILE.exists() else f"AppArmor has no {PROFILE.name} here",
            around=apparmor,
        )
        for user, launch, chosen in (("root", service(), "v2"), ("alice", login, "systemd"))
    ),
    Scene("suites-root", "root", service(), r"/system\.slice/run-.*\.service", "v2", SUITES, long=True),
    Scene(
        "suites-user", "alice", login, r"/user\.slice/user-1000\.slice/session-.*\.scope", "systemd", SUITES, long=True
    ),
)


def play(names: Sequence[str], arguments: Sequence[str], slow: int, results: Path) -> bool:
    """Play the scenes named, or all. Gives whether all passed."""
    if unknown := set(names) - {scene.name for scene in SCENES}:
        print(f"there is no scene {', '.join(sorted(unknown))}; there are {' '.join(scene.name for scene in SCENES)}")
        return False
    subprocess.run(["loginctl", "enable-linger", "alice"], check=True)
    report = []
    for scene in SCENES:
        if names and scene.name not in names:
            continue
        reason = "emulated, it would take too long; name it" if scene.long and slow > 1 and not names else scene.needs()
        if reason:
            report.append(f"skipped       {scene.name}: {reason}")
            continue
        print(f"\n--- {scene.name}", flush=True)
        begin = time.monotonic()
        passed = _play(scene, arguments, slow, results)
        report.append(f"{'passed' if passed else 'FAILED'} {time.monotonic() - begin:4.0f} s {scene.name}")
    print("\n" + "\n".join(report), flush=True)
    return not any(line.startswith("FAILED") for line in report)


def _play(scene: Scene, arguments: Sequence[str], slow: int, results: Path) -> bool:
    folder = results / scene.name
    folder.mkdir()
    user = pwd.getpwnam(scene.user)
    os.chown(folder, user.pw_uid, user.pw_gid)
    scratch = Path("/var/tmp", f"{scene.name}-scratch")
    scratch.mkdir(mode=0o700)
    os.chown(scratch, user.pw_uid, user.pw_gid)
    environ = {
        "CLOCHE_MUST_WORK": "local",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SCENE": scene.name,
        "SCENE_OWN": scene.own,
        "SCENE_CHOSEN": scene.chosen,
        "SCENE_SLOW": str(slow),
        "SCENE_RESULTS": str(folder),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": user.pw_dir,
        "LANG": "C.UTF-8",
    }
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={scratch}/pytest", f"--junitxml={folder}/junit.xml"]
    options += [f"--timeout={180 * slow}", *arguments]
    command = [
        "env",
        *(f"{name}={value}" for name, value in environ.items()),
        PYTHON,
        "-m",
        "pytest",
        *options,
        *scene.tests,
    ]
    with scene.around():
        done = subprocess.run(
            scene.launch(scene.user, f"cd {PROJECT} && exec {shlex.join(command)}"),
            stdin=subprocess.DEVNULL,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )
    sys.stdout.flush()
    return done.returncode == 0
