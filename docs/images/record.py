"""Makes docs/images/terminal.svg from a real run: python docs/images/record.py, from a checkout that `make setup` has set up.

The commands run in a pseudo-terminal, so that they write what a person would see, colours included.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "terminal.svg"
COLUMNS, LINES = 120, 60
COMMANDS = (
    "cloche run -v --workspace examples/skills/sales-report --output {out} scripts/report.py -- data/sales.csv",
    "python examples/library/judge.py",
)


def record(command: str) -> str:
    """What the command writes to a terminal.

    Raises:
        RuntimeError: it failed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    env = {k: v for k, v in os.environ.items() if not k.startswith("CLOCHE_") and k not in {"NO_COLOR", "FORCE_COLOR"}}
    env["TERM"] = "xterm-256color"
    program, *rest = shlex.split(command)
    argv = [str(Path(sys.executable).with_name(program)), *rest]
    with subprocess.Popen(  # noqa: S603 # commands of our own
        argv, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:  # EIO: the last one who could write is gone (Linux, drivers/tty/pty.c)
            pass
    os.close(ours)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{written.decode(errors='replace')}")
    return written.decode().replace("\r\n", "\n")


def main() -> None:
    """Run all commands, one after the other, and draw what they wrote."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command.format(out="report"), "bold")))
            # The folder's name is the one thing in the picture that is not as it was written.
            text = record(command.format(out=folder)).replace(folder, "report")
            console.print(Text.from_ansi(text))
    picture = console.export_svg(title="cloche", unique_id="cloche")
    # Fonts from other hosts are not loaded by a picture in a page; the fallback, monospace, is what is seen anyway.
    PICTURE.write_text(re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
