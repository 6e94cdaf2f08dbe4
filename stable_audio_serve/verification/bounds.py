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

# For folders that state how far float32 rounding of the weights moves each number: in those, rounding alone moves an
# autoencoder's output by more than 1e-5.
AUTOENCODER_BOUND_WITH_ROUNDING = 1e-4

# Verification fails when nothing was compared for one of these parts.
REQUIRED: dict[str, tuple[Component, ...]] = {
    "text": ("text",),
    "number": ("number",),
    "denoiser": ("denoiser", "denoiser guidance", "denoiser padding"),
    "autoencoder": ("autoencoder",),
    "end-to-end": ("end-to-end latents", "end-to-end audio"),
}
