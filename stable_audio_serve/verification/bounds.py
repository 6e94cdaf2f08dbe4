"""How far a component may be from the reference: absolute, float32 on a CPU. 0 means equal."""

from __future__ import annotations

from stable_audio_serve.core.processor import is_amd

# The comparisons of a component are reported together, in this order.
BOUNDS: dict[str, float] = {
    "lengths": 0.0,
    "schedules": 1e-6,
    "draws": 0.0,
    "text tokens": 0.0,
    "text": 2e-5,
    "text in float16": 2e-3,
    "number": 1e-4,  # Fourier arguments reach 6e4 rad
    "denoiser time features": 1e-4,
    "denoiser": 2e-5,
    "denoiser guidance": 5e-5,
    "denoiser padding": 2e-5,
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

# The reference's numbers come from an AMD processor; wider vectors and other libraries sum in another order. Seen on a
# Xeon with AVX512 and AMX, rounded up.
if not is_amd():
    BOUNDS |= {"text": 3e-5, "text in float16": 4e-3, "denoiser time features": 2.5e-4, "denoiser": 3e-5}

OPEN_NUMBER_BOUND = 1e-5  # of the Stable Audio Open family, whose numbers are scaled to 0..1

# A folder may state how far float32 rounding of the weights alone moves a number. That number's bound is this many
# times as far; and where any is stated, rounding moves the other outputs of the autoencoder by more than 1e-5.
TIMES_ROUNDING = 10.0
AUTOENCODER_BOUND_WITH_ROUNDING = 1e-4

# Verification of a model fails when nothing was compared for one of these parts.
REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "number": ("number",),
    "denoiser": ("denoiser", "denoiser guidance", "denoiser padding"),
    "autoencoder": ("autoencoder",),
    "end-to-end": ("end-to-end latents", "end-to-end audio"),
}

# The same for a folder without a model.
REQUIRED_WITHOUT_MODEL: dict[str, tuple[str, ...]] = {
    component: (component,)
    for component in (
        "schedules",
        "draws",
        "Brownian paths",
        "samplers over sigma",
        "Heun over sigma",
        "samplers over time",
        "source preparation",
    )
}
