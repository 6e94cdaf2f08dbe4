"""Draws each row's latent noise on a worker thread, one step ahead, so that the device never waits for random numbers.
The draws of a row stay in order. Independent of models.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.plan import SamplerPlan


class RowNoise:
    """The latent noise of one row, used by the engine thread. Encoding and decoding the row's windows use `source` too.

    `noise_pool` must run one task at a time, in order. Draws after the last one that an evaluation uses are skipped.
    The noise of kept frames is from a separate stream, so that it does not change the other draws.
    """

    def __init__(self, source: NoiseSource, plan: SamplerPlan, *, shape: tuple[int, int], noise_pool: Executor) -> None:
        """`shape` is the row's latent shape (D, F). The initial draw starts at once."""
        self.source = source
        self._shape = shape
        self._noise_pool = noise_pool
        drawing = [any(e.c) for e in plan.evaluations if e.draws_noise]
        self._num_left = max((i + 1 for i, weighs in enumerate(drawing) if weighs), default=0)
        self._initial = noise_pool.submit(source.initial, shape)
        self._kept = noise_pool.submit(self._source_kept) if plan.start_blend else None
        self._next: Future[Tensor] | None = None
        self._draw_next()

    def initial(self) -> Tensor:
        """Return the initial latent noise (D, F) float32 on the CPU."""
        return self._initial.result()

    def kept(self) -> Tensor:
        """Return the noise of kept frames (D, F) float32 on the CPU. Raises RuntimeError if the plan has no blend."""
        if self._kept is None:
            raise RuntimeError("a row that keeps no frames asked for their noise")
        return self._kept.result()

    def current(self) -> Tensor | None:
        """Return the current evaluation's draw (D, F) float32 on the CPU; None once no evaluation uses noise any more.

        Returns the same tensor until `advance`, so that a failed step can run again.
        """
        return self._next.result() if self._next else None

    def advance(self) -> None:
        """Drop the current draw and start the next one."""
        self._draw_next()

    def cancel(self) -> None:
        """Stop drawing because the row ended."""
        self._num_left = 0
        if self._next:
            self._next.cancel()

    def _draw_next(self) -> None:
        self._next = None
        if self._num_left > 0:
            self._num_left -= 1
            self._next = self._noise_pool.submit(self._source_step)

    def _source_kept(self) -> Tensor:
        return self.source.window("kept", 0, shape=self._shape, frame_axis=1, device=torch.device("cpu"))

    def _source_step(self) -> Tensor:
        return self.source.step(self._shape)
