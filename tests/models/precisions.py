"""How close a decoder in each precision must be to a decoder in float32, for the reference checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

# Precision -> checkpoint -> least allowed signal-to-error ratio in decibels. The limits are 1 to 4 dB below the ratios
# measured on a CPU, where the rounding of tf32 was emulated.
LEAST_DB = {
    "tf32": {"sharp-s": 52.0, "sharp-l": 60.0},
    "float16": {"sharp-s": 49.0, "sharp-l": 56.0},
    "bfloat16": {"sharp-s": 33.0, "sharp-l": 37.0},
}


def noise_ratio_db(actual: Tensor, exact: Tensor) -> float:
    """Returns the ratio of the power of `exact` to the power of `actual - exact`, in decibels."""
    return float(10 * torch.log10(exact.double().square().sum() / (actual.double() - exact).square().sum()))
