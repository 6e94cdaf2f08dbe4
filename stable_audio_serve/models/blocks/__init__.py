"""Network blocks shared by model families: norms, rotary positions, attention, Fourier features."""

from __future__ import annotations

from stable_audio_serve.models.blocks.attention import (
    Attend,
    CrossAttention,
    SelfAttention,
    attend,
)
from stable_audio_serve.models.blocks.band import BandAttention
from stable_audio_serve.models.blocks.feedforward import FeedForward, add_branch, sine
from stable_audio_serve.models.blocks.fourier import ExpoFourier
from stable_audio_serve.models.blocks.fused import FusedModule, Kernels
from stable_audio_serve.models.blocks.layouts import Layout, Padded
from stable_audio_serve.models.blocks.norms import HEAD_NORMS, DyT, RMSNorm, build_head_norm
from stable_audio_serve.models.blocks.packed import Packed
from stable_audio_serve.models.blocks.packed_segments import PackedSegments
from stable_audio_serve.models.blocks.rotary import HeadAffine, RotaryEmbedding, RotaryTable, cosines, gather_affine

__all__ = [
    "HEAD_NORMS",
    "Attend",
    "BandAttention",
    "CrossAttention",
    "DyT",
    "ExpoFourier",
    "FeedForward",
    "FusedModule",
    "HeadAffine",
    "Kernels",
    "Layout",
    "Packed",
    "PackedSegments",
    "Padded",
    "RMSNorm",
    "RotaryEmbedding",
    "RotaryTable",
    "SelfAttention",
    "add_branch",
    "attend",
    "build_head_norm",
    "cosines",
    "gather_affine",
    "sine",
]
