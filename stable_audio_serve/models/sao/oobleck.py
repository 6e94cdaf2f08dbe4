"""The Oobleck autoencoder of the Stable Audio Open family: convolutions from stereo audio to latents and back.

Module names are the checkpoint's keys below `pretransform.model.`. Checkpoints store each kernel as direction and
length, and the parameters of activations as logarithms. `resolve` computes the actual values once after loading.

Shapes: B batch, C channels, S audio samples, D latent channels, F latent frames.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.sao.network_config import DILATIONS, OobleckConfig

_MIN_DEVIATION = 1e-4
_BETA_FLOOR = 1e-9


class SnakeBeta(nn.Module):
    """The activation `x + sin(e^alpha x)^2 / e^beta`, with alpha and beta per channel.

    It is Snake (arXiv 2006.08195) with a separate amplitude.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self._resolved: tuple[Tensor, Tensor] | None = None

    def resolve(self) -> None:
        """Compute and cache `e^alpha` and `1 / e^beta`, which every call would otherwise compute."""
        self._resolved = self._compute()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, samples) -> (batch, channels, samples)."""
        rate, amplitude = self._compute() if self._resolved is None else self._resolved
        return torch.addcmul(x, amplitude, (x * rate).sin_().square_())

    def _compute(self) -> tuple[Tensor, Tensor]:
        return self.alpha.exp()[:, None], 1.0 / (self.beta.exp()[:, None] + _BETA_FLOOR)


class NormedConv(nn.Module):
    """A 1-D convolution with the kernel `weight_g * weight_v / |weight_v|` (weight normalisation).

    The norm is over all axes except the first. The first axis has the output channels, or the input channels in a
    transposed convolution.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        transposed: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        first, second = (channels_in, channels_out) if transposed else (channels_out, channels_in)
        self.stride, self.padding, self.dilation, self.transposed = stride, padding, dilation, transposed
        self.weight_g: nn.Parameter | None = nn.Parameter(torch.ones(first, 1, 1))
        self.weight_v: nn.Parameter | None = nn.Parameter(
            torch.empty(first, second, kernel).normal_(std=(second * kernel) ** -0.5)
        )
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None
        self.weight: nn.Parameter | None = None

    def resolve(self) -> None:
        """Replace `weight_g` and `weight_v` by the kernel, which every call would otherwise compute."""
        if self.weight is None:
            self.weight = nn.Parameter(self.kernel(), requires_grad=False)
            self.weight_g = self.weight_v = None

    def kernel(self) -> Tensor:
        """Returns the kernel, computed from `weight_g` and `weight_v` unless resolved."""
        if self.weight_g is None or self.weight_v is None:
            assert self.weight is not None
            return self.weight
        return self.weight_g * self.weight_v / self.weight_v.norm(dim=(1, 2), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels in, samples) -> (batch, channels out, output samples)."""
        kernel = self.kernel()
        if self.transposed:
            return F.conv_transpose1d(x, kernel, self.bias, stride=self.stride, padding=self.padding)
        return F.conv1d(x, kernel, self.bias, self.stride, self.padding, self.dilation)


class _Sequence(nn.Module):
    """A sequence of modules whose state-dict keys begin with `layers`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ResidualUnit(_Sequence):
    """`x + conv1(act(conv7(act(x))))`. The numbers are kernel sizes; conv7 is dilated."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__(
            SnakeBeta(channels),
            NormedConv(channels, channels, kernel=7, padding=3 * dilation, dilation=dilation),
            SnakeBeta(channels),
            NormedConv(channels, channels, kernel=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, samples) -> (batch, channels, samples)."""
        return x + self.layers(x)


class OobleckEncoder(_Sequence):
    """Encodes audio (batch, channels, samples) to the parameters of a normal distribution for each latent.

    The output is (batch, 2 * latent channels, latent frames): the means of all channels, then the scales of all.
    """

    def __init__(self, config: OobleckConfig) -> None:
        widths = config.widths
        blocks = [
            _Sequence(
                *_residual_units(width),
                SnakeBeta(width),
                NormedConv(width, wider, kernel=2 * stride, stride=stride, padding=math.ceil(stride / 2)),
            )
            for width, wider, stride in zip(widths, widths[1:], config.strides, strict=False)
        ]
        super().__init__(
            NormedConv(config.channels, widths[0], kernel=7, padding=3),
            *blocks,
            SnakeBeta(widths[-1]),
            NormedConv(widths[-1], 2 * config.latent_channels, kernel=3, padding=1),
        )


class OobleckDecoder(_Sequence):
    """Decodes latents (batch, latent channels, latent frames) to audio (batch, channels, samples)."""

    def __init__(self, config: OobleckConfig) -> None:
        widths = config.widths[::-1]
        blocks = [
            _Sequence(
                SnakeBeta(width),
                NormedConv(
                    width, narrower, kernel=2 * stride, stride=stride, padding=math.ceil(stride / 2), transposed=True
                ),
                *_residual_units(narrower),
            )
            for width, narrower, stride in zip(widths, widths[1:], config.strides[::-1], strict=False)
        ]
        super().__init__(
            NormedConv(config.latent_channels, widths[0], kernel=7, padding=3),
            *blocks,
            SnakeBeta(widths[-1]),
            NormedConv(widths[-1], config.channels, kernel=7, padding=3, bias=False),
        )
        self.final_tanh = config.final_tanh

    def forward(self, x: Tensor) -> Tensor:
        """Latents (batch, latent channels, latent frames) -> audio (batch, channels, samples)."""
        audio = self.layers(x)
        return torch.tanh(audio) if self.final_tanh else audio


class OobleckAutoencoder(nn.Module):
    """The autoencoder: an encoder, a variational bottleneck and a decoder, all float32."""

    def __init__(self, config: OobleckConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = OobleckEncoder(config)
        self.decoder = OobleckDecoder(config)

    def resolve(self) -> None:
        """Cache values that are derived from the weights, which every call would otherwise compute.

        Call it after the weights are loaded and on their device.
        """
        for module in self.modules():
            if isinstance(module, NormedConv | SnakeBeta):
                module.resolve()

    def encode(self, audio: Tensor, noise: Tensor) -> Tensor:
        """Returns latents (batch, latent channels, frames) of audio (batch, channels, at least frames * hop samples).

        `noise` has the shape of the latents and is standard normal. As in training, a latent is the mean plus the
        standard deviation times the noise.
        """
        mean, scale = self.encoder(audio).chunk(2, dim=1)
        return (mean + (F.softplus(scale) + _MIN_DEVIATION) * noise) / self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Returns audio (batch, channels, frames * hop) of latents (batch, latent channels, frames)."""
        return self.decoder(latents * self.config.scale)


def _residual_units(channels: int) -> list[ResidualUnit]:
    return [ResidualUnit(channels, dilation) for dilation in DILATIONS]
