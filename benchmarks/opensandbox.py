"""cloche's opensandbox mode against the official `opensandbox` package, and against the least that the service's API can cost.

    make bench                                # where CLOCHE_TEST_OPENSANDBOX_API_URL or …_OLD_API_URL names a service
    python -m benchmarks.opensandbox --rounds 20 --json build/bench-opensandbox.json

Each makes a sandbox of the same image, uploads the same script, runs it, and knows its output and exit status: the **result**.
Then it has the sandbox removed: the **whole**. All take turns within one round on one service; compare ratios of one run.

**floor**: the six requests that it takes and nothing else, over connections that are kept. The script runs as root, nothing
checks or bounds it, nothing recovers. **SDK**: the package as its README has it: asynchronous, one ConnectionConfig with the
defaults for all; in a process of its own that is there before, so that neither its start nor its imports count, and with
OPENSANDBOX_DISABLE_METRICS=1, so that it does not report each sandbox to the service. **SDK, one transport**: the same with what
its README recommends to those who make many sandboxes.

Up to execd 1.1.0 the stream of a command stays open for a second after its last event, and the package waits for that. Whether
it does so is looked at, and there is a goal for either. The image has to be there already.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlencode

import anyio
import httpx2
from anyio.streams.buffered import BufferedByteReceiveStream
from benchmarks.contenders import Contender, by_cloche, median_phases, summary, take_turns, together, write_json
from rich.console import Console
from rich.table import Table
from tests import services
from tests.engines.docker import cache, host
from tests.services import Service

import cloche
from cloche._kit.http import HttpClient
from cloche.backends.opensandbox.address import EXECD_PORT

LINGERING_GOAL, PROMPT_GOAL = 0.35, 0.65
"""cloche's result, of the package's time for a run, at p50: where the stream stays open for a second, and where it does not.

Who uses the package as its README has it goes on when his sandbox is removed; who uses cloche, when he has the result.
"""
WHOLE_GOAL = 1.0
"""cloche's whole, of the same."""
CONCURRENT = 5
WARM_UP = 2
"""Rounds that do not count."""
EXPECTED = "done"
SCRIPT = f"print({EXPECTED!r})\n"
SPEC = cloche.Spec(name="main.py", content=SCRIPT)
SCRIPT_PATH = "/tmp/main.py"
METADATA = {"cloche-bench": "floor"}
SETTLE_S = (0.1, 0.3)
"""Between two turns, for what the engine still does behind its answer."""
LOOK_STEP_S, GONE_S = 0.02, 60.0
READY_STEP_S, READY_S = 0.005, 30.0
LINGERS_S = 0.5
"""From the last event to the end: who takes longer stays on purpose."""
REQUIREMENTS = Path(__file__).with_name("opensandbox-sdk.txt")
WORKER = Path(__file__).with_name("opensandbox_sdk.py")
ANSWER_BYTES = 64 * 1024
TRIES = 3
PACKAGE = {"SDK": "defaults", "SDK, one transport": "one transport"}
"""The contenders that use the package, and what the worker calls their configurations."""
Both: TypeAlias = tuple[float, float]
"""Seconds to the result, and the whole."""


