"""Speaks the Kubernetes API (kubernetes.io, "Kubernetes API reference", core/v1, batch/v1, authorization.k8s.io/v1). No other
room does.

Every answer is read with a bound, every call has a timeout, every name that enters a path is encoded. Errors leave this room
as three: :class:`Refused`, the API server's own no; the :class:`cloche._kit.http.HttpFailure` of a server that cannot be
talked to; and the BackendUnavailable of credentials that cannot be had.

Requests that may be repeated are repeated, after a pause, when the server is busy (429), fails (5xx) or the connection
breaks. That is all of them: what is made has a name of ours, so that "there is one of that name" (409) can be looked at.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from anyio import to_thread

from cloche._kit.fields import field, parse_json
from cloche._kit.http import (
    Answer,
    ConnectionLost,
    HttpClient,
    HttpFailure,
    Query,
    Server,
    Stream,
    TlsFailure,
    TooLarge,
    segment,
)
from cloche._kit.retries import repeat
from cloche.backends.kubernetes import facts, names
from cloche.backends.kubernetes.credentials import ClientCertificate, Identity
from cloche.backends.kubernetes.facts import Pod, Rule, Status, Thing
from cloche.backends.kubernetes.kubeconfig import Access

QUICK_S = 20.0
"""For one answer. The API server itself gives up on most requests after 60 s; whoever waits has a deadline of his own."""
PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Before each new try of a request."""
MAX_RETRY_AFTER_S = 10.0
PAGE = 500
"""Objects in one answer to a list; more come in further ones."""
MAX_ANSWER_BYTES = 16 * 2**20
MAX_ERROR_BYTES = 64 * 1024
MAX_EVENT_LINE = 4 * 2**20
"""Of a watch: one object, which etcd bounds at 1.5 MiB."""
WATCH_S = 300
"""For so long the server keeps a watch open."""
WATCH_IDLE_S = 100.0
"""Between two words on a watch; the server sends a bookmark every minute."""
LOG_IDLE_S = 120.0
"""A log that says nothing for so long is asked for anew: what stands between may have forgotten the connection."""
BUSY = frozenset({429, 500, 502, 503, 504})
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
LIST_OF_METADATA = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"}
_NO_RIGHT = re.compile(r"is forbidden: User .* cannot [a-z]+ resource")
NEW_S = 1.0
"""What an authorizer says (k8s.io/apiserver, responsewriters/errors.go), and how long it is not believed: one that has just been
started says it of everything, for some tenths of a second, until it has read its rules (seen with 1.37). Nothing was done then.
"""
EXISTS, CONFLICT = "AlreadyExists", "Conflict"
"""What the API server means by 409: there is one of that name, or somebody else (a quota that is counted, mostly) came in
between, so that nothing was done.
"""

_log = logging.getLogger("cloche.kubernetes")


class Refused(Exception):
    """The API server answered with an error. ``status`` has its code, its reason, and its message of at most 1,000 characters."""

    def __init__(self, status: Status) -> None:
        super().__init__(f"{status.message or status.reason or 'no message'} (status {status.code})")
        self.status = status

    @property
    def code(self) -> int:
        """HTTP's number."""
        return self.status.code

    @property
    def message(self) -> str:
        """The server's, for people."""
        return self.status.message or self.status.reason


class OtherContent(Exception):
    """Under the name there is something else. ``args`` has the name."""


class Expired(Exception):
    """A watch cannot go on from where it was: what happened since is forgotten (410)."""


@dataclass(eq=False, slots=True)
class _Line:
    """The connections of one client certificate."""

    http: HttpClient
    certificate: ClientCertificate | None
    users: int = 0


