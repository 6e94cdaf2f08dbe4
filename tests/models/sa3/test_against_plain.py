"""Networks and runs equal those of slow, simple implementations, for sizes that have no stored reference values."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.engine import Engine, EngineOptions
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.native import checkpoint_modules
from stable_audio_serve.models.registry import complete_card
from stable_audio_serve.models.sa3.build import build_components, build_spec
from stable_audio_serve.models.sa3.config import parse_config
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.sampling.noise import SeededNoise
from tests.goldens import load_goldens
from tests.models.loaded import assert_near, loaded
from tests.models.sa3.plain_generation import PlainModel, PlainRun
from tests.models.sa3.plain_networks import below, decode, denoise, encode

SIZES: dict[str, dict[str, Any]] = {
    # Mono, odd stride. Attention in unshifted chunks of three latents, differential, wide heads, no memory tokens.
    "mono": {
        "rate": 2205, "channels": 1, "latents": 5, "patch": 3, "stride": 5, "max_frames": 150, "text": 33,
        "encoder": {"chunk_size": 15, "transformer_depths": [1], "channels": 12, "dim_heads": 12, "c_mults": [2]},
        "decoder": {"chunk_size": 15, "transformer_depths": [3], "channels": 12, "dim_heads": 12, "c_mults": [1]},
        "network": {"embed_dim": 132, "num_heads": 2, "depth": 1, "num_memory_tokens": 0},
        "attention": {"qk_norm": "none", "differential": True},
        "diffusion": {
            "sampling_distribution_shift_options": {"min_length": 8, "max_length": 200, "use_sine": True},
        },
        "pretransform": {"chunked": False},  # with windows of 128 frames, a window would end within a chunk of three
    },
    # Chunks shifted by half a chunk, odd numbers of layers, ordinary attention, schedule for the padded length.
    "shifted": {
        "rate": 1000, "channels": 2, "latents": 8, "patch": 2, "stride": 4, "max_frames": 200, "text": 4,
        "encoder": {"chunk_size": 16, "chunk_midpoint_shift": True, "transformer_depths": [1], "dim_heads": 8},
        "decoder": {
            "chunk_size": 16, "chunk_midpoint_shift": True, "transformer_depths": [3], "dim_heads": 8,
            "conv_mapping": True, "differential": False, "mask_noise": 0.0,
        },
        "network": {"embed_dim": 80, "num_heads": 1, "depth": 3, "num_memory_tokens": 1, "timestep_features_dim": 64},
        "attention": {"qk_norm": "dyt", "differential": False},
        "diffusion": {
            "use_effective_length_for_schedule": False, "diffusion_objective": "rectified_flow",
            "sampling_distribution_shift_options": {"type": "logsnr", "rate": 0.5, "anchor_length": 100},
        },
    },
    # Sliding-window attention with wide windows, a sine activation in one layer, and a config without padding mask.
    "sliding": {
        "rate": 800, "channels": 2, "latents": 12, "patch": 1, "stride": 16, "max_frames": 170, "text": 16,
        "encoder": {"sliding_window": [1, 1], "transformer_depths": [2], "ff_mult": 2.5},
        "decoder": {"sliding_window": [2, 2], "transformer_depths": [4], "sinusoidal_blocks": [4]},
        "network": {"embed_dim": 192, "num_heads": 3, "depth": 2, "num_memory_tokens": 9},
        "attention": {"qk_norm": "rms", "differential": True},
        "diffusion": {
            "mask_padding_attention": False, "diffusion_objective": "rectified_flow",
            "sampling_distribution_shift_options": {
                "type": "flux", "min_length": 4, "max_length": 300, "alpha_min": 0.5, "alpha_max": 6.0,
            },
        },
    },
}  # fmt: skip
SIZES |= {
    f"mono-{norm}": {**SIZES["mono"], "attention": {"qk_norm": norm, "differential": norm == "l2"}}
    for norm in ("l2", "ln")
}
# The encoder's chunks have 32 latents, and lengths are multiples of 8: the source of an edit ends within a chunk.
SIZES["unaligned"] = {
    **SIZES["shifted"],
    "encoder": {"transformer_depths": [1], "dim_heads": 8},
    "bottleneck": {"auto_scale": False, "noise_regularize": False},
}


def make_config(sizes: dict[str, Any]) -> dict[str, Any]:
    config = json.loads((load_goldens("sharp-s").folder / "model_config.json").read_text())
    model, latents = config["model"], sizes["latents"]
    config["sample_rate"], config["audio_channels"] = sizes["rate"], sizes["channels"]
    hop = sizes["patch"] * sizes["stride"]
    config["sample_size"] = sizes["max_frames"] * hop
    model["io_channels"] = latents
    model["pretransform"].update(sizes.get("pretransform", {}))
    autoencoder = model["pretransform"]["config"]
    autoencoder.update(latent_dim=latents, io_channels=sizes["channels"], downsampling_ratio=hop)
    autoencoder["pretransform"]["config"] = {"channels": sizes["channels"], "patch_size": sizes["patch"]}
    autoencoder["bottleneck"]["config"].update({"dim": latents, **sizes.get("bottleneck", {})})
    for half, key in (("encoder", "in_channels"), ("decoder", "out_channels")):
        part = autoencoder[half]["config"]
        for name in ("chunk_size", "chunk_midpoint_shift", "conv_mapping"):
            part.pop(name, None)
        part.update({"strides": [sizes["stride"]], "latent_dim": latents, key: sizes["channels"] * sizes["patch"]})
        part.update(sizes[half])
    model["conditioning"]["configs"][0]["config"]["max_length"] = sizes["text"]
    model["conditioning"]["configs"][1]["config"]["max_val"] = 60
    network = {"io_channels": latents, "local_add_cond_dim": latents + 1, "attn_kwargs": sizes["attention"]}
    model["diffusion"]["config"].update(network, **sizes["network"])
    model["diffusion"].update(sizes["diffusion"])
    return config


@cache
def make_pair(name: str) -> tuple[Sa3Model, PlainModel]:
    """Returns the package's implementation and the simple implementation of one network with random weights."""
    stated = make_config(SIZES[name])
    config = parse_config(ConfigReader(stated))
    borrowed = loaded("sharp-s").text
    text = TextEncoder(borrowed.tokenizer, borrowed.encoder, width=borrowed.width, max_length=config.prompt.max_length)
    torch.manual_seed(1)
    components = build_components(config, text)
    modules = checkpoint_modules(components, config)
    for module in modules.values():
        for parameter in module.requires_grad_(False).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = {prefix + key: value for prefix, module in modules.items() for key, value in module.state_dict().items()}
    card = ModelCard(name, "stable-audio-3", max_duration_s=1e6, default_duration_padding_s=0.2)
    spec = build_spec(complete_card(card, ConfigReader(stated), cap_s=None), config, components=components)
    model = Sa3Model(components, config=config, spec=spec, device=torch.device("cpu"))
    texts = {embedding.prompt: (embedding.tokens, embedding.mask) for embedding in model.encode_text(PROMPTS)}
    return model, PlainModel(stated, weights, texts)


