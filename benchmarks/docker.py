"""cloche's docker mode against `docker run` with the same flags, and against a script with the official `docker` package.

    make bench                                # where CLOCHE_TEST_DOCKER_HOST or DOCKER_HOST names a daemon
    python -m benchmarks.docker --rounds 50

All contenders take turns within one round; compare ratios of one run. The image has to be there already.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from benchmarks.contenders import Contender, by_cloche, by_subprocess, median_phases, summary, take_turns, write_json
from rich.console import Console
from rich.table import Table

import cloche
from cloche.backends.contract import Profile
from cloche.backends.docker import address, manifest
from cloche.backends.docker.client import DockerClient
from cloche.backends.docker.manifest import Ground
from cloche.backends.docker.volume import SupervisorVolume
from cloche.settings import resolve
from cloche.supervisor.binary import supervisor_path
from cloche.supervisor.bundle import Bundle, File
from cloche.supervisor.frames import Decoder

RESULT_GOAL, WHOLE_GOAL = 0.75, 1.0
"""Of plain `docker run`, at p50."""
VOLUME = "cloche-bench"
"""Mounted read-only by the others, as cloche mounts its own. The package gets its output from a log, so it keeps one."""
SCRIPT = cloche.Spec(name="main.py", content="pass\n")
HARDENED: dict[str, Any] = {
    "network_mode": "none",
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "user": "1000:1000",
    "ipc_mode": "none",
    "pids_limit": 128,
    "mem_limit": 256 * 2**20,
    "memswap_limit": 256 * 2**20,
    "nano_cpus": 10**9,
    "volumes": {VOLUME: {"bind": "/run/bench", "mode": "ro"}},
    "tmpfs": dict.fromkeys(("/workspace", "/output", "/tmp", "/dev/shm"), "rw,exec,nosuid,nodev,size=40m"),
}
"""What cloche's containers have, in the words of the `docker` package."""


def docker_run(image: str, runtime: str | None) -> list[str]:
    """The same as a command line."""
    flags = ["--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    flags += [
        "--user",
        "1000:1000",
        "--ipc",
        "none",
        "--pids-limit",
        "128",
        "--memory",
        "256m",
        "--memory-swap",
        "256m",
    ]
    flags += [
        "--cpus",
        "1",
        "--log-driver",
        "none",
        "--mount",
        f"type=volume,source={VOLUME},target=/run/bench,readonly",
    ]
    flags += [word for path, options in HARDENED["tmpfs"].items() for word in ("--tmpfs", f"{path}:{options}")]
    flags += [] if runtime is None else ["--runtime", runtime]
    return ["docker", "run", *flags, image, "python3", "-c", "pass"]


def by_package(host: str, image: str, runtime: str | None) -> Contender | None:
    """As one would write it with the official package: run, read the output, remove. None: it is not installed."""
    try:
        docker: Any = importlib.import_module("docker")
    except ImportError:
        return None
    client = docker.DockerClient(base_url=host)
    options = {**HARDENED, **({} if runtime is None else {"runtime": runtime})}
    run: Callable[[], object] = functools.partial(
        client.containers.run, image, ["python3", "-c", "pass"], remove=True, **options
    )

    async def once() -> float:
        begun = time.perf_counter()
        await to_thread.run_sync(run)
        return time.perf_counter() - begun

    return once


async def steps(settings: cloche.Settings, guest: bool, rounds: int) -> dict[str, float]:  # noqa: FBT001
    """Where the time goes: each request of a run for itself, p50 in milliseconds."""
    client = DockerClient(address.find(settings).server)
    times: dict[str, list[float]] = {}
    try:
        await client.version()
        info, image = await client.info(), await client.image(settings.image)
        assert image is not None
        volume = SupervisorVolume(client, supervisor_path())
        ground = Ground(volume.name, runtime=settings.docker_runtime, cpus=info.cpus, guest_kernel=guest)
        limits = resolve(SCRIPT, settings)
        bundle = Bundle(
            argv=["python3", "/workspace/main.py"],
            env={"PATH": "/usr/bin"},
            limits=limits,
            entries=[File("main.py", b"pass\n")],
        )
        for i in range(rounds + 3):
            profile = Profile(f"r{i}", "bench", time.time() + 60, limits)
            body = manifest.container(profile, ground, image, manifest.labels(profile, ground, time.time() + 60))
            laps = await _one(client, f"cloche-bench-{os.getpid()}-{i}", body, bundle)
            if i >= 3:
                for step, taken in laps.items():
                    times.setdefault(step, []).append(taken)
        await client.remove_volume(VOLUME)
    finally:
        await client.aclose()
    return {step: summary(values)["p50_ms"] for step, values in times.items()}


