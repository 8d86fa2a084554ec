"""What a Dockerfile says, as far as ours say it: its stages, and the configuration of the image that the last one gives."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.docker import images

_NANOSECONDS = 1_000_000_000
_REFERENCE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
BASE: Mapping[str, str] = {"PATH": images.ENVIRONMENT.removeprefix("ENV PATH=")}
"""The environment that every base image gives, as far as ours refer to it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined and its comments gone."""

    word: str
    value: str


@dataclass(frozen=True)
class Stage:
    """What stands between one FROM and the next."""

    image: str
    name: str
    instructions: tuple[Instruction, ...]

    def all(self, word: str) -> list[str]:
        """The values of all its instructions of a kind."""
        return [found.value for found in self.instructions if found.word == word]

    def config(self, environ: Mapping[str, str] = BASE) -> dict[str, Any]:
        """The configuration of its image as registries and engines keep it, given the environment of the image below.

        Raises:
            ValueError: an instruction that none of our files had so far.
        """
        env = dict(environ)
        config: dict[str, Any] = {}
        for found in self.instructions:
            match found.word:
                case "USER":
                    config["User"] = found.value
                case "WORKDIR":
                    config["WorkingDir"] = found.value
                case "ENTRYPOINT" | "CMD":
                    config[found.word.title()] = json.loads(found.value)
                case "EXPOSE":
                    config.setdefault("ExposedPorts", {})[f"{found.value}/tcp"] = {}
                case "ENV":
                    env |= {name: _filled(value, env) for name, value in _pairs(found.value)}
                case "LABEL":
                    config.setdefault("Labels", {}).update(_pairs(found.value))
                case "HEALTHCHECK":
                    config["Healthcheck"] = _healthcheck(found.value)
                case "ARG" | "COPY" | "RUN":
                    pass  # these give files
                case _:
                    raise ValueError(f"{found.word} is not read yet")
        return {"Env": [f"{name}={value}" for name, value in env.items()], **config}


def stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, with what ARG before the first FROM gives by default put into their images' names."""
    found: list[Stage] = []
    defaults: dict[str, str] = {}
    for instruction in _instructions(path.read_text()):
        if instruction.word == "FROM":
            image, _, name = instruction.value.partition(" AS ")
            found.append(Stage(_filled(image, defaults), name, ()))
        elif found:
            last = found[-1]
            found[-1] = Stage(last.image, last.name, (*last.instructions, instruction))
        elif instruction.word == "ARG":
            name, _, value = instruction.value.partition("=")
            defaults[name] = value
    return found


def _instructions(text: str) -> Iterator[Instruction]:
    whole = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", whole).splitlines():
        word, _, value = line.strip().partition(" ")
        if word:
            yield Instruction(word, " ".join(value.split()))


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (word.partition("=") for word in shlex.split(text))]


def _filled(text: str, values: Mapping[str, str]) -> str:
    return _REFERENCE.sub(lambda match: values[match[1] or match[2]], text)


def _healthcheck(text: str) -> dict[str, Any]:
    options, _, command = text.partition("CMD ")
    parser = argparse.ArgumentParser()
    for name in ("interval", "timeout", "start-period"):
        parser.add_argument(f"--{name}", required=True, type=lambda value: int(value.removesuffix("s")) * _NANOSECONDS)
    given = parser.parse_args(options.split())
    times = {"Interval": given.interval, "Timeout": given.timeout, "StartPeriod": given.start_period}
    return {"Test": ["CMD", *json.loads(command)], **times}
