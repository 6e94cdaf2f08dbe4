"""Sources of randomness, one per row, so that neighbours, windows and devices cannot change a row's draws.

`SeededNoise` serves generation. `ReplayNoise` repeats a reference run's draws for verification. Independent of models.
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
    """All random draws of one row. They do not depend on other rows or on how the row is cut into windows."""

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """Return the initial latent noise, `shape` (D, F), float32 on the CPU, unit normal. Called once, first."""
        ...

    def step(self, shape: tuple[int, ...]) -> Tensor:
        """Return the noise of the next evaluation that draws noise, `shape` (D, F), float32 on the CPU."""
        ...

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        """Return noise for latent frames `start ... start + shape[frame_axis] - 1` of an encode or decode window.

        The noise has shape `shape`, float32 on `device`. `stage` names the draw, such as "decode/bottleneck" or
        "init/tokens". The noise of a frame depends only on (seed, stage, frame), never on the window.
        """
        ...


class SeededNoise:
    """The noise of a row, determined by its seed.

    Latent noise is drawn from one CPU generator, in the order and shape of a reference run with one row and that seed.
    The noise of windows is drawn on the model's device in blocks of 32 latent frames, each from a generator that is
    seeded from (seed, stage, block).
    """

    def __init__(self, seed: int) -> None:
        """`seed` is any integer; seeds equal modulo 2**64 give the same noise."""
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
    """One draw of a reference run. `shape` is that of the whole batch.

    `stage` is "initial", "step" or a window's stage; `index` is the step's number or the window's first latent frame.
    """

    stage: str
    index: int
    shape: tuple[int, ...]

    def make(self, generator: torch.Generator) -> dict[tuple[str, int], Tensor]:
        """Return the draw, with its stage and index as key."""
        return {(self.stage, self.index): torch.randn(self.shape, generator=generator, dtype=torch.float32)}


class ReplayNoise:
    """The draws of a reference run over `num_rows` rows, from one CPU generator. `script` lists them in order.

    The result does not depend on the order of calls or on their threads: before a draw is returned, all earlier draws
    of the script are made, each once. A draw of the batch's size is split between the rows. A draw of one row's size is
    shared by all rows, because the reference encodes source audio once per run.
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
        """Return the whole batch's draw, float32 on the CPU. Raises GenerationError if the script has none."""
        with self._lock:
            while (stage, index) not in self._made:
                if not self._pending:
                    raise GenerationError(f"replayed noise: the reference run has no draw {stage!r} at {index}")
                self._made.update(self._pending.pop().make(self._generator))
            return self._made[stage, index]

    def share(self, stage: str, index: int, *, row: int, shape: tuple[int, ...]) -> Tensor:
        """Return row `row`'s part of a draw, in `shape`. Raises GenerationError if the sizes do not match."""
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
