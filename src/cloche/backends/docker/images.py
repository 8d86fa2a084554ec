"""Names of images, taken apart. Pure.

The grammar is that of distribution/reference: the first part is a registry if it has a dot or a colon or is localhost.
"""

from __future__ import annotations

from dataclasses import dataclass

DOCKER_HUB = "docker.io"
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
"""Under which Docker's config.json keeps the Hub's credentials (docker/cli, cli/config/configfile)."""


@dataclass(frozen=True, slots=True)
class Reference:
    """An image's name: ``repository`` with its registry as it was given, and a tag or a digest (``sha256:…``)."""

    repository: str
    tag: str | None
    digest: str | None

    @property
    def registry(self) -> str:
        """The registry's host, with its port where it has one."""
        first, slash, _ = self.repository.partition("/")
        return first if slash and ("." in first or ":" in first or first == "localhost") else DOCKER_HUB

    @property
    def pulled_tag(self) -> str:
        """What to ask the daemon for beside the repository. Asked for nothing, it would fetch every tag."""
        return self.digest or self.tag or "latest"


def parse_reference(image: str) -> Reference:
    """The parts of a name. Whether there is such an image is the daemon's to say."""
    name, _, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:  # a colon before the last slash is a port's
        repository, tag = name, ""
    return Reference(repository, tag or None, digest or None)
