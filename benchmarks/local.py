"""How much cloche's local mode adds: against the bare program, and against plain bubblewrap with the same namespaces.

    make bench                              # a table, and build/bench.json
    python -m benchmarks.local --rounds 50

All contenders take turns within one round, so that whatever else the machine does meets them alike. Compare ratios and
differences of one run; absolute times belong to the machine.
"""

from __future__ import annotations

import argparse
import gc
import glob
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import psutil
from benchmarks.contenders import by_cloche, by_subprocess, median_phases, take_turns, write_json
from rich.console import Console
from rich.table import Table

import cloche

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
"""The same interpreter for everybody: the system's, not one that a version manager has put before it."""
GOAL_OVER_BUBBLEWRAP_MS = 8.0
GOAL_IMPORT_MS = 150.0
FLAT_BYTES = 4 * 2**20


def bubblewrap(*command: str) -> list[str]:
    """Plain bubblewrap as one would write it by hand, with the namespaces that cloche's box has."""
    links = [("--symlink", f"usr/{name}", f"/{name}") for name in ("bin", "lib", "lib64")]
    return [
        *("bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv", "--ro-bind", "/usr", "/usr"),
        *(word for link in links for word in link),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/output", "--tmpfs", "/workspace"),
        *command,
    ]


async def compare(rounds: int, sandbox: cloche.Sandbox, folder: Path) -> dict[str, Any]:
    """All contenders over each program, taking turns."""
    script = folder / "main.py"
    script.write_text("pass\n")
    programs: dict[str, tuple[list[str], cloche.Spec]] = {
        "/bin/true": (["/bin/true"], cloche.Spec(script=str(script), interpreter="true")),
        "python3 -c pass": (["python3", "-c", "pass"], cloche.Spec(script=str(script))),
    }
    found: dict[str, Any] = {}
    for name, (command, spec) in programs.items():
        phases: list[Any] = []
        contenders = {
            "bare program": by_subprocess(command),
            "plain bubblewrap": by_subprocess(bubblewrap(*command)),
            "cloche, result": by_cloche(sandbox, spec, whole=False, phases=phases),
            "cloche, box removed": by_cloche(sandbox, spec, whole=True, phases=[]),
        }
        rows = await take_turns(contenders, rounds)
        floor = rows["plain bubblewrap"]["p50_ms"]
        found[name] = {
            "contenders": rows,
            "over_bubblewrap_ms": round(rows["cloche, result"]["p50_ms"] - floor, 2),
            "ratio_to_bubblewrap": round(rows["cloche, result"]["p50_ms"] / floor, 2),
            "phases_p50_ms": median_phases(phases),
        }
    return found


async def endure(runs: int, sandbox: cloche.Sandbox, folder: Path) -> dict[str, Any]:
    """Many runs in a row: does memory stay flat, and is anything left?"""
    script = folder / "main.py"
    me = psutil.Process()
    spec = cloche.Spec(script=str(script))
    for _ in range(20):
        await sandbox.run(spec, wait_cleanup=True)
    gc.collect()
    before, fds = me.memory_info().rss, me.num_fds()
    for _ in range(runs):
        await sandbox.run(spec, wait_cleanup=True)
    gc.collect()
    return {
        "runs": runs,
        "memory_growth_bytes": me.memory_info().rss - before,
        "fd_growth": me.num_fds() - fds,
    }


def cgroups_left(owner: str) -> int:
    """How many cgroups of an owner there still are."""
    return len(glob.glob(f"/sys/fs/cgroup/**/cloche-{owner}*", recursive=True))


def import_time(rounds: int = 10) -> float:
    """Median of ``import cloche`` in a fresh interpreter, its own start taken off, in milliseconds."""

    def median(code: str) -> float:
        times = []
        for _ in range(rounds):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    return round((median("import cloche") - median("pass")) * 1000, 1)


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    for program, of in found["programs"].items():
        table = Table("", "p50 ms", "p99 ms", "to bubblewrap", title=program, title_justify="left")
        floor = of["contenders"]["plain bubblewrap"]["p50_ms"]
        for name, row in of["contenders"].items():
            table.add_row(name, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['p50_ms'] / floor:.2f}")
        console.print(table)
        over = of["over_bubblewrap_ms"]
        verdict = "met" if over <= GOAL_OVER_BUBBLEWRAP_MS else "NOT met"
        console.print(f"cloche's result over plain bubblewrap at p50: {over:.2f} ms (goal: at most 8; {verdict})")
        console.print(f"where the time goes, p50 in ms: {of['phases_p50_ms']}\n")
    console.print(f"import cloche: {found['import_ms']} ms (goal: under {GOAL_IMPORT_MS:g})")
    many = found["endurance"]
    console.print(
        f"{many['runs']} runs in a row: memory {many['memory_growth_bytes'] / 2**20:+.1f} MiB, "
        f"descriptors {many['fd_growth']:+d}, processes left {many['processes_left']}, cgroups left {many['cgroups_left']}"
    )


async def measure(rounds: int, runs: int) -> dict[str, Any]:
    """Everything that needs a sandbox."""
    settings = cloche.Settings.from_env({**os.environ, "CLOCHE_MODE": "local"})
    with tempfile.TemporaryDirectory() as folder:
        async with cloche.Sandbox(settings) as sandbox:
            posture = await sandbox.posture()
            found: dict[str, Any] = {
                "machine": {"kernel": platform.release(), "cpus": os.cpu_count(), "engine": posture.engine},
                "rounds": rounds,
                "programs": await compare(rounds, sandbox, Path(folder)),
                "endurance": await endure(runs, sandbox, Path(folder)),
            }
    found["endurance"]["processes_left"] = len(psutil.Process().children(recursive=True))
    found["endurance"]["cgroups_left"] = cgroups_left(sandbox.owner)
    return found


def main() -> int:
    """Exit status 1: something was left behind, or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--runs", type=int, default=200, help="how many in a row for the look at memory and leftovers")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if shutil.which("bwrap") is None:
        raise SystemExit("the benchmark compares with plain bubblewrap: install the bubblewrap package")
    os.environ["PATH"] = SYSTEM_PATH
    found = anyio.run(measure, arguments.rounds, arguments.runs)
    found["import_ms"] = import_time()
    show(found)
    if arguments.json:
        write_json(arguments.json, found)
    many = found["endurance"]
    left = many["processes_left"] + many["cgroups_left"] + many["fd_growth"]
    return 1 if left or many["memory_growth_bytes"] > FLAT_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
