"""Computes how far the Oobleck autoencoder's convolutions reach: the halo (extra latent frames) that a window needs.

Arithmetic over a config, without tensors: an interval [low, high] of outputs is traced back to the inputs it depends
on, one convolution after another.
"""

from __future__ import annotations

import math

from stable_audio_serve.models.sao.network_config import DILATIONS, OobleckConfig

# How many inputs a convolution reads on each side of its position: (kernel size - 1) / 2, times the dilation.
_UNIT_REACH = 3 * sum(DILATIONS)  # the three residual units of one resolution together (kernel size 7)
_ENDS_REACH = 3  # the encoder's first convolution, and the decoder's first and last one (kernel size 7)
_CODE_REACH = 1  # the encoder's last convolution (kernel size 3)


def decoder_halo(config: OobleckConfig) -> int:
    """Returns how many latent frames on each side of a latent frame can influence the frame's audio."""
    low, high = -_ENDS_REACH, config.hop - 1 + _ENDS_REACH
    for stride in config.strides:
        low, high = low - _UNIT_REACH, high + _UNIT_REACH
        padding = math.ceil(stride / 2)
        low, high = -(-(low + padding - (2 * stride - 1)) // stride), (high + padding) // stride
    low, high = low - _ENDS_REACH, high + _ENDS_REACH
    return max(-low, high)


def encoder_halo(config: OobleckConfig) -> int:
    """Returns how many frames of `hop` samples on each side of a latent frame can influence the frame's latent."""
    low, high = -_CODE_REACH, _CODE_REACH
    for stride in reversed(config.strides):
        padding = math.ceil(stride / 2)
        low, high = low * stride - padding, high * stride - padding + 2 * stride - 1
        low, high = low - _UNIT_REACH, high + _UNIT_REACH
    low, high = low - _ENDS_REACH, high + _ENDS_REACH
    return max(math.ceil(-low / config.hop), math.ceil((high - config.hop + 1) / config.hop))
