"""How long a runner waits where nothing calls it back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerPauses:
    """Seconds; the defaults are the real ones, tests give shorter ones."""

    first_poll_s: float = 0.25  # doubles while there is nothing to do
    last_poll_s: float = 3.0  # the most that a lost wake-up costs; with it idle runners ask less than once a second
    count_s: float = 15.0  # between two counts of the jobs of each state
    replicas_s: float = 2.0  # between two questions how many replicas each model has
    report_s: float = 0.5  # between two reports of progress; what takes no longer is not worth a transaction
    settle_s: float = 1.0  # until the end of a job is written again when the store has failed
    retry_s: float = 2.0  # at most, before another attempt at a job; doubles with each
    last_retry_s: float = 60.0
    probe_s: float = 1.0  # at most, before the place for files is tried again; doubles with each refusal
    last_probe_s: float = 60.0
