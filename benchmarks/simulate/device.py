"""Formulas for the time that an H200 GPU needs for Stable Audio 3's networks.

A denoiser call takes `fixed + max(F / flops, (W + A) / bandwidth) / efficiency`. F is the number of operations and A
the bytes of activations of all rows; W is the bytes of the weights. Decoding takes `fixed + D / flops / efficiency`
with D operations. A multiply-add counts as two operations. The constants fit Stability AI's published H200 times within
10 % (medium at 5 s: 37 % too high). The networks' dimensions are from the published configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_RATE_HZ, _HOP = 44_100, 4096
_LATENT_CHANNELS = 256
_LOCAL_WIDTH = 257  # width of the local conditioning that is added to each frame
_TEXT_WIDTH, _CONTEXT_TOKENS = 768, 257
_TIME_FEATURES = 256
_BYTES = 2  # bytes per value in half precision
_ACTIVATIONS = 40  # vectors of the layer's width that a layer reads or writes for each token
_TOKENS_PER_FRAME = 17  # the decoder's tokens for each latent frame


@dataclass(frozen=True, slots=True)
class Network:
    """The dimensions of a model's denoiser and decoder. The default values describe the small models.

    With `differential` attention, a layer projects to five vectors (q, k, v, q', k') and computes two softmaxes.
    """

    width: int = 1024
    depth: int = 20
    differential: bool = False
    decoder_width: int = 768
    decoder_blocks: int = 6
    decoder_keys: int = 34  # number of keys that a query sees in the decoder
    decoder_kernel: int = 3  # kernel size of the decoder's last convolution
    halo_frames: int = 2  # frames on each side of a decoded window whose audio is not used
    longest_s: float = 120.0
    prefix_tokens: int = 64

    def frames(self, duration_s: float) -> int:
        """Returns the number of latent frames of a clip, rounded up to an even number."""
        return 2 * math.ceil(duration_s * _RATE_HZ / _HOP / 2)

    @property
    def num_weights(self) -> float:
        e = self.width
        block = self._products + (self._softmaxes + 1) * e**2  # keys and values of cross-attention
        block += _LOCAL_WIDTH * e + e**2
        head = 2 * _LATENT_CHANNELS * e + _TEXT_WIDTH * e + e**2 + 2 * (_TIME_FEATURES * e + e**2)
        return self.depth * block + head + 7 * e**2

    def step_operations(self, frames: int) -> float:
        """Returns the number of operations for one step of a row, without operations that a request needs only once."""
        e, tokens = self.width, frames + self.prefix_tokens
        layer = 2 * self._products * tokens + 4 * self._softmaxes * e * tokens * (tokens + _CONTEXT_TOKENS)
        return self.depth * layer + 4 * _LATENT_CHANNELS * e * frames

    def spare_operations(self, tokens: int) -> float:
        """Returns the number of operations for padding tokens of a packed batch, which have no attention."""
        return (2 * self._products * self.depth + 4 * _LATENT_CHANNELS * self.width) * tokens

    def step_bytes(self, frames: int) -> float:
        return _ACTIVATIONS * self.width * (frames + self.prefix_tokens) * self.depth * _BYTES

    def decode_operations(self, frames: int) -> float:
        width, tokens = self.decoder_width, _TOKENS_PER_FRAME * frames
        blocks = self.decoder_blocks * (2 * 15 * width**2 + 8 * self.decoder_keys * width) * tokens
        return blocks + 2 * _LATENT_CHANNELS * width * frames + 2 * width * 512 * 16 * frames * self.decoder_kernel

    @property
    def _softmaxes(self) -> int:
        return 2 if self.differential else 1

    @property
    def _products(self) -> float:
        """Returns the number of a layer's weights by which every token is multiplied in every step.

        Addends: self-attention and its output, cross-attention's queries and output, gated feed-forward network.
        """
        return float(((5 if self.differential else 3) + 1 + self._softmaxes + 1 + 12) * self.width**2)


SMALL = Network()
MEDIUM = Network(
    width=1536,
    depth=24,
    differential=True,
    decoder_width=1536,
    decoder_blocks=12,
    decoder_keys=51,
    decoder_kernel=1,
    halo_frames=12,
    longest_s=380.0,
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An H200 GPU that runs one network in half precision with CUDA graphs. Times are in milliseconds."""

    network: Network
    flops: float = 790e12  # sustained
    bandwidth: float = 4.3e12  # bytes per second, sustained
    efficiency: float = 0.55
    fixed_ms: float = 1.4
    prompt_ms: float = 1.0

    def step_ms(self, lengths: Sequence[int], *, num_spare: int = 0) -> float:
        """Returns the time of one denoiser call for rows with these numbers of latent frames.

        `num_spare` is the number of padding tokens in the call.
        """
        net = self.network
        operations = sum(map(net.step_operations, lengths)) + net.spare_operations(num_spare)
        moved = net.num_weights * _BYTES + sum(map(net.step_bytes, lengths))
        moved += net.step_bytes(num_spare - net.prefix_tokens)
        device_ms = max(operations / self.flops, moved / self.bandwidth) / self.efficiency * 1000.0
        return self.fixed_ms + device_ms

    def decode_ms(self, windows: int, frames: int) -> float:
        operations = windows * self.network.decode_operations(frames)
        return self.fixed_ms + operations / self.flops / self.efficiency * 1000.0
