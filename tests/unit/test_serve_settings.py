"""Who may use the service, as the settings have it; and where it listens."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloche
from cloche.server.auth import ANYBODY, MAX_FILE_BYTES, Caller, Doorkeeper, doorkeeper
from cloche.settings import Settings, split_address

ONE, OTHER = "0123456789abcdef", "fedcba9876543210"


def door(text: str) -> Doorkeeper:
    return doorkeeper(Settings.from_env({"CLOCHE_SERVE_TOKENS": text}))


def test_nobody_needs_a_token() -> None:
    """Without tokens anybody may."""
    keeper = doorkeeper(Settings())
    assert not keeper.needs_tokens
    assert keeper.who(None) is keeper.who("Bearer x") is ANYBODY


@pytest.mark.parametrize("between", [",", "\n", " ,\n", "\r\n", ",,", "\n# a remark, of two parts\n"])
def test_several(between: str, tmp_path: Path) -> None:
    """Tokens stand with commas or lines between, in the environment or a file, each with its name and maybe a limit."""
    text = f" one:{ONE}{between}two-2:{OTHER}:7 "
    (tmp_path / "tokens").write_text(text + "\n")
    in_file = doorkeeper(Settings(serve_tokens_file=str(tmp_path / "tokens")))
    for keeper in (door(text), in_file):
        assert keeper.needs_tokens
        assert keeper.who(f"Bearer {ONE}") == Caller("one")
        assert keeper.who(f"bearer  {OTHER} ") == Caller("two-2", 7)
        assert keeper.who(f"Bearer {ONE[:-1]}") is keeper.who(None) is keeper.who("") is keeper.who(ONE) is None


def test_environment_and_file(tmp_path: Path) -> None:
    """Both together are one list."""
    (tmp_path / "tokens").write_text(f"two:{OTHER}")
    both = {"CLOCHE_SERVE_TOKENS": f"one:{ONE}", "CLOCHE_SERVE_TOKENS_FILE": str(tmp_path / "tokens")}
    keeper = doorkeeper(Settings.from_env(both))
    assert keeper.who(f"Bearer {ONE}") == Caller("one")
    assert keeper.who(f"Bearer {OTHER}") == Caller("two")


MALFORMED = [
    "SECRETSECRETSECRET",
    "one:SECRET",
    "one:SECRETSECRETSECRET:0",
    "one:SECRETSECRETSECRET:-1",
    "one:SECRETSECRETSECRET:many",
    "one:SECRETSECRETSECRET:",
    "one:SECRETSECRETSECRET:1:2",
    "one:SECRET SECRET SECRET",
    "one:SECRETSECRET\u00e9SECRET",
    "One:SECRETSECRETSECRET",
    ":SECRETSECRETSECRET",
    "-one:SECRETSECRETSECRET",
    "one two:SECRETSECRETSECRET",
    "one:" + "SECRET" * 100,
    f"one:SECRETSECRETSECRET,one:{OTHER}",
    "one:SECRETSECRETSECRET,two:SECRETSECRETSECRET",
    "#one:SECRETSECRETSECRET",
    ",",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed(text: str, tmp_path: Path) -> None:
    """An entry that is none, two of one name or one token, or no entry at all are refused, and never shown."""
    (tmp_path / "tokens").write_text(text)
    for settings in (
        Settings.from_env({"CLOCHE_SERVE_TOKENS": text}),
        Settings(serve_tokens_file=str(tmp_path / "tokens")),
    ):
        with pytest.raises(cloche.InvalidSettings) as caught:
            doorkeeper(settings)
        told = "".join(traceback.format_exception(caught.value))
        assert "SECRET" not in told
        assert "SECRET" not in repr(settings)
        assert caught.value.hint


def test_name_twice_in_two_places(tmp_path: Path) -> None:
    """Nor may the environment and the file have one name each."""
    (tmp_path / "tokens").write_text(f"one:{OTHER}")
    with pytest.raises(cloche.InvalidSettings, match="one name"):
        doorkeeper(
            Settings.from_env(
                {"CLOCHE_SERVE_TOKENS": f"one:{ONE}", "CLOCHE_SERVE_TOKENS_FILE": str(tmp_path / "tokens")}
            )
        )


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is missing, a folder, no text or too large is told by its name."""
    (tmp_path / "binary").write_bytes(b"one:\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    (tmp_path / "folder").mkdir()
    for name in ("missing", "binary", "large", "folder"):
        with pytest.raises(cloche.InvalidSettings, match=name):
            doorkeeper(Settings(serve_tokens_file=str(tmp_path / name)))


@given(st.text())
def test_whatever_is_shown(text: str) -> None:
    """Whatever a request shows is somebody's token or nobody's, and no error."""
    assert door(f"one:{ONE}").who(text) is None
    assert door(f"one:{ONE}").who(f"Bearer {text}x") is None


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("0.0.0.0:0", "0.0.0.0", 0),
        ("[::1]:65535", "::1", 65535),
        ("localhost:80", "127.0.0.1", 80),
        ("[0:0:0:0:0:0:0:1]:1", "::1", 1),
    ],
)
def test_address(text: str, host: str, port: int) -> None:
    """An address to listen at is one of IPv4 or IPv6, or localhost, with a port."""
    assert split_address(text) == (host, port)
    assert Settings.from_env({"CLOCHE_SERVE_ADDRESS": text}).serve_address == text
