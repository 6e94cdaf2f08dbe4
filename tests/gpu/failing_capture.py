"""A capture that fails, and work after it: `python -m tests.gpu.failing_capture cuda:0`."""

from __future__ import annotations

import sys

import pytest
import torch

from stable_audio_serve.core.clock import SystemClock
from stable_audio_serve.engine.hardware.device import open_device


def main(name: str) -> None:
    """Raise AssertionError unless the capture is refused and the device stays usable."""
    device = torch.device(name)
    opened = open_device(device, clock=SystemClock())
    values, current = torch.ones(8, device=device), torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        opened.capture(lambda: values.add_(values.sum().item()))  # type: ignore[arg-type, return-value]
    assert torch.cuda.current_stream(device) == current
    values.fill_(1.0)
    assert (values * 2.0).tolist() == [2.0] * 8


if __name__ == "__main__":
    main(sys.argv[1])
