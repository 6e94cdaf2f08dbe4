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
    "text in float16",
    "number",
    "denoiser time features",
    "denoiser",
    "denoiser guidance",
    "denoiser padding",
    "autoencoder",
    "decoder halo",
    "end-to-end steps",
    "end-to-end latents",
    "end-to-end audio",
    "Brownian paths",
    "samplers over sigma",
    "Heun over sigma",
    "samplers over time",
    "source preparation",
]

# The reference numbers come from one processor; another, with wider vectors, sums in another order. A Xeon with AVX512
# is 2.7e-5 away in the denoiser, 2.4e-4 in the time features and one step of float16 in the text.
BOUNDS: dict[Component, float] = {
    "lengths": 0.0,
    "schedules": 1e-6,
    "draws": 0.0,
    "text tokens": 0.0,
    "text": 5e-5,
    "text in float16": 8e-3,  # steps between 4 and 8 are 4e-3
    "number": 5e-4,  # Fourier arguments reach 6e4 rad
    "denoiser time features": 5e-4,
    "denoiser": 3.5e-5,
    "denoiser guidance": 5e-5,
    "denoiser padding": 3.5e-5,
    "autoencoder": 2e-5,
    "decoder halo": 2e-5,
    "end-to-end steps": 1e-4,  # by the size of x
    "end-to-end latents": 1e-4,
    "end-to-end audio": 1e-4,
    "Brownian paths": 1e-5,
    "samplers over sigma": 1e-5,  # by the size of x, which reaches 1000
    "Heun over sigma": 2e-4,  # the same; two steps from sigma = 500 to 0.3 multiply rounding by 800
    "samplers over time": 1e-6,
    "source preparation": 1e-5,
}

OPEN_NUMBER_BOUND = 1e-5  # of the Stable Audio Open family, whose numbers are scaled to 0..1

# A folder may state how far float32 rounding of the weights alone moves a number. That number's bound is this many
# times as far; and where any is stated, rounding moves the other outputs of the autoencoder by more than 1e-5.
TIMES_ROUNDING = 10.0
AUTOENCODER_BOUND_WITH_ROUNDING = 1e-4

# Verification of a model fails when nothing was compared for one of these parts.
REQUIRED: dict[str, tuple[Component, ...]] = {
    "text": ("text",),
    "number": ("number",),
    "denoiser": ("denoiser", "denoiser guidance", "denoiser padding"),
    "autoencoder": ("autoencoder",),
    "end-to-end": ("end-to-end latents", "end-to-end audio"),
}

# The same for a folder without a model.
REQUIRED_WITHOUT_MODEL: dict[str, tuple[Component, ...]] = {
    "schedules": ("schedules",),
    "draws": ("draws",),
    "Brownian paths": ("Brownian paths",),
    "samplers over sigma": ("samplers over sigma",),
    "Heun over sigma": ("Heun over sigma",),
    "samplers over time": ("samplers over time",),
    "source preparation": ("source preparation",),
}
