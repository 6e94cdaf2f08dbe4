from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.models import official_config
from stable_audio_serve.core.errors import CheckpointError
from stable_audio_serve.models.config_reader import ConfigReader
from stable_audio_serve.models.native_denoiser import DenoiserConditioning
from stable_audio_serve.models.sao.config import INERT_KEYS
from stable_audio_serve.models.sao.denoiser import Denoiser
from stable_audio_serve.models.sao.network_config import NUM_PREFIX, DenoiserConfig, parse_denoiser
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.plan import Guidance
from tests.goldens import load_open_goldens
from tests.models.packing import SPARE_ROWS, WAYS, run_packed_with
from tests.models.sao.tiny import TINY, load_denoiser, model_values

TOLERANCE = 2e-5
GUIDED_TOLERANCE = 5e-5


def parse(values: dict[str, Any]) -> DenoiserConfig:
    diffusion = ConfigReader({"config": values}, path="model.diffusion")
    parsed = parse_denoiser(diffusion)
    diffusion.refuse_unread(inert=INERT_KEYS)
    return parsed


def tiny_values(name: str) -> dict[str, Any]:
    values: dict[str, Any] = model_values(name)["diffusion"]["config"]
    return values


def condition(name: str, context: str = "cond/inputs_cross_attn_cond") -> DenoiserConditioning:
    tensors = load_open_goldens(name).tensors
    return load_denoiser(name).condition(tensors[context], tensors["cond/inputs_global_cond"])


def run(name: str, conditioning: DenoiserConditioning) -> torch.Tensor:
    tensors = load_open_goldens(name).tensors
    return load_denoiser(name)(tensors["dit/x"], tensors["dit/t"], conditioning=conditioning)


