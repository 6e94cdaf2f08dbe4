"""With networks of stable-audio-tools, the engine reproduces reference runs, and runs configs that need the package."""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.models import official_config
from stable_audio_serve.core.catalog import NetworkBackend
from stable_audio_serve.core.errors import CheckpointError, InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest, SourceAudio
from stable_audio_serve.models.config_reader import ConfigReader, read_config
from stable_audio_serve.models.families import load_model
from stable_audio_serve.models.protocol import DecodeWindow
from stable_audio_serve.models.registry import resolve_entry
from stable_audio_serve.models.sao.config import parse_config
from stable_audio_serve.models.stable_audio_tools.build import build_wrapper, load_with_package
from stable_audio_serve.models.stable_audio_tools.config import parse_inputs
from stable_audio_serve.models.stable_audio_tools.model import PackageModel
from stable_audio_serve.models.stable_audio_tools.package import import_package
from stable_audio_serve.models.text_encoder import TextEncoder
from stable_audio_serve.sampling.noise import ReplayDraw, ReplayNoise, SeededNoise
from tests.goldens import SA3_GOLDENS, load_open_goldens
from tests.models.sao.test_checkpoint import make_parts, shapes_of
from tests.models.sao.test_model import (
    CASES,
    TOLERANCE,
    make_noise,
    run,
    to_requests,
    with_objective,
    with_sample_size,
)
from tests.models.sao.tiny import TINY
from tests.models.stable_audio_tools.installed import needs_package, quiet
from tests.parameters import slow

pytestmark = [pytest.mark.server, needs_package, quiet]


def load(folder: Path) -> PackageModel:
    model = load_model(resolve_entry("mine", path=str(folder), backend="stable_audio_tools"))
    assert isinstance(model, PackageModel)
    return model


@cache
def loaded(name: str) -> PackageModel:
    return load(load_open_goldens(name).folder)


@pytest.fixture(scope="module")
def rectified_flow(tmp_path_factory: pytest.TempPathFactory) -> PackageModel:
    folder = load_open_goldens("tiny-small").folder
    return load(with_objective(folder, "rectified_flow", target=tmp_path_factory.mktemp("flow") / "checkpoint"))


@pytest.mark.parametrize(("name", "case"), [CASES[0], *starmap(slow, CASES[1:])])
def test_reference_run_is_reproduced(name: str, case: str, rectified_flow: PackageModel) -> None:
    goldens = load_open_goldens(name)
    facts, latents = goldens.facts["cases"][case], goldens.tensors[f"{case}/latents"]
    model = rectified_flow if case.startswith("gen/rf_") else loaded(name)
    noise = make_noise(name, facts["args"], tuple(latents.shape))
    made = run(model, to_requests(name, facts), noise=noise, frames=latents.shape[-1])
    stored = goldens.tensors.get(f"{case}/audio")
    expected = decoded(model, latents) if stored is None else stored
    torch.testing.assert_close(torch.from_numpy(np.stack(made)), expected, rtol=0, atol=TOLERANCE)


