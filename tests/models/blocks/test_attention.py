"""`name_kernels` names the attention kernels that torch chooses on a GPU, from what torch reports about each kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stable_audio_serve.models.blocks import attention
from stable_audio_serve.models.blocks.attention import name_kernels


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitate a GPU. Its flash kernel needs float16 and no mask; its memory-efficient kernel refuses only float64."""
    backends = torch.backends.cuda

    def parameters(q: torch.Tensor, k: Any, v: Any, mask: Any, *rest: Any) -> tuple[torch.dtype, bool]:
        return q.dtype, mask is None

    monkeypatch.setattr(backends, "SDPAParams", parameters)
    monkeypatch.setattr(backends, "can_use_cudnn_attention", lambda own: True)
    monkeypatch.setattr(backends, "can_use_flash_attention", lambda own: own == (torch.float16, True))
    monkeypatch.setattr(backends, "can_use_efficient_attention", lambda own: own[0] != torch.float64)
    monkeypatch.setattr(backends, "cudnn_sdp_enabled", lambda: False)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float16, "flash, masked efficient"),
        (torch.float32, "efficient, masked efficient"),
        (torch.float64, "math, masked math"),
    ],
)
def test_kernels_are_named_in_the_order_torch_tries_them(dtype: torch.dtype, names: str) -> None:
    assert name_kernels(torch.device("cuda"), dtype, num_heads=2, head_width=64) == names


@pytest.mark.usefixtures("gpu")
def test_cudnn_is_named_only_if_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    assert attention.name_kernels(torch.device("cuda"), torch.float16, num_heads=2, head_width=64).startswith("cudnn")


def test_other_devices_have_no_kernels_to_name() -> None:
    assert name_kernels(torch.device("cpu"), torch.float32, num_heads=2, head_width=64) == ""