class Laps:
    """How long each kind of request took, in seconds."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        """One of that kind is made inside."""
        begun = time.perf_counter()
        yield
        self.times[step].append(time.perf_counter() - begun)

    def medians_ms(self) -> dict[str, float]:
        """In the order in which they were met first."""
        return {step: round(statistics.median(times) * 1000, 1) for step, times in self.times.items()}


# --- the floor --------------------------------------------------------------------------------------------------------


class Api:
    """A service, bare."""

    def __init__(self, service: Service, image: str) -> None:
        self._image = image
        self._sandboxes = f"{service.url}/v1/sandboxes"
        self._headers = {"OPEN-SANDBOX-API-KEY": service.key}
        self._client = httpx2.AsyncClient(timeout=GONE_S, trust_env=False)
        self.laps = Laps()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def run(self) -> Both:
        """One sandbox, and the script in it."""
        begun = time.perf_counter()
        async with self._sandbox() as execd:
            about = json.dumps({"path": SCRIPT_PATH, "mode": 644})
            with self.laps.of("upload"):
                form = [("metadata", ("metadata", about)), ("file", ("file", SCRIPT))]
                await self._ask("POST", f"{execd}/files/upload", files=form)
            with self.laps.of("command"):
                async with aclosing(self._events(execd, f"python3 {SCRIPT_PATH}")) as events:
                    printed = [event.get("text", "").strip() async for event in events if event["type"] == "stdout"]
            result = time.perf_counter() - begun
        if printed != [EXPECTED]:
            raise SystemExit(f"the benchmark's own script failed: {printed}")
        return result, time.perf_counter() - begun

    async def lingers_s(self) -> float:
        """How long the stream of a command stays open after its last event."""
        async with self._sandbox() as execd:
            last = end = 0.0
            async for _ in self._events(execd, "true", to_its_end=True):
                last, end = end, time.perf_counter()
            return end - last

    @asynccontextmanager
    async def _sandbox(self) -> AsyncIterator[str]:
        """One that is ready, as the address of its execd."""
        with self.laps.of("create"):
            made = await self._ask(
                "POST",
                self._sandboxes,
                json={
                    "image": {"uri": self._image},
                    "entrypoint": ["tail", "-f", "/dev/null"],
                    "timeout": 600,
                    "resourceLimits": {"cpu": "1", "memory": "512Mi"},
                    "metadata": METADATA,
                },
            )
        try:
            with self.laps.of("endpoint"):
                told = await self._ask("GET", f"{self._sandboxes}/{made['id']}/endpoints/{EXECD_PORT}")
            # With the suffix execd would pass each request on to itself.
            execd = f"http://{told['endpoint'].removesuffix(f'/proxy/{EXECD_PORT}')}"
            with self.laps.of("ping"), anyio.fail_after(READY_S):
                while not await self._is_there(execd):  # noqa: ASYNC110
                    await anyio.sleep(READY_STEP_S)
            yield execd
        finally:
            with self.laps.of("remove"):
                await self._ask("DELETE", f"{self._sandboxes}/{made['id']}")

    async def _is_there(self, execd: str) -> bool:
        try:
            return (await self._client.get(f"{execd}/ping")).is_success
        except httpx2.TransportError:
            return False

    async def _events(
        self, execd: str, command: str, *, to_its_end: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Up to the last one; or up to the end of the stream, which counts as one more."""
        async with self._client.stream("POST", f"{execd}/command", json={"command": command}) as answer:
            rest = b""
            async for chunk in answer.aiter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for event in map(json.loads, filter(None, lines)):
                    yield event
                    if event["type"] in {"execution_complete", "error"} and not to_its_end:
                        return
            yield {"type": "end"}

    async def _ask(self, method: str, url: str, **more: Any) -> Any:
        answer = await self._client.request(method, url, headers=self._headers, **more)
        if answer.is_error:
            raise SystemExit(f"{method} {url}: {answer.text}")
        return answer.json() if answer.content else None

    async def until_gone(self, owner: str) -> None:
        """Wait until nothing is left of cloche's turn before, and then some time, by chance."""
        query = urlencode({"metadata": urlencode({"cloche-owner": owner})})
        with anyio.fail_after(GONE_S):
            while (await self._ask("GET", f"{self._sandboxes}?{query}"))["items"]:  # noqa: ASYNC110
                await anyio.sleep(LOOK_STEP_S)
        await anyio.sleep(random.uniform(*SETTLE_S))


# --- contenders -------------------------------------------------------------------------------------------------------


