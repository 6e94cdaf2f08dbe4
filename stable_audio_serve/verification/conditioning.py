"""Compares the text encoder and the number conditioner with stored tokens, hidden states and embeddings."""

from __future__ import annotations

import torch

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.verification.goldens import Goldens, as_bool
from stable_audio_serve.verification.report import Report


def compare_text(report: Report, goldens: Goldens, *, model: Sa3Model) -> None:
    """Compare text/*: the prompts named in the facts through tokenizer, encoder and learned padding."""
    prompts = goldens.component("text").get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise CheckpointError("golden.json: components.text.prompts must be a list of strings")
    ids, mask = model.text.tokenize(prompts).ids_and_mask.unbind(1)
    for key, actual in (("text/input_ids", ids), ("text/attention_mask", mask)):
        if (expected := goldens.find(key)) is not None:
            report.compare("text tokens", key, actual=actual, expected=expected)
    real = as_bool(mask)
    hidden = model.text.encode(ids, mask)
    if (expected := goldens.find("text/last_hidden_state")) is not None:
        report.compare("text", "text/last_hidden_state", actual=hidden, expected=expected, only=real[..., None])
    if (expected := goldens.find("text/embeddings")) is not None:
        report.compare("text", "text/embeddings", actual=model.prompt(hidden, real), expected=expected)


def compare_number(report: Report, goldens: Goldens, *, model: Sa3Model) -> None:
    """Compare number/embeddings: the values named in the facts, some beyond the conditioner's range."""
    facts = goldens.component("number")
    values = facts.get("values")
    if not isinstance(values, list):
        raise CheckpointError("golden.json: components.number.values must be a list")
    name = facts.get("id", "seconds_total")
    conditioner = model.numbers[name] if name in model.numbers else next(iter(model.numbers.values()))
    embedded = conditioner(torch.tensor(values, dtype=torch.float32))[:, None]
    report.compare("number", "number/embeddings", actual=embedded, expected=goldens["number/embeddings"])
