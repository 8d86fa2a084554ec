"""Speaks the Docker Engine API (docs.docker.com/reference/api/engine; checked with 1.41 and 1.56). No other room does.

Every answer is read with a bound, every call has a timeout, every name that enters a path is encoded. Errors leave this room
as two: :class:`Refused`, the daemon's own no, and the :class:`cloche._kit.http.HttpFailure` of a daemon that cannot be
talked to.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from cloche._kit.fields import field, parse_json
from cloche._kit.http import Answer, Connection, ConnectionLost, HttpClient, Server, segment
from cloche.backends.docker import facts
from cloche.backends.docker.facts import Image, Info, Labelled, State, Version
from cloche.backends.docker.images import Reference

QUICK_S = 20.0
"""For what the daemon knows by heart. A busy one takes its time."""
WORK_S = 120.0
"""For what it does with disks and processes. Whoever waits has a deadline of his own, which is shorter."""
PULL_IDLE_S = 300.0
"""Between two words on a pull: unpacking one large layer is told with none."""
MAX_ANSWER_BYTES = 8 * 2**20
MAX_MESSAGE = 1000
MAX_PROGRESS_LINE = 2**20

_TAR = {"Content-Type": "application/x-tar"}
_ID = re.compile(r"[0-9a-f]{12,64}")


class Refused(Exception):
    """The daemon answered with an error. ``status`` is HTTP's, ``message`` the daemon's, cut to 1,000 characters."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (status {status})")
        self.status = status
        self.message = message


