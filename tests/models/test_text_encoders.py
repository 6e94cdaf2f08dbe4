"""The networks of text encoders give the same bits as those of transformers, for sizes that no checkpoint here has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stable_audio_serve.models.blocks import text
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.sa3.t5gemma import T5GemmaEncoder
from stable_audio_serve.models.sao.t5 import T5Encoder
from stable_audio_serve.models.text_encoder import EncoderNetwork, TextEncoder
from stable_audio_serve.models.weights import cast_network

SMALL_T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 2}
SMALL_GEMMA = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "head_dim": 8, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def encode(
    network: Any, own: EncoderNetwork, *, dtype: torch.dtype, num_tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns three prompts' hidden states from both networks, which get the same random weights of this scale."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
        cast_network(network.eval(), dtype)
        cast_network(own.eval(), dtype)
        own.load_state_dict({key: network.state_dict()[f"encoder.{key}"] for key in own.state_dict()})
        ids, mask = torch.randint(50, (3, num_tokens)), torch.ones(3, num_tokens, dtype=torch.long)
        mask[1, 5:], mask[2] = 0, 0
        added = torch.zeros(3, 1, 1, num_tokens, dtype=dtype)
        added.masked_fill_(mask[:, None, None] == 0, torch.finfo(dtype).min)
        expected: Tensor = network(input_ids=ids, attention_mask=added).last_hidden_state.float()
        hidden = TextEncoder(None, own, width=0, max_length=num_tokens).encode(ids, mask)
    assert expected.isfinite().all()
    return hidden, expected


@pytest.fixture(scope="module")
def transformers() -> Any:
    """Import the package only here, because its networks take three seconds, and most processes never need them."""
    import transformers

    return transformers


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use torch's half-precision products on every processor, as transformers does."""
    monkeypatch.setattr(text, "is_slow", lambda x: False)


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 7, "layer_norm_epsilon": 1e-2},
        {"feed_forward_proj": "gated-silu", "relative_attention_max_distance": 20},
    ],
)
def test_t5_has_the_bits_of_transformers(changes: dict[str, Any], dtype: torch.dtype, transformers: Any) -> None:
    config = SMALL_T5 | changes
    network = transformers.T5EncoderModel(transformers.T5Config(**config))
    assert torch.equal(*encode(network, T5Encoder(ConfigReader(config)), dtype=dtype, num_tokens=150, scale=0.4))


@pytest.mark.usefixtures("torch_products")
def test_infinite_sums_of_a_t5_in_float16_are_bounded(transformers: Any) -> None:
    network, own = transformers.T5EncoderModel(transformers.T5Config(**SMALL_T5)), T5Encoder(ConfigReader(SMALL_T5))
    assert torch.equal(*encode(network, own, dtype=torch.float16, num_tokens=20, scale=15.0))


def test_a_prompt_with_infinite_sums_does_not_change_another() -> None:
    own = T5Encoder(ConfigReader(SMALL_T5 | {"num_layers": 1})).half().requires_grad_(False)
    for key, parameter in own.named_parameters():
        parameter.fill_(1.0 if "norm" in key else 0.0)
    own.embed_tokens.weight[0, :2] = torch.tensor([65_000.0, 30_000.0])
    own.embed_tokens.weight[1, 2] = 65_000.0
    own.get_parameter("block.0.layer.1.DenseReluDense.wi.weight")[0, 2] = 1.0
    own.get_parameter("block.0.layer.1.DenseReluDense.wo.weight")[2, 0] = 60_000.0  # infinite for token 1
    text, ids = TextEncoder(None, own, width=24, max_length=1), torch.tensor([[0], [1]])
    hidden = text.encode(ids, torch.ones_like(ids))
    assert torch.equal(hidden[:1], text.encode(ids[:1], torch.ones_like(ids[:1])))


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_logit_softcapping": None, "attention_bias": True, "hidden_activation": "silu", "rms_norm_eps": 1e-2},
        {"attn_logit_softcapping": 3.0, "rope_parameters": {"rope_type": "default", "rope_theta": 30.0}},
    ],
)
def test_t5gemma_has_the_bits_of_transformers(changes: dict[str, Any], dtype: torch.dtype, transformers: Any) -> None:
    network, own = make_t5gemma(transformers, SMALL_GEMMA | changes)
    assert torch.equal(*encode(network, own, dtype=dtype, num_tokens=30, scale=0.3))


def make_t5gemma(transformers: Any, config: dict[str, Any]) -> tuple[Any, T5GemmaEncoder]:
    sizes = transformers.T5GemmaModuleConfig(**config)
    whole = transformers.T5GemmaConfig(
        encoder=sizes, decoder=sizes, is_encoder_decoder=False, attn_implementation="eager"
    )
    return transformers.T5GemmaEncoderModel(whole), T5GemmaEncoder(ConfigReader(config))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_products_in_float32_change_only_the_last_bits(
    dtype: torch.dtype, bound: float, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_has_bfloat16", lambda: False)
    network, own = make_t5gemma(transformers, SMALL_GEMMA | {"attention_bias": True})
    hidden, expected = encode(network, own, dtype=dtype, num_tokens=30, scale=0.3)
    assert (hidden - expected).abs().max() <= bound * expected.abs().max()
