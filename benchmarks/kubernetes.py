"""cloche's kubernetes mode against the least that a Job's output can cost, and against a port of the usual way.

    make bench                                        # where CLOCHE_TEST_KUBECONFIG names a cluster's administrator
    python -m benchmarks.kubernetes --rounds 20 --json build/bench-kubernetes.json

**floor**: a bare Job and its ConfigMap, made at the same time, of the very pod that cloche makes, but with the script as its
command; one watch tells when the pod is about to start, and from then on its log is asked for all the time. Nothing is
checked, nothing recovers, nothing is removed in its time. **usual way**: ConfigMap, Job, a look at the Job's status every
500 ms, and then its log.

All are in a namespace of the benchmark's own with the quota, limits, rights and accounts of deploy/kubernetes, so that the
API server does the same for each. They take turns within one round, and each begins when nothing is left of the one before,
so that nobody pays for the removal of others' boxes; compare ratios of one run. Where the cluster shares its processors with the
benchmark, ten runs at once measure these above all. The image has to be there already.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import json
import os
import platform
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import anyio
import httpx2
import yaml
from benchmarks.contenders import Contender, by_cloche, median_phases, take_turns, together, write_json
from rich.console import Console
from rich.table import Table

import cloche
from cloche._kit.http import HttpClient
from cloche.backends.contract import Profile
from cloche.backends.kubernetes import kubeconfig, manifest, names
from cloche.backends.kubernetes.manifest import Ground, Made
from cloche.spec import Limits
from cloche.supervisor.binary import supervisor_path

FLOOR, USUAL, OURS = "floor", "usual way", "cloche, result"
FLOOR_GOAL, USUAL_GOAL, CONCURRENT_GOAL = 1.05, 0.2, 1.1
"""At p50: of the floor and of the usual way for one run, and of the floor for ten at once."""
CONCURRENT = 10
DELAY_S = 0.1
"""A round trip to a far API server."""
MANIFESTS = Path(__file__).parents[1] / "deploy" / "kubernetes"
DEPLOYED = "cloche-sandbox"
"""The namespace of those."""
NAMESPACE = "cloche-bench"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
RIGHTS = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"{CORE}/pods"
CONFIG_MAPS = f"{CORE}/configmaps"
PATHS = {
    "Namespace": "/api/v1/namespaces",
    "ServiceAccount": f"{CORE}/serviceaccounts",
    "ResourceQuota": f"{CORE}/resourcequotas",
    "LimitRange": f"{CORE}/limitranges",
    "Role": f"{RIGHTS}/roles",
    "RoleBinding": f"{RIGHTS}/rolebindings",
}
SUPERVISOR = "bench-supervisor"
"""The ConfigMap that the others' pods mount, as cloche's do."""
BUNDLE = "/run/cloche/bundle-00"
MARK = b"cloche-bench: done"
SCRIPT = cloche.Spec(name="main.py", content="pass\n")
LOG_STEP_S, STATUS_STEP_S, LOOK_STEP_S = 0.01, 0.5, 0.1
SETTLE_S = (0.2, 1.2)
"""Between two turns. A kubelet looks at its containers once a second: by chance, so that nobody meets it at a better moment."""
GONE_S = 120.0
WARM_UP = 2
"""Rounds that do not count."""
TOKEN_S = 6 * 3600
METADATA_ONLY = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}


class Api:
    """The API server, as whom a kubeconfig names."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.access = kubeconfig.find(cloche.Settings(kube_config=str(config)))

    async def __aenter__(self) -> Self:
        identity = await self.access.credentials.identity()

        async def name(request: httpx2.Request) -> None:
            if self.access.server_name is not None:
                request.extensions["sni_hostname"] = self.access.server_name

        self.client = httpx2.AsyncClient(
            base_url=self.access.base,
            headers=identity.headers,
            verify=self.access.tls(identity.certificate) or False,
            timeout=60,
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=60),
            event_hooks={"request": [name]},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.aclose()

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        fine: tuple[int, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """What it answers. An error ends the benchmark, unless it is a fine one."""
        answer = await self.client.request(method, path, json=body, headers=headers)
        if answer.is_error and answer.status_code not in fine:
            raise SystemExit(f"{method} {path}: {answer.text}")
        return answer.json()

    async def warm(self, connections: int) -> None:
        """Have so many, since requests at the same time would begin with a greeting: far away it takes two round trips."""
        async with anyio.create_task_group() as tasks:
            for _ in range(connections):
                tasks.start_soon(self.ask, "GET", "/version")

    async def items(self, path: str) -> list[Any]:
        """What a list has, without contents."""
        found: dict[str, list[Any] | None] = await self.ask("GET", path, headers=METADATA_ONLY)
        return found["items"] or []


# --- the ground -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ground(admin: Api, folder: Path) -> AsyncIterator[Path]:
    """A namespace as deploy/kubernetes makes it, but with another name and without the policy, which would admit none but
    cloche; and a kubeconfig for it, with the application's rights.
    """
    await admin.ask("DELETE", f"{PATHS['Namespace']}/{NAMESPACE}", fine=(404,))
    await _until_there_is_none(admin)
    try:
        for name in ("namespace", "service-account", "role", "quota", "limit-range"):
            text = (MANIFESTS / f"{name}.yaml").read_text().replace(DEPLOYED, NAMESPACE)
            for body in yaml.safe_load_all(text):
                for subject in body.get("subjects", ()):
                    subject["namespace"] = NAMESPACE
                await admin.ask("POST", PATHS[body["kind"]], body)
        application = {"metadata": {"name": "cloche"}}
        await admin.ask("POST", PATHS["ServiceAccount"], application)
        asked = {"spec": {"expirationSeconds": TOKEN_S}}
        told = await admin.ask("POST", f"{PATHS['ServiceAccount']}/cloche/token", asked)
        await admin.ask("POST", CONFIG_MAPS, manifest.supervisor_map(SUPERVISOR, supervisor_path().read_bytes()))
        yield _kubeconfig(folder / "application.kubeconfig", admin.access, told["status"]["token"])
    finally:
        with anyio.CancelScope(shield=True):
            await admin.ask("DELETE", f"{PATHS['Namespace']}/{NAMESPACE}")
            await _until_there_is_none(admin)


async def _until_there_is_none(admin: Api) -> None:
    with anyio.fail_after(GONE_S):
        while any(n["metadata"]["name"] == NAMESPACE for n in await admin.items(PATHS["Namespace"])):  # noqa: ASYNC110
            await anyio.sleep(LOOK_STEP_S)


def _kubeconfig(path: Path, access: kubeconfig.Access, token: str) -> Path:
    """For a user with a token."""
    cluster: dict[str, Any] = {"server": access.base, "insecure-skip-tls-verify": not access.verify}
    if access.authority is not None and access.verify:
        cluster["certificate-authority-data"] = base64.b64encode(access.authority.encode()).decode()
    if access.server_name is not None:
        cluster["tls-server-name"] = access.server_name
    context = {"cluster": "bench", "user": "bench", "namespace": NAMESPACE}
    return _write(
        path,
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bench", "cluster": cluster}],
            "users": [{"name": "bench", "user": {"token": token}}],
            "contexts": [{"name": "bench", "context": context}],
            "current-context": "bench",
        },
    )


