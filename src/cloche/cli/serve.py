"""``cloche serve``: the settings, then the service until it is asked to end."""

from __future__ import annotations

import os
from collections.abc import Callable

from cloche.cli import exits, render
from cloche.errors import ClocheError, InvalidSettings
from cloche.settings import Settings


def execute(address: str | None, mode: str | None) -> int:
    """Serve, and give the exit status. Errors are told on stderr; nothing is raised for them."""
    given = {"serve_address": address, "mode": mode}
    try:
        settings = Settings.from_env(os.environ, **{name: value for name, value in given.items() if value is not None})
        _server()(settings)
    except ClocheError as error:
        render.say_error(error)
        return exits.status_of_error(error)
    return 0


def _server() -> Callable[[Settings], None]:
    """Raises: InvalidSettings: what it needs is not installed."""
    try:
        from cloche.server.process import serve
    except ModuleNotFoundError as exc:
        raise InvalidSettings(
            f"The service needs {exc.name}, which is not installed.", hint="Install it: pip install 'cloche[server]'."
        ) from None
    return serve
