"""An image with the real OpenSandbox server from its package, configured as the project's own image is.

Checked against the Dockerfile of the project's server (as of June 2026): its program is the entrypoint, and it reads
/etc/opensandbox/config.toml.
"""

from __future__ import annotations

from pathlib import Path

from tests.engines.docker.images import ENVIRONMENT
from tests.engines.opensandbox.service import REQUIREMENTS
from tests.engines.service import layers
from tests.engines.service.archive import Layered

PLACE = "opt/opensandbox"
MORE = Path(__file__).with_name("requirements.txt")
SERVER = Layered(
    "cloche-test/opensandbox-server:1",
    (layers.BASE, layers.environment("cloche-test/opensandbox-packages:1", PLACE, REQUIREMENTS, MORE)),
    {
        "Env": [ENVIRONMENT.removeprefix("ENV ").replace("PATH=", f"PATH=/{PLACE}/bin:")],
        "Entrypoint": ["opensandbox-server"],
        "Cmd": ["--config", "/etc/opensandbox/config.toml"],
        "ExposedPorts": {"8080/tcp": {}},
    },
)
