"""How much of a device's memory captured calls have taken, which they keep for good. Knows no call and no shape."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from stable_audio_serve.engine.device import Device

log = logging.getLogger(__name__)


class CaptureRoom:
    """Counts by what this process holds more after a capture than before. Used by one thread."""

    def __init__(self, device: Device, *, max_bytes: int | None) -> None:
        """`max_bytes` None: no bound, and nothing is counted."""
        self._device = device
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be captured."""
        return self._max_bytes is not None and self.num_bytes >= self._max_bytes

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Returns a context for one capture, which may fail."""
        before = self._held()
        try:
            yield
        finally:
            self.num_bytes += max(0, self._held() - before)
            if self.is_full:
                held_gb = self.num_bytes / 1e9
                log.warning("captured calls hold %.3g GB: calls of other shapes run without (memory_share)", held_gb)

    def _held(self) -> int:
        memory = None if self._max_bytes is None else self._device.memory()
        return 0 if memory is None else memory.held
