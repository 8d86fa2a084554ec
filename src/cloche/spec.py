"""What to run (:class:`Spec`), as callers write it, and the resolved limits that a box is made with (:class:`Limits`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from cloche.errors import InvalidSpec
from cloche.isolation import Isolation

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
}
_QUANTITY = re.compile(r"(?P<number>\d{1,15})(?P<unit>[kKmMgG]i?)?B?")

MIN_MEMORY_BYTES = 16 * 2**20
"""Below this no interpreter starts (python3 alone needs 9 MiB), and the end would look like a crash."""
MAX_TIMEOUT_S = 24 * 3600.0
MAX_ARGS = 4096
MAX_ENV = 16_000
"""The supervisor's reader holds 16384 variables, some of which are the box's own."""
MAX_STRINGS_BYTES = 5 * 2**20
"""Of arguments and environment together; the supervisor's reader holds 6 MiB, and the kernel takes less than that."""
MAX_PATH_BYTES = 4000
"""As the supervisor's reader has it; PATH_MAX is 4096 with what stands before (Linux, include/uapi/linux/limits.h)."""
MAX_PART_BYTES = 255
"""NAME_MAX (Linux, include/uapi/linux/limits.h)."""
MAX_ARG_BYTES = 128 * 1024 - 1
"""The kernel's MAX_ARG_STRLEN is 32 pages with the final NUL (Linux, include/uapi/linux/binfmts.h)."""


def parse_bytes(value: Any) -> Any:
    """Bytes from ``"256Mi"``, ``"1G"``, ``"4096"`` or a whole number; anything else is handed on to be refused.

    The units are those of Kubernetes quantities: ``k M G`` are powers of 1000, ``Ki Mi Gi`` of 1024. A final ``B`` is
    allowed.

    Raises:
        ValueError: a string that is no quantity.
    """
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not an amount of bytes such as 256Mi, 1G or 4096")
    return int(match["number"]) * _UNITS[(match["unit"] or "").lower()]


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
"""A whole number of bytes; accepts ``"256Mi"``."""


class Network(StrEnum):
    """What a box may reach: nothing, or whatever the engine's open network gives."""

    NONE = "none"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Limits:
    """Every bound of one run, resolved from spec and settings. Bytes, seconds, counts."""

    timeout_s: float = 60.0
    """Wall clock of the script, from its start."""
    grace_s: float = 0.3
    """Between SIGTERM and SIGKILL at the end of the time. With it ``timed_out`` comes within 1 s of the limit."""
    memory_bytes: int = 256 * 2**20
    cpus: float = 1.0
    pids: int = 128
    output_bytes: int = 2**20
    """Kept of each of stdout and stderr, head and tail together."""
    artifact_bytes: int = 4 * 2**20
    """Collected from /output, per file and in all."""
    artifact_count: int = 256


_REFUSED_ENV = re.compile(
    r"LD_.*|DYLD_.*|GLIBC_TUNABLES|GCONV_PATH|LOCPATH|NLSPATH|GETCONF_DIR|HOSTALIASES|LOCALDOMAIN|"
    r"MALLOC_TRACE|RES_OPTIONS|RESOLV_HOST_CONF|TZDIR|BASH_ENV|ENV|BASH_FUNC_.*|NODE_OPTIONS|PERL5OPT|RUBYOPT|"
    r"PYTHONINSPECT|PYTHONSTARTUP|PYTHONHOME|SHELLOPTS|BASHOPTS|PS4|IFS"
)


def _check_text(value: str, what: str) -> int:
    """The size in bytes of what can be handed to a program; else a ValueError."""
    if "\0" in value:
        raise ValueError(f"{what} holds a NUL byte, which no program can receive")
    try:
        return len(encode(value))
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds a lone surrogate, which stands for no character and no byte") from None


