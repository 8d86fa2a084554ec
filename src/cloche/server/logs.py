"""The service's log: one JSON object in a line, on stderr. What scripts are and print, and tokens, never stand in it."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from cloche.settings import Settings


def configure(settings: Settings) -> None:
    """Have everything that the process logs written in this form. The level is the settings', else ``info``."""
    level = (settings.log if "log" in settings.model_fields_set else "info").upper()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _without_nothing,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel("WARNING")
    logging.getLogger("cloche").setLevel(level)
    logging.captureWarnings(True)  # noqa: FBT003 (logging's own signature)
    # Requests are logged by the service itself, with more.
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").setLevel("WARNING")


def _without_nothing(_: Any, __: str, event: EventDict) -> EventDict:
    return {name: value for name, value in event.items() if value is not None}
