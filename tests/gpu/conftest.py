"""Selects the device for this folder's tests: the first CUDA device, or STABLE_AUDIO_TEST_DEVICE (`cpu` to try them).

The folder is a separate test suite for machines that have torch, transformers and pytest but none of our other
packages. It has its own pytest.ini, and neither this file nor any test needs pytest-asyncio or tests/conftest.py.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    name = os.environ.get("STABLE_AUDIO_TEST_DEVICE", "cuda:0")
    if name.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)
