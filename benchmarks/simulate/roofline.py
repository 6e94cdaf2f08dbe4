"""Stable Audio's networks as counts of operations and bytes, and a GPU as how fast it does them.

A step of `rows` rows of L frames takes `fixed + max(rows F(L) / flops, (W + rows A(L)) / bandwidth) / efficiency`, with
F operations and A activation bytes of one row and W weight bytes; a decode `fixed + rows D(L) / flops / efficiency`.
A multiply-add counts as two operations. The presets fit Stability AI's published H200 rows within 10 % with captured
steps (medium at 5 s: 37 % high). Dimensions are those of the published checkpoints' configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

_RATE_HZ = 44_100
_LATENT_TEXT_WIDTH = 768  # of T5Gemma and T5 base
_TIME_FEATURES = 256
_BYTES = 2  # half precision
_ACTIVATIONS = 40  # width-sized reads and writes per token and block with fused attention and norms


@dataclass(frozen=True, slots=True)
class Network:
    """One model's denoiser and decoder. `differential` attention computes two softmaxes from a five-way projection."""

    name: str
    width: int
    depth: int
    differential: bool
    context_tokens: int
    context_width: int
    prefix_tokens: int  # memory tokens, or the one global token
    local_width: int  # of additions per frame; 0 = none
    latent_channels: int
    hop: int
    decoder: str
    window_frames: int = 0  # always this long; 0 = as long as the clip

    def frames(self, duration_s: float) -> int:
        """Returns the latent frames of a clip without headroom, an even number."""
        if self.window_frames:
            return self.window_frames
        return 2 * math.ceil(duration_s * _RATE_HZ / self.hop / 2)

    @property
    def num_weights(self) -> float:
        """Parameters of the denoiser."""
        e = self.width
        block = (5 if self.differential else 3) * e**2 + e**2  # self-attention
        block += (2 if self.differential else 1) * e**2 + e**2  # cross-attention: queries and output
        block += (3 if self.differential else 2) * e * self.context_width  # its keys and values
        block += 12 * e**2  # gated feed-forward, four times the width
        block += (self.local_width * e + e**2) if self.local_width else 0
        head = 2 * self.latent_channels * e + _LATENT_TEXT_WIDTH * e + e**2 + 2 * (_TIME_FEATURES * e + e**2)
        modulation = 7 * e**2 if self.local_width else 0
        return self.depth * block + head + modulation

    def step_operations(self, frames: int, *, is_cached: bool = True) -> float:
        """Returns the operations of one row's step. `is_cached`: keys and values of the context are kept between steps
        and local additions that are zero are left out, as our engine does."""
        e, tokens, softmaxes = self.width, frames + self.prefix_tokens, self._softmaxes
        total: float = 2 * self._products * tokens
        total += 4 * softmaxes * e * tokens * (tokens + self.context_tokens)
        if not is_cached:
            total += 2 * (softmaxes + 1) * e * self.context_width * self.context_tokens
            total += 2 * (self.local_width * e + e**2) * frames if self.local_width else 0
        total *= self.depth
        total += 4 * self.latent_channels * e * frames
        if not is_cached:
            total += 2 * (_LATENT_TEXT_WIDTH * e + e**2) * self.context_tokens
        return total

    def spare_operations(self, tokens: int) -> float:
        """Returns the operations of tokens that are in no row, so that they attend to nothing."""
        return (2 * self._products * self.depth + 4 * self.latent_channels * self.width) * tokens

    @property
    def _softmaxes(self) -> int:
        return 2 if self.differential else 1

    @property
    def _products(self) -> float:
        """Weights of a layer that every token meets in every step."""
        return float(((5 if self.differential else 3) + 1 + self._softmaxes + 1 + 12) * self.width**2)

    def step_bytes(self, frames: int) -> float:
        """Returns the activation bytes of one row's step."""
        return _ACTIVATIONS * self.width * (frames + self.prefix_tokens) * self.depth * _BYTES

    def decode_operations(self, frames: int) -> float:
        """Returns the operations of decoding one window."""
        if self.decoder == "same-s":
            return _same_operations(frames, width=768, blocks=6, keys=34)
        if self.decoder == "same-l":
            return _same_operations(frames, width=1536, blocks=12, keys=51)
        return _oobleck_operations(frames)


