"""Calls of the audio decoder. One call decodes several windows (excerpts of latents) of equal length. The call runs
eagerly or replays a captured CUDA graph, which reads its inputs from fixed addresses.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stable_audio_serve.engine.hardware.device import Device
from stable_audio_serve.engine.hardware.graphs import CallMemory, Graphs, Kind
from stable_audio_serve.engine.scheduling.batching import GRAPH_ROWS
from stable_audio_serve.models.protocol import DecodeWindow, DiffusionModel
from stable_audio_serve.sampling.noise import NoiseSource

# Decoder calls with more latent frames are not captured as CUDA graphs. Such a call keeps the device busy so much
# longer than the host needs to launch it that a graph saves no time, and the graph's memory would stay allocated.
_MOST_LATENTS = 512


def captured_windows(num_windows: int, *, frames: int) -> int:
    """Return the batch size of the CUDA graph that decodes `num_windows` windows of `frames` latent frames each.

    Returns 0 if there are too many windows or latent frames for a graph.
    """
    if num_windows > GRAPH_ROWS[-1]:
        return 0
    padded = GRAPH_ROWS[bisect_left(GRAPH_ROWS, num_windows)]
    return padded if padded * frames <= _MOST_LATENTS else 0


@dataclass(frozen=True, slots=True)
class Draw:
    """The arguments of one call of `NoiseSource.window` by the decoder. The call returns a noise tensor of `shape`."""

    stage: str
    shape: tuple[int, ...]
    frame_axis: int


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """The shape of a decoder call.

    `windows` is the number of windows. Each window has `latents` (channels, frames) and `audio` (channels, samples),
    and the decoder draws the noise tensors `draws` for each window.
    """

    windows: int
    latents: tuple[int, int]
    audio: tuple[int, int]
    draws: tuple[Draw, ...]

    @property
    def kind(self) -> Kind:
        return "decode"

    @property
    def size(self) -> int:
        return self.windows * self.latents[1]

    @property
    def num_inputs(self) -> int:
        return sum(self._sizes)

    @property
    def num_outputs(self) -> int:
        return self.windows * math.prod(self.audio)

    @property
    def _sizes(self) -> list[int]:
        return [self.windows * math.prod(shape) for shape in self._shapes]

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [self.latents, *(draw.shape for draw in self.draws)]

    def read(self, inputs: Tensor) -> list[Tensor]:
        """Return views of the input memory: the latents of all windows, then one noise tensor for each of `draws`.

        The first axis of every tensor is the window.
        """
        return [part.view(self.windows, *s) for part, s in zip(inputs.split(self._sizes), self._shapes, strict=True)]


class DecodeCalls:
    """Calls of one model's decoder. Used by the engine thread only."""

    def __init__(self, model: DiffusionModel, *, device: Device, graphs: Graphs) -> None:
        self._model = model
        self._device = device
        self._graphs = graphs
        self._draws: dict[int, tuple[Draw, ...]] = {}  # what the decoder draws for a window of this many latent frames

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """Decode windows of equal length in one call. Returns each window's audio: (channels, samples) float32."""
        model, num_frames = self._model, windows[0].latents.shape[-1]
        count = captured_windows(len(windows), frames=num_frames)
        if not (count and self._device.can_capture and model.spec.captures_decode):
            return model.decode(windows)
        if num_frames not in self._draws:
            recording = _RecordingNoise(windows[0].noise)
            audio = model.decode([replace(windows[0], noise=recording), *windows[1:]])
            self._draws[num_frames] = tuple(dict.fromkeys(recording.draws))
            # There is no graph of this shape yet. `find` counts this call, so that the shape can be captured later.
            self._graphs.find(self._shape(count, num_frames), self._run)
            return audio
        shape = self._shape(count, num_frames)
        captured = self._graphs.find(shape, self._run)
        if captured is None:
            return model.decode(windows)
        self._write_inputs(windows, shape=shape, inputs=captured.memory.inputs)
        if not self._graphs.replay(captured):
            return model.decode(windows)
        replayed = captured.memory.outputs.view(count, *shape.audio)[: len(windows)].clone()
        if captured.is_confirmed:
            return list(replayed)
        expected = model.decode(windows)
        self._graphs.confirm(captured, replayed, expected=torch.stack(expected))
        return expected

    def _run(self, shape: DecodeShape, memory: CallMemory) -> None:
        latents, *drawn = shape.read(memory.inputs)
        names = [draw.stage for draw in shape.draws]
        noises = [_StoredNoise(dict(zip(names, own, strict=True))) for own in zip(*drawn, strict=True)]
        windows = [
            DecodeWindow(own, start=0, noise=noise)
            for own, noise in zip(latents, noises or [_StoredNoise({})] * shape.windows, strict=True)
        ]
        torch.stack(self._model.decode(windows), out=memory.outputs.view(shape.windows, *shape.audio))

    def _shape(self, windows: int, frames: int) -> DecodeShape:
        spec = self._model.spec
        return DecodeShape(
            windows,
            latents=(spec.card.latent_channels, frames),
            audio=(spec.card.channels, frames * spec.hop),
            draws=self._draws[frames],
        )

    def _write_inputs(self, windows: Sequence[DecodeWindow], *, shape: DecodeShape, inputs: Tensor) -> None:
        """Copy the windows' latents and noise to `inputs`. Unused batch entries keep their old values."""
        latents, *drawn = shape.read(inputs)
        torch.stack([window.latents for window in windows], out=latents[: len(windows)])
        for draw, targets in zip(shape.draws, drawn, strict=True):
            for window, target in zip(windows, targets, strict=False):
                noise = window.noise.window(
                    draw.stage, window.start, shape=draw.shape, frame_axis=draw.frame_axis, device=self._model.device
                )
                target.copy_(noise)


class _RecordingNoise:
    """Passes calls on to another noise source and records the arguments of each `window` call in `draws`."""

    def __init__(self, noise: NoiseSource) -> None:
        self._noise = noise
        self.draws: list[Draw] = []

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        return self._noise.initial(shape)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        return self._noise.step(shape)

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        self.draws.append(Draw(stage, shape, frame_axis))
        return self._noise.window(stage, start, shape=shape, frame_axis=frame_axis, device=device)


class _StoredNoise:
    """A noise source whose `window` returns a given tensor for each stage name."""

    def __init__(self, drawn: Mapping[str, Tensor]) -> None:
        self._drawn = drawn

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        raise RuntimeError("a window draws no latents")

    step = initial

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> Tensor:
        return self._drawn[stage]
