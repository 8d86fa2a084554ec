"""What goes into a run beside the script: arguments, standard input, environment. All byte-exact, no shell anywhere."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest

import cloche
from cloche.testing.conformance.target import Suite, Target, assert_exited, python, shell

ARGUMENTS = {
    "none": [],
    "empty string": ["", "x", ""],
    "spaces": ["a b", " lead", "trail ", "\t"],
    "quotes": ['"', "'", "a'b\"c", "\\'", "`"],
    "newlines": ["a\nb", "\n", "\r\n"],
    "substitution": ["$(touch /tmp/pwned)", "`id`", "$HOME", "${PATH}", "$((1+1))"],
    "operators": [";", "&&", "|", "> /tmp/x", "a;b", "&", "#", "!"],
    "globs": ["*", "?", "[a-z]", "~", "{a,b}"],
    "unicode": ["ü", "日本語", "🎉", "e\u0301", "\u202e"],
    "dashes": ["-", "--", "-c", "--help", "-x=1", "-"],
    "not utf-8": ["\udcff\udc80", "a\udcfeb"],
    "control": ["\x01\x1b[31m", "\x7f"],
    "long": ["x" * 100_000],
    "many": [str(i) for i in range(2000)],
}
SHOW_ARGUMENTS = "import json, os, sys; print(json.dumps([os.fsencode(a).hex() for a in sys.argv[1:]]))"

LOADER_NAMES = ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "GLIBC_TUNABLES", "GCONV_PATH", "BASH_ENV", "PYTHONHOME"]


class Inputs(Suite):
    """Arguments, stdin and environment."""

    @pytest.mark.parametrize("name", ARGUMENTS)
    async def test_arguments(self, sandbox: cloche.Sandbox, name: str) -> None:
        """Arguments reach the script as they are, byte for byte."""
        args = ARGUMENTS[name]
        result = await sandbox.run(python(SHOW_ARGUMENTS, args=args))
        assert_exited(result)
        assert [bytes.fromhex(a) for a in json.loads(result.stdout)] == [
            a.encode("utf-8", "surrogateescape") for a in args
        ]

    async def test_arguments_of_a_shell_script(self, sandbox: cloche.Sandbox) -> None:
        """A shell script's arguments are its own words, never code."""
        args = ["$(echo no)", "a b", "", "*", "; echo no", "-e"]
        result = await sandbox.run(shell("printf '[%s]' \"$@\"", args=args))
        assert_exited(result)
        assert result.stdout == "".join(f"[{a}]" for a in args)

    @pytest.mark.parametrize(
        "fields",
        [{"args": ["a\0b"]}, {"env": {"A": "b\0c"}}, {"env": {"A\0": "b"}}, {"env": {"A=B": "c"}}, {"env": {"": "c"}}],
    )
    def test_impossible_inputs_are_refused(self, in_environment: Target, fields: dict[str, Any]) -> None:
        """What no program can receive is refused as ``invalid-spec``, by the spec itself and by run()."""
        with pytest.raises(cloche.InvalidSpec):
            python("pass", **fields)
        with pytest.raises(cloche.InvalidSpec) as caught:
            cloche.run(name="main.py", content="pass", **fields)
        assert caught.value.code == "invalid-spec"
        assert caught.value.hint

    @pytest.mark.parametrize(
        "data",
        [b"", b"text\n", bytes(range(256)), b"no newline", b"\0" * 10],
        ids=["empty", "text", "binary", "tail", "nul"],
    )
    async def test_stdin(self, sandbox: cloche.Sandbox, data: bytes) -> None:
        """The script reads the bytes it was given, then the end."""
        result = await sandbox.run(python("import sys; sys.stdout.write(sys.stdin.buffer.read().hex())", stdin=data))
        assert_exited(result)
        assert bytes.fromhex(result.stdout) == data

    async def test_no_stdin(self, sandbox: cloche.Sandbox) -> None:
        """Without stdin a script that reads meets the end at once."""
        result = await sandbox.run(python("import sys; print(repr(sys.stdin.buffer.read()))", timeout=10))
        assert_exited(result)
        assert result.stdout == "b''\n"

    async def test_large_stdin(self, sandbox: cloche.Sandbox) -> None:
        """5 MiB of binary stdin arrive whole."""
        data = random.Random(5).randbytes(5 * 2**20)
        source = "import hashlib, sys; d = sys.stdin.buffer.read(); print(len(d), hashlib.sha256(d).hexdigest())"
        result = await sandbox.run(python(source, stdin=data))
        assert_exited(result)
        assert result.stdout == f"{len(data)} {hashlib.sha256(data).hexdigest()}\n"

    async def test_unread_stdin(self, sandbox: cloche.Sandbox) -> None:
        """A script that never reads its 5 MiB of stdin ends as it likes."""
        assert_exited(await sandbox.run(python("raise SystemExit(3)", stdin=b"x" * (5 * 2**20))), 3)

    async def test_stdin_is_no_terminal_and_not_shared(self, sandbox: cloche.Sandbox) -> None:
        """No stream of the script is a terminal, and stdin can be read again from its start only by who holds it."""
        result = await sandbox.run(python("import os; print([os.isatty(fd) for fd in (0, 1, 2)])", stdin=b"x"))
        assert_exited(result)
        assert result.stdout == "[False, False, False]\n"

    async def test_environment_is_exact(self, sandbox: cloche.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        """The script has PATH, HOME=/tmp, LANG and what it was given, and nothing of ours."""
        monkeypatch.setenv("OF_THE_HOST", "secret")
        given = {
            "GREETING": "héllo wörld",
            "EMPTY": "",
            "WITH_EQUALS": "a=b=c",
            "LINES": "a\nb",
            "lower.and-odd name": "1",
        }
        source = "import sys; sys.stdout.buffer.write(open('/proc/self/environ', 'rb').read())"
        result = await sandbox.run(python(source, env=given))
        assert_exited(result)
        got = dict(item.split("=", 1) for item in result.stdout.split("\0") if item)
        assert {name: got.pop(name) for name in given} == given
        assert got.pop("PATH")
        assert got == {"HOME": "/tmp", "LANG": "C.UTF-8"}

    async def test_given_variables_replace_the_defaults(self, sandbox: cloche.Sandbox) -> None:
        """HOME and LANG can be set by the caller."""
        result = await sandbox.run(shell('echo "$HOME $LANG"', env={"HOME": "/output", "LANG": "C"}))
        assert_exited(result)
        assert result.stdout == "/output C\n"

    @pytest.mark.parametrize("name", LOADER_NAMES)
    def test_variables_that_subvert_the_loader_are_refused(self, in_environment: Target, name: str) -> None:
        """A variable that would make the loader or the interpreter run other code is refused, by name."""
        with pytest.raises(cloche.InvalidSpec, match=name) as caught:
            cloche.run(name="main.py", content="pass", env={name: "/tmp/evil.so"})
        assert caught.value.code == "invalid-spec"

    async def test_network(self, sandbox: cloche.Sandbox) -> None:
        """Without a word on it a run has no network but perhaps its own loopback; with ``open`` it has the engine's."""
        source = "import socket; print(sorted(name for _, name in socket.if_nameindex()))"
        closed = await sandbox.run(python(f"try:\n    {source}\nexcept PermissionError:\n    print([])"))
        assert_exited(closed)
        assert closed.stdout in {"['lo']\n", "[]\n"}
        opened = await sandbox.run(python(source, network=cloche.Network.OPEN))
        assert_exited(opened)
        assert "'lo'" in opened.stdout
        assert len(opened.stdout) >= len(closed.stdout)
        server = """
            import socket
            with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
                server.accept()[0].sendall(b"heard")
                print(client.recv(5).decode())
        """
        result = await sandbox.run(python(server, network=cloche.Network.OPEN))
        assert_exited(result)
        assert result.stdout == "heard\n"

    async def test_identity(self, sandbox: cloche.Sandbox) -> None:
        """The script is nobody: not root, no capability, nothing to gain by setuid programs, a session of its own."""
        result = await sandbox.run(
            python("""
                import os
                status = dict(line.split(":", 1) for line in open("/proc/self/status"))
                print(0 in os.getresuid(), 0 in os.getresgid(), 0 in os.getgroups(), os.getpid() == 1)
                print(*(status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")))
                print(os.getsid(0) == os.getpid(), os.getcwd(), oct(os.umask(0)))
            """)
        )
        assert_exited(result)
        zero = "0" * 16
        identity, rights, session = result.stdout.splitlines()
        assert identity == "False False False False"
        assert rights == f"{zero} {zero} {zero} {zero} {zero} 1"
        assert session.startswith("True /workspace 0o")
