"""Loads the fused GPU kernels, and checks that they work on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.models.blocks.feedforward import sine
from stable_audio_serve.models.blocks.fused import Kernels, Places
from stable_audio_serve.models.blocks.norms import DyT, RMSNorm
from stable_audio_serve.models.blocks.rotary import RotaryEmbedding, gather_affine, rotate, without_affine

log = logging.getLogger(__name__)

_ROWS, _TOKENS, _HEADS, _HEAD_WIDTH = 2, 3, 4, 64
_BAND_TOKENS, _BAND_RADIUS = 150, 40  # several blocks of queries, which see several blocks of keys
# Largest acceptable error for values of about 1, by the dtype of the values.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}


@cache
def load_kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """Returns the fused kernels; None if they cannot be used on this device.

    They must work in this dtype, in float32 and in float16, in which decoders compute whatever the dtype is.

    Runs each kernel once to check its results. Logs a warning if Triton is missing, if it cannot compile the kernels
    (it needs a C compiler and Python's headers), or if a result is wrong.
    """
    if device.type != "cuda":
        return None
    try:
        from stable_audio_serve.models.blocks import kernels

        for own in {dtype, torch.float32, torch.float16}:
            for name, error in errors(kernels, device=device, dtype=own):
                if not error <= _TOLERANCE[own]:  # unlike `error > _TOLERANCE`, also true if the error is NaN
                    raise RuntimeError(f"{name} is off by {error:.2g} in {own}")
    except Exception as error:  # noqa: BLE001 - whatever does not work, torch's operations do
        log.warning("fused kernels are off: %s", error or repr(error))
        return None
    return kernels


@torch.inference_mode()
def errors(kernels: Kernels, *, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Yields the name of each kernel and its largest difference from torch's operations in float32. A kernel with
    several forms has several results.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def error(actual: Tensor, expected: Tensor) -> float:
        return float((actual.float() - expected).abs().max())

    width = _HEADS * _HEAD_WIDTH
    x, update, scale, shift = (draw(_ROWS, count, width) for count in (_TOKENS, _TOKENS, 1, 1))
    scales, shifts, half = scale[:, 0], shift[:, 0], width // 2
    norm_of = partial(F.rms_norm, normalized_shape=(width,), eps=1e-5)
    packed, rows = x.flatten(0, 1)[None].clone(), torch.arange(_ROWS, device=device).repeat_interleave(_TOKENS).int()
    is_frame = (torch.arange(_TOKENS, device=device) > 0).repeat(_ROWS)
    for h, of in ((x.clone(), Places(None, None, 1)), (packed, Places(rows, is_frame, 1))):
        made = kernels.add_and_norm(
            h, update.view(h.shape), gate=scales, local=shifts, scale=scales, shift=shifts, places=of, eps=1e-5
        )
        added = torch.addcmul(x.float(), scale.float(), update.float())
        added[:, 1:] += shift.float()
        expected = torch.addcmul(shift.float(), norm_of(added), scale.float())
        yield "add_and_norm", max(error(h.view(x.shape), added), error(made.view(x.shape), expected))
    made = kernels.add_and_norm(
        x.clone(), None, gate=None, local=None, scale=scales, shift=None, places=Places(None, None, 1), eps=1e-5
    )
    yield "add_and_norm", error(made, norm_of(x.float()) * scale.float())
    alpha = scale.flatten()[:1].float()
    yield "squashed", error(kernels.squashed(x, alpha), (alpha * x.float()).tanh())
    totals, added = x.float().repeat(2, 1, 1, 1), x.float() + update.float()
    yield "add_squashed", error(kernels.add_squashed(totals[0], update, alpha=alpha), (alpha * added).tanh())
    kernels.add(totals[1], update)
    yield "add", error(totals, added)
    yield "difference", error(kernels.difference(x), x[..., :half].float() - x[..., half:].float())
    for activation in (F.silu, sine):
        yield "gated", error(kernels.gated(x, activation), x[..., :half].float() * activation(x[..., half:].float()))
    norm, heads = RMSNorm(_HEAD_WIDTH, eps=1e-6).to(device), x.unflatten(-1, (_HEADS, _HEAD_WIDTH))
    yield "normed_heads", error(kernels.normed_heads(heads, gamma=norm.gamma, eps=norm.eps), norm(heads.float()))
    parts, rope = draw(_ROWS, _TOKENS, 5, _HEADS, _HEAD_WIDTH), RotaryEmbedding(_HEAD_WIDTH // 2).to(device)
    pairs = torch.stack([parts[:, :, 0::3].flatten(2, 3), parts[:, :, 1::3].flatten(2, 3)], dim=2)
    for head_norm in (norm, DyT(_HEAD_WIDTH).to(device)):
        for parameter in head_norm.parameters():
            parameter.add_(0.1 * draw(*parameter.shape))
        affine = gather_affine([(head_norm, head_norm)], half=rope.half_width)
        table = affine.table(torch.arange(_TOKENS, device=device).float(), rates=rope.rates(_HEAD_WIDTH)).layer(0)
        rotated = rotate(without_affine(head_norm, pairs.float(), rate=table.rate), table, dtype=torch.float32)
        for repeats in (False, True):
            queries, keys, values = kernels.rotated_heads(parts, norm=head_norm, table=table, repeats_values=repeats)
            repeated = parts[:, :, 2].repeat(1, 1, 1 + repeats, 1).float()
            yield "rotated_heads", max(error(torch.stack([queries, keys], dim=2), rotated), error(values, repeated))
    parts = draw(_ROWS, _BAND_TOKENS, 5, _HEADS, _HEAD_WIDTH)
    q, k, v = parts[:, :, 0::3].flatten(2, 3), parts[:, :, 1::3].flatten(2, 3), parts[:, :, 2]
    if kernels.has_local_attention(q):
        place = torch.arange(_BAND_TOKENS, device=device)
        hidden = (place[:, None] - place).abs() > _BAND_RADIUS
        scores = torch.einsum("bqhc,bkhc->bhqk", q.float(), k.float()) / _HEAD_WIDTH**0.5
        plain, primed = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).chunk(2, dim=1)
        for num_sets, weights in ((1, plain), (2, plain - primed)):
            heads = slice(num_sets * _HEADS)
            made = kernels.local_attention(q[:, :, heads], k[:, :, heads], v, radius=_BAND_RADIUS)
            yield "local_attention", error(made, torch.einsum("bhqk,bkhc->bqhc", weights, v.float()))