PROMPTS = ("house music 124 bpm with rain and a piano", "", "low quality")


class Quiet(SeededNoise):
    """Latent noise as usual, but no noise inside the autoencoder."""

    def window(
        self, stage: str, start: int, *, shape: tuple[int, ...], frame_axis: int, device: torch.device
    ) -> torch.Tensor:
        return torch.zeros(shape)


def make_clip(model: Sa3Model, frames: float, *, seed: int) -> SourceAudio:
    shape = (model.spec.card.channels, int(frames * model.spec.hop))
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)
    return SourceAudio(samples, model.spec.card.sample_rate_hz)


def make_requests(model: Sa3Model) -> list[GenerationRequest]:
    """Returns requests that together use every sampler, schedule and input.

    Their lengths are from 1.5 frames to two windows.
    """
    frame_s = model.spec.hop / model.spec.card.sample_rate_hz
    init = {"init_audio": make_clip(model, 20.3, seed=1), "init_noise_level": 0.5}
    regions = ((3.2 * frame_s, 8 * frame_s), (15 * frame_s, 99 * frame_s))
    # The plain implementation returns what the model generated, also outside the regions.
    edit = {"inpaint_audio": make_clip(model, 30, seed=2), "inpaint_regions_s": regions, "keep": "model"}
    strong = {"cfg_scale": 5.0, "negative_prompt": PROMPTS[2]}
    partly = {**strong, "cfg_interval": (0.3, 0.9)}
    fields: list[dict[str, Any]] = [
        {"duration_s": 1.5 * frame_s, "steps": 1},
        {"duration_s": 21 * frame_s, "sampler": "rk4", **partly},
        {"duration_s": 20.3 * frame_s, "sampler": "pingpong", **init, "steps": 5},
        {"duration_s": 33 * frame_s, "sampler": "euler", **init, **edit, **strong, "apg_scale": 0.5, "steps": 3},
        {"duration_s": 19 * frame_s, "sampler": "dpmpp", **edit, "steps": 6},
        {"duration_s": 130 * frame_s, "steps": 2, "cfg_scale": 0.5, "cfg_rescale": 0.4, "cfg_norm_threshold": 3.0},
        {"duration_s": 9 * frame_s, "sampler": "rk4", "steps": 2, "prompt": ""},
    ]  # fmt: skip
    return [
        GenerationRequest(**{"prompt": PROMPTS[0], "seed": seed, "steps": 4, "cfg_scale": 1.0, **field})
        for seed, field in enumerate(fields)
    ]


