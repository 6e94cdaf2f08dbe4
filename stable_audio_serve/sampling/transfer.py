"""Copies from the host to a device without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return the values of a host tensor on `device`: the same tensor if `device` is a CPU, else a copy.

    The copy goes through pinned memory. A copy from memory that is not pinned would make the host wait until the device
    has done all earlier work.
    """
    if device.type in ("cpu", "mps"):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