def _same_operations(frames: int, *, width: int, blocks: int, keys: int) -> float:
    """Stable Audio 3's transformer decoder: 17 tokens per latent frame, differential attention over `keys` keys."""
    tokens = 17 * frames
    convolution = 3 if keys == 34 else 1  # the small one maps with a kernel of three
    blocks_total = blocks * (2 * 15 * width**2 + 8 * keys * width) * tokens
    return blocks_total + 2 * 256 * width * frames + 2 * width * 512 * 16 * frames * convolution


def _oobleck_operations(frames: int) -> float:
    """The convolutional decoder of Stable Audio Open: strides 8, 8, 4, 4, 2, widths 128 x (16, 8, 4, 2, 1, 1)."""
    widths, total, length = (2048, 1024, 512, 256, 128, 128), 2.0 * 64 * 2048 * 7 * frames, frames
    for into, out, stride in zip(widths, widths[1:], (8, 8, 4, 4, 2), strict=False):
        total += 2 * into * out * 2 * stride * length
        length *= stride
        total += 3 * 2 * (7 + 1) * out**2 * length
    return total + 2 * 128 * 2 * 7 * length


SMALL = Network(
    "small",
    width=1024,
    depth=20,
    differential=False,
    context_tokens=257,
    context_width=1024,
    prefix_tokens=64,
    local_width=257,
    latent_channels=256,
    hop=4096,
    decoder="same-s",
)
MEDIUM = replace(SMALL, name="medium", width=1536, depth=24, differential=True, context_width=1536, decoder="same-l")
OPEN = Network(
    "stable-audio-open-1.0",
    width=1536,
    depth=24,
    differential=False,
    context_tokens=130,
    context_width=768,
    prefix_tokens=1,
    local_width=0,
    latent_channels=64,
    hop=2048,
    decoder="oobleck",
    window_frames=1024,
)
OPEN_SMALL = replace(OPEN, name="stable-audio-open-small", width=1024, depth=16, context_tokens=65, window_frames=256)


@dataclass(frozen=True, slots=True)
class Roofline:
    """A device model. `host_ms`: a call takes at least as long as the host needs to launch it."""

    network: Network
    flops: float = 790e12  # sustained, half precision, one H200
    bandwidth: float = 4.3e12  # bytes per second, sustained
    efficiency: float = 0.55
    fixed_ms: float = 1.4
    host_ms: float = 0.0
    prompt_ms: float = 1.0

    def text_ms(self, prompts: int) -> float:
        return self.prompt_ms

    def encode_ms(self, rows: int, frames: int) -> float:
        return self.decode_ms(rows, frames)  # encoder and decoder are alike

    def step_ms(self, rows: int, frames: int) -> float:
        return self.packed_step_ms([(rows, frames)])

    def packed_step_ms(self, lanes: Sequence[tuple[int, int]], *, num_spare: int = 0) -> float:
        """Returns the time of one call over rows of several lengths, (rows, frames) each, and `num_spare` tokens that
        it only has room for."""
        net = self.network
        operations = sum(rows * net.step_operations(frames) for rows, frames in lanes) + net.spare_operations(num_spare)
        moved = net.num_weights * _BYTES + sum(r * net.step_bytes(f) for r, f in lanes)
        moved += net.step_bytes(num_spare - net.prefix_tokens)
        device_ms = max(operations / self.flops, moved / self.bandwidth) / self.efficiency * 1000.0
        return max(self.host_ms, self.fixed_ms + device_ms)

    def decode_ms(self, rows: int, frames: int) -> float:
        operations = rows * self.network.decode_operations(frames)
        return max(self.host_ms, self.fixed_ms + operations / self.flops / self.efficiency * 1000.0)


def h200(network: Network, *, is_captured: bool = True) -> Roofline:
    """One H200 in half precision: with captured steps, or launching every kernel from the host as the engine does."""
    if is_captured:
        return Roofline(network)
    return Roofline(network, efficiency=0.45, fixed_ms=0.0, host_ms=12.0 if network is SMALL else 16.0)