def decoded(model: PackageModel, latents: Tensor) -> Tensor:
    return torch.stack(model.decode([DecodeWindow(row, 0, SeededNoise(0)) for row in latents]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable-audio-open-1.0", "stable-audio-open-small"])
def test_the_packages_tensors_equal_ours_for_published_models(name: str) -> None:
    config = ConfigReader(official_config(name))
    inputs = parse_inputs(config)
    text = TextEncoder(None, nn.Identity(), width=768, max_length=64)
    with torch.device("meta"):
        theirs = build_wrapper(config, inputs, text=text).state_dict()
        ours = shapes_of(make_parts(parse_config(config), encoder_width=768))
    assert {key: tuple(value.shape) for key, value in theirs.items()} == ours


@pytest.mark.parametrize("name", ["tiny-1.0", slow("tiny-small")])
def test_other_rows_do_not_change_a_row(name: str) -> None:
    samplers = ("dpmpp-3m-sde", "k-heun", "v-ddim") if name == "tiny-1.0" else ("pingpong", "euler", "rk4")
    source = SourceAudio(np.linspace(-0.5, 0.5, 2 * 4000, dtype=np.float32).reshape(2, 4000), 1000)
    requests = [
        GenerationRequest(
            prompt=f"loop {seed}",
            duration_s=3.0,
            seed=seed,
            steps=3 + seed,
            cfg_scale=1.0 if seed == 1 else 5.0,
            negative_prompt="noise" if seed == 2 else None,
            sampler=sampler,
            init_audio=source if seed == 0 else None,
            init_noise_level=0.8,
        )
        for seed, sampler in enumerate(samplers)
    ]
    alone = [run(loaded(name), [request])[0] for request in requests]
    together = run(loaded(name), requests)
    for one, other in zip(alone, together, strict=True):
        assert one.tobytes() == other.tobytes()
    for one, other in zip(alone, run(loaded(name), requests, mode="fast"), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_half_precision_stays_near_float32(name: str) -> None:
    folder = load_open_goldens(name).folder
    card = loaded(name).spec.card
    half = load_with_package(card, folder, text_encoder=folder / "t5", device=torch.device("cpu"), dtype=torch.float16)
    request = GenerationRequest(prompt="a kick drum", duration_s=3.0, seed=1, steps=8)
    (made,), (exact,) = run(half, [request]), run(loaded(name), [request])
    assert 0 < np.abs(made - exact).max() < 0.1 * exact.std()  # measured: at most 0.05


def test_a_prompt_with_a_token_that_the_text_encoder_lacks_is_refused() -> None:
    model = load(load_open_goldens("tiny-1.0").folder)
    text = model.wrapper.conditioner.conditioners[model.inputs.prompt.id]
    text.tokenizer.add_tokens([f"<{number}>" for number in range(text.model.encoder.num_tokens)])
    with pytest.raises(InvalidRequestError, match="the text has token"):
        model.encode_text([f"a tone <{text.model.encoder.num_tokens - 1}>"])
    assert len(model.encode_text(["a tone", ""])) == 2


def test_an_unexpected_key_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(load_open_goldens("tiny-small").folder, folder)
    weights = load_file(folder / "model.safetensors")
    for changed, expected in (
        (weights | {"model.model.extra": torch.zeros(1)}, r"model\.model\.extra does not belong"),
        (
            {k: v for k, v in weights.items() if k != "model.model.preprocess_conv.weight"},
            r"preprocess_conv\.weight is",
        ),
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=expected):
            load(folder)


def test_an_unbuildable_config_is_refused_with_the_packages_message(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(load_open_goldens("tiny-small").folder, folder)
    values = json.loads((folder / "model_config.json").read_text())
    values["model"]["diffusion"]["config"]["num_wheels"] = 4
    (folder / "model_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"stable-audio-tools cannot build: TypeError: .*num_wheels"):
        load(folder)


def test_another_family_is_refused() -> None:
    with pytest.raises(CheckpointError, match="runs models of the family stable-audio-open"):
        load(SA3_GOLDENS / "tiny-s")


def changed_config(name: str) -> dict[str, Any]:
    """Returns a tiny checkpoint's config, changed so that only the networks of stable-audio-tools support it."""
    values: dict[str, Any] = json.loads((load_open_goldens(name).folder / "model_config.json").read_text())
    model = values["model"]
    diffusion, conditioning = model["diffusion"], model["conditioning"]
    if name == "tiny-1.0":  # global conditioning by AdaLN, and a conditioner for integers
        diffusion["config"] |= {"global_cond_type": "adaLN", "num_memory_tokens": 3, "patch_size": 2}
        conditioning["configs"][1] = {"id": "first", "type": "int", "config": {"min_val": 0, "max_val": 60}}
        conditioning["default_keys"] = {"first": "seconds_start"}
        for key in ("cross_attention_cond_ids", "global_cond_ids"):
            diffusion[key] = ["first" if id_ == "seconds_start" else id_ for id_ in diffusion[key]]
        model["pretransform"]["chunked"] = True
        values["sample_size"] = 2048  # 32 latents, fewer than a window of the package
    else:  # conditioning tokens before the latents, and a bottleneck without noise
        diffusion["config"] |= {"prepend_cond_dim": 64}
        diffusion["prepend_cond_ids"] = ["seconds_total"]
        model["pretransform"]["config"]["bottleneck"] = {"type": "tanh"}
        model["pretransform"]["config"]["encoder"]["config"]["latent_dim"] = 8
        conditioning["configs"][0]["config"]["project_out"] = True
        values["sample_size"] = 1024
    return values


def write_checkpoint(folder: Path, name: str) -> Path:
    """Write a checkpoint with the changed config. Its tensors are the original's if they exist and fit, else random."""
    source = load_open_goldens(name).folder
    shutil.copytree(source / "t5", folder / "t5")
    (folder / "model_config.json").write_text(json.dumps(changed_config(name)))
    config = read_config(folder)
    text = TextEncoder(None, nn.Identity(), width=64, max_length=8)
    wrapper = build_wrapper(config, parse_inputs(config), text=text)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(source / "model.safetensors")
    for key, value in wrapper.state_dict().items():
        if key not in weights or weights[key].shape != value.shape:
            weights[key] = torch.randn(value.shape, generator=generator) * 0.3 / value[0].numel() ** 0.5
    save_file({key: weights[key] for key in wrapper.state_dict()}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_package_only_configs_generate_like_the_package(name: str, tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path, name))
    with pytest.raises(CheckpointError):
        parse_config(read_config(tmp_path))
    is_v, samples = name == "tiny-1.0", model.spec.max_frames * model.spec.hop
    inputs = {"prompt": "a kick drum", "seconds_start": 3, "first": 3, "seconds_total": 9.5}
    steps, sampler = 6, "dpmpp-2m" if is_v else "pingpong"
    sigmas = {"sigma_min": 0.3, "sigma_max": 50.0} if is_v else {}
    expected = import_package().diffusion.generate_diffusion_cond(
        model.wrapper, steps=steps, cfg_scale=4.0, conditioning=[inputs], sample_size=samples, seed=7, device="cpu",
        negative_conditioning=[inputs | {"prompt": "noise"}], sampler_type=sampler, **sigmas,
    )  # fmt: skip
    request = GenerationRequest(
        prompt="a kick drum",
        negative_prompt="noise",
        duration_s=samples / model.spec.card.sample_rate_hz,
        seed=0,
        start_s=3,
        conditioned_total_s=9.5,
        steps=steps,
        cfg_scale=4.0,
        sampler=sampler,
        **sigmas,
    )
    shape = (1, model.spec.card.latent_channels, model.spec.max_frames)
    script = [ReplayDraw("initial", 0, shape), *(ReplayDraw("step", step, shape) for step in range(steps))]
    (made,) = run(model, [request], noise=ReplayNoise(7, script, num_rows=1))
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(torch.from_numpy(made), expected[0], rtol=0, atol=TOLERANCE)


# Sizes without reference values: name -> a tiny checkpoint, and changes to sections of its config.
UNSEEN: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "three queries a key": ("tiny-1.0", {"diffusion.config": {"embed_dim": 192, "num_heads": 6, "depth": 3}}),
    "one wide head": ("tiny-small", {"diffusion.config": {"embed_dim": 256, "num_heads": 2, "depth": 1}}),
    "another context width": (
        "tiny-1.0",
        {
            "diffusion.config": {"cond_token_dim": 96, "global_cond_dim": 192, "project_cond_tokens": True},
            "conditioning": {"cond_dim": 96},
        },
    ),
    "other ratios": (
        "tiny-small",
        {
            "pretransform": {"scale": 1.7},
            "pretransform.config": {"downsampling_ratio": 24},
            "pretransform.config.encoder.config": {"strides": [2, 2, 6], "c_mults": [1, 3, 2]},
            "pretransform.config.decoder.config": {"strides": [2, 2, 6], "c_mults": [1, 3, 2], "final_tanh": True},
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNSEEN)
def test_both_backends_agree_on_configs_without_stored_numbers(name: str, tmp_path: Path) -> None:
    base, changes = UNSEEN[name]
    source = load_open_goldens(base).folder
    values = json.loads((source / "model_config.json").read_text())
    for path, change in changes.items():
        section = values["model"]
        for key in path.split("."):
            section = section[key]
        section |= change
    values["sample_size"] = 3072
    write_random_checkpoint(tmp_path, values, text_encoder=source / "t5")
    native, package = load_model(resolve_entry("mine", path=str(tmp_path))), load(tmp_path)
    requests = [
        GenerationRequest(prompt="a kick drum", duration_s=3.0, seed=1, steps=4, cfg_scale=3.0),
        GenerationRequest(
            prompt="rain",
            duration_s=3.0,
            seed=2,
            steps=4,
            cfg_scale=1.0,
            init_audio=SourceAudio(np.linspace(-0.5, 0.5, 4000, dtype=np.float32).reshape(2, 2000), 1000),
            init_noise_level=0.7,
        ),
    ]
    for ours, theirs in zip(run(native, requests), run(package, requests), strict=True):
        assert theirs.std() > 1e-2
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "stable_audio_tools"])
def test_a_source_fills_a_fractional_window(backend: NetworkBackend, tmp_path: Path) -> None:
    """The window is 64 latent frames and 50 samples long. As in stable-audio-tools, the source fills all of it."""
    samples, steps = 64 * 64 + 50, 2
    folder = with_sample_size(load_open_goldens("tiny-small").folder, samples, target=tmp_path / "odd")
    source = np.random.default_rng(0).uniform(-0.8, 0.8, (2, samples + 100)).astype(np.float32)
    inputs = {"prompt": "a kick drum", "seconds_total": 4.0}
    expected = import_package().diffusion.generate_diffusion_cond(
        load(folder).wrapper, steps=steps, cfg_scale=1.0, conditioning=[inputs], sample_size=samples, seed=7,
        device="cpu", sampler_type="pingpong", init_audio=(1000, torch.from_numpy(source)), init_noise_level=0.1,
    )  # fmt: skip
    model = load_model(resolve_entry("odd", path=str(folder), backend=backend))
    request = GenerationRequest(
        prompt="a kick drum",
        duration_s=64 * 64 / 1000,
        seed=0,
        conditioned_total_s=4.0,
        steps=steps,
        cfg_scale=1.0,
        init_audio=SourceAudio(source, 1000),
        init_noise_level=0.1,
        edit_schedule="reference",
    )
    facts = {"steps": steps, "sampler_type": "pingpong", "init_noise_level": 0.1, "seed": 7}
    (made,) = run(model, [request], noise=make_noise("tiny-small", facts, (1, 8, 64)))
    assert made.shape == expected.shape[1:]
    torch.testing.assert_close(torch.from_numpy(made), expected[0], rtol=0, atol=TOLERANCE)


def generate_with_package(model: PackageModel, samples: int, *, seconds_total: float) -> Tensor:
    """Returns two Euler steps of the package for the prompt "a kick drum" and the seed 7, (1, channels, samples)."""
    audio: Tensor = import_package().diffusion.generate_diffusion_cond(
        model.wrapper, steps=2, cfg_scale=1.0, conditioning=[{"prompt": "a kick drum", "seconds_total": seconds_total}],
        sample_size=samples, seed=7, device="cpu", sampler_type="euler",
    )  # fmt: skip
    return audio


def test_a_clip_of_a_decoder_with_an_odd_stride_ends_in_silence(tmp_path: Path) -> None:
    """Transposed convolutions with an odd stride return fewer samples than latent frames times the ratio."""
    source = load_open_goldens("tiny-small").folder
    values = json.loads((source / "model_config.json").read_text())
    autoencoder = values["model"]["pretransform"]["config"]
    for part in ("encoder", "decoder"):
        autoencoder[part]["config"]["strides"] = [2, 3, 5]
    autoencoder["downsampling_ratio"] = 30
    values["sample_size"] = samples = 16 * 30
    write_random_checkpoint(tmp_path, values, text_encoder=source / "t5")
    model = load(tmp_path)
    expected = generate_with_package(model, samples, seconds_total=0.48)
    rate = model.spec.card.sample_rate_hz
    request = GenerationRequest(
        prompt="a kick drum", duration_s=samples / rate, seed=7, steps=2, cfg_scale=1.0, sampler="euler"
    )
    (made,) = run(model, [request])
    num_decoded = expected.shape[-1]
    assert num_decoded < samples == made.shape[-1]
    torch.testing.assert_close(torch.from_numpy(made[:, :num_decoded]), expected[0], rtol=0, atol=TOLERANCE)
    assert not made[:, num_decoded:].any()


def test_noise_channels_of_a_decoder_come_from_the_rows_noise(tmp_path: Path) -> None:
    """A Wasserstein bottleneck can add channels of noise to the latents before they are decoded."""
    source = load_open_goldens("tiny-small").folder
    values = json.loads((source / "model_config.json").read_text())
    autoencoder = values["model"]["pretransform"]["config"]
    latents, added, frames = autoencoder["latent_dim"], 2, 16
    autoencoder["bottleneck"] = {"type": "wasserstein", "config": {"noise_augment_dim": added}}
    autoencoder["encoder"]["config"]["latent_dim"] = latents
    autoencoder["decoder"]["config"]["latent_dim"] = latents + added
    values["sample_size"] = samples = frames * autoencoder["downsampling_ratio"]
    write_random_checkpoint(tmp_path, values, text_encoder=source / "t5")
    model = load(tmp_path)
    expected = generate_with_package(model, samples, seconds_total=1.0)
    script = [ReplayDraw("initial", 0, (1, latents, frames)), ReplayDraw("decode/bottleneck", 0, (1, added, frames))]
    request = GenerationRequest(
        prompt="a kick drum",
        duration_s=samples / values["sample_rate"],
        seed=0,
        conditioned_total_s=1.0,
        steps=2,
        cfg_scale=1.0,
        sampler="euler",
    )
    (made,) = run(model, [request], noise=ReplayNoise(7, script, num_rows=1))
    torch.testing.assert_close(torch.from_numpy(made), expected[0], rtol=0, atol=TOLERANCE)


def write_random_checkpoint(folder: Path, values: dict[str, Any], *, text_encoder: Path) -> None:
    """Write a checkpoint with the config `values`. With its random weights, the network's activations stay near 1."""
    (folder / "model_config.json").write_text(json.dumps(values))
    shutil.copytree(text_encoder, folder / "t5")
    config = read_config(folder)
    text = TextEncoder(None, nn.Identity(), width=64, max_length=8)
    wrapper = build_wrapper(config, parse_inputs(config), text=text)
    generator = torch.Generator().manual_seed(0)
    weights = wrapper.state_dict()
    for key, parameter in wrapper.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if key.endswith(("gamma", "_g", "norm.weight")):
            weights[key] = (0.5 if key.endswith("_g") else 1.0) + 0.1 * drawn  # 0.5: residual blocks add to their input
        else:
            weights[key] = drawn / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1 * drawn
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
