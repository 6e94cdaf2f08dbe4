"""The predicted memory size of a model's weights equals their size after loading."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.models import build_random_model
from stable_audio_serve.models.download import download_text_encoder
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.registry import BUILT_IN, resolve_entry
from stable_audio_serve.models.weight_sizes import official_weight_bytes, weight_bytes
from tests.goldens import OPEN_GOLDENS, SA3_GOLDENS
from tests.parameters import some


@pytest.mark.parametrize("folder", [SA3_GOLDENS / "tiny-s", SA3_GOLDENS / "tiny-l", OPEN_GOLDENS / "tiny-1.0"], ids=str)
def test_sizes_from_headers_equal_the_loaded_networks(folder: Path) -> None:
    sizes: list[int] = []
    model = load_model(resolve_entry("tiny", path=str(folder)), check_size=sizes.append)
    networks = (model.text.encoder, model.prompt, *model.numbers.values(), model.denoiser, model.autoencoder)  # type: ignore[attr-defined]
    taken = sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
    assert sizes == [pytest.approx(taken, rel=0.01)]
    text_encoder = download_text_encoder(folder)
    halved = weight_bytes(folder, text_encoder=text_encoder, dtype=torch.float16)
    denoiser = sum(parameter.nbytes for parameter in model.denoiser.parameters())  # type: ignore[attr-defined]
    assert sizes[0] - halved == pytest.approx(denoiser / 2, rel=0.01)


OFFICIAL = [name for name in BUILT_IN if name != "demo"]
DTYPES = (torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    some(product(OFFICIAL, DTYPES), [(name, DTYPES[index % 2]) for index, name in enumerate(OFFICIAL)]),
)
def test_sizes_of_official_models_equal_their_networks(name: str, dtype: torch.dtype) -> None:
    model = build_random_model(name, device="meta", dtype=dtype)
    networks = (model.text.encoder, model.prompt, *model.numbers.values(), model.denoiser, model.autoencoder)
    taken = sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())
    assert official_weight_bytes(name, dtype=dtype) == pytest.approx(taken, abs=2000)


def test_weights_that_are_refused_are_not_loaded() -> None:
    def refuse(num_bytes: int) -> None:
        raise ValueError(num_bytes)

    with pytest.raises(ValueError, match=r"\d+"):
        load_model(resolve_entry("tiny", path=str(SA3_GOLDENS / "tiny-s")), check_size=refuse)
