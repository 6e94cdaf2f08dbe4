"""The interfaces of three parts of an audio autoencoder. The fourth, the bottleneck, is the same in all checkpoints.

To add a type of part, add its build function to the tables in `stable_audio_serve/models/sa3/autoencoder.py`. Encoding
runs pretransform, encoder and bottleneck; decoding runs bottleneck, decoder and pretransform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stable_audio_serve.sampling.noise import NoiseSource


@dataclass(frozen=True, slots=True)
class WindowNoise:
    """Draws the noise for one window of a clip. `start` is the window's first latent frame.

    `stage` is "decode", "init" or "inpaint". Each stage has different noise.
    """

    source: NoiseSource
    stage: str
    start: int

    def draw(self, name: str, shape: tuple[int, ...], *, frame_axis: int, device: torch.device) -> Tensor:
        """Returns standard normal values of `shape` on `device`, float32.

        Index i on axis `frame_axis` is latent frame `start + i` of the clip.
        """
        return self.source.window(f"{self.stage}/{name}", self.start, shape=shape, frame_axis=frame_axis, device=device)


Noises = Sequence[WindowNoise] | None  # the noise of each window in a batch; None: no noise


class Pretransform(Protocol):
    """The outermost part of an autoencoder: converts audio to frames and back."""

    samples_per_frame: int
    halo_frames: int  # number of frames on each side that can influence a frame's audio
    # Whether the result of `decode` depends on `start` of the windows in `noise`. If so, `decode` is not captured as a
    # CUDA graph: `start` is an int, not a tensor, so the graph would use its value at the capture for every window.
    is_placed: bool

    def encode(self, audio: Tensor) -> Tensor:
        """Audio (batch, channels, samples) -> frames (batch, frame channels, ceil(samples / samples_per_frame))."""
        ...

    def decode(self, frames: Tensor, noise: Noises) -> Tensor:
        """Frames (batch, frame channels, frames) -> audio (batch, channels, frames * samples_per_frame).

        The first frame must be the first frame of a latent, because `noise` is drawn for whole latents.
        """
        ...


class Encoder(Protocol):
    """Encodes frames to raw latents, the input of the bottleneck."""

    frames_per_latent: int
    noisy: bool  # whether the encoder adds noise (if `noise` is not None)

    def __call__(self, frames: Tensor, noise: Noises) -> Tensor:
        """Frames (batch, frame channels, frames) -> raw latents (batch, latent channels, latent frames).

        The encoder pads the frames at the end to whole latents.
        """
        ...


class Decoder(Protocol):
    """Decodes latents, the output of the bottleneck, to frames."""

    frames_per_latent: int
    latent_multiple: int
    halo_latents: int  # number of latents on each side that can influence a latent's frames

    def __call__(self, latents: Tensor, noise: Noises) -> Tensor:
        """Latents (batch, latent channels, latent frames) -> frames (batch, frame channels, frames).

        The decoder pads the latents at the end to a multiple of `latent_multiple`.
        """
        ...


def stack_draws(
    noise: Sequence[WindowNoise], name: str, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
) -> Tensor:
    """Returns standard normal noise of `shape` for each window, stacked: (windows, *shape) float32."""
    return torch.stack([window.draw(name, shape, frame_axis=frame_axis, device=device) for window in noise])