@pytest.mark.parametrize("name", TINY)
def test_output_and_every_layer_match_the_reference(name: str) -> None:
    tensors, net = load_open_goldens(name).tensors, load_denoiser(name)
    hidden: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: hidden.append(call[2])) for layer in net.transformer.layers]
    out = run(name, condition(name))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.stack(hidden), tensors["dit/hidden"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(out, tensors["dit/out"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", TINY)
def test_embeddings_match_the_reference(name: str) -> None:
    tensors, net = load_open_goldens(name).tensors, load_denoiser(name)
    time, context = tensors["dit/t"], tensors["cond/inputs_cross_attn_cond"]
    for found, key in (
        (net.timestep_features(time), "dit/timestep_features"),
        (net.embed_time(time), "dit/timestep_embed"),
        (condition(name).global_embed, "dit/global_embed"),
        (net.to_cond_embed(context), "dit/cond_embed"),
    ):
        torch.testing.assert_close(found, tensors[key], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("key", "guidance"),
    [
        ("dit/out_cfg6", Guidance(cfg_scale=6.0, apg_scale=0.0)),
        ("dit/out_cfg0", Guidance(cfg_scale=0.0, apg_scale=0.0)),
        ("dit/out_cfg6_phi", Guidance(cfg_scale=6.0, apg_scale=0.0, rescale=0.7)),
        ("dit/out_cfg6_negative", Guidance(cfg_scale=6.0, apg_scale=0.0)),
    ],
)
def test_guided_output_matches_the_reference(name: str, key: str, guidance: Guidance) -> None:
    tensors, wanted = load_open_goldens(name).tensors, condition(name)
    other = condition(name, "dit/negative_cross_attn_cond") if "negative" in key else wanted.without_context()
    guided = guide(
        tensors["dit/x"],
        tensors["dit/t"],
        conditional=run(name, wanted),
        unconditional=run(name, other),
        valid=None,
        rows=GuidanceBatch.of([guidance, guidance]),
    )
    torch.testing.assert_close(guided, tensors[key], rtol=0, atol=GUIDED_TOLERANCE)


@pytest.mark.parametrize("name", TINY)
def test_a_zero_context_equals_no_context(name: str) -> None:
    zeros = torch.zeros_like(load_open_goldens(name).tensors["cond/inputs_cross_attn_cond"])
    conditioning = load_denoiser(name).condition(zeros, load_open_goldens(name).tensors["cond/inputs_global_cond"])
    torch.testing.assert_close(run(name, conditioning), run(name, conditioning.without_context()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_padding_and_neighbours_do_not_affect_a_row(name: str) -> None:
    tensors, net = load_open_goldens(name).tensors, load_denoiser(name)
    x = torch.cat([tensors["dit/x"], torch.full((2, 8, 24), 5.0)], dim=-1)
    valid = (torch.arange(64) < 40).expand(2, -1)
    together = net(x, tensors["dit/t"], conditioning=condition(name), valid=valid)[..., :40]
    torch.testing.assert_close(together, tensors["dit/out"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TINY)
def test_packed_rows_match_the_reference_with_any_neighbours(name: str, way: str) -> None:
    tensors, net = load_open_goldens(name).tensors, load_denoiser(name)
    (first, second), rows = tensors["dit/x"].split(1), condition(name)
    slots = torch.tensor([0, 0, 1])
    of_rows = slots if way == "row by row" else torch.tensor([0, 0, 1, *[0] * SPARE_ROWS])
    context = rows.context if way == "one kernel" or rows.context is None else rows.context[of_rows]
    conditioning = DenoiserConditioning(rows.global_embed[of_rows], context)
    out = run_packed_with(
        lambda x, layout: net(x, tensors["dit/t"][of_rows], conditioning=conditioning, packed=layout),
        [torch.full_like(first[..., :24], float("nan")), first, second],
        valid_frames=None,
        num_prefix=NUM_PREFIX,
        way=way,
        slots=slots,
    )
    torch.testing.assert_close(torch.cat(out[1:]), tensors["dit/out"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "key_width", "normed"), [("stable-audio-open-1.0", 768, False), ("stable-audio-open-small", 1024, True)]
)
def test_published_models_share_key_heads_or_norm_keys(name: str, key_width: int, normed: bool) -> None:
    with torch.device("meta"):
        state = Denoiser(parse(official_config(name)["model"]["diffusion"]["config"])).state_dict()
    assert state["transformer.layers.0.cross_attn.to_kv.weight"].shape == (2 * key_width, key_width)
    assert ("transformer.layers.0.self_attn.q_norm.weight" in state) == normed


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.diffusion.config.attn_kwargs.qk_norm_eps", {"attn_kwargs": {"qk_norm_eps": 1e-3}}),
        ("model.diffusion.config.attn_kwargs.qk_norm", {"attn_kwargs": {"qk_norm": "l2"}}),
        ("model.diffusion.config.ff_kwargs.sinusoidal", {"ff_kwargs": {"sinusoidal": True}}),
        ("model.diffusion.config.norm_kwargs.eps", {"norm_kwargs": {"eps": 1e-6}}),
        ("model.diffusion.config.invented", {"invented": 1}),
        ("model.diffusion.config.global_cond_type", {"global_cond_type": "adaLN"}),
        ("model.diffusion.config.num_heads", {"num_heads": 3}),
        ("model.diffusion.config.num_heads", {"num_heads": 8}),
        ("model.diffusion.config.cond_token_dim", {"cond_token_dim": 48}),
        ("model.diffusion.config.cond_token_dim", {"cond_token_dim": 96}),
        ("model.diffusion.config.cond_token_dim", {"cond_token_dim": None}),
        ("model.diffusion.config.timestep_features_dim", {"timestep_features_dim": 7}),
    ],
)
def test_a_config_for_another_network_is_refused_by_key(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(tiny_values("tiny-1.0") | changes)
    assert f"{key} " in str(caught.value)


def test_keys_that_cannot_change_inference_are_accepted() -> None:
    inert = {"zero_init_branch_outputs": True, "ff_kwargs": {"zero_init_output": False}, "causal": None}
    assert parse(tiny_values("tiny-small") | inert) == parse(tiny_values("tiny-small"))
