"""Names of Linux signals, whatever system this runs on: the box is always Linux, its client need not be."""

from __future__ import annotations

# Linux on x86_64 and aarch64, include/uapi/asm-generic/signal.h (6.12). Python's signal module has the names of the
# machine it runs on: macOS numbers many signals otherwise, and Windows lacks most.
_NAMES = (
    "SIGHUP SIGINT SIGQUIT SIGILL SIGTRAP SIGABRT SIGBUS SIGFPE SIGKILL SIGUSR1 SIGSEGV SIGUSR2 SIGPIPE SIGALRM SIGTERM "
    "SIGSTKFLT SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGURG SIGXCPU SIGXFSZ SIGVTALRM SIGPROF SIGWINCH SIGIO "
    "SIGPWR SIGSYS"
).split()
_NUMBERS = {name: number for number, name in enumerate(_NAMES, 1)}
_REALTIME = "SIGRTMIN"
# The first one that programs can use: 32 and 33 are the C library's own.
_REALTIME_FIRST = 34


def signal_name(number: int) -> str:
    """The name of a Linux signal: ``SIGKILL`` for 9, ``SIGRTMIN+2`` for 36, ``SIG33`` for one that has none."""
    if 1 <= number <= len(_NAMES):
        return _NAMES[number - 1]
    if number == _REALTIME_FIRST:
        return _REALTIME
    return f"{_REALTIME}+{number - _REALTIME_FIRST}" if number > _REALTIME_FIRST else f"SIG{number}"


def signal_number(name: str) -> int:
    """The number behind a name that :func:`signal_name` gave.

    Raises:
        ValueError: no such signal.
    """
    if name in _NUMBERS:
        return _NUMBERS[name]
    realtime = name.removeprefix(_REALTIME)
    if realtime != name and (not realtime or realtime[0] == "+"):
        return _REALTIME_FIRST + int(realtime or 0)
    if name.startswith("SIG"):
        return int(name.removeprefix("SIG"))
    raise ValueError(f"{name!r} is not the name of a signal")