class DockerClient:
    """One daemon."""

    def __init__(self, server: Server) -> None:
        self._http = HttpClient(server)
        self._prefix = ""

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # --- the daemon ---------------------------------------------------------------------------------------------------

    async def version(self) -> Version | None:
        """What it is; from then on it is spoken to in its own version of the API. None: it is no Docker daemon.

        Raises:
            Refused, HttpFailure.
        """
        answer = await self._call("GET", "/version")
        try:
            found = facts.parse_version(answer.json())
        except ValueError:
            return None
        if found is not None:
            self._prefix = "/v{}.{}".format(*found.spoken_api)
        return found

    async def info(self) -> Info:
        """What its host offers."""
        return facts.parse_info(_json(await self._call("GET", "/info")))

    async def engine_time(self) -> float | None:
        """Unix time by the daemon's clock, in whole seconds; None where it does not tell."""
        return (await self._call("GET", "/_ping")).server_time

    async def clock_offset_s(self) -> float:
        """The daemon's clock less ours, to the second; 0 where it does not tell."""
        engine = await self.engine_time()
        return 0.0 if engine is None else engine - time.time()

    # --- images -------------------------------------------------------------------------------------------------------

    async def image(self, name: str) -> Image | None:
        """An image that the daemon has, or None.

        Raises:
            Refused: the name is malformed, or the daemon cannot tell.
        """
        try:
            answer = await self._call("GET", f"/images/{'/'.join(map(segment, name.split('/')))}/json")
        except Refused as exc:
            if exc.status == 404:
                return None
            raise
        return facts.parse_image(_json(answer))

    async def pull(self, reference: Reference, auth: str | None) -> AsyncGenerator[Mapping[str, Any], None]:
        """Have an image pulled, and give the daemon's words on it as they come.

        Raises:
            Refused: the daemon could not pull it. The status is 200 when it found out on the way.
        """
        query = {"fromImage": reference.repository, "tag": reference.pulled_tag}
        headers = {"X-Registry-Auth": auth} if auth else {}
        path = f"{self._prefix}/images/create"
        async with self._http.stream("POST", path, query=query, headers=headers, idle_s=PULL_IDLE_S) as stream:
            if stream.status != 200:
                raise _refusal(stream.status, await stream.read(MAX_ANSWER_BYTES))
            partial = b""
            async for chunk in stream.chunks():
                *lines, partial = (partial + chunk).split(b"\n")
                for line in lines:
                    if (said := _progress(line)) is not None:
                        yield said
                if len(partial) > MAX_PROGRESS_LINE:
                    raise ConnectionLost("what the daemon says of the pull has no end")
            if (said := _progress(partial)) is not None:
                yield said

    # --- volumes ------------------------------------------------------------------------------------------------------

    async def volume_labels(self, name: str) -> Mapping[str, str] | None:
        """The labels of a volume; None: there is no such volume."""
        try:
            answer = await self._call("GET", f"/volumes/{segment(name)}")
        except Refused as exc:
            if exc.status == 404:
                return None
            raise
        return field(_json(answer), "Labels", dict, {})

    async def create_volume(self, body: Mapping[str, Any]) -> None:
        """Make a volume; one of that name that is there already is kept as it is."""
        await self._call("POST", "/volumes/create", body=body)

    async def volumes(self, label: str) -> list[Labelled]:
        """The volumes that bear a label."""
        query = {"filters": json.dumps({"label": [label]})}
        return facts.parse_volumes(_json(await self._call("GET", "/volumes", query=query)))

    async def remove_volume(self, name: str) -> None:
        """Remove a volume. That it is gone already is fine.

        Raises:
            Refused: with 409, a container uses it.
        """
        await self._call("DELETE", f"/volumes/{segment(name)}", gone_is_fine=True, timeout_s=WORK_S)

    # --- containers ---------------------------------------------------------------------------------------------------

    async def create(self, name: str, body: Mapping[str, Any]) -> None:
        """Make a container, not started. From then on it is known by its name."""
        answer = await self._call("POST", "/containers/create", query={"name": name}, body=body, timeout_s=WORK_S)
        if _ID.fullmatch(field(_json(answer), "Id", str, "")) is None:
            raise ConnectionLost("the daemon's answer names no container")

    @asynccontextmanager
    async def attach(self, name: str) -> AsyncIterator[Connection]:
        """The container's three streams as one connection, from the moment on in which it is made.

        Raises:
            Refused: also when the daemon does not leave HTTP for it.
        """
        query = {"stream": True, "stdin": True, "stdout": True, "stderr": True}
        path = f"{self._prefix}/containers/{segment(name)}/attach"
        async with self._http.upgrade(
            path, protocol="tcp", query=query, timeout_s=QUICK_S, max_bytes=MAX_ANSWER_BYTES
        ) as connection:
            if isinstance(connection, Answer):
                raise _refusal(connection.status, connection.body)
            yield connection

    async def start(self, name: str) -> None:
        """Start a container."""
        await self._call("POST", f"/containers/{segment(name)}/start", timeout_s=WORK_S)

    async def update(self, name: str, limits: Mapping[str, Any]) -> None:
        """Change the limits of a running container."""
        await self._call("POST", f"/containers/{segment(name)}/update", body=limits, timeout_s=WORK_S)

    async def signal(self, name: str, signal_name: str) -> None:
        """Send a signal to its first process. That it has none any more is fine."""
        try:
            await self._call("POST", f"/containers/{segment(name)}/kill", query={"signal": signal_name})
        except Refused as exc:
            if exc.status not in {404, 409}:
                raise

    async def wait(self, name: str) -> None:
        """Wait until a container does not run."""
        await self._call(
            "POST", f"/containers/{segment(name)}/wait", query={"condition": "not-running"}, timeout_s=WORK_S
        )

    async def state(self, name: str) -> State | None:
        """How a container is doing; None: there is none of that name."""
        try:
            answer = await self._call("GET", f"/containers/{segment(name)}/json")
        except Refused as exc:
            if exc.status == 404:
                return None
            raise
        return facts.parse_state(_json(answer))

    async def was_killed(self, name: str) -> bool:
        """Whether somebody had a container killed through the daemon (kill, stop, a forced removal), as far as it remembers.

        It may take two seconds: the daemon writes it down a moment after the container has ended.
        """
        filters = json.dumps({"container": [name], "event": ["kill"]})
        query: dict[str, str | int] = {
            "since": 1,
            "until": int(time.time() + await self.clock_offset_s()) + 2,
            "filters": filters,
        }
        return bool((await self._call("GET", "/events", query=query)).body.strip())

    async def remove(self, name: str) -> bool:
        """Kill and remove a container. False: somebody else is doing so."""
        query = {"force": True, "v": True}
        try:
            await self._call("DELETE", f"/containers/{segment(name)}", query=query, gone_is_fine=True, timeout_s=WORK_S)
        except Refused as exc:
            if exc.status == 409 and "removal" in exc.message:
                return False
            raise
        return True

    async def containers(self, label: str) -> list[Labelled]:
        """All containers that bear a label, whether they run or not."""
        query: dict[str, str | bool] = {"all": True, "filters": json.dumps({"label": [label]})}
        return facts.parse_containers(_json(await self._call("GET", "/containers/json", query=query)))

    async def put_archive(self, name: str, folder: str, archive: bytes) -> None:
        """Unpack a tar archive in a folder of a container."""
        path = f"/containers/{segment(name)}/archive"
        await self._call("PUT", path, query={"path": folder}, body=archive, timeout_s=WORK_S)

    async def size_in(self, name: str, path: str) -> int | None:
        """The size of a file in a container, in bytes; None: there is none."""
        try:
            answer = await self._call("HEAD", f"/containers/{segment(name)}/archive", query={"path": path})
        except Refused as exc:
            if exc.status == 404:
                return None
            raise
        try:
            stat = parse_json(base64.b64decode(answer.headers.get("x-docker-container-path-stat", "")))
        except ValueError:
            return None
        return field(stat, "size", int, -1)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | bool] | None = None,
        body: bytes | Mapping[str, Any] | None = None,
        timeout_s: float = QUICK_S,
        gone_is_fine: bool = False,
    ) -> Answer:
        """Raises: Refused, HttpFailure."""
        answer = await self._http.request(
            method,
            self._prefix + path,
            query=query,
            body=body,
            headers=_TAR if isinstance(body, bytes) else None,
            timeout_s=timeout_s,
            max_bytes=MAX_ANSWER_BYTES,
        )
        # 304: it already is what it was to become.
        if answer.ok or answer.status == 304 or (gone_is_fine and answer.status == 404):
            return answer
        raise _refusal(answer.status, answer.body)


def _json(answer: Answer) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise ConnectionLost("the daemon's answer is not JSON") from None


def _refusal(status: int, body: bytes) -> Refused:
    """The daemon says why in ``message``, Podman in ``cause`` too; what is no JSON was written by somebody in between."""
    text = body.decode("utf-8", "replace").strip()
    with contextlib.suppress(ValueError):
        text = field(parse_json(body), "message", str, "") or text
    return Refused(status, " ".join(text.split())[:MAX_MESSAGE] or "no reason was given")


def _progress(line: bytes) -> Mapping[str, Any] | None:
    """One line of a pull. Raises: Refused, for one that says that it failed."""
    try:
        said = parse_json(line)
    except ValueError:
        return None
    if not isinstance(said, dict):
        return None
    error = field(field(said, "errorDetail", dict, {}), "message", str, "") or field(said, "error", str, "")
    if error:
        raise Refused(200, error[:MAX_MESSAGE])
    return said
