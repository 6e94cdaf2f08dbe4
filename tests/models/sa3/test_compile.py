"""`torch.compile` can trace a layer of the diffusion transformer as one graph. The graph is not compiled here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stable_audio_serve.models.sa3.denoiser import Update
from tests.goldens import SHARP
from tests.models.loaded import assert_near
from tests.models.sa3.test_denoiser import conditioning, denoiser, golden


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARP)
def test_a_layer_is_traced_as_one_graph(name: str) -> None:
    g, net, given = golden(name), denoiser(name), []
    layer = net.transformer.typed_layers[1]  # the first one that gets an update of the layer before

    def keep(_: object, args: tuple[Tensor, Update], kwargs: dict[str, Any]) -> None:
        given.append((args[0].clone(), args[1], kwargs))  # a copy, because the layer may overwrite the tokens

    with torch.inference_mode():
        hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
        net(g("x"), g("t"), conditioning=conditioning(name), valid=g("padding_mask").bool())
        hook.remove()
        ((h, before, kwargs),) = given
        expected, update = layer(h.clone(), before, **kwargs)
        traced, traced_update = torch.compile(layer, fullgraph=True, backend="aot_eager")(h.clone(), before, **kwargs)
    assert_near(traced_update.added_to(traced), update.added_to(expected), within=1e-5)
