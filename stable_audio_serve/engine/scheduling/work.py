"""The remaining work of one clip (row): latent frames to encode, evaluations of the network to run, and latent frames
to decode. The engine's loop updates this state; the scheduler and admission read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from stable_audio_serve.engine.scheduling.batching import Lane
from stable_audio_serve.engine.scheduling.cost import CostModel


class Phase(Enum):
    """The kind of work that a row does when next picked."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    DONE = "done"


class RowWork:
    """The remaining work of one row (clip) of `frames` latent frames.

    `encode_left` and `decode_left` are the lengths of the windows that remain to be encoded and decoded. `branches` has
    one number per evaluation, the rows that it takes in the network's batch: 2 if guided, else 1.
    """

    __slots__ = ("_guided_left", "branches", "decode_left", "encode_left", "frames", "num_done")

    def __init__(
        self, frames: int, *, branches: Sequence[int], encode_left: Sequence[int] = (), decode_left: Sequence[int] = ()
    ) -> None:
        self.frames = frames
        self.branches = tuple(branches)
        self.encode_left = tuple(encode_left)
        self.decode_left = tuple(decode_left)
        self.num_done = 0
        self._guided_left = sum(n == 2 for n in self.branches)

    @property
    def phase(self) -> Phase:
        """The current phase; phases run in the order of the enum."""
        if self.encode_left:
            return Phase.ENCODE
        if self.num_done < len(self.branches):
            return Phase.DENOISE
        return Phase.DECODE if self.decode_left else Phase.DONE

    @property
    def lane(self) -> Lane:
        """The size of the next evaluation: its number of network rows and latent frames."""
        return Lane(self.branches[self.num_done], self.frames)

    @property
    def tokens(self) -> int:
        """How many latent frames the row adds to a step if it is picked now."""
        if self.phase is Phase.DENOISE:
            return self.frames * self.branches[self.num_done]
        return self.frames

    def finish_evaluation(self) -> None:
        """Count one evaluation as done."""
        self._guided_left -= self.branches[self.num_done] == 2
        self.num_done += 1

    def predict_ms(self, cost: CostModel, evaluation_ms: Callable[[int, int], float]) -> float:
        """Return the predicted time of the remaining work, without text encoding.

        `evaluation_ms(branches, frames)` predicts the time of one evaluation, either alone or as a share of a full
        step.
        """
        total = sum(cost.call_ms("encode", rows=1, frames=frames) for frames in self.encode_left)
        total += sum(cost.call_ms("decode", rows=1, frames=frames) for frames in self.decode_left)
        single = len(self.branches) - self.num_done - self._guided_left
        if single:
            total += single * evaluation_ms(1, self.frames)
        if self._guided_left:
            total += self._guided_left * evaluation_ms(2, self.frames)
        return total
