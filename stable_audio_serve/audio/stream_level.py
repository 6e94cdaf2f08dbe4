"""Bring audio that arrives in blocks to a target loudness, and fade its ends.

`audio.level` does this for a clip that is in memory as a whole.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stable_audio_serve.audio.level import MOST_PASSES, fade, next_gain_db, to_dbtp, to_gain
from stable_audio_serve.audio.loudness import ClipMeter
from stable_audio_serve.audio.peaks import BLOCK, LIMITED_AROUND_S, limit
from stable_audio_serve.audio.true_peak import envelope
from stable_audio_serve.core.sound import Finishing, Loudness

if TYPE_CHECKING:
    import numpy.typing as npt

_LIMITED_S = 5.0  # length of the audio that is limited at once
_REACH = 32  # a value between two samples depends on fewer samples than this on each side


class TruePeakMeter:
    """Measures the true peak of audio that arrives in blocks."""

    def __init__(self) -> None:
        self._peak = 0.0
        self._waiting: npt.NDArray[np.float32] | None = None
        self._num_before = 0  # samples at the start of `_waiting` that have been measured

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Measure the next samples (C, S)."""
        waiting = block if self._waiting is None else np.concatenate([self._waiting, block], axis=1)
        stop = waiting.shape[1] - _REACH  # values before `stop` depend only on samples that have arrived
        if stop > self._num_before:
            self._peak = max(self._peak, float(envelope(waiting)[self._num_before : stop].max()))
            kept = min(_REACH, stop)
            waiting, self._num_before = waiting[:, stop - kept :].copy(), kept
        self._waiting = waiting

    def finish(self) -> float:
        """Return the true peak, 1 = full scale. Call this once, after the last block."""
        if self._waiting is None or not self._waiting.shape[1]:
            return self._peak
        return max(self._peak, float(envelope(self._waiting)[self._num_before :].max(initial=0.0)))


class LoudnessSearch:
    """Finds the gain with which a piece has its target loudness. Each pass over the piece improves the gain.

    Use it as `while search.needs_pass: for each block: search.add(block); search.end_pass()`.
    """

    def __init__(self, sample_rate_hz: int, *, loudness: Loudness) -> None:
        self._rate_hz = sample_rate_hz
        self._loudness = loudness
        self._tried: list[tuple[float, float]] = []  # each gain in dB, and the loudness that it gave in LUFS
        self.gain_db: float | None = None  # None: the piece is silent or was not measured yet
        self.needs_pass = True
        self.factor = 1.0  # multiplies the limited audio, so that its true peak is not too high
        self._begin_pass()

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Measure the next samples (C, S) of the piece, with the gain of this pass applied."""
        self._measure(block if self._limiter is None else self._limiter.add(block))

    def end_pass(self) -> None:
        """Choose the gain of the next pass, or the final one."""
        if self._limiter is not None:
            self._measure(self._limiter.finish())
        reached = self._meter.describe(seed=0).loudness_lufs
        target_lufs = self._loudness.target_lufs
        next_db: float | None
        if self.gain_db is None:
            next_db = None if reached is None else target_lufs - reached
        else:
            self.factor = min(1.0, to_gain(self._loudness.true_peak_dbtp) / max(self._peak.finish(), 1e-9))
            self._tried.append((self.gain_db, target_lufs if reached is None else reached))
            next_db = next_gain_db(self._tried, target_lufs=target_lufs) if len(self._tried) < MOST_PASSES else None
        self.needs_pass = next_db is not None
        self.gain_db = self.gain_db if next_db is None else next_db
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._meter, self._peak = ClipMeter(self._rate_hz), TruePeakMeter()
        self._limiter = None if self.gain_db is None else _Limiter(self._rate_hz, self._loudness, gain_db=self.gain_db)

    def _measure(self, block: npt.NDArray[np.float32]) -> None:
        if block.shape[1]:
            self._meter.add(block)
            self._peak.add(block)


class PieceFinisher:
    """Applies the gain that a `LoudnessSearch` found, the limiter and the fades to the blocks of a piece."""

    def __init__(
        self,
        sample_rate_hz: int,
        *,
        finishing: Finishing,
        num_samples: int,
        search: LoudnessSearch | None,
    ) -> None:
        """Create the finisher of a piece of `num_samples` samples.

        `search` has found the gain for the target loudness. None means that there is no target.
        """
        self._limiter: _Limiter | None = None
        self._factor = 1.0
        if search is not None and search.gain_db is not None and finishing.loudness is not None:
            self._limiter = _Limiter(sample_rate_hz, finishing.loudness, gain_db=search.gain_db)
            self._factor = search.factor
        self._position = 0
        self._fade = partial(fade, sample_rate_hz=sample_rate_hz, finishing=finishing, num_samples=num_samples)
        self._peak = TruePeakMeter()

    @property
    def true_peak_dbtp(self) -> float | None:
        """The true peak of all finished samples in dBTP, None if all are 0."""
        return to_dbtp(self._peak.finish())

    def add(self, block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the next finished samples (C, S). They may be fewer or more than the samples in `block`."""
        return self._finish(block if self._limiter is None else self._limiter.add(block))

    def end(self) -> npt.NDArray[np.float32] | None:
        """Return the last finished samples, None if there are no more."""
        return None if self._limiter is None else self._finish(self._limiter.finish())

    def _finish(self, block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self._factor != 1.0:
            block = block * np.float32(self._factor)
        block = self._fade(block, start=self._position)
        self._position += block.shape[1]
        if self._limiter is not None:
            self._peak.add(block)
        return block


class _Limiter:
    """Applies `peaks.limit` to audio that arrives in blocks.

    It limits the audio in parts, each together with a second of audio before and after it.
    """

    def __init__(self, sample_rate_hz: int, loudness: Loudness, *, gain_db: float) -> None:
        self._rate_hz = sample_rate_hz
        self._gain = np.float32(to_gain(gain_db))
        self._ceiling = to_gain(loudness.true_peak_dbtp)
        self._around = -(-round(LIMITED_AROUND_S * sample_rate_hz) // BLOCK) * BLOCK
        self._length = -(-round(_LIMITED_S * sample_rate_hz) // BLOCK) * BLOCK
        self._waiting: npt.NDArray[np.float32] | None = None
        self._num_before = 0  # samples at the start of `_waiting` that have been returned

    def add(self, block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the limited samples that later blocks cannot change."""
        block = block * self._gain
        waiting = block if self._waiting is None else np.concatenate([self._waiting, block], axis=1)
        parts = [np.empty((len(block), 0), np.float32)]
        while waiting.shape[1] - self._num_before >= self._length + self._around:
            stop = self._num_before + self._length
            parts.append(self._limit(waiting[:, : stop + self._around])[:, self._num_before : stop])
            kept = min(self._around, stop)
            waiting, self._num_before = waiting[:, stop - kept :], kept
        self._waiting = waiting.copy()
        return np.concatenate(parts, axis=1)

    def finish(self) -> npt.NDArray[np.float32]:
        """Return the remaining samples."""
        if self._waiting is None:
            return np.empty((1, 0), np.float32)
        return self._limit(self._waiting)[:, self._num_before :]

    def _limit(self, audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return limit(audio, self._rate_hz, ceiling=self._ceiling, levels=envelope(audio))
