"""Set up logging: key=value lines on standard error, which Ray writes to a file for each process.

Also shortens the log messages of Ray Serve's controller about a dead replica.
"""

from __future__ import annotations

import logging
import re

import structlog

_ROOT = "stable_audio_serve"
_ACTOR_NAME = re.compile(r"\bname: (\S+)")  # finds an actor's name in the message of `ActorDiedError`


def configure_logging(level: str) -> None:
    """Write this package's log events of `level` and above to standard error, from structlog and from `logging`."""
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["event"], bool_as_flag=False),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger(_ROOT)
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(level.upper())
    # At a lower level, this library would log every malformed form that a client sends.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def tidy_controller_log() -> None:
    """Log the death of a replica or proxy in one line. Must be called in the process of Ray Serve's controller.

    The controller asks each replica for its load once a second. Until a health check finds that a replica is dead,
    every failed call would be logged with two tracebacks.

    Other tracebacks are still logged, but without the colour codes of Ray's errors, because the log is a file.
    """
    from ray.exceptions import colorama  # the copy of colorama that Ray contains

    colorama.Fore.CYAN = colorama.Fore.RESET = ""
    logging.getLogger("ray.serve").addFilter(_Deaths())


class _Deaths(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        from ray.exceptions import ActorDiedError

        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, ActorDiedError) or error.actor_init_failed:
            return True
        what = record.getMessage().partition("\n")[0].rstrip(":")
        named = _ACTOR_NAME.search(str(error))
        record.msg, record.args = "%s: %s has died", (what, named[1] if named else error.actor_id)
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = record.exc_text = None
        is_new = (line := record.getMessage()) not in self._logged
        self._logged.add(line)
        return is_new
