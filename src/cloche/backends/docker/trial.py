"""One box that runs nothing but the supervisor's own version: it shows which kernel a runtime gives, and what can be applied."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from cloche.backends import shape
from cloche.backends.contract import Box, Profile
from cloche.errors import BackendUnavailable
from cloche.spec import Limits
from cloche.supervisor.bundle import Bundle
from cloche.supervisor.frames import Data, Decoder, End, Fail, Foreign, Frame, FrameError, Hardening

TIMEOUT_S = 30.0
PIDS = 64


@dataclass(frozen=True, slots=True)
class Shown:
    """What a trial box showed. ``kernel`` is the release that it sees, empty where it was not told."""

    kernel: str
    hardening: Hardening


def profile(owner: str, image: str, start_timeout_s: float) -> Profile:
    """What a trial box is made from."""
    return Profile(
        run_id=f"trial{secrets.token_hex(4)}",
        owner=owner,
        expires_at=time.time() + start_timeout_s + TIMEOUT_S,
        limits=Limits(timeout_s=TIMEOUT_S, pids=PIDS, output_bytes=4096),
        image=image,
    )


async def run(box: Box, made_of: Profile) -> Shown:
    """Feed it and listen to it.

    Raises:
        BackendUnavailable: no script can run in it.
    """
    await box.feed(Bundle(argv=[shape.SUPERVISOR, "version"], env={}, limits=made_of.limits))
    decoder, said = Decoder(), b""
    last: Frame | None = None
    try:
        async for data in box.output():
            for frame in decoder.feed(data):
                if isinstance(frame, Foreign):
                    raise FrameError(f"a foreign line: {frame.line[:80]!r}")
                last = frame
                if isinstance(frame, Data) and frame.stream == "stdout":
                    said += frame.data
    except FrameError as exc:
        raise BackendUnavailable(f"A trial box gave no frames: {exc}.") from exc
    if isinstance(last, End) and last.exit_code == 0:
        kernel = said.decode("utf-8", "replace").partition("kernel ")[2].strip()
        return Shown(kernel, last.hardening)
    reason = last.message if isinstance(last, Fail) else (await box.fate(ended=True)).message
    raise BackendUnavailable(f"A trial box could not be made: {reason}")
