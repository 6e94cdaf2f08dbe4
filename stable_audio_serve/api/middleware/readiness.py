"""Whether a load balancer should send requests to this server: state of the default model, and other reasons.

Independent of HTTP. Other code reports a reason to accept no work with `block`.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.catalog import ModelStatus

# A model scaled to zero is ready too: its first requests are held until it has loaded.
_ANSWERING = frozenset({"ready", "idle", "waking"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status` is ok, loading, failed or a blocking cause. `reasons` are sentences, empty when the server is ready."""

    status: str
    reasons: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        return not self.reasons


class Readiness:
    """One per application. Safe from any thread."""

    def __init__(self) -> None:
        self._blocked: dict[str, str] = {}

    def block(self, cause: str, sentence: str) -> None:
        """Accept no work. `cause` is one word, for example `draining`; `sentence` explains it to clients."""
        self._blocked = {**self._blocked, cause: sentence}

    def clear(self, cause: str) -> None:
        """Remove a blocking cause."""
        self._blocked = {known: sentence for known, sentence in self._blocked.items() if known != cause}

    def judge(self, default_model: str, status: ModelStatus) -> Verdict:
        """Returns whether the server is ready, given the status of the default model."""
        blocked = self._blocked
        reasons = tuple(blocked.values())
        name = next(iter(blocked), "ok")
        if status.stage not in _ANSWERING:
            state = "cannot be loaded" if status.stage == "failed" else "is being loaded"
            reasons = (*reasons, f"the default model, {default_model}, {state}")
            name = next(iter(blocked), status.stage)
        return Verdict(name, reasons)
