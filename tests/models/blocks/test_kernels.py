"""The fused GPU kernels compute what the layers compute without them. Triton's interpreter runs them on the CPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stable_audio_serve.models.blocks.attention import SelfAttention, attend, heads_first
from stable_audio_serve.models.blocks.band import BandAttention
from stable_audio_serve.models.blocks.feedforward import sine
from stable_audio_serve.models.blocks.fused import Kernels, Places, use_kernels
from stable_audio_serve.models.blocks.kernel_check import errors, load_kernels
from stable_audio_serve.models.blocks.norms import HEAD_NORMS, DyT
from stable_audio_serve.models.blocks.rotary import RotaryEmbedding, gather_affine
from stable_audio_serve.models.sa3 import same
from stable_audio_serve.models.sa3.denoiser import Denoiser
from stable_audio_serve.models.sa3.model import Sa3Model
from stable_audio_serve.verification.verify import BOUNDS
from tests.goldens import SHARP, load_goldens
from tests.models.loaded import assert_near, loaded
from tests.models.packing import run_packed
from tests.parameters import slow, some

CLOSE = 1e-5  # the kernels compute in float32, but in another order
HEADS, HEAD_WIDTH, TOKENS = 3, 16, 5
HEAD_SIZES = [(16, 8), (16, 16), (24, 12)]  # width, of it rotated
LENGTHS = [(1, 0), (34, 34), (34, 1000), (64, 3), (65, 17), (130, 0), (130, 17), (140, 70)]  # tokens, radius
KERNELS = {"add_and_norm", "squashed", "add_squashed", "add", "difference", "gated", "normed_heads", "rotated_heads"}


@pytest.fixture
def kernels() -> Kernels:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("tests/gpu runs the kernels on a GPU")
    from stable_audio_serve.models.blocks import kernels

    return kernels


@pytest.fixture(params=[SHARP[0], *map(slow, SHARP[1:])])
def model(request: pytest.FixtureRequest, kernels: Kernels) -> Iterator[Sa3Model]:
    """Returns a model of the reference implementation, which uses the kernels."""
    model = loaded(request.param)
    for network in (model.denoiser, model.autoencoder):
        use_kernels(network, kernels)
    with torch.inference_mode():
        yield model
    for network in (model.denoiser, model.autoencoder):
        use_kernels(network, None)


def golden(model: Sa3Model) -> Callable[[str], Tensor]:
    return load_goldens(model.spec.card.name).tensors.__getitem__


def largest_errors(kernels: Kernels, dtype: torch.dtype) -> dict[str, float]:
    largest: dict[str, float] = {}
    for name, error in errors(kernels, device=torch.device("cpu"), dtype=dtype):
        largest[name] = max(error, largest.get(name, 0.0))
    return largest


def test_each_kernel_passes_the_check_at_start(kernels: Kernels) -> None:
    found = largest_errors(kernels, torch.float32)
    assert set(found) == KERNELS
    assert max(found.values()) <= CLOSE


def test_the_check_at_start_finds_a_wrong_kernel(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gated", lambda x, activation: activation(x[..., : x.shape[-1] // 2]))
    found = largest_errors(kernels, torch.float16)
    assert found.pop("gated") > 0.1
    assert set(found) == {*KERNELS, "local_attention"} - {"gated"}
    assert max(found.values()) <= 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which the kernels cannot run")
def test_kernels_that_cannot_run_are_off_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert load_kernels(torch.device("cuda", 7), torch.float16) is None
    assert "fused kernels are off: " in caplog.text
    assert load_kernels(torch.device("cpu"), torch.float16) is None


@pytest.mark.parametrize(
    ("kind", "width", "rotated", "is_differential"),
    some(
        [(kind, *size, differential) for kind in HEAD_NORMS for size in HEAD_SIZES for differential in (False, True)],
        [
            (kind, *size, (row + column) % 2 == 0)
            for row, kind in enumerate(HEAD_NORMS)
            for column, size in enumerate(HEAD_SIZES)
        ],
    ),
)
@torch.inference_mode()
def test_attention_is_the_same_with_each_norm(
    kernels: Kernels, kind: str, width: int, rotated: int, is_differential: bool
) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(HEADS * width, num_heads=HEADS, differential=is_differential, head_norm=kind)
    for norm in (layer.q_norm, layer.k_norm):
        for parameter in norm.parameters():
            parameter.copy_(0.7 + 0.3 * torch.randn(parameter.shape))
    rope = RotaryEmbedding(rotated)
    affine = gather_affine([(layer.q_norm, layer.k_norm)], half=rope.half_width)
    table = affine.table(torch.arange(TOKENS).float(), rates=rope.rates(width)).layer(0)
    x = torch.randn(3, TOKENS, HEADS * width)
    plain = layer(x, rotary=table, attend_fn=attend)
    use_kernels(layer, kernels)
    assert_near(layer(x, rotary=table, attend_fn=attend), plain, within=CLOSE)


@pytest.mark.parametrize(
    ("tokens", "radius", "sets"),
    some(
        [(*lengths, sets) for lengths in LENGTHS for sets in (1, 2)],
        [(*lengths, 1 + index % 2) for index, lengths in enumerate(LENGTHS)],
    ),
)
def test_local_attention_is_the_same_for_all_lengths(kernels: Kernels, tokens: int, radius: int, sets: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, tokens, 2, sets * HEADS, HEAD_WIDTH, generator=generator).unbind(2)
    v = torch.randn(2, tokens, 2 * sets + 1, HEADS, HEAD_WIDTH, generator=generator)[:, :, 2]
    assert_near(kernels.local_attention(q, k, v, radius=radius), banded(q, k, v, radius=radius), within=CLOSE)


def banded(q: Tensor, k: Tensor, v: Tensor, *, radius: int) -> Tensor:
    place = torch.arange(q.shape[1])
    mask = torch.zeros(len(place), len(place)).masked_fill_((place[:, None] - place).abs() > radius, float("-inf"))
    terms = [
        attend(*map(heads_first, (*pair, v)), mask=mask)
        for pair in zip(q.split(HEADS, dim=2), k.split(HEADS, dim=2), strict=True)
    ]
    return heads_first(terms[0] - terms[1] if len(terms) == 2 else terms[0])


def test_local_attention_needs_half_precision_and_certain_head_widths(kernels: Kernels) -> None:
    assert kernels.has_local_attention(torch.empty(1, 1, 1, 64, dtype=torch.bfloat16))
    assert not kernels.has_local_attention(torch.empty(1, 1, 1, 64))
    for width in (8, 24, 256):
        assert not kernels.has_local_attention(torch.empty(1, 1, 1, width, dtype=torch.float16))


def test_gated_units_are_the_same_for_both_activations(kernels: Kernels) -> None:
    x = torch.randn(2, TOKENS, 2 * 1500, generator=torch.Generator().manual_seed(0))
    value, gate = x.chunk(2, dim=-1)
    for activation in (F.silu, sine):
        assert_near(kernels.gated(x, activation), value * activation(gate), within=CLOSE)
    with pytest.raises(ValueError, match="no fused kernel"):
        kernels.gated(x, F.gelu)


def test_a_folded_norm_is_the_same_and_in_the_dtype_of_autocast(kernels: Kernels) -> None:
    norm, x = DyT(8), torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    norm.fold_into(nn.Linear(8, 8))
    plain = norm(x)
    use_kernels(norm, kernels)
    assert_near(norm(x), plain, within=CLOSE)
    with torch.autocast("cpu", dtype=torch.float16):
        assert_near(norm(x), plain.half(), within=0.0005)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_sum_and_its_norm_are_the_same_with_every_part(kernels: Kernels, is_packed: bool) -> None:
    generator, rows, prefix, width = torch.Generator().manual_seed(0), 2, 2, 24
    h, update = (torch.randn(rows, TOKENS, width, generator=generator) for _ in range(2))
    gate, local, scale, shift = torch.randn(4, rows, width, generator=generator)
    is_frame = (torch.arange(TOKENS) >= prefix).repeat(rows)
    places = Places(torch.arange(rows).repeat_interleave(TOKENS).int(), is_frame, 0)
    for own_gate, own_local, own_shift in ((gate, local, shift), (None, None, None), (gate[:1], local[:1], None)):
        expected = h + update * (1 if own_gate is None else own_gate[:, None])
        if own_local is not None:
            expected[:, prefix:] += own_local[:, None]
        tokens = h.flatten(0, 1)[None].clone() if is_packed else h.clone()
        made = kernels.add_and_norm(
            tokens,
            update.view(tokens.shape),
            gate=own_gate,
            local=own_local,
            scale=scale,
            shift=own_shift,
            places=places if is_packed else Places(None, None, prefix),
            eps=1e-5,
        )
        norm = F.rms_norm(expected, (width,), None, 1e-5) * scale[:, None]
        assert_near(tokens.view(h.shape), expected, within=CLOSE)
        assert_near(made.view(h.shape), norm if own_shift is None else norm + own_shift[:, None], within=CLOSE)


@pytest.mark.parametrize("is_folded", [False, True])
@torch.inference_mode()
def test_adding_to_the_residual_stream_is_the_same_and_in_place(kernels: Kernels, is_folded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    norm, x = DyT(300), torch.randn(2, TOKENS, 300, generator=generator)
    update = torch.randn(2, TOKENS, 300, generator=generator).half()
    if is_folded:
        norm.fold_into(nn.Linear(300, 300))
    expected, normed = norm.after_adding(x, update)
    assert torch.equal(expected, x + update)
    use_kernels(norm, kernels)
    for kind in (torch.float32, torch.float16):
        own = x.clone()
        with torch.autocast("cpu", dtype=torch.float16, enabled=kind == torch.float16):
            total, found = norm.after_adding(own, update)
        assert total is own
        assert torch.equal(total, expected)
        assert found.dtype == (kind if is_folded else torch.float32)
        assert_near(found.float(), normed, within=CLOSE if found.dtype == torch.float32 else 0.0005)
    assert torch.equal(kernels.add(x.clone(), update), expected)


def test_gradients_do_not_see_additions_in_place(kernels: Kernels) -> None:
    norm, x = DyT(8), torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    use_kernels(norm, kernels)
    before = x.clone()
    norm.after_adding(x, torch.ones_like(x))
    assert torch.equal(x, before)


def test_rows_that_do_not_fit_the_tokens_are_refused(kernels: Kernels) -> None:
    x, values = torch.zeros(1, TOKENS, 8), torch.zeros(2, 8)  # two rows of values for one row of tokens
    too_few = torch.zeros(TOKENS - 1, dtype=torch.int32)
    for places in (Places(None, None, 0), Places(too_few, too_few > 0, 0)):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.add_and_norm(x, None, gate=None, local=None, scale=values, shift=None, places=places, eps=1e-5)


def condition(net: Denoiser, *inputs: Tensor) -> Any:
    """Compute the conditioning without kernels, which `test_stacked_layers_give_the_same_conditioning` tests."""
    kernels = next(module.kernels for module in net.modules() if isinstance(module, SelfAttention))
    use_kernels(net, None)
    context, own, local = inputs
    conditioning = net.condition(context, own, local=local)
    use_kernels(net, kernels)
    return conditioning


def test_a_padded_step_matches_the_reference(model: Sa3Model) -> None:
    """Only the second row, because the interpreter is slow. It has more padding than the first."""
    stored, net = golden(model), model.denoiser

    def g(key: str) -> Tensor:
        return stored(f"dit/{key}")[1:]

    conditioning = condition(net, g("cross_attn_cond"), g("global_cond"), g("local_add_cond"))
    valid = g("padding_mask").bool()
    out = net(g("x"), g("t"), conditioning=conditioning, valid=valid)
    visible = valid[:, None].expand_as(out)
    assert_near(out[visible], g("out_pad_keymask")[visible], within=BOUNDS["denoiser padding"])


def test_a_packed_step_matches_the_reference(model: Sa3Model) -> None:
    g, net = golden(model), model.denoiser
    parts = (g(f"dit/{key}").split(1) for key in ("cross_attn_cond", "global_cond", "local_add_cond"))
    conditions = [condition(net, *own) for own in zip(*parts, strict=True)]
    out = run_packed(net, g("dit/x").split(1), times=g("dit/t"), conditions=conditions, way="one kernel")
    assert_near(torch.cat(out), g("dit/out"), within=BOUNDS["denoiser"])


def test_decoding_in_half_precision_uses_the_kernel_of_local_attention(
    model: Sa3Model, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, latents = model.autoencoder, golden(model)("ae/latents")[:1, :, :2]
    use_kernels(net, None)
    exact = net.decode(latents)
    with torch.autocast("cpu", dtype=torch.float16):
        plain = net.decode(latents)
        use_kernels(net, kernels)
        for module, name in ((same, "attend"), (BandAttention, "__call__")):
            monkeypatch.setattr(module, name, None)  # torch's attention fails
        fused = net.decode(latents)
    assert (fused - exact).square().mean() <= 1.2 * (plain - exact).square().mean()


@pytest.mark.slow
def test_decoding_is_the_same_without_kernels(model: Sa3Model) -> None:
    net, latents = model.autoencoder, golden(model)("ae/latents")[:1, :, :2]  # few: the interpreter is slow
    fused = net.decode(latents)
    use_kernels(net, None)
    assert_near(fused, net.decode(latents), within=BOUNDS["autoencoder"])


@pytest.mark.parametrize("name", [SHARP[0], *map(slow, SHARP[1:])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_stacked_layers_give_the_same_conditioning(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    """On a GPU, the weights of all layers are stacked, and the conditioning of all layers is computed at once."""
    g, net = load_goldens(name).tensors, copy.deepcopy(loaded(name).denoiser).to(dtype)
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    num_bytes = sum(storage_bytes(net).values())
    inputs = [
        (g["dit/cross_attn_cond"], g["dit/global_cond"], g["dit/local_add_cond"][..., :1]),
        (g["dit/cross_attn_cond"], g["dit/global_cond"], g["dit/local_add_cond"]),
        (None, g["dit/global_cond"], None),
    ]
    before = [net.condition(context, own, local=local) for context, own, local in inputs]
    net.resolve()
    use_kernels(net, kernels)
    assert sum(storage_bytes(net).values()) == num_bytes
    for (context, own, local), expected in zip(inputs, before, strict=True):
        made = net.condition(context, own, local=local)
        for part in ("global_embed", "context", "local"):
            actual, wanted = getattr(made, part), getattr(expected, part)
            assert (actual is None) == (wanted is None)
            if actual is not None:
                assert actual.is_contiguous()
                torch.testing.assert_close(actual, wanted, atol=rounding, rtol=rounding)


@torch.inference_mode()
def test_stacked_layers_run_one_by_one_if_one_of_them_has_a_hook(kernels: Kernels) -> None:
    g, net = load_goldens(SHARP[0]).tensors, copy.deepcopy(loaded(SHARP[0]).denoiser)
    net.resolve()
    use_kernels(net, kernels)
    layer = net.transformer.typed_layers[1]
    plain = net.condition(g["dit/cross_attn_cond"], g["dit/global_cond"], local=g["dit/local_add_cond"][..., :1])
    for module, part in ((layer.cross_attn.to_kv, "context"), (layer.to_local_embed[0], "local")):
        handle = module.register_forward_hook(lambda _module, _args, out: 2.0 * out)
        hooked = net.condition(g["dit/cross_attn_cond"], g["dit/global_cond"], local=g["dit/local_add_cond"][..., :1])
        handle.remove()
        own, other = (getattr(result, part) for result in (hooked, plain))
        assert_near(own[:, 0], other[:, 0], within=1e-5)
        assert not torch.allclose(own[:, 1], other[:, 1])


@torch.inference_mode()
def test_more_layers_need_no_more_operations_for_conditioning(kernels: Kernels) -> None:
    g, config = load_goldens(SHARP[0]).tensors, loaded(SHARP[0]).denoiser.config
    counts = []
    for depth in (2, 4):
        net = Denoiser(replace(config, depth=depth))
        net.resolve()
        use_kernels(net, kernels)
        with Operations() as operations:
            net.project_context(g["dit/cross_attn_cond"])
        counts.append(operations.count)
    assert counts[0] == counts[1]


class Operations(TorchDispatchMode):
    """Counts the operations within this context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def storage_bytes(net: nn.Module) -> dict[int, int]:
    """Returns the size of each block of memory that contains parameters, by its address."""
    storages = [parameter.untyped_storage() for parameter in net.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
