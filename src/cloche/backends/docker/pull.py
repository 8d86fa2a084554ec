"""What the daemon says of a pull → one line for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloche._kit.fields import field

_MIB = 2**20


class Progress:
    """Adds up the layers of one pull."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._layers: dict[str, tuple[int, int]] = {}

    def add(self, said: Mapping[str, Any]) -> str:
        """How far it is, after one more word of the daemon's."""
        layer, status = field(said, "id", str, ""), field(said, "status", str, "")
        detail = field(said, "progressDetail", dict, {})
        current, total = field(detail, "current", int, 0), field(detail, "total", int, 0)
        if layer and status == "Downloading" and total > 0:
            self._layers[layer] = (min(current, total), total)
        elif layer in self._layers and status in {
            "Download complete",
            "Verifying Checksum",
            "Extracting",
            "Pull complete",
        }:
            total = self._layers[layer][1]
            self._layers[layer] = (total, total)
        return self.line()

    def line(self) -> str:
        """The same, again."""
        if not self._layers:
            return f"pulling {self._image}"
        done, total = (sum(column) for column in zip(*self._layers.values(), strict=True))
        if done == total:
            return f"pulling {self._image}: {total / _MIB:.1f} MiB are here, unpacking"
        return f"pulling {self._image}: {done / _MIB:.1f} of {total / _MIB:.1f} MiB"