def _write(path: Path, config: object) -> Path:
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config))
    return path


async def clear(admin: Api) -> None:
    """Remove what is left of the turn before, wait until it is gone, and then some time."""
    left = f"labelSelector={names.LABEL_RUN}"
    with anyio.fail_after(GONE_S):
        for path in (f"{JOBS}?propagationPolicy=Background&{left}", f"{CONFIG_MAPS}?{left}"):
            await admin.ask("DELETE", path)
        while any([await admin.items(f"{path}?{left}") for path in (JOBS, PODS, CONFIG_MAPS)]):  # noqa: ASYNC110
            await anyio.sleep(LOOK_STEP_S)
    await anyio.sleep(random.uniform(*SETTLE_S))


# --- contenders -------------------------------------------------------------------------------------------------------


def things(image: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, ConfigMap and Job: cloche's own, with the script as the container's command."""
    name, expires = f"bench-{secrets.token_hex(6)}", time.time() + 600
    profile = Profile(name, "bench", expires, Limits(), image=image)
    where = Ground(NAMESPACE, SUPERVISOR, platform.machine(), service_account=f"{NAMESPACE}-runner")
    made = Made(name, 1_234_567_890, expires, deadline_s=600)
    job = manifest.job(profile, where, made)
    job["spec"]["template"]["spec"]["containers"][0]["command"] = ["python3", BUNDLE]
    script = f"pass\nprint({MARK.decode()!r}, flush=True)\n".encode()
    (config_map,) = manifest.bundle_maps(profile, where, made, "", script)
    del config_map["metadata"]["ownerReferences"]  # who makes both at once does not know the Job yet
    return name, config_map, job


class Watch:
    """Tells of each pod of the namespace when it is about to start: one stream for all, which is there before they are."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._ready: dict[str, asyncio.Future[str]] = {}

    def expect(self, job: str) -> asyncio.Future[str]:
        """The name of a Job's pod, as soon as its sandbox is ready."""
        return self._ready.setdefault(job, asyncio.get_running_loop().create_future())

    async def run(self) -> None:
        """Until cancelled."""
        async with self._api.client.stream("GET", PODS, params={"watch": "true"}, timeout=None) as response:
            async for line in response.aiter_lines():
                pod = json.loads(line)["object"]
                told = {condition["type"]: condition["status"] for condition in pod["status"].get("conditions", ())}
                ready = self._ready.get(pod["metadata"]["labels"].get("job-name", ""))
                if told.get("PodReadyToStartContainers") == "True" and ready is not None and not ready.done():
                    ready.set_result(pod["metadata"]["name"])


def by_floor(api: Api, watch: Watch, image: str, laps: list[dict[str, float]]) -> Contender:
    """The dozen lines, and the moments in which its pod was about to start and its log was there."""

    async def once() -> float:
        name, config_map, job = things(image)
        pod = watch.expect(name)
        begun = time.perf_counter()
        async with anyio.create_task_group() as both:
            both.start_soon(api.ask, "POST", JOBS, job)
            both.start_soon(api.ask, "POST", CONFIG_MAPS, config_map)
        log, text = f"{PODS}/{await pod}/log", b""
        lap = {"ready": time.perf_counter() - begun, "log requests": 0.0}
        while MARK not in text:
            lap["log requests"] += 1
            async with api.client.stream("GET", log, params={"follow": "true"}) as response:
                if response.is_success:
                    lap.setdefault("log", time.perf_counter() - begun)
                async for chunk in response.aiter_bytes():
                    if response.is_success and MARK in (text := text + chunk):
                        break
            if response.is_error:
                await anyio.sleep(LOG_STEP_S)
        taken = time.perf_counter() - begun
        laps.append(lap)
        return taken

    return once


def by_usual_way(api: Api, image: str) -> Contender:
    """As it is mostly written."""

    async def once() -> float:
        name, config_map, job = things(image)
        begun = time.perf_counter()
        await api.ask("POST", CONFIG_MAPS, config_map)
        await api.ask("POST", JOBS, job)
        while True:
            status = (await api.ask("GET", f"{JOBS}/{name}"))["status"]
            if status.get("succeeded") or status.get("failed"):
                break
            await anyio.sleep(STATUS_STEP_S)
        (pod,) = (await api.ask("GET", f"{PODS}?labelSelector=job-name%3D{name}"))["items"]
        text = (await api.client.get(f"{PODS}/{pod['metadata']['name']}/log")).content
        taken = time.perf_counter() - begun
        assert MARK in text, text
        return taken

    return once


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The requests that cloche makes meanwhile."""
    found: Counter[str] = Counter()
    request, stream = HttpClient.request, HttpClient.stream

    def note(method: str, path: str) -> None:
        kind, _, rest = path.partition(f"/namespaces/{NAMESPACE}/")[2].partition("/")
        found[f"{method} {'log' if rest.endswith('/log') else kind}"] += 1

    @functools.wraps(request)
    def noted_request(self: HttpClient, method: str, path: str, **options: Any) -> Any:
        note(method, path)
        return request(self, method, path, **options)

    @functools.wraps(stream)
    def noted_stream(self: HttpClient, method: str, path: str, **options: Any) -> Any:
        note(method, path)
        return stream(self, method, path, **options)

    HttpClient.request, HttpClient.stream = noted_request, noted_stream  # type: ignore[method-assign]
    try:
        yield found
    finally:
        HttpClient.request, HttpClient.stream = request, stream  # type: ignore[method-assign]


# --- what is measured -------------------------------------------------------------------------------------------------


async def compare(
    admin: Api, config: Path, image: str, rounds: int, *, at_once: int = 1, usual: bool = False
) -> dict[str, Any]:
    """All contenders over one way to the API server. Ratios are of medians."""
    settings = cloche.Settings(
        mode=cloche.Mode.KUBERNETES,
        fallback=False,
        kube_config=str(config),
        kube_namespace=NAMESPACE,
        kube_service_account=f"{NAMESPACE}-runner",
        image=image,
        pull="never",
        max_concurrent=CONCURRENT,
    )
    phases: list[Any] = []
    laps: list[dict[str, float]] = []
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(Api(config))
        watch = Watch(api)
        watching = await stack.enter_async_context(anyio.create_task_group())
        watching.start_soon(watch.run)
        sandbox = await stack.enter_async_context(cloche.Sandbox(settings))
        posture = await sandbox.posture()
        if not posture.available:
            raise SystemExit(f"{posture.reason} {posture.hint}")
        contenders: dict[str, Contender] = {FLOOR: by_floor(api, watch, image, laps)}
        if usual:
            contenders[USUAL] = by_usual_way(api, image)
        contenders[OURS] = by_cloche(sandbox, SCRIPT, whole=False, phases=phases, removal_s=0.0)
        if at_once > 1:
            contenders = {name: together(once, at_once) for name, once in contenders.items()}

        async def get_ready() -> None:
            await clear(admin)
            await api.warm(2 * at_once)

        await sandbox.run(SCRIPT, wait_cleanup=True)  # so that what is done once is done
        with counted() as requests:
            rows = await take_turns(contenders, rounds, warm_up=WARM_UP, before=get_ready)
        await clear(admin)
        watching.cancel_scope.cancel()
    kept = at_once * rounds
    found: dict[str, Any] = {
        "rounds": rounds,
        "at_once": at_once,
        "contenders": rows,
        "to_floor": _ratio(rows, FLOOR),
        "phases_p50_ms": median_phases(phases[-kept:]),
        "floor_p50_ms": {lap: _median_ms([at[lap] for at in laps[-kept:]]) for lap in ("ready", "log")},
        "requests_of_a_run": {what: round(number / len(phases), 2) for what, number in sorted(requests.items())},
        "log_requests_of_the_floor": statistics.fmean(lap["log requests"] for lap in laps),
    }
    return found | ({"to_usual_way": _ratio(rows, USUAL)} if usual else {})


def _ratio(rows: Mapping[str, Mapping[str, float]], to: str) -> float:
    return round(rows[OURS]["p50_ms"] / rows[to]["p50_ms"], 3)


def _median_ms(times: list[float]) -> float:
    return round(statistics.median(times) * 1000, 2)


async def measure(rounds: int, batches: int, far_rounds: int) -> dict[str, Any]:
    """The cluster that the environment names."""
    config = os.environ.get("CLOCHE_TEST_KUBECONFIG", "")
    found: dict[str, Any] = {"machine": {"kernel": platform.release(), "cpus": os.cpu_count()}}
    if not config:
        print("no cluster to measure: set CLOCHE_TEST_KUBECONFIG (make engines-kubernetes starts one)")
        return found
    image = os.environ.get("CLOCHE_TEST_KUBERNETES_IMAGE", "cloche-test/sandbox:1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with Api(Path(config)) as admin, ground(admin, folder) as ours:
            found["machine"]["engine"] = f"Kubernetes {(await admin.ask('GET', '/version'))['gitVersion']}"
            if rounds:
                found["one"] = await compare(admin, ours, image, rounds, usual=True)
            if batches:
                found["ten at once"] = await compare(admin, ours, image, batches, at_once=CONCURRENT)
            if far_rounds:
                found["one, far away"] = await far(admin, ours, image, far_rounds)
    return found


async def far(admin: Api, ours: Path, image: str, rounds: int) -> dict[str, Any]:
    """The same with a round trip of 100 ms to the API server, and one more for each new connection."""
    from tests.engines.kubernetes.forwarder import Forwarder

    at = urlsplit(admin.access.base)
    with Forwarder((at.hostname or "", at.port or 443), delay_s=DELAY_S) as passage:
        through = _detour(ours, f"https://127.0.0.1:{passage.port}{at.path}", admin.access.server_name or at.hostname)
        return await compare(admin, through, image, rounds)


def _detour(config: Path, base: str, server_name: str | None) -> Path:
    """The same kubeconfig with another way to the same server."""
    found = yaml.safe_load(config.read_text())
    found["clusters"][0]["cluster"] |= {"server": base, "tls-server-name": server_name}
    return _write(config.with_name("detour.kubeconfig"), found)


def show(found: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    titles = {
        "one": "one run",
        "ten at once": f"{CONCURRENT} runs at once, until the last result",
        "one, far away": f"one run, {DELAY_S * 1000:g} ms away from the API server",
    }
    for name, title in titles.items():
        if (of := found.get(name)) is None:
            continue
        rows = of["contenders"]
        table = Table("", "p50 ms", "p90 ms", "to the floor", "to the usual way", title=title, title_justify="left")
        for contender, row in rows.items():
            to = [f"{row['p50_ms'] / rows[other]['p50_ms']:.2f}" if other in rows else "-" for other in (FLOOR, USUAL)]
            table.add_row(contender, f"{row['p50_ms']:.0f}", f"{row['p90_ms']:.0f}", *to)
        console.print(table)
        goals = [("to_floor", CONCURRENT_GOAL if of["at_once"] > 1 else FLOOR_GOAL, "the floor")]
        goals += [("to_usual_way", USUAL_GOAL, "the usual way")] if "to_usual_way" in of else []
        for key, goal, what in goals:
            verdict = "met" if of[key] <= goal else "NOT met"
            console.print(f"cloche: {of[key]:.2f} of {what} (goal: at most {goal}; {verdict})")
        console.print(f"cloche's phases, p50 in ms: {of['phases_p50_ms']}")
        console.print(f"cloche's requests a run: {of['requests_of_a_run']}")
        console.print(
            f"the floor's pod is ready to start, and has a log, after p50 in ms: {of['floor_p50_ms']};"
            f" its log is asked for {of['log_requests_of_the_floor']:.1f} times\n"
        )


def main() -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, default=5, help=f"of {CONCURRENT} runs at once")
    parser.add_argument("--far-rounds", type=int, default=8, help="with 100 ms to the API server")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = anyio.run(measure, arguments.rounds, arguments.batches, arguments.far_rounds)
    show(found)
    if arguments.json:
        write_json(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
