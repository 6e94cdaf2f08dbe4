"""Sources of random noise. Each clip (row) has its own source, so other clips in the batch do not affect its noise.

`SeededNoise` is for generation. `ReplayNoise` is for verification: it returns the same random numbers as a run of the
reference implementation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from stable_audio_serve.core.errors import GenerationError
from stable_audio_serve.sampling.brownian import ReplayPath

WINDOW_BLOCK_FRAMES = 32
_CPU = torch.device("cpu")


class NoiseSource(Protocol):
    """All random numbers of one clip. They do not depend on other clips, nor on how the clip is cut into windows."""

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """Return the initial latents: standard normal noise of `shape` (channels, frames), float32 on the CPU.

        Must be called once, before `step`.
        """
        ...

    def step(self, shape: tuple[int, ...]) -> Tensor:
        """Return noise for the next sampler step that needs any: `shape` (channels, frames), float32 on the CPU."""
        ...

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        """Return the autoencoder's noise for a window of latent frames, `start ... start + shape[frame_axis] - 1`.

        The noise has shape `shape`, float32 on `device`. `stage` names what the noise is used for, such as
        "decode/bottleneck" or "init/tokens". The noise of a frame depends only on the seed, `stage` and the frame, not
        on the window.
        """
        ...


class SeededNoise:
    """The noise of a clip, determined by its seed.

    `initial` and `step` draw from one CPU generator. The reference implementation draws the same numbers for this seed
    and a batch of one. `window` draws on the model's device, in blocks of 32 latent frames. Each block has a new
    generator, whose seed is computed from the clip's seed, the stage and the block's number.
    """

    def __init__(self, seed: int) -> None:
        """`seed` can be any integer. `initial` and `step` depend on its last 32 bits, `window` on its last 64 bits.

        PyTorch's CPU generator ignores the higher bits.
        """
        self._seed = seed % 2**64
        self._generator = torch.Generator(device=_CPU).manual_seed(self._seed)

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float32)

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        length = shape[frame_axis]
        generator = torch.Generator(device=device)
        block_shape = [WINDOW_BLOCK_FRAMES if axis == frame_axis else size for axis, size in enumerate(shape)]
        first, last = start // WINDOW_BLOCK_FRAMES, (start + length - 1) // WINDOW_BLOCK_FRAMES
        blocks = []
        for block in range(first, last + 1):
            generator.manual_seed(self._block_seed(stage, block))
            blocks.append(torch.randn(block_shape, generator=generator, dtype=torch.float32, device=device))
        return torch.cat(blocks, dim=frame_axis).narrow(frame_axis, start - first * WINDOW_BLOCK_FRAMES, length)

    def _block_seed(self, stage: str, block: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{stage}/{block}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


@dataclass(frozen=True, slots=True)
class ReplayDraw:
    """One draw of random numbers in a run of the reference implementation. `shape` is the shape of the whole batch.

    `stage` is "initial", "step", or the name of a use of noise in the autoencoder. `index` is the number of the step,
    or the first latent frame of the autoencoder's window.
    """

    stage: str
    index: int
    shape: tuple[int, ...]

    def make(self, generator: torch.Generator) -> dict[tuple[str, int], Tensor]:
        """Draw the random numbers from `generator`. The key of the result is (stage, index)."""
        return {(self.stage, self.index): torch.randn(self.shape, generator=generator, dtype=torch.float32)}


class ReplayNoise:
    """The random numbers of a run of the reference implementation with a batch of `num_rows`. `script` lists the draws
    in the order in which that run took them from one CPU generator.

    The draws do not depend on the order or the threads of calls: before a draw is returned, all earlier draws in the
    script are made, each once. A draw for the whole batch is split between the rows. A draw for one row is shared by
    all rows, because the reference implementation encodes source audio once for the batch.
    """

    def __init__(self, seed: int, script: Sequence[ReplayDraw | ReplayPath], *, num_rows: int) -> None:
        self._generator = torch.Generator(device=_CPU).manual_seed(seed % 2**64)
        self._pending = list(reversed(script))
        self._num_rows = num_rows
        self._made: dict[tuple[str, int], Tensor] = {}
        self._lock = Lock()

    def row(self, index: int) -> NoiseSource:
        """Return the noise source of row `index`."""
        return _ReplayRow(self, index)

    def draw(self, stage: str, index: int) -> Tensor:
        """Return a draw for the whole batch, float32 on the CPU. Raises GenerationError if it is not in the script."""
        with self._lock:
            while (stage, index) not in self._made:
                if not self._pending:
                    raise GenerationError(f"replayed noise: the reference run has no draw {stage!r} at {index}")
                self._made.update(self._pending.pop().make(self._generator))
            return self._made[stage, index]

    def share(self, stage: str, index: int, *, row: int, shape: tuple[int, ...]) -> Tensor:
        """Return the part of a draw that belongs to the row with index `row`. It has shape `shape`.

        Raises GenerationError if the draw does not have the right number of values.
        """
        drawn = self.draw(stage, index)
        size = torch.Size(shape).numel()
        if drawn.numel() == size:
            return drawn.reshape(shape)
        if drawn.numel() == size * self._num_rows:
            return drawn.reshape(self._num_rows, *shape)[row]
        found = "x".join(map(str, drawn.shape))
        wanted = "x".join(map(str, shape))
        raise GenerationError(f"replayed noise: draw {stage!r} at {index} is {found}, a row of the model asks {wanted}")


class _ReplayRow:
    """The noise source of one row of a ReplayNoise."""

    def __init__(self, replay: ReplayNoise, row: int) -> None:
        self._replay = replay
        self._row = row
        self._num_steps = 0

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self._replay.share("initial", 0, row=self._row, shape=shape)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        self._num_steps += 1
        return self._replay.share("step", self._num_steps - 1, row=self._row, shape=shape)

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return self._replay.share(stage, start, row=self._row, shape=shape).to(device)
