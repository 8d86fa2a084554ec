"""What a request may ask for. Pure."""

from __future__ import annotations

from cloche.errors import InvalidSpec
from cloche.settings import Settings
from cloche.spec import Network, Spec


def check(spec: Spec, settings: Settings) -> None:
    """Refuse what goes beyond the operator's settings. What the service gives those who ask for nothing is always allowed.

    Raises:
        InvalidSpec: the message has the bound, the hint the setting.
    """
    for name, most in (
        ("timeout", max(settings.serve_max_timeout, settings.timeout)),
        ("memory", max(settings.serve_max_memory, settings.memory)),
        ("cpus", max(settings.serve_max_cpus, settings.cpus)),
        ("pids", max(settings.serve_max_pids, settings.pids)),
    ):
        asked = getattr(spec, name)
        if asked is not None and asked > most:
            raise InvalidSpec(
                f"This service gives a {name} of {most:g} at most.",
                hint=f"Ask for less, or have CLOCHE_SERVE_MAX_{name.upper()} raised.",
            )
    if spec.network is Network.OPEN and settings.serve_network is not Network.OPEN:
        raise InvalidSpec(
            "This service gives no network.", hint="Do without one, or have CLOCHE_SERVE_NETWORK set to open."
        )
    if spec.image is not None and not _is_allowed(spec.image, settings):
        raise InvalidSpec(
            f"This service does not run the image {spec.image[:200]!r}.",
            hint="Leave it out for the service's own, or have it added to CLOCHE_SERVE_IMAGES.",
        )


def _is_allowed(image: str, settings: Settings) -> bool:
    return image == settings.image or any(
        image.startswith(entry[:-1]) if entry.endswith("*") else image == entry for entry in settings.serve_images
    )
