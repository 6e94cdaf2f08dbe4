"""Runs a check and collects its findings. An exception in a check becomes a finding, so that other checks still run."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Literal

from stable_audio_serve.core.errors import StableAudioError

State = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the result. `advice` names the remedy, if the message does not."""

    check: str
    state: State
    message: str
    advice: str | None = None


Check = Callable[[], Iterable[Finding]]


def run_check(name: str, check: Check) -> list[Finding]:
    """Return the findings of a check. An exception ends the check and becomes its last finding, a failure."""
    found: list[Finding] = []
    try:
        with _quiet():
            for finding in check():
                found.append(finding)  # noqa: PERF402 - the findings before an exception are kept
    except StableAudioError as error:
        found.append(Finding(name, "failure", error.message))
    except Exception as error:  # noqa: BLE001 - a fault of one check must not hide the others
        reason = next(filter(None, map(str.strip, str(error).splitlines())), "no message")
        advice = "report it with the file that --report writes, if the reason is not on this machine"
        found.append(Finding(name, "failure", f"{type(error).__name__}: {reason}", advice))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide log lines, with their tracebacks, and warnings. Standard output is for the findings only."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