class KubernetesClient:
    """One namespace of one cluster."""

    def __init__(self, access: Access, namespace: str) -> None:
        self._access = access
        self._line: _Line | None = None
        self._old: set[_Line] = set()
        self._connecting = anyio.Lock()
        self._core = f"/api/v1/namespaces/{segment(namespace)}"
        self._batch = f"/apis/batch/v1/namespaces/{segment(namespace)}"
        self._namespace = namespace
        self._offset_s: float | None = None

    async def aclose(self) -> None:
        """Close all connections."""
        for line in (self._line, *self._old):
            if line is not None:
                await line.http.aclose()

    def server_time(self) -> float:
        """Unix time in seconds by the API server's clock, as its last answer told it; ours where none did."""
        return time.time() + (self._offset_s or 0.0)

    # --- what we may do -----------------------------------------------------------------------------------------------

    async def rules(self) -> tuple[list[Rule], bool]:
        """What we may do in the namespace, and whether that is all that is to be known.

        Raises:
            Refused, HttpFailure, BackendUnavailable.
        """
        path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": self._namespace},
        }
        status = field(_json(await self._call("POST", path, body=body)), "status", dict, {})
        found = [facts.parse_rule(rule) for rule in field(status, "resourceRules", list, [])]
        return found, not field(status, "incomplete", bool, otherwise=False)

    async def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether we have a right in the namespace; ``resource`` may be one such as ``pods/log``.

        Raises:
            Refused, HttpFailure, BackendUnavailable.
        """
        kind, _, part = resource.partition("/")
        asked = {"namespace": self._namespace, "verb": verb, "group": group, "resource": kind, "subresource": part}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        answer = await self._call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body=body)
        return field(field(_json(answer), "status", dict, {}), "allowed", bool, otherwise=False)

    async def look(self) -> None:
        """The least that we may do: list one ConfigMap.

        Raises:
            Refused, HttpFailure, BackendUnavailable.
        """
        await self._call("GET", f"{self._core}/configmaps", query={"limit": 1}, headers=LIST_OF_METADATA)

    async def version(self) -> str:
        """The cluster's, such as ``v1.37.2``; empty where it does not tell."""
        try:
            return field(_json(await self._call("GET", "/version")), "gitVersion", str, "")[:64]
        except Refused:
            return ""

    # --- Jobs ---------------------------------------------------------------------------------------------------------

    async def create_job(self, body: Mapping[str, Any]) -> str:
        """Make a Job, and give its uid. One of its name that is there already and is ours was made by a request whose answer
        was lost.

        Raises:
            Refused, HttpFailure, BackendUnavailable.
        """
        name = body["metadata"]["name"]
        try:
            found = _json(await self._call("POST", f"{self._batch}/jobs", body=body))
        except Refused as exc:
            if exc.status.reason != EXISTS:
                raise
            found = _json(await self._call("GET", f"{self._batch}/jobs/{segment(name)}"))
            labels = field(field(found, "metadata", dict, {}), "labels", dict, {})
            if any(labels.get(label) != value for label, value in body["metadata"]["labels"].items()):
                raise
        return _uid(found)

    async def delete_job(self, name: str) -> None:
        """Delete a Job, and in the background what belongs to it, if there is one (any more)."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        await self._delete(f"{self._batch}/jobs/{segment(name)}", body)

    async def jobs(self) -> list[Thing]:
        """All of cloche's in the namespace."""
        return [facts.parse_thing("job", item) async for item in self._list(f"{self._batch}/jobs")]

    # --- ConfigMaps ---------------------------------------------------------------------------------------------------

    async def create_config_map(self, body: Mapping[str, Any]) -> None:
        """Make a ConfigMap; one of its name with the same content is as good.

        Raises:
            Refused, HttpFailure, BackendUnavailable.
            OtherContent: there is one with another content.
        """
        encoded = await to_thread.run_sync(_encoded, body)
        for pause in (*PAUSES_S, None):
            try:
                await self._call("POST", f"{self._core}/configmaps", body=encoded)
            except Refused as exc:
                if exc.status.reason != EXISTS:
                    raise
                if await self.has_config_map(body):
                    return
                if pause is None:
                    raise
                await anyio.sleep(pause)  # it went while we looked
            else:
                return

    async def has_config_map(self, body: Mapping[str, Any], *, content: bool = True) -> bool:
        """Whether there is one of that name; where its ``content`` is asked for too, with the same.

        Raises:
            Refused, HttpFailure, BackendUnavailable.
            OtherContent: there is one with another content.
        """
        name = body["metadata"]["name"]
        headers = None if content else {"Accept": f"{METADATA_ONLY},application/json"}
        try:
            answer = await self._call("GET", f"{self._core}/configmaps/{segment(name)}", headers=headers)
        except Refused as exc:
            if exc.code == 404:
                return False
            raise
        if content and not _same_data(_json(answer), body):
            raise OtherContent(name)
        return True

    async def delete_config_map(self, name: str) -> None:
        """Delete one, if there is one (any more)."""
        await self._delete(f"{self._core}/configmaps/{segment(name)}", None)

    async def config_maps(self) -> list[Thing]:
        """All of cloche's in the namespace, without their contents."""
        return [facts.parse_thing("configmap", item) async for item in self._list(f"{self._core}/configmaps")]

    # --- pods ---------------------------------------------------------------------------------------------------------

    async def pods(self, selector: str) -> tuple[list[Pod], str]:
        """The pods with a label, and the version of the list, from which a watch can go on."""
        pods: list[Pod | None] = []
        version = ""
        async for page in self._pages(f"{self._core}/pods", selector):
            pods += [facts.parse_pod(item) for item in field(page, "items", list, [])]
            version = field(field(page, "metadata", dict, {}), "resourceVersion", str, "")
        return [pod for pod in pods if pod is not None], version

    async def pod(self, name: str) -> Pod | None:
        """One pod; None: it is not there."""
        try:
            return facts.parse_pod(_json(await self._call("GET", f"{self._core}/pods/{segment(name)}")))
        except Refused as exc:
            if exc.code == 404:
                return None
            raise

    async def watch_pods(self, selector: str, version: str) -> AsyncGenerator[tuple[str, Pod | None, str], None]:
        """What happens to the pods with a label since a version: ``ADDED``, ``MODIFIED``, ``DELETED`` or ``BOOKMARK``, the pod,
        and the version from which the next watch can go on. Ends when the server ends it.

        Raises:
            Expired: the version is too old.
            Refused, HttpFailure, BackendUnavailable.
        """
        query: dict[str, str | int | bool] = {
            "labelSelector": selector,
            "watch": True,
            "allowWatchBookmarks": True,
            "resourceVersion": version,
            "timeoutSeconds": WATCH_S,
        }
        async with self._open(f"{self._core}/pods", query, idle_s=WATCH_IDLE_S) as stream:
            if stream.status != 200:
                refused = await _no_stream(stream)
                raise Expired if refused.code == 410 else refused
            async with aclosing(_lines(stream)) as lines:
                async for line in lines:
                    kind, body = field(line, "type", str, ""), field(line, "object", dict, {})
                    if kind == "ERROR":
                        status = facts.parse_status(500, body)
                        raise Expired if status.code == 410 else Refused(status)
                    at = field(field(body, "metadata", dict, {}), "resourceVersion", str, "")
                    yield kind, facts.parse_pod(body), at

    @asynccontextmanager
    async def log(self, pod: str) -> AsyncIterator[Stream | Refused]:
        """The log of a pod's box from its first byte on, followed until the container ends; or why there is none.

        Raises:
            HttpFailure, BackendUnavailable.
        """
        query: dict[str, str | int | bool] = {"container": names.CONTAINER, "follow": True}
        async with self._open(f"{self._core}/pods/{segment(pod)}/log", query, idle_s=LOG_IDLE_S) as stream:
            yield stream if stream.status == 200 else await _no_stream(stream)

    async def events(self, uid: str) -> list[tuple[str, str]]:
        """Reason and message of what the cluster noted about an object, in no order."""
        query: dict[str, str | int | bool] = {"fieldSelector": f"involvedObject.uid={uid}", "limit": PAGE}
        found = _json(await self._call("GET", f"{self._core}/events", query=query))
        return [facts.parse_event(item) for item in field(found, "items", list, [])]

    # --- how ----------------------------------------------------------------------------------------------------------

    async def _list(self, path: str) -> AsyncIterator[object]:
        async for page in self._pages(path, names.OURS, LIST_OF_METADATA):
            for item in field(page, "items", list, []):
                yield item

    async def _pages(self, path: str, selector: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[object]:
        """The answers to a list, one after the other."""
        query: dict[str, str | int | bool] = {"labelSelector": selector, "limit": PAGE}
        while True:
            found = _json(await self._call("GET", path, query=query, headers=headers))
            yield found
            if not (more := field(field(found, "metadata", dict, {}), "continue", str, "")):
                return
            query["continue"] = more

    async def _delete(self, path: str, body: Mapping[str, Any] | None) -> None:
        try:
            await self._call("DELETE", path, body=body)
        except Refused as exc:
            if exc.code != 404:
                raise

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request, as often as it takes; the answer is a success.

        Raises:
            Refused, HttpFailure, BackendUnavailable.
        """
        encoded = body if body is None or isinstance(body, bytes) else _encoded(body)
        given = {**(headers or {}), **({} if encoded is None else {"Content-Type": "application/json"})}
        busy, begun = False, anyio.current_time()

        async def ask() -> Answer:
            nonlocal busy
            answer = await self._once(method, path, query, encoded, given)
            busy = answer.status in BUSY
            if not answer.ok:
                raise _refusal(answer.status, answer.body, answer.headers.get("retry-after", ""))
            return answer

        def least_pause(exc: Exception) -> float | None:
            _log.debug("%s %s: %s", method, path, exc)
            new = isinstance(exc, Refused) and _may_be_new(exc) and anyio.current_time() - begun < NEW_S
            if isinstance(exc, Refused) and (busy or new or exc.status.reason == CONFLICT):
                return min(exc.status.retry_after_s or 0.0, MAX_RETRY_AFTER_S)
            return 0.0 if isinstance(exc, HttpFailure) and not isinstance(exc, TooLarge | TlsFailure) else None

        # A server that never answered is not waited for: it may not be there at all.
        return await repeat(ask, PAUSES_S if self._offset_s is not None else PAUSES_S[:1], least_pause)

    async def _once(
        self, method: str, path: str, query: Query | None, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        """One request; a second one with new credentials where the first one's were refused."""

        async def ask(*, after_refusal: bool) -> Answer:
            async with self._speak(after_refusal=after_refusal) as (http, identity):
                answer = await http.request(
                    method,
                    path,
                    query=query,
                    body=body,
                    headers={"Accept": "application/json", **headers, **identity.headers},
                    timeout_s=QUICK_S,
                    max_bytes=MAX_ANSWER_BYTES,
                )
            self._note_time(answer)
            return answer

        answer = await ask(after_refusal=False)
        return answer if answer.status != 401 else await ask(after_refusal=True)

    @asynccontextmanager
    async def _open(self, path: str, query: Query, *, idle_s: float | None) -> AsyncIterator[Stream]:
        for after_refusal in (False, True):
            async with self._speak(after_refusal=after_refusal) as (http, identity):
                headers = identity.headers
                async with http.stream("GET", path, query=query, headers=headers, idle_s=idle_s) as stream:
                    if stream.status != 401 or after_refusal:
                        yield stream
                        return

    @asynccontextmanager
    async def _speak(self, *, after_refusal: bool = False) -> AsyncIterator[tuple[HttpClient, Identity]]:
        """Over which connections, and as whom. A new client certificate needs new connections; the old ones go when nobody
        uses them any more.
        """
        identity = await self._access.credentials.identity(after_refusal=after_refusal)
        async with self._connecting:
            if self._line is None or identity.certificate != self._line.certificate:
                tls = await to_thread.run_sync(self._access.tls, identity.certificate)
                old, self._line = self._line, _Line(HttpClient(self._server(tls)), identity.certificate)
                if old is not None:
                    self._old.add(old)
                    await self._close_unused()
            line = self._line
        line.users += 1
        try:
            yield line.http, identity
        finally:
            line.users -= 1
            if line in self._old:
                with anyio.CancelScope(shield=True):
                    await self._close_unused()

    def _server(self, tls: ssl.SSLContext | None) -> Server:
        return Server(self._access.base, tls=tls, name=self._access.server_name)

    async def _close_unused(self) -> None:
        for line in [line for line in self._old if line.users == 0]:
            self._old.discard(line)
            await line.http.aclose()

    def _note_time(self, answer: Answer) -> None:
        told = answer.server_time
        self._offset_s = (self._offset_s or 0.0) if told is None else told + 0.5 - time.time()  # it tells whole seconds


def _same_data(found: object, wanted: Mapping[str, Any]) -> bool:
    """Whether a ConfigMap that is there holds what one was to hold."""
    same = field(found, "binaryData", dict, {}) == wanted["binaryData"]
    return same and field(found, "immutable", bool, otherwise=False) and not field(found, "data", dict, {})


def _uid(found: object) -> str:
    uid = field(field(found, "metadata", dict, {}), "uid", str, "")
    if not uid:
        raise ConnectionLost("the API server's answer is not what it says of a Job")
    return uid


def _json(answer: Answer) -> Any:
    return _parsed(answer.body)


def _parsed(body: bytes) -> Any:
    try:
        return parse_json(body)
    except ValueError:
        raise ConnectionLost("what the API server sent is not JSON") from None


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _may_be_new(exc: Refused) -> bool:
    """Whether it may be the word of a server that does not know anybody's rights yet."""
    return exc.code == 403 and _NO_RIGHT.search(exc.message) is not None


def _refusal(http_status: int, body: bytes, retry_after: str = "") -> Refused:
    try:
        status = facts.parse_status(http_status, parse_json(body))
    except ValueError:
        text = facts.shortened(body[: 4 * facts.MAX_MESSAGE].decode("utf-8", "replace"))
        status = Status(http_status, message=text)
    after = float(retry_after) if retry_after.isdecimal() and len(retry_after) < 6 else status.retry_after_s
    return Refused(Status(status.code, status.reason, status.message, after))


async def _no_stream(stream: Stream) -> Refused:
    return _refusal(stream.status, await stream.read(MAX_ERROR_BYTES))


async def _lines(stream: Stream) -> AsyncGenerator[object, None]:
    """A JSON object a line.

    Raises:
        ConnectionLost: a line has no end, or is none.
    """
    partial = bytearray()
    async with aclosing(stream.chunks()) as chunks:
        async for chunk in chunks:
            partial += chunk
            while (end := partial.find(b"\n")) >= 0:
                line = bytes(partial[:end])
                del partial[: end + 1]
                yield _parsed(line)
            if len(partial) > MAX_EVENT_LINE:
                raise ConnectionLost("what the API server says of a pod has no end")