class Spec(BaseModel):
    """One run, as the caller describes it. Values that are None come from the settings.

    Give the script as a path (``script``), or as text (``content`` with ``name``, whose suffix chooses the interpreter).
    With a ``workspace`` a ``script`` is a path inside that folder; without one it is a file of the host that is delivered
    alone. Inline ``content`` with a workspace is put into the workspace under ``name``.

    Raises:
        InvalidSpec: the values cannot describe a run.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )

    script: str | None = None
    content: str | None = Field(default=None, repr=False)
    name: str | None = None
    interpreter: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")
    """Bare name of the program that runs the script, found on the box's PATH. None: chosen by the script's suffix."""
    args: tuple[str, ...] = Field(default=(), max_length=MAX_ARGS)
    env: dict[str, str] = Field(default_factory=dict, repr=False)
    """The environment, exactly, on top of PATH, HOME=/tmp, LANG=C.UTF-8."""
    stdin: bytes | None = Field(default=None, repr=False)
    workspace: Path | None = None
    timeout: float | None = Field(default=None, gt=0, le=MAX_TIMEOUT_S, allow_inf_nan=False)
    """Seconds."""
    memory: ByteSize | None = Field(default=None, ge=MIN_MEMORY_BYTES, le=2**44)
    """Bytes."""
    cpus: float | None = Field(default=None, gt=0, le=1024, allow_inf_nan=False)
    pids: int | None = Field(default=None, ge=4, le=2**22)
    """How many processes and threads the box may hold, the supervisor's one included."""
    network: Network = Network.NONE
    image: str | None = Field(default=None, min_length=1, max_length=512)
    min_isolation: Isolation | None = None

    @field_validator("args")
    @classmethod
    def _args(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for i, arg in enumerate(value):
            if _check_text(arg, f"argument {i + 1}") > MAX_ARG_BYTES:
                raise ValueError(f"argument {i + 1} is longer than {MAX_ARG_BYTES} bytes, the kernel's limit")
        return value

    @field_validator("env")
    @classmethod
    def _env(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) > MAX_ENV:
            raise ValueError(f"there are {len(value)} environment variables, more than {MAX_ENV}")
        for name, text in value.items():
            if not name or "=" in name:
                raise ValueError(f"{name!r} is not a name for an environment variable")
            size = _check_text(name, "the name of an environment variable")
            size += _check_text(text, f"environment variable {name}") + 1
            if _REFUSED_ENV.fullmatch(name):
                raise ValueError(
                    f"environment variable {name} is refused: it would subvert the loader or the interpreter"
                )
            if size > MAX_ARG_BYTES:
                raise ValueError(
                    f"environment variable {name} is longer than {MAX_ARG_BYTES} bytes, the kernel's limit"
                )
        return value

    @model_validator(mode="after")
    def _one_script(self) -> Spec:
        for what, value in (("script", self.script), ("name", self.name)):
            if value is not None:
                _check_text(value, what)
                if not value:
                    raise ValueError(f"{what} is empty")
        if (self.script is None) == (self.content is None):
            raise ValueError("give either script (a path) or content (the script's text), not both and not neither")
        if self.content is not None and self.name is None:
            raise ValueError("content needs a name, whose suffix tells the interpreter, such as main.py")
        if self.name is not None and self.content is None:
            raise ValueError("name goes with content; a script already has its own name")
        inside = self.name if self.script is None else (self.script if self.workspace is not None else None)
        if inside is not None:
            check_inside(inside, "script")
            _check_size(inside)
        if self.workspace is not None:
            _check_text(str(self.workspace), "workspace")
        strings = sum(len(encode(arg)) + 1 for arg in self.args)
        strings += sum(len(encode(f"{name}={value}")) + 1 for name, value in self.env.items())
        if strings > MAX_STRINGS_BYTES:
            raise ValueError(f"arguments and environment together are larger than {MAX_STRINGS_BYTES} bytes")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Spec]) -> Spec:
        # Defined last, so around all the others. An error that is no ValueError passes through pydantic as it is.
        try:
            return handler(data)
        except ValidationError as exc:
            raise _invalid(exc) from None


def _invalid(exc: ValidationError) -> InvalidSpec:
    """Our error for pydantic's, about the first value that is not allowed. Values that may be secret are not repeated."""
    error = exc.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in error["loc"])
    what = error["msg"].removeprefix("Value error, ")
    if not where or where in {"args", "env"}:
        return InvalidSpec(f"{what[:1].upper()}{what[1:]}.")
    shown = "" if where.partition(".")[0] in {"env", "stdin", "content"} else f"={str(error['input'])[:80]!r}"
    return InvalidSpec(f"{where}{shown} is not allowed: {what[:1].lower()}{what[1:]}.")


def encode(text: str) -> bytes:
    """UTF-8, with lone surrogates standing for the bytes that :func:`os.fsdecode` could not decode."""
    return text.encode("utf-8", "surrogateescape")


def _check_size(path: str) -> None:
    if len(encode(path)) > MAX_PATH_BYTES:
        raise ValueError(f"the script's path {path[:80]!r}… is longer than {MAX_PATH_BYTES} bytes")
    for part in path.split("/"):
        if len(encode(part)) > MAX_PART_BYTES:
            raise ValueError(f"the script's path has a name {part[:80]!r}… longer than {MAX_PART_BYTES} bytes")


def check_inside(path: str, what: str) -> None:
    """Refuse a path that is absolute or climbs.

    Raises:
        ValueError: the path starts with ``/`` or has an empty, ``.`` or ``..`` part.
    """
    if path.startswith("/"):
        raise ValueError(f"{what} {path!r} is absolute; it must be a path inside the workspace")
    if any(part in {"", ".", ".."} for part in path.split("/")):
        raise ValueError(f"{what} {path!r} must stay inside the workspace: no '..', '.' or empty part")
