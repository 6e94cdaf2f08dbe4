"""Decide whether a load balancer should send requests to this server.

The server is ready if the default model is available and no other code has reported a reason to accept no work
(`Readiness.block`).
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.catalog import ModelStatus

# Stages in which a model accepts requests. "idle" and "waking" have no replica yet: requests wait until one is loaded.
_ANSWERING = frozenset({"ready", "idle", "waking"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the server is ready. `status` is ok, loading, failed or a cause given to `Readiness.block`.

    `reasons` are sentences that explain why the server is not ready. `is_blocked` is true if there is such a cause.
    """

    status: str
    reasons: tuple[str, ...] = ()
    is_blocked: bool = False

    @property
    def is_ready(self) -> bool:
        return not self.reasons


class Readiness:
    """The reasons why an application accepts no work. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._blocked: dict[str, str] = {}

    def block(self, cause: str, sentence: str) -> None:
        """Report a reason to accept no work. `cause` is one word, such as "draining"; `sentence` is for clients."""
        self._blocked = {**self._blocked, cause: sentence}

    def clear(self, cause: str) -> None:
        """Remove the reason with this cause."""
        self._blocked = {known: sentence for known, sentence in self._blocked.items() if known != cause}

    def judge(self, default_model: str, status: ModelStatus) -> Verdict:
        """Return whether the server is ready, given the status of the default model."""
        blocked = self._blocked
        reasons = tuple(blocked.values())
        name = next(iter(blocked), "ok")
        if status.stage not in _ANSWERING:
            state = "cannot be loaded" if status.stage == "failed" else "is being loaded"
            reasons = (*reasons, f"the default model, {default_model}, {state}")
            name = next(iter(blocked), status.stage)
        return Verdict(name, reasons, is_blocked=bool(blocked))
