"""Select the device for this folder's tests: the first CUDA device, or STABLE_AUDIO_TEST_DEVICE, such as `cpu`.

With `stand-in`, the tests run on the CPU with simulated queues and captures of a GPU, and are fewer and shorter.

This folder is a separate test suite for machines that have torch, transformers and pytest, but not the project's other
dependencies. It has its own pytest.ini and needs neither pytest-asyncio nor tests/conftest.py.
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
    return torch.device("cpu" if name == "stand-in" else name)