@pytest.mark.parametrize("num_frames", [1, 2, 7, 24])
@pytest.mark.parametrize("name", SIZES)
def test_networks_match_the_plain_implementation(name: str, num_frames: int) -> None:
    model, plain = make_pair(name)
    generator = torch.Generator().manual_seed(num_frames)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    channels, width = model.spec.card.latent_channels, model.config.prompt.width
    latents, audio = draw(channels, num_frames), draw(model.spec.card.channels, num_frames * model.spec.hop - 1)
    context, glob, local = draw(9, width), draw(width), draw(channels + 1, num_frames)
    weights, valid = below(plain.weights, "pretransform.model."), max(1, num_frames - 2)
    with torch.inference_mode():
        decoded, encoded = model.autoencoder.decode(latents[None])[0], model.autoencoder.encode(audio[None])[0]
        assert_near(decoded, decode(weights, plain.autoencoder, latents), within=2e-5)
        assert_near(encoded, encode(weights, plain.autoencoder, audio), within=2e-5)
        conditioning = model.denoiser.condition(context[None], glob[None], local=local[None])
        mask = (torch.arange(num_frames) < valid)[None]
        ours = model.denoiser(latents[None], torch.tensor([0.31]), conditioning=conditioning, valid=mask)[0]
        expected = denoise(
            below(plain.weights, "model.model."), plain.diffusion["config"], latents, 0.31,
            context=context, glob=glob, local=local, num_valid=valid,
        )  # fmt: skip
    assert_near(ours[:, :valid], expected[:, :valid], within=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_runs_match_the_plain_implementation(name: str) -> None:
    model, plain = make_pair(name)
    requests = make_requests(model)

    async def generate() -> list[np.ndarray]:
        options = EngineOptions(warmup_budget_s=0.0, torch_threads=1)
        async with Engine(model, options, noise_factory=Quiet) as engine:
            return [result.audio[0] for result in await asyncio.gather(*map(engine.generate, requests))]

    for request, audio in zip(requests, asyncio.run(generate()), strict=True):
        with torch.inference_mode():
            expected = PlainRun(plain, request, padding_s=model.spec.card.default_duration_padding_s).audio()
        assert audio.shape == expected.shape
        assert np.abs(expected).max() > 0.02
        np.testing.assert_allclose(audio, expected, atol=2e-4, rtol=0, err_msg=str(request)[:300])
