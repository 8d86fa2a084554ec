"""The terminal of whoever started the run: nothing may be typed into it, nothing but the run's output shown on it."""

from __future__ import annotations

from pathlib import Path

from tests.escape.attack import PREAMBLE, judge

from cloche.testing.conformance import Target
from cloche.testing.conformance.terminal import command, on_terminal

SETUP = r"""
TIOCSTI, TIOCLINUX, TIOCSCTTY = 0x5412, 0x541C, 0x540E

def type_into(fd):
    for key in b"echo pwned\n":
        fcntl.ioctl(fd, TIOCSTI, bytes([key]))
    return "typed"

def paste(fd):
    # TIOCLINUX 3: paste the console's selection
    fcntl.ioctl(fd, TIOCLINUX, ctypes.create_string_buffer(b"\3"))
    return "pasted"

def opened(path):
    return os.open(path, os.O_RDWR | os.O_NONBLOCK)
"""
PATHS = (
    "/dev/tty",
    "/dev/console",
    "/dev/pts/0",
    "/dev/pts/1",
    "/dev/pts/2",
    "/dev/tty0",
    "/dev/tty1",
    "/dev/stdin",
    "/proc/1/fd/0",
    "/proc/1/fd/1",
    "/proc/1/fd/2",
)


def test_nothing_is_typed(target: Target, tmp_path: Path) -> None:
    """A script run from a terminal cannot type into it (TIOCSTI, TIOCLINUX) nor make it its own, over any fd or device.

    Guard: a session without a terminal, no fd of it in the box, a /dev/pts of the box's own.
    """
    attempts: dict[str, str] = {}
    for fd in range(10):
        attempts[f"type into fd {fd}"] = f"type_into({fd})"
        attempts[f"paste into fd {fd}"] = f"paste({fd})"
        attempts[f"take fd {fd}"] = (
            f"(os.setsid() if os.getsid(0) != os.getpid() else 0, fcntl.ioctl({fd}, TIOCSCTTY, 1))"
        )
        attempts[f"is a terminal: fd {fd}"] = f"quietly(os.ttyname, {fd})"
    for path in PATHS:
        attempts[f"type into {path}"] = f"type_into(opened({path!r}))"
        attempts[f"paste into {path}"] = f"paste(opened({path!r}))"
    attempts["controlling terminal"] = "open('/proc/self/stat').read().rsplit(')', 1)[1].split()[4] != '0'"
    lines = [
        PREAMBLE,
        SETUP,
        *(f"attempt({name!r}, lambda: ({code}))" for name, code in attempts.items()),
        "print('the end')",
    ]
    source = tmp_path / "attack.py"
    source.write_text("\n".join(lines))
    with on_terminal(command("run", str(source)), target.command_environment()) as terminal:
        shown = terminal.read(None, within_s=60)
        assert terminal.process.wait(10) == 0, shown[-2000:]
        typed = terminal.typed_ahead()
    assert typed == b""
    text = shown.decode().replace("\r\n", "\n")
    assert "the end\n" in text
    judge(text, attempts, also_refused=("ENOTTY", "EBADF", "ENXIO", "EIO", "EINVAL", "ENODEV"))


def test_the_terminal_would_show_it(tmp_path: Path) -> None:
    """What is typed into the terminal of this test is seen: the test above looks at the right thing."""
    with on_terminal(["sleep", "0.5"], {}) as terminal:
        terminal.press(b"pwned\n")
        terminal.process.wait(10)
        assert terminal.typed_ahead() == b"pwned\n"