async def _one(client: DockerClient, name: str, body: dict[str, Any], bundle: Bundle) -> dict[str, float]:
    laps: dict[str, float] = {}
    mark = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        laps[step], mark = now - mark, now

    await client.create(name, body)
    lap("create")
    async with client.attach(name) as connection:
        lap("attach")
        await client.start(name)
        lap("start")
        await connection.write(b"".join(bundle.records()))
        lap("bundle in")
        decoder, seen = Decoder(), b""
        while not decoder.finished and (data := await connection.read()):
            # Headers of pieces are skipped by their sight: frames are text.
            seen += data
            *lines, seen = seen.split(b"\n")
            for line in lines:
                list(decoder.feed(line[line.index(b"@c ") :] + b"\n"))
        lap("run, frames out")
    await client.remove(name)
    lap("remove")
    return laps


async def compare(settings: cloche.Settings, host: str, rounds: int) -> dict[str, Any]:
    """All contenders on one daemon and runtime."""
    phases: list[Any] = []
    async with cloche.Sandbox(settings) as sandbox:
        posture = await sandbox.posture()
        await sandbox.run(SCRIPT, wait_cleanup=True)
        contenders: dict[str, Contender] = {}
        if shutil.which("docker"):
            os.environ["DOCKER_HOST"] = host
            contenders["docker run"] = by_subprocess(docker_run(settings.image, settings.docker_runtime))
        package = by_package(host, settings.image, settings.docker_runtime)
        if package is not None:
            contenders["docker package"] = package
        contenders["cloche, result"] = by_cloche(sandbox, SCRIPT, whole=False, phases=phases, removal_s=0.15)
        contenders["cloche, box removed"] = by_cloche(sandbox, SCRIPT, whole=True, phases=[])
        rows = await take_turns(contenders, rounds)
    return {
        "engine": posture.engine,
        "isolation": posture.isolation,
        "contenders": rows,
        "phases_p50_ms": median_phases(phases),
        "steps_p50_ms": await steps(settings, posture.isolation is cloche.Isolation.KERNEL, max(10, rounds // 3)),
    }


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    for name, of in found["engines"].items():
        rows = of["contenders"]
        floor = rows.get("docker run", {}).get("p50_ms")
        table = Table("", "p50 ms", "p99 ms", "to docker run", title=f"{name}: {of['engine']}", title_justify="left")
        for contender, row in rows.items():
            ratio = f"{row['p50_ms'] / floor:.2f}" if floor else "-"
            table.add_row(contender, f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", ratio)
        console.print(table)
        if floor:
            for contender, goal in (("cloche, result", RESULT_GOAL), ("cloche, box removed", WHOLE_GOAL)):
                ratio = rows[contender]["p50_ms"] / floor
                console.print(
                    f"{contender}: {ratio:.2f} of docker run (goal: at most {goal}; {'met' if ratio <= goal else 'NOT met'})"
                )
        else:
            console.print("there is no docker command here to compare with")
        console.print(f"cloche's phases, p50 in ms: {of['phases_p50_ms']}")
        console.print(f"the requests of a run, p50 in ms: {of['steps_p50_ms']}\n")


async def measure(rounds: int) -> dict[str, Any]:
    """The daemon that the environment names, with its default runtime and with the one of CLOCHE_TEST_DOCKER_RUNTIME."""
    host = os.environ.get("CLOCHE_TEST_DOCKER_HOST") or os.environ.get("DOCKER_HOST", "")
    found: dict[str, Any] = {"machine": {"kernel": platform.release(), "cpus": os.cpu_count()}, "engines": {}}
    if not host:
        print("no daemon to measure: set CLOCHE_TEST_DOCKER_HOST or DOCKER_HOST (make engines-docker starts one)")
        return found
    image = os.environ.get("CLOCHE_TEST_DOCKER_IMAGE", "cloche-test/sandbox:1")
    for runtime in (None, os.environ.get("CLOCHE_TEST_DOCKER_RUNTIME")):
        settings = cloche.Settings(
            mode=cloche.Mode.DOCKER,
            fallback=False,
            docker_host=host,
            image=image,
            pull="never",
            docker_runtime=runtime,
        )
        if runtime is None or runtime:
            found["engines"][runtime or "default runtime"] = await compare(settings, host, rounds)
        if not os.environ.get("CLOCHE_TEST_DOCKER_RUNTIME"):
            break
    return found


def main() -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = anyio.run(measure, arguments.rounds)
    show(found)
    if arguments.json:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
