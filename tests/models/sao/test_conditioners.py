"""The conditioners, which embed prompts and numbers for the network, match the reference values."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.conditioners import NumberConditioner, PromptConditioner, PromptConfig
from stable_audio_serve.models.config_reader import read_config
from stable_audio_serve.models.sao.conditioners import LearnedFrequencies, load_text_encoder
from stable_audio_serve.models.sao.config import SaoConfig, parse_config
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.verification.verify import BOUNDS
from tests.goldens import load_open_goldens
from tests.models.sao.tiny import TINY, assign

CPU = torch.device("cpu")
CONDITIONERS = "conditioner.conditioners."
NUMBERS = [("tiny-1.0", "seconds_start"), ("tiny-1.0", "seconds_total"), ("tiny-small", "seconds_total")]


def config_of(name: str) -> SaoConfig:
    return parse_config(read_config(load_open_goldens(name).folder))


@cache
def text_encoder(name: str, dtype: torch.dtype) -> TextEncoder:
    folder = load_open_goldens(name).folder / "t5"
    return load_text_encoder(folder, max_length=config_of(name).prompt.max_length, device=CPU, dtype=dtype)


def embed(name: str, prompts: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    encoder = text_encoder(name, dtype)
    ids, mask = encoder.tokenize(prompts).ids_and_mask.unbind(1)
    return PromptConditioner(config_of(name).prompt, encoder_width=encoder.width, learns_padding=False)(
        encoder.encode(ids, mask), mask.bool()
    )


@pytest.mark.parametrize("name", TINY)
def test_prompts_become_the_references_tokens(name: str) -> None:
    goldens = load_open_goldens(name)
    ids, mask = text_encoder(name, torch.float32).tokenize(goldens.facts["cond_t5"]["prompts"]).ids_and_mask.unbind(1)
    assert torch.equal(ids, goldens.tensors["cond/input_ids"])
    assert torch.equal(mask, goldens.tensors["cond/attention_mask"])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("dtype", "key", "bound"),
    [(torch.float32, "cond/t5_fp32", BOUNDS["text"]), (torch.float16, "cond/t5", BOUNDS["text in float16"])],
)
def test_prompt_embeddings_match_the_reference(name: str, dtype: torch.dtype, key: str, bound: float) -> None:
    goldens = load_open_goldens(name)
    tokens = embed(name, goldens.facts["cond_t5"]["prompts"], dtype)
    torch.testing.assert_close(tokens, goldens.tensors[key], rtol=0, atol=bound)
    assert not tokens[~goldens.tensors["cond/attention_mask"].bool()].any()


def test_prompts_do_not_influence_each_other() -> None:
    prompts = ["rain", "", "a very long prompt " * 20]
    together = embed("tiny-1.0", prompts)
    for prompt, among in zip(prompts, together, strict=True):
        torch.testing.assert_close(embed("tiny-1.0", [prompt])[0], among, rtol=0, atol=1e-6)


def test_an_encoder_of_another_width_is_projected() -> None:
    config = PromptConfig(id="prompt", width=64, max_length=4, project_out=False)
    conditioner = PromptConditioner(config, encoder_width=48, learns_padding=False)
    tokens = conditioner(
        torch.full((1, 2, 48), float("nan")).index_fill(1, torch.tensor([0]), 1.0), torch.tensor([[True, False]])
    )
    assert set(conditioner.state_dict()) == {"proj_out.weight", "proj_out.bias"}
    assert tokens[0, 0].any()
    assert not tokens[0, 1].any()


@pytest.mark.parametrize(("name", "id_"), NUMBERS)
def test_number_embeddings_match_the_reference_and_clamp(name: str, id_: str) -> None:
    goldens = load_open_goldens(name)
    (config,) = (number for number in config_of(name).numbers if number.id == id_)
    conditioner, prefix = NumberConditioner(config, LearnedFrequencies()), f"{CONDITIONERS}{id_}."
    assign(conditioner, name, prefix)
    values = torch.tensor(goldens.facts["cond_number_values"], dtype=torch.float32)
    expected = goldens.tensors[f"cond/{id_}"]
    torch.testing.assert_close(conditioner(values)[:, None], expected, rtol=0, atol=1e-5)


def test_a_missing_encoder_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_text_encoder(tmp_path, max_length=4, device=CPU, dtype=torch.float32)


def test_a_t5_whose_positions_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(load_open_goldens("tiny-1.0").folder / "t5", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"relative_attention_max_distance": 8}))
    with pytest.raises(CheckpointError, match="relative_attention_max_distance must be at least 9, found 8"):
        load_text_encoder(folder, max_length=4, device=CPU, dtype=torch.float32)
