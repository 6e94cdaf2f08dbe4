"""Network blocks shared by model families: norms, rotary positions, attention, Fourier features."""

from __future__ import annotations

from stable_audio_serve.models.blocks.attention import (
    Attend,
    CrossAttention,
    SelfAttention,
    attend,
    attend_band,
)
from stable_audio_serve.models.blocks.feedforward import FeedForward, sine
from stable_audio_serve.models.blocks.fourier import ExpoFourier
from stable_audio_serve.models.blocks.layouts import Layout, Padded
from stable_audio_serve.models.blocks.norms import HEAD_NORMS, DyT, RMSNorm, build_head_norm
from stable_audio_serve.models.blocks.packed import Packed, join_local, packed_layout
from stable_audio_serve.models.blocks.rotary import RotaryEmbedding, RotaryTable, rotate

__all__ = [
    "HEAD_NORMS",
    "Attend",
    "CrossAttention",
    "DyT",
    "ExpoFourier",
    "FeedForward",
    "Layout",
    "Packed",
    "Padded",
    "RMSNorm",
    "RotaryEmbedding",
    "RotaryTable",
    "SelfAttention",
    "attend",
    "attend_band",
    "build_head_norm",
    "join_local",
    "packed_layout",
    "rotate",
    "sine",
]
