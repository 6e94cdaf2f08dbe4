"""Linear layers with oneDNN: a row's result does not depend on the number of threads or on other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stable_audio_serve.models import onednn
from stable_audio_serve.models.onednn import OneDnnLinear, linear, supports_onednn, use_onednn

needs_it = pytest.mark.skipif(not onednn._is_faster(), reason="oneDNN multiplies nothing on this processor")
pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(onednn, "_is_faster", lambda: True)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_layer(width_in: int, width_out: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width_in, width_out, bias=bias))
    use_onednn(net)
    (layer,) = net
    assert type(layer) is OneDnnLinear
    return layer


@needs_it
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width_in", "width_out"), [(192, 576), (1024, 3072), (65, 320), (512, 65)])
def test_products_are_exact_and_independent_of_threads_and_rows(width_in: int, width_out: int, bias: bool) -> None:
    layer = make_layer(width_in, width_out, bias=bias)
    x = torch.randn(1, 160, width_in)
    with torch.inference_mode():
        made = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            made.append(layer(x))
        among_others = layer(torch.cat([torch.full_like(x[:, :37], float("nan")), x], dim=1))[:, 37:]
        exact = layer.double()(x.double())
    assert all(torch.equal(made[0], other) for other in (*made[1:], among_others))
    torch.testing.assert_close(made[0].double(), exact, rtol=0, atol=2e-5)


@needs_it
def test_transposed_views_give_the_same_products() -> None:
    layer, x = make_layer(192, 576), torch.randn(2, 192, 54)
    with torch.inference_mode():
        assert torch.equal(layer(x.transpose(1, 2)), layer(x.transpose(1, 2).contiguous()))


def test_gradients_reach_the_weights() -> None:
    layer = make_layer(192, 576)
    layer(torch.randn(54, 192)).sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


def test_small_products_and_other_precisions_use_torch() -> None:
    layer, small, wide = make_layer(192, 576), torch.randn(1, 192), torch.randn(54, 192)
    weight = layer.weight
    assert supports_onednn(wide, weight)
    assert not supports_onednn(wide.bfloat16(), weight.bfloat16())
    with torch.inference_mode():
        assert torch.equal(layer(small), F.linear(small, weight, layer.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(wide), F.linear(wide, weight, layer.bias))
            assert layer(wide).dtype == torch.bfloat16


def test_networks_on_other_devices_or_processors_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        elsewhere = nn.Sequential(nn.Linear(192, 576))
    use_onednn(elsewhere)
    assert type(elsewhere[0]) is nn.Linear
    monkeypatch.undo()
    monkeypatch.setattr(onednn, "is_amd", lambda: False)
    other = nn.Sequential(nn.Linear(192, 576))
    use_onednn(other)
    assert type(other[0]) is nn.Linear


def test_torch_function_modes_see_the_products() -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func)
            return func(*args, **(kwargs or {}))

    names: list[Callable[..., Any]] = []
    layer = make_layer(192, 576)
    with torch.inference_mode(), Seen():
        layer(torch.randn(54, 192))
    assert linear in names
