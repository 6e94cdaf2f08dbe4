"""Stable Audio 3 models on CUDA, compared with reference values from a CPU. Wider tolerances than on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stable_audio_serve.models.blocks.varlen import has_varlen
from stable_audio_serve.sampling.guidance import GuidanceBatch, guide
from stable_audio_serve.sampling.plan import Guidance
from stable_audio_serve.verification.checks import Goldens
from stable_audio_serve.verification.verify import BOUNDS, Report, compare
from tests.goldens import SHARP, load_goldens
from tests.gpu.loaded import gpu_only, load_on
from tests.models.loaded import assert_near

pytestmark = pytest.mark.gpu

# Ten times the tolerances of the CPU tests, because CUDA kernels sum in another order.
WIDER = 10.0
# Allowed relative RMS error of one denoiser call. On a CPU it is 0.0013 with float16 and 0.0098 with bfloat16.
HALF = {torch.float16: 0.01, torch.bfloat16: 0.05}


@pytest.fixture(params=SHARP)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stored(name: str, keys: Sequence[str], device: torch.device) -> list[Tensor]:
    return [load_goldens(name).tensors[key].to(device) for key in keys]


def denoise(device: torch.device, name: str, dtype: torch.dtype, *, guided: bool = False) -> Tensor:
    """Run the denoiser on the stored inputs. If not `guided`, the padding is masked.

    Returns the prediction (batch, latent channels, frames) as float32 on the CPU.
    """
    net = load_on(device, name, dtype).denoiser
    keys = ("x", "t", "cross_attn_cond", "global_cond", "local_add_cond", "padding_mask", "negative_cross_attn_cond")
    x, t, context, glob, local, valid, negative = stored(name, [f"dit/{key}" for key in keys], device)
    with torch.inference_mode():
        conditional = net.condition(context, glob, local=local)
        if not guided:
            return net(x, t, conditioning=conditional, valid=valid.bool()).float().cpu()
        mask = stored(name, ["dit/negative_cross_attn_mask"], device)[0].bool()
        away = net.condition(torch.where(mask[..., None], negative, 0.0), glob, local=local)
        rows = GuidanceBatch.of([Guidance(cfg_scale=3.0)] * len(x), device=device)
        velocity = guide(
            x,
            t,
            conditional=net(x, t, conditioning=conditional),
            unconditional=net(x, t, conditioning=away),
            valid=None,
            rows=rows,
        )
    return velocity.cpu()


def test_conditioners_match_the_reference(device: torch.device, name: str) -> None:
    model, goldens = load_on(device, name), load_goldens(name)
    encoded = model.encode_text(goldens.facts["components"]["text"]["prompts"])
    tokens = torch.stack([embedding.tokens for embedding in encoded]).cpu()
    assert_near(tokens, goldens.tensors["text/embeddings"], within=WIDER * BOUNDS["text"])
    values = torch.tensor(goldens.facts["components"]["number"]["values"], device=device)
    embedded = model.numbers["seconds_total"](values)[:, None].cpu()
    assert_near(embedded, goldens.tensors["number/embeddings"], within=WIDER * BOUNDS["number"])


def test_denoiser_matches_the_reference(device: torch.device, name: str) -> None:
    tensors = load_goldens(name).tensors
    valid = tensors["dit/padding_mask"].bool()[:, None].expand(-1, tensors["dit/x"].shape[1], -1)
    padded = denoise(device, name, torch.float32)
    expected = tensors["dit/out_pad_keymask"]
    assert_near(padded[valid], expected[valid], within=WIDER * BOUNDS["denoiser padding"])
    guided = denoise(device, name, torch.float32, guided=True)
    assert_near(guided, tensors["dit/cfg3_neg_apg1"], within=WIDER * BOUNDS["denoiser guidance"])


def test_autoencoder_matches_the_reference(device: torch.device, name: str) -> None:
    net, tensors = load_on(device, name).autoencoder, load_goldens(name).tensors
    audio, latents = stored(name, ["ae/audio", "ae/latents"], device)
    with torch.inference_mode():
        encoded, decoded = net.encode(audio).cpu(), net.decode(latents).cpu()
    assert_near(encoded, tensors["ae/encode_quiet"], within=WIDER * BOUNDS["autoencoder"])
    assert_near(decoded, tensors["ae/decode_quiet"], within=WIDER * BOUNDS["autoencoder"])


@gpu_only
def test_runs_match_the_reference(device: torch.device, name: str) -> None:
    report = Report(say=lambda line: None, bounds={component: WIDER * bound for component, bound in BOUNDS.items()})
    model, goldens = load_on(device, name), Goldens.load(load_goldens(name).folder)
    compare(report, goldens, model=model, only={"end-to-end"})
    missed = [comparison for comparison in report.comparisons if comparison.missed]
    assert not missed
    assert not report.failures
    assert sum(comparison.component == "end-to-end audio" for comparison in report.comparisons) >= 20


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_denoiser_is_close_to_the_reference(device: torch.device, name: str, dtype: torch.dtype) -> None:
    model, expected = load_on(device, name, dtype), load_goldens(name).tensors["dit/out_pad_keymask"]
    assert model.denoiser.dtype == dtype
    assert {parameter.dtype for parameter in model.autoencoder.parameters()} == {torch.float32}
    valid = load_goldens(name).tensors["dit/padding_mask"].bool()[:, None].expand_as(expected)
    difference = (denoise(device, name, dtype) - expected)[valid]
    assert difference.square().mean().sqrt() <= HALF[dtype] * expected[valid].square().mean().sqrt()


@gpu_only
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attention_for_packed_rows_works(device: torch.device, dtype: torch.dtype) -> None:
    assert has_varlen(device, dtype, num_heads=16, num_key_heads=8, head_width=64)


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_fused_kernels_match_the_reference(device: torch.device, name: str, dtype: torch.dtype) -> None:
    model, tensors = load_on(device, name, dtype), load_goldens(name).tensors
    model.use_features(fast_decoding=True, fused_kernels=True)
    assert model.spec.has_fused_kernels
    try:
        made = denoise(device, name, dtype)
        with torch.inference_mode():
            decoded = model.autoencoder.decode(tensors["ae/latents"].to(device)).cpu()
    finally:
        model.use_features(fast_decoding=True, fused_kernels=False)
    assert_near(decoded, tensors["ae/decode_quiet"], within=WIDER * BOUNDS["autoencoder"])
    valid = tensors["dit/padding_mask"].bool()[:, None].expand_as(made)
    difference, expected = (made - tensors["dit/out_pad_keymask"])[valid], tensors["dit/out_pad_keymask"][valid]
    allowed = HALF.get(dtype, WIDER * BOUNDS["denoiser padding"])
    assert difference.square().mean().sqrt() <= allowed * expected.square().mean().sqrt()
