"""Whether this server should be sent requests: what its default model can do, and what else keeps it from taking work.

Knows nothing of HTTP. Whoever notices that the server cannot take work, whatever its models could do, tells it here.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.catalog import ModelStatus

# A model at zero answers too: its first requests are held until it has been loaded.
_ANSWERING = frozenset({"ready", "idle", "waking"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status` is one word: ok, loading, failed or what blocks; `reasons` are sentences, none if requests may come."""

    status: str
    reasons: tuple[str, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether requests may come."""
        return not self.reasons


class Readiness:
    """One per application. Safe from any thread."""

    def __init__(self) -> None:
        self._blocked: dict[str, str] = {}

    def block(self, cause: str, sentence: str) -> None:
        """From now on take no work; `cause` is one word, such as `draining`, and `sentence` tells clients why."""
        self._blocked = {**self._blocked, cause: sentence}

    def clear(self, cause: str) -> None:
        """Take work again as far as `cause` is concerned."""
        self._blocked = {known: sentence for known, sentence in self._blocked.items() if known != cause}

    def judge(self, default_model: str, status: ModelStatus) -> Verdict:
        """Whether requests may come, given what the default model is doing."""
        blocked = self._blocked
        reasons = tuple(blocked.values())
        word = next(iter(blocked), "ok")
        if status.stage not in _ANSWERING:
            how = "cannot be loaded" if status.stage == "failed" else "is being loaded"
            reasons = (*reasons, f"the default model, {default_model}, {how}")
            word = next(iter(blocked), status.stage)
        return Verdict(word, reasons)
