"""How far the Oobleck autoencoder's convolutions reach, in latent frames: what a window must have beside what it keeps.

Pure arithmetic over a config, no tensors. An interval [low, high] of outputs is followed back to its inputs, one
convolution after another.
"""

from __future__ import annotations

import math

from stable_audio_serve.models.sao.network_config import DILATIONS, OobleckConfig

_UNIT_REACH = 3 * sum(DILATIONS)  # of the convolutions of a stride's residual units, kernel 7
_ENDS_REACH = 3  # of the first and last convolution, kernel 7
_CODE_REACH = 1  # of the encoder's last convolution, kernel 3


def decoder_halo(config: OobleckConfig) -> int:
    """Returns how many latent frames to each side of a frame its audio depends on, at most."""
    low, high = -_ENDS_REACH, config.hop - 1 + _ENDS_REACH
    for stride in config.strides:
        low, high = low - _UNIT_REACH, high + _UNIT_REACH
        padding = math.ceil(stride / 2)
        low, high = -(-(low + padding - (2 * stride - 1)) // stride), (high + padding) // stride
    low, high = low - _ENDS_REACH, high + _ENDS_REACH
    return max(-low, high)


def encoder_halo(config: OobleckConfig) -> int:
    """Returns how many latent frames' worth of audio to each side of a frame its latent depends on, at most."""
    low, high = -_CODE_REACH, _CODE_REACH
    for stride in reversed(config.strides):
        padding = math.ceil(stride / 2)
        low, high = low * stride - padding, high * stride - padding + 2 * stride - 1
        low, high = low - _UNIT_REACH, high + _UNIT_REACH
    low, high = low - _ENDS_REACH, high + _ENDS_REACH
    return max(math.ceil(-low / config.hop), math.ceil((high - config.hop + 1) / config.hop))
