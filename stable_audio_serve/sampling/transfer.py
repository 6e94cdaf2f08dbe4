"""Copies from the host to a device without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on `device`: the tensor itself on a CPU, otherwise a copy through pinned memory.

    A copy from unpinned memory would block the host until the device has done all earlier work.
    """
    if device.type in ("cpu", "mps"):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
