"""Where the tests of this folder run: the first CUDA device, or STABLE_AUDIO_TEST_DEVICE (`cpu` tries them out).

The folder is a test suite of its own for machines that have torch, transformers and pytest but none of our other
packages: pytest.ini stands here, and neither this file nor any test needs pytest-asyncio or the conftest above.
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
