"""How far a component may be from the reference: absolute, float32 on a CPU. 0 means equal."""

from __future__ import annotations

from typing import Literal

Component = Literal[
    "checkpoint",
    "goldens",
    "lengths",
    "schedules",
    "draws",
    "text tokens",
    "text",
    "number",
    "denoiser time features",
    "denoiser",
    "denoiser guidance",
    "denoiser padding",
    "autoencoder",
    "end-to-end latents",
    "end-to-end audio",
]

BOUNDS: dict[Component, float] = {
    "lengths": 0.0,
    "schedules": 1e-6,
    "draws": 0.0,
    "text tokens": 0.0,
    "text": 2e-5,
    "number": 1e-4,  # Fourier arguments reach 6e4 rad
    "denoiser time features": 1e-4,
    "denoiser": 5e-5,
    "denoiser guidance": 2e-4,
    "denoiser padding": 1e-4,
    "autoencoder": 2e-5,
    "end-to-end latents": 5e-4,
    "end-to-end audio": 5e-4,
}

# Folders that state how much float32 rounding of the weights moves each number are better conditioned, and their
# autoencoders answer with more than 1e-5 to it; the bound is theirs.
AUTOENCODER_BOUND_WITH_ROUNDING = 1e-4

# A verification that compared nothing of one of these has verified nothing.
REQUIRED: dict[str, tuple[Component, ...]] = {
    "text": ("text",),
    "number": ("number",),
    "denoiser": ("denoiser", "denoiser guidance", "denoiser padding"),
    "autoencoder": ("autoencoder",),
    "end-to-end": ("end-to-end latents", "end-to-end audio"),
}
