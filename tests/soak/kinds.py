"""What a run of the soak does, and what its result must be.

Each line that a script writes bears the run's own word, so that what belongs to another run is never taken for right. The word is
also the script's argument: by it whatever a box leaves is found among the processes of this machine.
"""

from __future__ import annotations

import hashlib
import random
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

OUTPUT_BYTES = 256 * 1024
"""The soak's CLOCHE_MAX_OUTPUT_BYTES."""
LONG_S = 60.0
"""No script gets here by itself: those that are no time-outs are not ended by a busy machine."""


@dataclass(frozen=True)
class Expected:
    """The one true result of a script that nothing happened to."""

    outcome: str = "exited"
    exit_code: int | None = 0
    signal: str | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    artifacts: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A script with its expected result. ``spec``: the fields of a :class:`cloche.Spec`, but for what JSON does not hold."""

    spec: Mapping[str, Any]
    expected: Expected
    stdin: bytes | None = None
    workspace: Mapping[str, bytes] | None = None


def lines(word: str, what: str, size: int) -> bytes:
    """So many bytes, every line of which tells whose it is and which."""
    row = f"{word} {what} "
    width = len(row) + 9
    return b"".join(b"%s%08d\n" % (row.encode(), i) for i in range(size // width + 1))[:size]


_LINES = """
import hashlib, os, sys, time
word = sys.argv[1]
def lines(what, size):
    row = f"{word} {what} "
    width = len(row) + 9
    return b"".join(b"%s%08d\\n" % (row.encode(), i) for i in range(size // width + 1))[:size]
"""
"""The same for a script, whose box knows nothing of this module."""


def _python(word: str, body: str, **fields: Any) -> dict[str, Any]:
    return {"name": "main.py", "content": _LINES + textwrap.dedent(body), "args": [word], "timeout": LONG_S, **fields}


def _shell(word: str, body: str, **fields: Any) -> dict[str, Any]:
    return {"name": "main.sh", "content": textwrap.dedent(body), "args": [word], "timeout": LONG_S, **fields}


def exits(word: str, chance: random.Random) -> Made:
    """Ends with a code, having said a word on each stream."""
    code = chance.choice([0, 0, 0, 1, 2, 3, 77, 124, 125, 126, 127, 130, 137, 143, 255])
    spec = _shell(word, f'echo "$1"; echo "$1 err" >&2; exit {code}')
    return Made(spec, Expected(exit_code=code, stdout=f"{word}\n".encode(), stderr=f"{word} err\n".encode()))


def dies(word: str, chance: random.Random) -> Made:
    """Ends by a signal of its own."""
    name = chance.choice(["SIGTERM", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGUSR1", "SIGHUP"])
    spec = _python(word, f"import signal\nprint(word, flush=True)\nos.kill(os.getpid(), signal.{name})\ntime.sleep(60)")
    return Made(spec, Expected("signaled", None, name, f"{word}\n".encode()))


def writes(word: str, chance: random.Random) -> Made:
    """Writes much on both streams, on some more than is kept."""
    sizes = [chance.choice([10, 5_000, 100_000, OUTPUT_BYTES, OUTPUT_BYTES + 1, 3 * OUTPUT_BYTES]) for _ in range(2)]
    code = chance.randrange(3)
    body = f"""
        out, err = lines("out", {sizes[0]}), lines("err", {sizes[1]})
        at = 0
        while at < max(len(out), len(err)):
            for to, what in ((1, out), (2, err)):
                piece = what[at:at + 50_000]
                while piece:
                    piece = piece[os.write(to, piece):]
            at += 50_000
        sys.exit({code})
    """
    return Made(
        _python(word, body),
        Expected(exit_code=code, stdout=lines(word, "out", sizes[0]), stderr=lines(word, "err", sizes[1])),
    )


def leaves(word: str, chance: random.Random) -> Made:
    """Leaves artifacts."""
    files = {
        f"{chance.choice('abc')}/{i}.bin": chance.choice([0, 17, 4096, 200_000]) for i in range(chance.randint(1, 6))
    }
    body = f"""
        for path, size in {files!r}.items():
            os.makedirs("/output/" + os.path.dirname(path), exist_ok=True)
            with open("/output/" + path, "wb") as file:
                file.write(lines(path, size))
        print(word)
    """
    kept = {path: lines(word, path, size) for path, size in files.items()}
    return Made(_python(word, body), Expected(stdout=f"{word}\n".encode(), artifacts=kept))


def outlasts(word: str, chance: random.Random) -> Made:
    """Does not end in its time."""
    ignores = "trap '' TERM; " if chance.random() < 0.5 else ""
    # Under load a second passes before a shell says its word.
    spec = _shell(word, f'echo "$1"; {ignores}sleep 61 & wait; sleep 61', timeout=chance.choice([2.0, 3.0]))
    return Made(spec, Expected("timed_out", None, stdout=f"{word}\n".encode()))


def hogs(word: str, _: random.Random) -> Made:
    """Takes more memory than it may."""
    body = "print(word, flush=True)\ndata = []\nwhile True:\n    data.append(bytearray(b'x' * 2**20))\n"
    return Made(_python(word, body, memory="64Mi"), Expected("out_of_memory", None, stdout=f"{word}\n".encode()))


def forks(word: str, chance: random.Random) -> Made:
    """Leaves children and daemons behind, which hold its pipes."""
    code, number = chance.randrange(4), chance.randint(1, 8)
    body = f"""
        print(word, flush=True)
        for i in range({number}):
            if os.fork() == 0:
                if i % 2:
                    os.setsid()
                    if os.fork():
                        os._exit(0)
                time.sleep(61)
        os._exit({code})
    """
    return Made(_python(word, body), Expected(exit_code=code, stdout=f"{word}\n".encode()))


def echoes(word: str, chance: random.Random) -> Made:
    """Gives back what it reads."""
    stdin = lines(word, "in", chance.choice([0, 1, 1000, 70_000, 200_000]))
    return Made(_shell(word, "cat"), Expected(stdout=stdin), stdin=stdin)


def reads(word: str, chance: random.Random) -> Made:
    """Looks at a workspace, from which its script is."""
    files = {
        f"data/{i}": lines(word, f"file-{i}", chance.choice([1, 999, 50_000])) for i in range(chance.randint(1, 9))
    }
    body = """
        for name in sorted(os.listdir("data")):
            print(name, hashlib.sha256(open("data/" + name, "rb").read()).hexdigest(), word)
    """
    spec = _python(word, body)
    program = str(spec.pop("content")).encode()
    del spec["name"]
    said = [f"{path[5:]} {hashlib.sha256(data).hexdigest()} {word}\n" for path, data in sorted(files.items())]
    return Made(
        {**spec, "script": "main.py"},
        Expected(stdout="".join(said).encode()),
        workspace={**files, "main.py": program},
    )


def ticks(word: str, chance: random.Random) -> Made:
    """Goes on for some seconds, and says so: what happens to a run happens to it in the middle."""
    number, code = chance.randint(15, 45), chance.randrange(5)
    body = f'i=0; while [ $i -lt {number} ]; do echo "$1 $i"; i=$((i+1)); sleep 0.1; done; exit {code}'
    said = "".join(f"{word} {i}\n" for i in range(number))
    return Made(_shell(word, body), Expected(exit_code=code, stdout=said.encode()))


KINDS: Mapping[str, Callable[[str, random.Random], Made]] = {
    kind.__name__: kind for kind in (exits, dies, writes, leaves, outlasts, hogs, forks, echoes, reads, ticks)
}
