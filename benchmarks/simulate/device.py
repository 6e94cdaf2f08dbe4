"""An H200 as a formula: the operations and bytes of Stable Audio 3's networks, and how fast the GPU does them.

A step of rows with L frames takes `fixed + max(F(L) / flops, (W + A(L)) / bandwidth) / efficiency`, with F operations
and A activation bytes of all rows and W weight bytes; a decode takes `fixed + D(L) / flops / efficiency`. A
multiply-add counts as two operations. The constants fit Stability AI's published H200 times within 10 % (medium at
5 s: 37 % too high). Dimensions are from the published configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

_RATE_HZ, _HOP = 44_100, 4096
_LATENT_CHANNELS = 256
_LOCAL_WIDTH = 257  # width of the local conditioning that is added to each frame
_TEXT_WIDTH, _CONTEXT_TOKENS = 768, 257
_TIME_FEATURES = 256
_BYTES = 2  # half precision
_ACTIVATIONS = 40  # width-sized reads and writes per token and block with fused attention and norms
_TOKENS_PER_FRAME = 17  # of the decoder


@dataclass(frozen=True, slots=True)
class Network:
    """One model's denoiser and decoder. `differential` attention computes two softmaxes from a five-way projection."""

    name: str
    width: int
    depth: int
    differential: bool
    decoder_width: int
    decoder_blocks: int
    decoder_keys: int  # keys per query in the decoder
    decoder_kernel: int  # kernel size of the decoder's last convolution
    halo_frames: int  # frames on each side of a decode window that it does not keep
    longest_s: float
    prefix_tokens: int = 64

    def frames(self, duration_s: float) -> int:
        """Returns the latent frames of a clip without headroom, an even number."""
        return 2 * math.ceil(duration_s * _RATE_HZ / _HOP / 2)

    @property
    def num_weights(self) -> float:
        """Parameters of the denoiser."""
        e = self.width
        block = (5 if self.differential else 3) * e**2 + e**2  # self-attention
        block += (self._softmaxes + 1) * e**2  # cross-attention: queries and output
        block += (self._softmaxes + 1) * e**2  # its keys and values
        block += 12 * e**2  # gated feed-forward, four times the width
        block += _LOCAL_WIDTH * e + e**2
        head = 2 * _LATENT_CHANNELS * e + _TEXT_WIDTH * e + e**2 + 2 * (_TIME_FEATURES * e + e**2)
        return self.depth * block + head + 7 * e**2

    def step_operations(self, frames: int) -> float:
        """Returns the operations of one step of a row. Keys and values of the context are not computed again."""
        e, tokens = self.width, frames + self.prefix_tokens
        layer = 2 * self._products * tokens + 4 * self._softmaxes * e * tokens * (tokens + _CONTEXT_TOKENS)
        return self.depth * layer + 4 * _LATENT_CHANNELS * e * frames

    def spare_operations(self, tokens: int) -> float:
        """Returns the operations of unused tokens, which belong to no row and attend to nothing."""
        return (2 * self._products * self.depth + 4 * _LATENT_CHANNELS * self.width) * tokens

    def step_bytes(self, frames: int) -> float:
        """Returns the activation bytes of one row's step."""
        return _ACTIVATIONS * self.width * (frames + self.prefix_tokens) * self.depth * _BYTES

    def decode_operations(self, frames: int) -> float:
        """Returns the operations of decoding one window."""
        width, tokens = self.decoder_width, _TOKENS_PER_FRAME * frames
        blocks = self.decoder_blocks * (2 * 15 * width**2 + 8 * self.decoder_keys * width) * tokens
        return blocks + 2 * _LATENT_CHANNELS * width * frames + 2 * width * 512 * 16 * frames * self.decoder_kernel

    @property
    def _softmaxes(self) -> int:
        return 2 if self.differential else 1

    @property
    def _products(self) -> float:
        """Returns the number of weights of a layer that multiply every token in every step."""
        return float(((5 if self.differential else 3) + 1 + self._softmaxes + 1 + 12) * self.width**2)


SMALL = Network(
    "small",
    width=1024,
    depth=20,
    differential=False,
    decoder_width=768,
    decoder_blocks=6,
    decoder_keys=34,
    decoder_kernel=3,
    halo_frames=2,
    longest_s=120.0,
)
MEDIUM = replace(
    SMALL,
    name="medium",
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
    """One H200 in half precision with captured steps, running one network. Times are in milliseconds."""

    network: Network
    flops: float = 790e12  # sustained
    bandwidth: float = 4.3e12  # bytes per second, sustained
    efficiency: float = 0.55
    fixed_ms: float = 1.4
    prompt_ms: float = 1.0

    def step_ms(self, lengths: Sequence[int], *, num_spare: int = 0) -> float:
        """Returns the time of one call over rows of these latent frames, with `num_spare` unused tokens."""
        net = self.network
        operations = sum(map(net.step_operations, lengths)) + net.spare_operations(num_spare)
        moved = net.num_weights * _BYTES + sum(map(net.step_bytes, lengths))
        moved += net.step_bytes(num_spare - net.prefix_tokens)
        device_ms = max(operations / self.flops, moved / self.bandwidth) / self.efficiency * 1000.0
        return self.fixed_ms + device_ms

    def decode_ms(self, windows: int, frames: int) -> float:
        """Returns the time of decoding windows of one length together."""
        operations = windows * self.network.decode_operations(frames)
        return self.fixed_ms + operations / self.flops / self.efficiency * 1000.0
