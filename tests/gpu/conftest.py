"""Select the device for this folder's tests: the first CUDA device, or STABLE_AUDIO_TEST_DEVICE, such as `cpu`.

`stand-in` is the CPU with a stand-in for the queues and captures of a GPU, and with fewer and shorter tests.

This folder is a separate test suite for machines that have torch, transformers and pytest, but not our other
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
