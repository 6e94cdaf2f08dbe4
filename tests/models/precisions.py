"""How far a decoder's precisions may differ from exact float32 on the reference checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

# Signal over error in decibels. Observed on a CPU, tf32 and split by emulated rounding: tf32 53.4 and 62.0, split 89.1
# and 99.5, float16 52.0 and 57.9, bfloat16 34.7 and 39.2.
LEAST_DB = {
    "tf32": {"sharp-s": 52.0, "sharp-l": 60.0},
    "split": {"sharp-s": 85.0, "sharp-l": 95.0},
    "float16": {"sharp-s": 49.0, "sharp-l": 56.0},
    "bfloat16": {"sharp-s": 33.0, "sharp-l": 37.0},
}


def noise_ratio_db(actual: Tensor, exact: Tensor) -> float:
    """Returns the power of `exact` over that of the difference, in decibels."""
    return float(10 * torch.log10(exact.double().square().sum() / (actual.double() - exact).square().sum()))
