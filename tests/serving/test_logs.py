"""Our changes to the logs of Ray Serve's controller: what it logs about a dead replica and about other failures."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from logging.handlers import BufferingHandler

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayTaskError, colorama

from stable_audio_serve.serving.logs import tidy_controller_log

_NAME = "SERVE_REPLICA::audio#tiny#abcdefgh"
logger = logging.getLogger("ray.serve")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """Configure Ray Serve's logger as in its controller. Yield a list to which its log records are added."""
    handler = BufferingHandler(100)
    for name in ("CYAN", "RESET"):
        monkeypatch.setattr(colorama.Fore, name, getattr(colorama.Fore, name))  # monkeypatch restores it later
    tidy_controller_log()
    logger.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)
        logger.removeFilter(logger.filters[-1])


def log_failure(error: Exception) -> None:
    """Log an error like Ray Serve's controller, with the traceback both in the message and in `exc_info`."""
    try:
        raise error
    except Exception:
        logger.exception("Exception when trying to get routing stats:\nTraceback (most recent call last):\n  ...")


def make_death() -> ActorDiedError:
    return ActorDiedError(ActorDiedErrorContext(class_name="ServeReplica:audio:tiny", actor_id=b"1" * 16, name=_NAME))


def test_dead_replica_is_logged_once_in_one_line(lines: list[logging.LogRecord]) -> None:
    log_failure(make_death())
    log_failure(make_death())
    (line,) = lines
    assert logging.Formatter().format(line) == f"Exception when trying to get routing stats: {_NAME} has died"
    assert line.levelno == logging.WARNING


def test_other_failures_keep_their_tracebacks(lines: list[logging.LogRecord]) -> None:
    for _ in range(2):
        log_failure(RuntimeError("a bug"))
    assert [logging.Formatter().format(line).count("Traceback") for line in lines] == [2, 2]


def test_errors_of_other_processes_have_no_colours(lines: list[logging.LogRecord]) -> None:
    trace = "Traceback (most recent call last):\n  what went wrong"
    log_failure(RayTaskError("f", trace, ValueError("x"), proctitle="ray::Replica", pid=1, ip="127.0.0.1"))
    (line,) = lines
    assert "ray::Replica() (pid=1" in logging.Formatter().format(line)
