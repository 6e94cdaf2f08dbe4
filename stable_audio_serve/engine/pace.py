"""How much of a row is encoded or decoded in one turn, so that others are not kept waiting. Knows no rows."""

from __future__ import annotations

from stable_audio_serve.engine.cost import CostModel

_LEAST_MS = 10.0  # of a turn's windows: shorter ones cost more than they help
_LENGTHS = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512)  # few, because calls of one length share graphs


class WindowPace:
    """Limits the windows of one turn. Used by the engine thread only."""

    def __init__(self, cost: CostModel, *, turn_frames: int, is_fixed: bool) -> None:
        """`turn_frames` is the most latent frames of a row in one turn. `is_fixed`: windows are cut as planned, each is
        a call of its own, and a row has one in each turn, because more would gain nothing.
        """
        self._cost = cost
        self.is_fixed = is_fixed
        self.turn_frames = 1 if is_fixed else turn_frames
        self._step_ms = 0.0

    def saw_step(self, ms: float) -> None:
        """Remember how long the last step is predicted to take.

        Its measured time may contain windows that ran beside it, which would make the next ones longer and longer.
        """
        self._step_ms = ms

    def decode_frames(self, num_rows: int, *, others_wait: bool) -> int:
        """Returns the most latent frames of each of `num_rows` rows to decode now.

        While others wait, all of them together take no longer than one step, or than a time that nobody notices;
        windows of one length share a call.
        """
        if self.is_fixed or not others_wait:
            return self.turn_frames
        most_ms = max(self._step_ms, _LEAST_MS)
        fitting = [
            frames
            for frames in _LENGTHS
            if frames <= self.turn_frames and self._cost.call_ms("decode", rows=num_rows, frames=frames) <= most_ms
        ]
        return fitting[-1] if fitting else min(_LENGTHS[0], self.turn_frames)
