"""What is compared for a model of the Stable Audio Open family, part by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.sao.conditioners import load_text_encoder
from stable_audio_serve.models.sao.model import SaoModel
from stable_audio_serve.verification.bounds import OPEN_NUMBER_BOUND
from stable_audio_serve.verification.goldens import Goldens, as_bool
from stable_audio_serve.verification.report import Report
from stable_audio_serve.verification.sao_edits import compare_edits
from stable_audio_serve.verification.sao_networks import compare_autoencoder, compare_denoiser
from stable_audio_serve.verification.sao_runs import compare_runs, given_to_network
from stable_audio_serve.verification.sao_windows import compare_windows
from stable_audio_serve.verification.tables import compare_draws


def compare_sao(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare everything the goldens hold about this model; an error in one part does not stop the others."""
    report.bounds["number"] = OPEN_NUMBER_BOUND
    parts: dict[str, Callable[[], None]] = {  # by the name under which an error is reported
        "text": lambda: _compare_text(report, goldens, model=model),
        "number": lambda: _compare_numbers(report, goldens, model=model),
        "conditioning": lambda: _compare_assembly(report, goldens, model=model),
        "denoiser": lambda: compare_denoiser(report, goldens, model=model),
        "autoencoder": lambda: compare_autoencoder(report, goldens, model=model),
        "decoder halo": lambda: compare_windows(report, model=model),
        "draws": lambda: compare_draws(report, goldens),
        "end-to-end": lambda: compare_runs(report, goldens, model=model),
        "edits": lambda: compare_edits(report, goldens, model=model),
    }
    for part, compare in parts.items():
        with report.guard(part), torch.no_grad():
            compare()


def _compare_text(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare cond/*: the prompts of the facts through tokenizer, encoder in float16 and in float32, and masking."""
    prompts = goldens.facts.get("cond_t5", {}).get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise CheckpointError("golden.json: cond_t5.prompts must be a list of strings")
    ids, mask = model.text.tokenize(prompts).ids_and_mask.unbind(1)
    real = as_bool(mask)
    report.compare("text tokens", "cond/input_ids", actual=ids, expected=goldens["cond/input_ids"])
    report.compare("text tokens", "cond/attention_mask", actual=mask, expected=goldens["cond/attention_mask"])
    if (stored := goldens.find("cond/t5_mask")) is not None:
        report.compare("text tokens", "cond/t5_mask", actual=real, expected=as_bool(stored))
    tokens = torch.stack([embedding.tokens for embedding in model.encode_text(prompts)])
    report.compare("text in float16", "cond/t5", actual=tokens, expected=goldens["cond/t5"])
    if (stored := goldens.find("cond/t5_fp32")) is not None:
        place = Path(str(model.text.encoder.config._name_or_path))  # type: ignore[union-attr]
        exact = load_text_encoder(place, max_length=model.text.max_length, device=model.device, dtype=torch.float32)
        found = model.prompt(exact.encode(ids, mask), real)
        report.compare("text", "cond/t5_fp32", actual=found, expected=stored)


def _compare_numbers(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare cond/<id> of every number conditioner: values of the facts, some beyond its range."""
    values = torch.tensor(goldens.facts.get("cond_number_values", []), dtype=torch.float32)
    for id_, conditioner in model.numbers.items():
        with report.guard("number", id_):
            key = f"cond/{id_}"
            report.compare("number", key, actual=conditioner(values)[:, None], expected=goldens[key])


def _compare_assembly(report: Report, goldens: Goldens, *, model: SaoModel) -> None:
    """Compare the context and the global vector that the network is given for the inputs of the facts."""
    for index, given in enumerate(goldens.facts.get("cond_inputs_batch", [])):
        with report.guard("number", f"cond/inputs[{index}]"):
            request = GenerationRequest(
                prompt=given["prompt"],
                duration_s=1e-3,
                seed=0,
                steps=1,
                start_s=float(given.get("seconds_start", 0)),
                conditioned_total_s=float(given["seconds_total"]) if "seconds_total" in given else None,
            )
            (context,), global_cond = given_to_network(model, model.plan(request, frames=1)[0])
            stored = goldens["cond/inputs_cross_attn_cond"][index : index + 1]
            report.compare("text in float16", f"cond/inputs_cross_attn_cond[{index}]", actual=context, expected=stored)
            stored = goldens["cond/inputs_global_cond"][index : index + 1]
            report.compare("number", f"cond/inputs_global_cond[{index}]", actual=global_cond, expected=stored)
    goldens.mark("cond/inputs_cross_attn_mask")  # cross-attention takes no mask
    if (negative := goldens.find(key := "dit/negative_cross_attn_cond")) is not None:
        before, prompt = model.config.context_ids.index(model.config.prompt.id), goldens.facts["dit"]["negative_prompt"]
        tokens = model.encode_text([prompt])[0].tokens
        stored = negative[:, before : before + len(tokens)]
        report.compare("text in float16", key, actual=tokens.expand_as(stored), expected=stored)
