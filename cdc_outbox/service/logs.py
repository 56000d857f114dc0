"""Logs: structlog to standard error, for people (console) or machines (json), one stable event name per kind.

Event names are snake_case constants where they are logged. No payloads, no secrets: values are names, LSNs and numbers.
"""

import logging
import os
import sys
from contextlib import suppress
from typing import Final, Literal

_RICH: Final = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment] # structlog would load it, for tracebacks that ours are not
import structlog  # noqa: E402
from structlog.typing import FilteringBoundLogger  # noqa: E402

del sys.modules["rich"]
if _RICH:
    sys.modules["rich"] = _RICH

STDERR: Final = 2

LogFormat = Literal["console", "json"]


class _StandardError:
    """It may be full, or its reader may have gone: then a line is lost, and what it would have told of goes on.

    Written to without a buffer: what stays in one would be tried again at the end, and end the process with 120.
    """

    def write(self, text: str) -> None:
        with suppress(OSError):
            os.write(STDERR, text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Nothing is held back."""


class _Forward(logging.Handler):
    """Libraries log through the standard library (librdkafka, psycopg.pool); their lines join ours, for debugging.

    What of it matters becomes a state with its reason, or an error: librdkafka repeats itself a hundred times a second.
    """

    def emit(self, record: logging.LogRecord) -> None:
        get_logger().debug("library", library=record.name, message=record.getMessage())


def configure(log_format: LogFormat, level: str) -> None:
    """``level``: debug, info, warning or error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=_StandardError()),  # type: ignore[arg-type] # no more is used
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


def say(line: str) -> None:
    """A line for people on standard error, lost rather than in the way."""
    _StandardError().write(f"{line}\n")


def get_logger() -> FilteringBoundLogger:
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger
