"""Bounds of the difference between a decoder's precisions and exact float32, for the reference checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

# Signal-to-error ratio in decibels. Observed on a CPU, with emulated rounding for tf32 and split: 53.4 and 62.0 for
# tf32, 89.1 and 99.5 for split, 52.0 and 57.9 for float16, 34.7 and 39.2 for bfloat16.
LEAST_DB = {
    "tf32": {"sharp-s": 52.0, "sharp-l": 60.0},
    "split": {"sharp-s": 85.0, "sharp-l": 95.0},
    "float16": {"sharp-s": 49.0, "sharp-l": 56.0},
    "bfloat16": {"sharp-s": 33.0, "sharp-l": 37.0},
}


def noise_ratio_db(actual: Tensor, exact: Tensor) -> float:
    """Returns the ratio of the power of `exact` to the power of the difference, in decibels."""
    return float(10 * torch.log10(exact.double().square().sum() / (actual.double() - exact).square().sum()))