class Package:
    """The process that has the package."""

    def __init__(self, process: anyio.abc.Process, image: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, BufferedByteReceiveStream(process.stdout)
        self._image = image
        self.lost: list[str] = []
        """What became of turns that do not count, since it lost a sandbox."""

    async def run(self, config: str, number: int) -> Both:
        """So many sandboxes at once; once more where one is lost."""
        told = {"config": config, "number": number, "image": self._image, "script": SCRIPT, "expected": EXPECTED}
        for _ in range(TRIES):
            await self._stdin.send(json.dumps(told).encode() + b"\n")
            try:
                answer = json.loads(await self._stdout.receive_until(b"\n", ANSWER_BYTES))
            except anyio.IncompleteRead:
                raise SystemExit("the package failed; its last words are above") from None
            if "lost" not in answer:
                return answer["result"], answer["whole"]
            self.lost.append(answer["lost"])
        raise SystemExit(f"the package failed: {self.lost[-TRIES:]}")


@asynccontextmanager
async def package(service: Service, image: str) -> AsyncIterator[Package]:
    """One for a service, which is there until the end."""
    folder = cache.obtain("sdk-opensandbox", REQUIREMENTS.read_text() + sys.version + sys.base_prefix, _install)
    environ = {
        "PATH": os.environ["PATH"],  # without a proxy of the environment: the others have none either
        "OPEN_SANDBOX_DOMAIN": service.url,
        "OPEN_SANDBOX_API_KEY": service.key,
        "OPENSANDBOX_DISABLE_METRICS": "1",
    }
    # -P: beside the worker there is a module with the package's name.
    command = [str(folder / "bin/python"), "-P", str(WORKER)]
    async with await anyio.open_process(command, stdin=subprocess.PIPE, stderr=None, env=environ) as process:
        try:
            yield Package(process, image)
        finally:
            if process.returncode is None:
                process.terminate()


def _install(folder: Path) -> None:
    host.say("installing the official OpenSandbox package")
    host.run(sys.executable, "-m", "venv", str(folder))
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    host.run(*pip, "--requirement", str(REQUIREMENTS))


def by_both(run: Callable[[], Awaitable[Both]], wholes: list[float]) -> Contender:
    """One who tells both times of a turn."""

    async def once() -> float:
        result, whole = await run()
        wholes.append(whole)
        return result

    return once


def at_once(run: Callable[[], Awaitable[Both]], number: int) -> Callable[[], Awaitable[Both]]:
    """So many, until the last one."""

    async def all_of_them() -> Both:
        found: list[Both] = []

        async def one() -> None:
            found.append(await run())

        async with anyio.create_task_group() as tasks:
            for _ in range(number):
                tasks.start_soon(one)
        return max(result for result, _ in found), max(whole for _, whole in found)

    return all_of_them


@contextmanager
def observed(laps: Laps) -> Iterator[None]:
    """Take the time of the requests that cloche makes meanwhile."""
    request, stream = HttpClient.request, HttpClient.stream

    @functools.wraps(request)
    async def timed_request(self: HttpClient, method: str, path: str, **options: Any) -> Any:
        with laps.of(_step(method, path)):
            return await request(self, method, path, **options)

    @functools.wraps(stream)
    @asynccontextmanager
    async def timed_stream(self: HttpClient, method: str, path: str, **options: Any) -> AsyncIterator[Any]:
        with laps.of(_step(method, path)):
            async with stream(self, method, path, **options) as found:
                yield found

    HttpClient.request, HttpClient.stream = timed_request, timed_stream  # type: ignore[method-assign]
    try:
        yield
    finally:
        HttpClient.request, HttpClient.stream = request, stream  # type: ignore[method-assign]


def _step(method: str, path: str) -> str:
    match method, path.rpartition("/")[2]:
        case "POST", "sandboxes":
            return "create"
        case "GET", last if last == str(EXECD_PORT):
            return "endpoint"
        case "DELETE", _ if "/sandboxes/" in path:
            return "remove"
        case _, last:
            return last


# --- what is measured -------------------------------------------------------------------------------------------------


async def compare(service: Service, image: str, rounds: int, number: int = 1) -> dict[str, Any]:
    """All contenders on one service. Ratios are of medians."""
    settings = cloche.Settings(
        mode=cloche.Mode.OPENSANDBOX,
        fallback=False,
        opensandbox_api_url=service.url,
        opensandbox_api_key=service.key,
        image=image,
        max_concurrent=CONCURRENT,
    )
    phases: list[Any] = []
    wholes: dict[str, list[float]] = defaultdict(list)
    requests = Laps()
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(aclosing(Api(service, image)))
        sdk = await stack.enter_async_context(package(service, image))
        sandbox = await stack.enter_async_context(cloche.Sandbox(settings))
        posture = await sandbox.posture()
        if not posture.available:
            raise SystemExit(f"{posture.reason} {posture.hint}")
        lingers_s = await api.lingers_s()
        await sandbox.run(SPEC, wait_cleanup=True)  # so that what is done once is done
        api.laps.times.clear()
        contenders: dict[str, Contender] = {"floor": by_both(at_once(api.run, number), wholes["floor"])}
        for name, config in PACKAGE.items():
            contenders[name] = by_both(functools.partial(sdk.run, config, number), wholes[name])
        ours = {
            "cloche": by_cloche(sandbox, SPEC, whole=False, phases=phases, removal_s=0.0),
            "cloche, removed": by_cloche(sandbox, SPEC, whole=True, phases=[]),
        }
        contenders |= {name: together(once, number) if number > 1 else once for name, once in ours.items()}

        async def settle() -> None:
            await api.until_gone(sandbox.owner)

        with observed(requests):
            rows = await take_turns(contenders, rounds, warm_up=WARM_UP, before=settle)
            await settle()
    whole = {name: summary(times[-rounds:]) for name, times in wholes.items()}
    whole["cloche"] = rows.pop("cloche, removed")
    return {
        "engine": posture.engine,
        "rounds": rounds,
        "at_once": number,
        "lingers_s": round(lingers_s, 3),
        "lost_by_the_sdk": sdk.lost,
        "result": rows,
        "whole": whole,
        "phases_p50_ms": median_phases(phases[-rounds * number :]),
        "requests_p50_ms": {"floor": api.laps.medians_ms(), "cloche": requests.medians_ms()},
    }


async def measure(rounds: int, batches: int) -> dict[str, Any]:
    """The services that the environment names."""
    found: dict[str, Any] = {"machine": {"kernel": platform.release(), "cpus": os.cpu_count()}, "services": {}}
    image = os.environ.get("CLOCHE_TEST_OPENSANDBOX_IMAGE", "cloche-test/sandbox-root:1")
    for name, prefix in services.PREFIXES.items():
        if (service := services.find(name)) is None:
            print(
                f"no service to measure: set {prefix}_API_URL and {prefix}_API_KEY (make engines-opensandbox starts one)"
            )
            continue
        found["services"][name] = of = {}
        if rounds:
            of["one"] = await compare(service, image, rounds)
        if batches:
            of["five at once"] = await compare(service, image, batches, CONCURRENT)
    return found


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    titles = {"one": "one run", "five at once": f"{CONCURRENT} runs at once, until the last one"}
    for service, measured in found["services"].items():
        for which, of in measured.items():
            title = f"{service}, {of['engine']}: {titles[which]}"
            table = Table("", "p50 ms", "p90 ms", "to the SDK", "to the floor", title=title, title_justify="left")
            for measure, rows in (("result", of["result"]), ("whole", of["whole"])):
                for contender, row in rows.items():
                    to = [f"{_ratio(rows, contender, other):.2f}" for other in ("SDK", "floor")]
                    table.add_row(f"{contender}, {measure}", f"{row['p50_ms']:.0f}", f"{row['p90_ms']:.0f}", *to)
                table.add_section()
            console.print(table)
            if which == "one":
                _show_goals(console, of)
                console.print(f"cloche's phases, p50 in ms: {of['phases_p50_ms']}")
                for contender, steps in of["requests_p50_ms"].items():
                    console.print(f"the requests of {contender}, p50 in ms: {steps}")
            if lost := of["lost_by_the_sdk"]:
                console.print(
                    f"turns that the SDK lost, and that do not count: {len(lost)}, the last one with {lost[-1]}"
                )
            console.print()


def _show_goals(console: Console, of: Mapping[str, Any]) -> None:
    lingers = of["lingers_s"] > LINGERS_S
    console.print(f"the stream of a command stays open for {of['lingers_s']:.2f} s after its last event")
    for measure, goal in (("result", LINGERING_GOAL if lingers else PROMPT_GOAL), ("whole", WHOLE_GOAL)):
        for package_ in PACKAGE:
            ratio = of[measure]["cloche"]["p50_ms"] / of["whole"][package_]["p50_ms"]
            verdict = "met" if ratio <= goal else "NOT met"
            console.print(
                f"cloche, {measure}: {ratio:.2f} of a run of the {package_} (goal: at most {goal}; {verdict})"
            )


def _ratio(rows: Mapping[str, Mapping[str, float]], who: str, to: str) -> float:
    return rows[who]["p50_ms"] / rows[to]["p50_ms"]


def main() -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, default=5, help=f"of {CONCURRENT} runs at once")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = anyio.run(measure, arguments.rounds, arguments.batches)
    show(found)
    if arguments.json:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
