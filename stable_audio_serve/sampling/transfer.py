"""Copies from the host to a device for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Returns a host tensor's values on `device`: the tensor itself on a CPU, else a copy through pinned memory.

    A copy from memory that is not pinned makes the host wait until the device has done everything before it.
    """
    if device.type in ("cpu", "mps"):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
