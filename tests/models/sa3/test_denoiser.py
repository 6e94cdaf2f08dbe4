"""The diffusion transformer matches the reference values. A row's result does not depend on its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from stable_audio_serve.models.native import from_batch, to_branch
from stable_audio_serve.models.native_denoiser import DenoiserConditioning
from stable_audio_serve.models.protocol import StepBatch
from stable_audio_serve.models.sa3.denoiser import Denoiser, Update
from stable_audio_serve.verification.verify import BOUNDS
from tests.goldens import SHARP, load_goldens
from tests.models.loaded import FAMILY, assert_near, loaded
from tests.models.packing import WAYS, run_packed

SINGLE_FORWARD = 5e-5
KEY_MASKED = 1e-4


def denoiser(name: str) -> Denoiser:
    return loaded(name).denoiser


def golden(name: str) -> Callable[[str], Tensor]:
    return lambda key: load_goldens(name).tensors[f"dit/{key}"]


def conditioning(name: str) -> DenoiserConditioning:
    g = golden(name)
    return denoiser(name).condition(g("cross_attn_cond"), g("global_cond"), local=g("local_add_cond"))


def row_conditionings(name: str) -> list[DenoiserConditioning]:
    """Returns the conditioning of each row of the stored batch. As in the engine, it is computed row by row."""
    parts = (golden(name)(key).split(1) for key in ("cross_attn_cond", "global_cond", "local_add_cond"))
    return [denoiser(name).condition(context, own, local=local) for context, own, local in zip(*parts, strict=True)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FAMILY)
def test_output_matches_the_reference(name: str) -> None:
    g = golden(name)
    assert_near(denoiser(name)(g("x"), g("t"), conditioning=conditioning(name)), g("out"), within=SINGLE_FORWARD)


@pytest.mark.parametrize("name", FAMILY)
def test_padding_is_key_masked(name: str) -> None:
    g = golden(name)
    valid = g("padding_mask").bool()
    out = denoiser(name)(g("x"), g("t"), conditioning=conditioning(name), valid=valid)
    visible = valid[:, None].expand_as(out)
    assert_near(out[visible], g("out_pad_keymask")[visible], within=SINGLE_FORWARD)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILY)
def test_packed_rows_match_the_reference(name: str, way: str) -> None:
    g = golden(name)
    rows, conditions = g("x").split(1), row_conditionings(name)
    out = run_packed(denoiser(name), rows, times=g("t"), conditions=conditions, way=way)
    assert_near(torch.cat(out), g("out"), within=SINGLE_FORWARD)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILY)
def test_packed_padding_is_key_masked(name: str, way: str) -> None:
    g = golden(name)
    valid = g("padding_mask").bool()
    out = run_packed(
        denoiser(name),
        g("x").split(1),
        times=g("t"),
        conditions=row_conditionings(name),
        valid_frames=valid.sum(1).tolist(),
        way=way,
    )
    visible = valid[:, None].expand_as(g("x"))
    assert_near(torch.cat(out)[visible], g("out_pad_keymask")[visible], within=SINGLE_FORWARD)


@pytest.mark.parametrize("name", FAMILY)
def test_zero_local_conditioning_differs_from_none(name: str) -> None:
    g, net = golden(name), denoiser(name)
    one_zero_frame = torch.zeros_like(g("local_add_cond")[..., :1])
    zero = net(g("x"), g("t"), conditioning=net.condition(g("cross_attn_cond"), g("global_cond"), local=one_zero_frame))
    absent = net(g("x"), g("t"), conditioning=net.condition(g("cross_attn_cond"), g("global_cond"), local=None))
    assert_near(zero, g("out_zero_local"), within=SINGLE_FORWARD)
    assert_near(absent, g("out_no_local"), within=SINGLE_FORWARD)


@pytest.mark.parametrize("name", FAMILY)
def test_intermediate_values_match_the_reference(name: str) -> None:
    g, net, seen = golden(name), denoiser(name), {}
    first = net.transformer.layers[0]
    modules = {
        "timestep_features": net.timestep_features,
        "timestep_embed": net.to_timestep_embed,
        "context": net.to_cond_embed,
        "global_embed": net.to_global_embed,
        "adaln_modulation": net.transformer.global_cond_embedder,
        "project_in": net.transformer.project_in,
        "layer0_self_attn_out": first.self_attn,
        "layer0_cross_attn_out": first.cross_attn,
        "layer0_ff_out": first.ff,
        "layer0_local_embed": first.to_local_embed,
        "hidden_after_layer_0": first,
        "hidden_after_layer_1": net.transformer.layers[1],
    }

    def record(key: str, out: Tensor | tuple[Tensor, Update]) -> None:
        if isinstance(out, tuple):  # a layer leaves the last addition to the layer after it
            out, update = out
            out = update.added_to(out)
        seen[key] = out.clone()

    handles = [
        module.register_forward_hook(lambda _module, _args, out, key=key: record(key, out))
        for key, module in modules.items()
    ]
    net(g("x"), g("t"), conditioning=conditioning(name))
    for handle in handles:
        handle.remove()
    for key, value in seen.items():
        within = BOUNDS["denoiser time features"] if key == "timestep_features" else SINGLE_FORWARD
        assert_near(value, g(f"mid/{key}"), within=within)
    assert seen.keys() == modules.keys()


@pytest.mark.parametrize("name", FAMILY)
def test_zero_context_equals_no_cross_attention(name: str) -> None:
    g, net = golden(name), denoiser(name)
    zeros = net.condition(torch.zeros_like(g("cross_attn_cond")), g("global_cond"), local=g("local_add_cond"))
    skipped = conditioning(name).without_context()
    assert torch.equal(net(g("x"), g("t"), conditioning=zeros), net(g("x"), g("t"), conditioning=skipped))


VARIED_LENGTHS = (17, 29, 40, 40)
UNLIKE_TIMES = torch.tensor([0.2, 0.55, 0.9, 0.9])


def make_varied_rows(name: str) -> tuple[list[Tensor], list[DenoiserConditioning]]:
    """Returns latents (1, channels, frames) and conditioning for rows that differ in length, prompt and inpainting."""
    g, net = golden(name), denoiser(name)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(1, net.config.latent_channels, frames, generator=generator) for frames in VARIED_LENGTHS]

    def condition(row: int) -> DenoiserConditioning:
        local = g("local_add_cond")[:1, :, : VARIED_LENGTHS[row]] * (row != 3)  # the last row is not an inpainting
        local = local[..., :1] if row == 3 else local
        made = net.condition(g("cross_attn_cond")[row % 2 :][:1], g("global_cond")[row % 2 :][:1], local=local)
        return made.without_context() if row == 1 else made

    return rows, [condition(row) for row in range(len(rows))]


def run_alone(name: str) -> list[Tensor]:
    rows = zip(*make_varied_rows(name), UNLIKE_TIMES.split(1), strict=True)
    return [denoiser(name)(x, t, conditioning=condition) for x, condition, t in rows]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SHARP)
def test_packed_rows_equal_rows_alone_even_next_to_nan_rows(name: str, way: str) -> None:
    net, (rows, conditions) = denoiser(name), make_varied_rows(name)
    together = run_packed(net, rows, times=UNLIKE_TIMES, conditions=conditions, way=way)
    broken = [rows[0], torch.full_like(rows[1], float("nan")), *rows[2:]]
    next_to_nan = run_packed(net, broken, times=UNLIKE_TIMES, conditions=conditions, way=way)
    for i, alone in enumerate(run_alone(name)):
        assert_near(together[i], alone, within=1e-5)
        assert i == 1 or torch.equal(next_to_nan[i], together[i])


@pytest.mark.parametrize("name", SHARP)
def test_row_alone_equals_row_among_different_rows(name: str) -> None:
    net, lengths, padded = denoiser(name), VARIED_LENGTHS, 64
    rows, conditions = make_varied_rows(name)
    x = torch.full((len(rows), net.config.latent_channels, padded), 7.0)  # the padding keeps the value 7
    valid = torch.zeros(len(rows), padded, dtype=torch.bool)
    for i, row in enumerate(rows):
        x[i, :, : lengths[i]] = row[0]
        valid[i, : lengths[i]] = True
    batch = StepBatch.of(x, t=UNLIKE_TIMES, valid=valid, branches=[to_branch(row) for row in conditions])
    together = net(x, UNLIKE_TIMES, conditioning=from_batch(batch), valid=valid)
    for i, row in enumerate(run_alone(name)):
        assert_near(together[i : i + 1, :, : lengths[i]], row, within=1e-5)


@pytest.mark.parametrize("name", SHARP)
def test_gradients_reach_every_weight_and_the_context(name: str) -> None:
    g, net = golden(name), copy.deepcopy(denoiser(name)).requires_grad_()
    with torch.enable_grad():
        inputs = {key: g(key).clone() for key in ("x", "t", "cross_attn_cond", "global_cond", "local_add_cond")}
        context = inputs["cross_attn_cond"].requires_grad_()
        valid = g("padding_mask").bool()
        conditions = net.condition(context, inputs["global_cond"], local=inputs["local_add_cond"])
        out = net(inputs["x"], inputs["t"], conditioning=conditions, valid=valid)
        assert_near(
            out[valid[:, None].expand_as(out)],
            g("out_pad_keymask")[valid[:, None].expand_as(out)],
            within=KEY_MASKED,
        )
        out.square().sum().backward()
    assert context.grad is not None
    assert context.grad.abs().sum() > 0
    missing = [key for key, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert missing == []
