"""The four kinds of parts of an audio autoencoder, each built from its config by its `type`.

To add a type, decorate a function from config to module with `register_part(kind, type)`, and import its module in
`stable_audio_serve/models/families.py`, so that it is registered before any checkpoint is built.
Shapes: B windows, C channels, S samples, P frame channels (the pretransform's), N frames, D latent channels, F latent
frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.sampling.noise import NoiseSource

PartKind = Literal["pretransform", "encoder", "decoder", "bottleneck"]
PartBuilder = Callable[[ConfigReader], nn.Module]


@dataclass(frozen=True, slots=True)
class WindowNoise:
    """The noise of one window of one row. `stage` is decode, init or inpaint; `start` is its first latent frame."""

    source: NoiseSource
    stage: str
    start: int

    def draw(self, name: str, shape: tuple[int, ...], *, frame_axis: int, device: torch.device) -> Tensor:
        """Returns unit normal float32 on `device`; `shape[frame_axis]` counts latent frames from the window's start."""
        return self.source.window(f"{self.stage}/{name}", self.start, shape=shape, frame_axis=frame_axis, device=device)


Noises = Sequence[WindowNoise] | None  # one per window of a batch; None: no noise


class Pretransform(Protocol):
    """Converts audio to frames and back."""

    samples_per_frame: int
    halo_frames: int  # frames on each side that can influence a frame's audio
    is_placed: bool  # `decode` depends on the window's start, which it reads on the host from the noise

    def encode(self, audio: Tensor) -> Tensor:
        """Audio (B, C, S) -> frames (B, P, ceil(S / samples_per_frame))."""
        ...

    def decode(self, frames: Tensor, noise: Noises) -> Tensor:
        """Frames (B, P, N) -> audio (B, C, N * samples_per_frame). `noise` starts at a latent frame boundary."""
        ...


class Encoder(Protocol):
    """Encodes frames to raw latents."""

    frames_per_latent: int
    latent_multiple: int  # windows start and end at multiples of this many latents
    noisy: bool  # uses noise if given

    def __call__(self, frames: Tensor, noise: Noises) -> Tensor:
        """(B, P, N) -> (B, D, F); N is padded at the end to whole latents."""
        ...


class Decoder(Protocol):
    """Decodes latents from the bottleneck to frames."""

    frames_per_latent: int
    latent_multiple: int
    halo_latents: int  # latents on each side that can influence a latent's frames

    def __call__(self, latents: Tensor, noise: Noises) -> Tensor:
        """(B, D, F) -> (B, P, N); F is padded at the end to a multiple of `latent_multiple`."""
        ...


class Bottleneck(Protocol):
    """Converts raw latents to the denoiser's latents and back."""

    def encode(self, raw: Tensor) -> Tensor:
        """(B, D, F) -> (B, D, F)."""
        ...

    def decode(self, latents: Tensor, noise: Noises) -> Tensor:
        """(B, D, F) -> (B, D, F)."""
        ...


_BUILDERS: dict[tuple[PartKind, str], PartBuilder] = {}


def register_part(kind: PartKind, *types: str) -> Callable[[PartBuilder], PartBuilder]:
    """Register the decorated function as builder of `types`; it receives the part's `config` section."""

    def register(builder: PartBuilder) -> PartBuilder:
        for type_ in types:
            _BUILDERS[kind, type_] = builder
        return builder

    return register


def build_part(kind: PartKind, config: ConfigReader) -> nn.Module:
    """Build the part that `config` describes with its entries `type` and `config`.

    Raises CheckpointError naming an unknown type.
    """
    known = [type_ for registered, type_ in _BUILDERS if registered == kind]
    type_ = config.choice("type", sorted(known))
    return _BUILDERS[kind, type_](config.section("config", optional=True))


def stack_draws(
    noise: Sequence[WindowNoise], name: str, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
) -> Tensor:
    """Returns one draw of `shape` per window, stacked: (B, *shape) float32."""
    return torch.stack([window.draw(name, shape, frame_axis=frame_axis, device=device) for window in noise])
