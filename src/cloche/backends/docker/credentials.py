"""What a registry wants to see, from Docker's config.json and its credential helpers. Blocks.

The formats are docker/cli's (cli/config/configfile, cli/config/credentials) and docker/docker-credential-helpers'; checked
with docker/cli 29.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

from cloche.backends.docker.address import read_config
from cloche.backends.docker.images import DOCKER_HUB, DOCKER_HUB_KEY

HELPER_S = 30.0
"""A helper may ask a keyring, or the network for a short-lived token."""
TOKEN_USER = "<token>"  # noqa: S105 (the helpers' word for: what follows is an identity token)

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_log = logging.getLogger("cloche.docker")


def registry_auth(folder: Path, registry: str) -> str | None:
    """The value of ``X-Registry-Auth`` for a registry (``docker.io``, ``registry.example:5000``); None: there is nothing.

    A helper that fails is logged and counts as nothing: the registry will then say what it lacks.
    """
    config = read_config(folder)
    key = DOCKER_HUB_KEY if registry == DOCKER_HUB else registry
    found = _from_helper(config, key) or _from_file(config, key)
    if found is None:
        return None
    return base64.urlsafe_b64encode(json.dumps({**found, "serveraddress": key}).encode()).decode()


def _from_helper(config: dict[str, Any], key: str) -> dict[str, str] | None:
    helpers = config.get("credHelpers")
    name = helpers.get(key) if isinstance(helpers, dict) else None
    name = name or config.get("credsStore")
    if not name:
        return None
    if not isinstance(name, str) or _HELPER.fullmatch(name) is None:
        _log.warning("%r in Docker's config.json is no name of a credential helper", name)
        return None
    try:
        done = subprocess.run(  # noqa: S603 (the user's own configuration names it)
            [f"docker-credential-{name}", "get"],
            input=key.encode(),
            capture_output=True,
            timeout=HELPER_S,
            check=False,
        )
        if done.returncode != 0:
            _log.info("docker-credential-%s has nothing for %s", name, key)
            return None
        said = json.loads(done.stdout)
        user, secret = str(said["Username"]), str(said["Secret"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as exc:
        _log.warning("docker-credential-%s could not be asked: %s", name, type(exc).__name__)
        return None
    return {"identitytoken": secret} if user == TOKEN_USER else {"username": user, "password": secret}


def _from_file(config: dict[str, Any], key: str) -> dict[str, str] | None:
    auths = config.get("auths")
    if not isinstance(auths, dict):
        return None
    # Older versions of Docker wrote addresses where a host is meant.
    entry = next((v for k, v in auths.items() if k == key or _host(k) == _host(key)), None)
    if not isinstance(entry, dict):
        return None
    if entry.get("identitytoken"):
        return {"identitytoken": str(entry["identitytoken"])}
    try:
        text = base64.b64decode(str(entry.get("auth", "")), validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    user, colon, password = text.partition(":")
    if colon:
        return {"username": user, "password": password.rstrip("\0")}
    if entry.get("username"):
        return {"username": str(entry["username"]), "password": str(entry.get("password", ""))}
    return None


def _host(key: str) -> str:
    return re.sub(r"^https?://", "", key).partition("/")[0]
