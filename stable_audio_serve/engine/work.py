"""What one row still has to do, in counts: latents to encode, evaluations to run, latents to decode. Knows no tensors;
the loop advances it, the scheduler and admission read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from stable_audio_serve.engine.batching import Lane
from stable_audio_serve.engine.cost import CostModel


class Phase(Enum):
    """What a row does when it is picked next."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"
    DONE = "done"


class RowWork:
    """The remaining work of one row of `frames` latents; the loop writes `encode_left` and `decode_left`.

    Those hold the lengths of the windows still to code. `branches` holds, per evaluation, the network rows it takes:
    2 where guidance is on, else 1.
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
        """Work happens in this order; a row with nothing left is done."""
        if self.encode_left:
            return Phase.ENCODE
        if self.num_done < len(self.branches):
            return Phase.DENOISE
        return Phase.DECODE if self.decode_left else Phase.DONE

    @property
    def lane(self) -> Lane:
        """What the next evaluation needs of a device call."""
        return Lane(self.branches[self.num_done], self.frames)

    @property
    def tokens(self) -> int:
        """Latent frames that the row puts through the network when it is picked now."""
        if self.phase is Phase.DENOISE:
            return self.frames * self.branches[self.num_done]
        return self.frames

    def finish_evaluation(self) -> None:
        """One evaluation has been applied."""
        self._guided_left -= self.branches[self.num_done] == 2
        self.num_done += 1

    def predict_ms(self, cost: CostModel, evaluation_ms: Callable[[int, int], float]) -> float:
        """Predicted time of what is left, text encoding aside.

        `evaluation_ms(branches, frames)` prices one evaluation: alone, or as a share of a crowded step.
        """
        total = sum(cost.call_ms("encode", 1, frames) for frames in self.encode_left)
        total += sum(cost.call_ms("decode", 1, frames) for frames in self.decode_left)
        single = len(self.branches) - self.num_done - self._guided_left
        if single:
            total += single * evaluation_ms(1, self.frames)
        if self._guided_left:
            total += self._guided_left * evaluation_ms(2, self.frames)
        return total
