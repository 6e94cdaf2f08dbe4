"""Draws the noise of each clip (row) on a worker thread, one step ahead, so that the device never waits for random
numbers. The draws of one clip stay in order.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.plan import SamplerPlan


class RowNoise:
    """The noise that the sampler uses for one row. Used by the engine thread. The encoder and the decoder draw their
    noise from `source` directly.

    `noise_pool` must start its tasks in order, but may run several at a time. Nothing is drawn after the last
    evaluation that uses noise. The noise of kept frames comes from a separate random generator, so that it does not
    change the other draws.
    """

    def __init__(self, source: NoiseSource, plan: SamplerPlan, *, shape: tuple[int, int], noise_pool: Executor) -> None:
        """Start drawing the initial noise. `shape` is the row's latent shape (channels, frames)."""
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
        """Return the initial noise (channels, frames) float32 on the CPU; waits until it is drawn."""
        return self._initial.result()

    def kept(self) -> Tensor:
        """Return the noise for the frames of the source that an edit keeps: (channels, frames) float32 on the CPU.

        Raises RuntimeError if the plan keeps no frames.
        """
        if self._kept is None:
            raise RuntimeError("a row that keeps no frames asked for their noise")
        return self._kept.result()

    def current(self) -> Tensor | None:
        """Return the current evaluation's noise (channels, frames) float32 on the CPU; None if no more noise is used.

        Returns the same tensor until `advance` is called, so that a failed step can run again with it.
        """
        return self._next.result() if self._next else None

    def advance(self) -> None:
        """Drop the current evaluation's noise and start drawing that of the next one."""
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
        self._initial.result()  # the generator's first draw; its task has started before this one
        return self.source.step(self._shape)
