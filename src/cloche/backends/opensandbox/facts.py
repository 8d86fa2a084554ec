"""What the service's answers mean. Pure; whatever is missing counts as not said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cloche._kit.fields import MAX_LINE, parse_json, shortened
from cloche._kit.fields import field as member

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DEAD = frozenset({"Failed", "Terminated"})


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One sandbox as the service shows it."""

    id: str
    state: str = ""
    reason: str = ""
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    created_at: float | None = None
    """Unix time in seconds."""

    @property
    def dead(self) -> bool:
        """Whether it has ended; it is still there."""
        return self.state in _DEAD


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no success. ``code`` is the service's own, such as ``DOCKER::SANDBOX_NOT_FOUND``."""

    status: int
    code: str = ""
    message: str = ""
    request_id: str = ""
    retry_after_s: float | None = None


def is_id(text: str) -> bool:
    """Whether a sandbox or a command may be called so. It becomes a part of paths and queries."""
    return bool(_ID.fullmatch(text))


def parse_sandbox(found: object) -> Sandbox | None:
    """One sandbox; None: it has no name that one could have."""
    name, status = member(found, "id", str, ""), member(found, "status", dict, {})
    if not is_id(name):
        return None
    metadata = {
        k: v for k, v in member(found, "metadata", dict, {}).items() if isinstance(k, str) and isinstance(v, str)
    }
    return Sandbox(
        name,
        shortened(member(status, "state", str, ""), 64),
        shortened(member(status, "reason", str, "")),
        shortened(member(status, "message", str, "")),
        metadata,
        _time(member(found, "createdAt", str, "")),
    )


def _time(text: str) -> float | None:
    try:
        told = datetime.fromisoformat(text)
        return (told if told.tzinfo is not None else told.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def parse_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """The four shapes that errors have: code and message; a list of what is wrong with a request; a detail; plain text.
    execd adds a fifth, ``{"error": …}``.
    """
    after = headers.get("retry-after", "")
    retry = float(after) if after.isascii() and after.isdecimal() and len(after) < 6 else None
    request_id = "".join(c for c in headers.get("x-request-id", "")[:64] if c.isascii() and c.isprintable())
    try:
        found: Any = parse_json(body)
    except ValueError:
        found = None
    code, message = member(found, "code", str, ""), member(found, "message", str, "")
    detail = found.get("detail") if isinstance(found, Mapping) else None
    if isinstance(detail, Mapping):
        code, message = code or member(detail, "code", str, ""), message or member(detail, "message", str, "")
    elif isinstance(detail, list):
        message = message or "; ".join(map(_wrong, detail[:5]))
    elif isinstance(detail, str):
        message = message or detail
    message = message or member(found, "error", str, "")
    if found is None:
        message = body[: 4 * MAX_LINE].decode("utf-8", "replace").strip()
    return Refusal(status, shortened(code, 100), shortened(message), request_id, retry)


def _wrong(item: object) -> str:
    where = member(item, "loc", list, [])
    return f"{'.'.join(map(str, where[1:]))}: {member(item, 'msg', str, '')}" if where else member(item, "msg", str, "")


def machine_of(program: bytes) -> str:
    """The architecture of a program, by the head of its file (ELF: elf(5), ``e_machine``); empty: it cannot be told."""
    if program[:4] != b"\x7fELF" or len(program) < 20:
        return ""
    order = "little" if program[5] == 1 else "big"
    return {62: "x86_64", 183: "aarch64"}.get(int.from_bytes(program[18:20], order), f"ELF {program[18:20].hex()}")  # type: ignore[arg-type]
