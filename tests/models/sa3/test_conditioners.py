"""The conditioners, which embed prompts and numbers for the network, match the reference values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.registry import BUILT_IN
from stable_audio_serve.models.sa3.build import load_text_encoder
from stable_audio_serve.verification.verify import BOUNDS
from tests.goldens import SHARP, load_goldens
from tests.models.loaded import FAMILY, assert_near, loaded


@pytest.mark.parametrize("name", FAMILY)
def test_prompts_become_the_reference_tokens(name: str) -> None:
    goldens = load_goldens(name)
    ids, mask = loaded(name).text.tokenize(goldens.facts["components"]["text"]["prompts"]).ids_and_mask.unbind(1)
    assert torch.equal(ids, goldens.tensors["text/input_ids"])
    assert torch.equal(mask, goldens.tensors["text/attention_mask"])


@pytest.mark.parametrize("name", FAMILY)
def test_prompt_embeddings_with_learned_padding(name: str) -> None:
    goldens, model = load_goldens(name), loaded(name)
    mask = goldens.tensors["text/attention_mask"]
    hidden = model.text.encode(goldens.tensors["text/input_ids"], mask)
    real = mask.bool()
    assert_near(hidden[real], goldens.tensors["text/last_hidden_state"][real], within=BOUNDS["text"])
    embedded = model.encode_text(goldens.facts["components"]["text"]["prompts"])
    assert_near(torch.stack([e.tokens for e in embedded]), goldens.tensors["text/embeddings"], within=BOUNDS["text"])
    assert torch.equal(torch.stack([e.mask for e in embedded]), real)


def test_the_number_of_characters_read_of_a_long_prompt() -> None:
    text = loaded("tiny-s").text
    long = "warm analog pad, slow attack " * 400
    tokens = text.tokenize(["rain", long])
    whole, read = tokens.chars_read
    assert whole is None
    assert read is not None
    assert 0 < read < len(long)
    assert text.tokenize([long[:read]]).ids_and_mask.equal(tokens.ids_and_mask[1:])
    assert text.tokenize([long[:read]]).chars_read == (None,)


@pytest.mark.parametrize("start", ["", "rain\N{COMBINING ACUTE ACCENT}" * 3000, "🎹" * 50_000])
def test_the_end_of_a_long_prompt_is_not_tokenized(start: str) -> None:
    """Other clips wait for the tokenizer, which needs seconds for some prompts of 100,000 characters."""
    text, prompt = loaded("tiny-s").text, start + "warm analog pad, " * 3000
    whole = text.tokenizer(prompt, truncation=True, max_length=text.max_length, padding="max_length")
    with patch.object(text, "tokenizer", wraps=text.tokenizer) as tokenizer:
        tokens = text.tokenize([prompt])
    assert tokens.ids_and_mask.tolist() == [[whole["input_ids"], whole["attention_mask"]]]
    assert tokens.chars_read == (max(end for _, end in whole.encodings[0].offsets),)
    ((texts,),) = (call.args for call in tokenizer.call_args_list)
    assert len(texts[0]) == 8192


def test_characters_read_of_a_long_prompt_with_few_tokens() -> None:
    text = loaded("tiny-s").text
    ignored_words = AutoTokenizer.from_pretrained(f"{BUILT_IN['demo'].folder}/t5gemma", padding_side="right")
    with patch.object(text, "tokenizer", ignored_words):
        tokens = text.tokenize(["unknown " * 1024, "unknown " * 1024 + "sine"])
    assert tokens.chars_read == (None, 8192)


def test_words_after_many_that_the_tokenizer_leaves_out_are_read() -> None:
    text = load_text_encoder(Path(BUILT_IN["demo"].folder or "") / "t5gemma", max_length=16, device=torch.device("cpu"))
    long, short = text.tokenize(["unknown " * 200 + "sine", "sine"]).ids_and_mask
    assert torch.equal(long, short)


def test_a_model_of_many_tokens_reads_more_characters() -> None:
    text = loaded("tiny-s").text
    with patch.object(text, "max_length", 512), patch.object(text, "tokenizer", wraps=text.tokenizer) as tokenizer:
        text.tokenize(["rain " * 10_000])
    ((texts,),) = (call.args for call in tokenizer.call_args_list)
    assert len(texts[0]) == 32 * 512


@pytest.mark.parametrize("name", SHARP)
def test_prompts_do_not_influence_each_other(name: str) -> None:
    prompts = ["dog barking", "", "a very long prompt " * 20]
    together = loaded(name).encode_text(prompts)
    for prompt, among in zip(prompts, together, strict=True):
        (alone,) = loaded(name).encode_text([prompt])
        assert_near(among.tokens, alone.tokens, within=1e-6)
        assert torch.equal(among.mask, alone.mask)


def test_an_empty_prompt_is_finite_padding() -> None:
    (empty,) = loaded("sharp-s").encode_text([""])
    assert not empty.mask.any()
    assert torch.equal(empty.tokens, loaded("sharp-s").prompt.padding_embedding.expand_as(empty.tokens))


def test_prompts_are_padded_on_the_side_that_the_tokenizer_names(tmp_path: Path) -> None:
    """Tokenizers of Gemma pad on the left unless their files say otherwise. The expected values are the reference's."""
    folder = tmp_path / "t5gemma"
    shutil.copytree(load_goldens("sharp-s").folder / "t5gemma", folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"padding_side": "left"}))
    text = load_text_encoder(folder, max_length=16, device=torch.device("cpu"))
    ids, mask = text.tokenize(["dog barking", "rain"]).ids_and_mask.unbind(1)
    assert mask.tolist() == [[0] * 7 + [1] * 9, [0] * 14 + [1] * 2]
    expected = [
        [[-2.41889, 0.645513, 1.741933, 0.77534], [-1.221781, 1.32932, 1.271046, 2.176375]],
        [[-1.263183, 0.086511, 0.369147, 0.243798], [2.005464, 0.51745, 0.0759, -0.033604]],
    ]
    assert_near(text.encode(ids, mask)[:, -2:, :4], torch.tensor(expected), within=BOUNDS["text"])


def test_prompts_longer_than_the_encoder_s_windows_are_refused() -> None:
    folder = load_goldens("sharp-s").folder / "t5gemma"
    assert load_text_encoder(folder, max_length=256, device=torch.device("cpu")).max_length == 256
    with pytest.raises(CheckpointError, match="sliding_window must be at least 514 for prompts of 257 tokens"):
        load_text_encoder(folder, max_length=257, device=torch.device("cpu"))


@pytest.mark.parametrize("name", FAMILY)
def test_seconds_embeddings_clamp_to_the_range(name: str) -> None:
    goldens = load_goldens(name)
    values = torch.tensor(goldens.facts["components"]["number"]["values"])
    embedded = loaded(name).numbers["seconds_total"](values)
    assert_near(embedded[:, None], goldens.tensors["number/embeddings"], within=1e-4)
