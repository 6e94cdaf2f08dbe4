"""Whether this server should be sent requests: the state of its default model, and other reasons to accept no work.

Knows nothing of HTTP. Code that finds another reason to accept no work reports it with `block`.
"""

from __future__ import annotations

from dataclasses import dataclass

from stable_audio_serve.core.catalog import ModelStatus

# A model scaled to zero answers too: its first requests are held until it has been loaded.
_ANSWERING = frozenset({"ready", "idle", "waking"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """`status` is one word: ok, loading, failed or what blocks; `reasons` are sentences, none if requests may come."""

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
        """Accept no work from now on; `cause` is one word, such as `draining`, `sentence` explains it to clients."""
        self._blocked = {**self._blocked, cause: sentence}

    def clear(self, cause: str) -> None:
        """Remove the reason `cause`."""
        self._blocked = {known: sentence for known, sentence in self._blocked.items() if known != cause}

    def judge(self, default_model: str, status: ModelStatus) -> Verdict:
        """Returns whether requests may come, given the status of the default model."""
        blocked = self._blocked
        reasons = tuple(blocked.values())
        word = next(iter(blocked), "ok")
        if status.stage not in _ANSWERING:
            how = "cannot be loaded" if status.stage == "failed" else "is being loaded"
            reasons = (*reasons, f"the default model, {default_model}, {how}")
            word = next(iter(blocked), status.stage)
        return Verdict(word, reasons)
