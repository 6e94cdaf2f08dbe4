"""`torch.compile` can trace a layer of the diffusion transformer as one graph. The graph is not compiled here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.goldens import SHARP
from tests.models.loaded import assert_near
from tests.models.sa3.test_denoiser import conditioning, denoiser, golden


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARP)
def test_a_layer_is_traced_as_one_graph(name: str) -> None:
    g, net, given = golden(name), denoiser(name), []
    layer = net.transformer.layers[0]

    def keep(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor) -> None:
        given.append((args, kwargs, out.clone()))

    with torch.inference_mode():
        hook = layer.register_forward_hook(keep, with_kwargs=True)
        net(g("x"), g("t"), conditioning=conditioning(name), valid=g("padding_mask").bool())
        hook.remove()
        ((args, kwargs, expected),) = given
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    assert_near(traced, expected, within=1e-5)
