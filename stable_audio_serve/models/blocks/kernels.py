"""Fused GPU kernels in Triton. Each replaces several operations of torch that read and write the same tensors. On an
H100, such operations took twice as long as the matrix products of a denoising step.

Importing this module imports Triton, which is installed together with torch for CUDA. All kernels compute in float32
and round once, when they store the result. They are for inference only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F
from triton import language as tl

from stable_audio_serve.models.blocks.feedforward import sine
from stable_audio_serve.models.blocks.fused import Places, Table
from stable_audio_serve.models.blocks.local_attention import has_local_attention, local_attention
from stable_audio_serve.models.blocks.norms import DyT, RMSNorm

__all__ = [
    "add",
    "add_and_norm",
    "add_squashed",
    "difference",
    "gated",
    "has_local_attention",
    "local_attention",
    "normed_heads",
    "rotated_heads",
    "squashed",
]

_BLOCK = 1024  # values that one program of `_squashed`, `_add_squashed` or `_gated` computes
_ROWS = 32  # heads of tokens that one program of `_rotated_heads` computes
_MANY = 1024  # a program that computes more values than this uses eight warps instead of four


def add_and_norm(
    h: Tensor,
    update: Tensor | None,
    *,
    gate: Tensor | None,
    local: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    places: Places,
    eps: float,
) -> Tensor:
    """Add `gate * update + local` to the tokens h (batch, tokens, width) in place, unless `update` is None.

    Returns `rms_norm(h) * scale + shift`.

    `gate`, `local`, `scale` and `shift` are (rows, width); one row fits all. A `gate` of None is 1, and a `local` or
    `shift` of None is 0. `local` is added to frames only, not to the tokens before a row's frames.
    """
    assert h.is_contiguous()
    assert local is None or update is not None
    of_rows = (gate, local, scale, shift)
    for values in of_rows:
        _require_rows(h, values=values, rows=places.rows)
    out, width = torch.empty_like(h), h.shape[-1]
    with torch.cuda.device_of(h):
        _add_and_norm[h.shape[0] * h.shape[1],](
            h,
            h if update is None else update.contiguous(),
            *(h if values is None else values for values in of_rows),
            h if places.rows is None else places.rows,
            h if places.is_frame is None else places.is_frame,
            out,
            h.shape[1],
            places.num_prefix,
            *(0 if values is None or len(values) == 1 else values.stride(0) for values in of_rows),
            width,
            eps,
            HAS_ROWS=places.rows is not None,
            HAS_UPDATE=update is not None,
            HAS_GATE=gate is not None,
            HAS_LOCAL=local is not None,
            HAS_SHIFT=shift is not None,
            BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width),
        )
    return out


def rotated_heads(
    parts: Tensor, *, norm: nn.Module, table: Table, repeats_values: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns normalised and rotated queries and keys, and the values, each (batch, tokens, heads, head width) in the
    dtype of `parts`.

    `parts` (batch, tokens, 3 or 5, heads, head width) has (q, k, v), or (q, k, v, q', k') for differential attention.
    Queries and keys then have twice as many heads, those of q' and k' last; so do the values if `repeats_values`, the
    same for both. `table` is a `RotaryTable`, which contains the norm's gain and bias.
    """
    batch, tokens, num_parts, heads, width = parts.shape
    sets = num_parts // 2
    parts = parts.contiguous()
    num_results = 3 if sets > 1 and repeats_values else 2
    out = parts.new_empty(batch, tokens, num_results, sets * heads, width)
    cos, sin, shift, rate, half = table
    assert cos.stride(-1) == 1
    assert cos.stride() == sin.stride() == (cos if shift is None else shift).stride()
    with torch.cuda.device_of(parts):
        _rotated_heads[triton.cdiv(batch * tokens * heads, _ROWS), num_results](
            parts,
            cos,
            sin,
            cos if shift is None else shift,
            cos if rate is None else rate,
            out,
            batch * tokens * heads,
            tokens,
            heads,
            cos.stride(0),
            cos.stride(1) if cos.shape[1] > 1 else 0,
            _eps(norm),
            RESULTS=num_results,
            SETS=sets,
            NORM=_kind(norm),
            HAS_SHIFT=shift is not None,
            WIDTH=width,
            HALF=half,
            ROWS=_ROWS,
            HALF_BLOCK=triton.next_power_of_2(half),
            REST_BLOCK=triton.next_power_of_2(max(width - 2 * half, 1)),
            num_warps=2,
        )
    queries, keys, *values = out.unbind(2)
    return queries, keys, values[0] if values else parts[:, :, 2]


def normed_heads(x: Tensor, *, gamma: Tensor, eps: float) -> Tensor:
    """Returns the RMS norm of the heads x (..., heads, head width), with one gain for each head.

    `gamma` is (head width,), or (groups, head width) if the axis before the heads has several groups.
    """
    *_, heads, width = x.shape
    groups = 1 if gamma.dim() == 1 else len(gamma)
    assert groups == 1 or groups == x.shape[-3]
    assert gamma.is_contiguous()
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x):
        _normed_heads[x.numel() // (heads * width),](
            x,
            gamma,
            out,
            groups,
            heads,
            width,
            eps,
            HEADS=triton.next_power_of_2(heads),
            WIDTH=triton.next_power_of_2(width),
            num_warps=_warps(heads * width),
        )
    return out


def difference(x: Tensor) -> Tensor:
    """Returns the first half of the channels minus the second half: (batch, tokens, 2 * width) -> (..., width)."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    with torch.cuda.device_of(x):
        _difference[out.numel() // width,](x, out, width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width))
    return out


def squashed(x: Tensor, alpha: Tensor) -> Tensor:
    """Returns `tanh(alpha * x)` for a scalar `alpha` (1,), in the dtype of autocast if it is enabled, else of x."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=_autocast_dtype(x))
    with torch.cuda.device_of(x):
        _squashed[triton.cdiv(x.numel(), _BLOCK),](x, alpha, out, x.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


def add(x: Tensor, update: Tensor) -> Tensor:
    """Add `update` to x in place, and return x. Unlike torch's addition, it is fast if only the update is half."""
    _add_update(x, update, alpha=None, out=x)
    return x


def add_squashed(x: Tensor, update: Tensor, *, alpha: Tensor) -> Tensor:
    """Add `update` to x in place, and return `squashed(x, alpha)` for the new x."""
    out = torch.empty_like(x, dtype=_autocast_dtype(x))
    _add_update(x, update, alpha=alpha, out=out)
    return out


def _add_update(x: Tensor, update: Tensor, *, alpha: Tensor | None, out: Tensor) -> None:
    assert x.is_contiguous()
    assert x.shape == update.shape
    with torch.cuda.device_of(x):
        _add_squashed[triton.cdiv(x.numel(), _BLOCK),](
            x,
            update.contiguous(),
            x if alpha is None else alpha,
            out,
            x.numel(),
            IS_SQUASHED=alpha is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns `value * activation(gate)` for x (..., 2 * inner), which has the values and then the gates.

    `activation` is `F.silu` or `blocks.sine`. Raises ValueError if it is another function.
    """
    if activation not in (F.silu, sine):
        raise ValueError("there is no fused kernel for this activation")
    x = x.contiguous()
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    with torch.cuda.device_of(x):
        _gated[out.numel() // inner, triton.cdiv(inner, _BLOCK)](
            x, out, inner, IS_SILU=activation is F.silu, BLOCK=_BLOCK, num_warps=4
        )
    return out


def _require_rows(x: Tensor, *, values: Tensor | None, rows: Tensor | None) -> None:
    """Raise ValueError unless every token of x has a row of `values`."""
    if values is None:
        return
    fits = len(values) in {1, len(x)} if rows is None else len(rows) == x.shape[0] * x.shape[1]
    if values.dim() != 2 or values.shape[1] != x.shape[-1] or values.stride(1) != 1 or not fits:
        raise ValueError(f"values of shape {tuple(values.shape)} do not fit tokens of shape {tuple(x.shape)}")


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of autocast if it is enabled, else of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _warps(num_values: int) -> int:
    return 8 if num_values > _MANY else 4


def _kind(norm: nn.Module) -> str:
    if isinstance(norm, RMSNorm):
        return "rms"
    if isinstance(norm, nn.LayerNorm):
        return "ln"
    return "dyt" if isinstance(norm, DyT) else "none"


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "eps", 0.0))


# Kernels are not type-checked: Triton compiles their source.


@triton.jit
def _tanh(x):
    root = tl.rsqrt(1.0 + tl.exp(2.0 * x))  # its square is the quotient; a division takes more instructions
    return 1.0 - 2.0 * root * root


@triton.jit(do_not_specialize=["row_tokens"])
def _add_and_norm(
    h,
    update,
    gate,
    local,
    scale,
    shift,
    rows,
    is_frame,
    out,
    row_tokens,
    num_prefix,
    gate_stride,
    local_stride,
    scale_stride,
    shift_stride,
    width,
    eps,
    HAS_ROWS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_LOCAL: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows + token).to(tl.int64)
    else:
        row = token // row_tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = token * width + column
    values = tl.load(h + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        change = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            change *= tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_LOCAL:
            if HAS_ROWS:
                at_frame = tl.load(is_frame + token).to(tl.float32)
            else:
                at_frame = (token % row_tokens >= num_prefix).to(tl.float32)
            change += at_frame * tl.load(local + row * local_stride + column, mask=inside, other=0.0).to(tl.float32)
        values += change
        tl.store(h + place, values, mask=inside)
    values = values / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    values *= tl.load(scale + row * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        values += tl.load(shift + row * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, values, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_positions"])
def _rotated_heads(
    parts,
    cos,
    sin,
    shift,
    rate,
    out,
    num_rows,
    num_positions,
    heads,
    position_stride,
    which_stride,
    eps,
    RESULTS: tl.constexpr,
    SETS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # one head of one token
    which = tl.program_id(1)  # 0: queries, 1: keys, 2: values
    token = row // heads
    head = row % heads
    table = (token % num_positions) * position_stride + which * which_stride
    token = token.to(tl.int64)
    # Load the two rotated halves and the other channels separately, so that each value is loaded and normalised once.
    low = tl.arange(0, HALF_BLOCK)[None, :]
    high = HALF + low
    rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    is_row = row < num_rows
    is_half = is_row & (low < HALF)
    is_rest = is_row & (rest < WIDTH)
    for own_set in tl.static_range(SETS):  # 1: q' and k' of differential attention
        target = out + (((token * RESULTS + which) * SETS + own_set) * heads + head) * WIDTH
        if which == 2:
            source = parts + ((token * (2 * SETS + 1) + 2) * heads + head) * WIDTH
            tl.store(target + low, tl.load(source + low, mask=is_half), mask=is_half)
            tl.store(target + high, tl.load(source + high, mask=is_half), mask=is_half)
            tl.store(target + rest, tl.load(source + rest, mask=is_rest), mask=is_rest)
        else:
            source = parts + ((token * (2 * SETS + 1) + which + 3 * own_set) * heads + head) * WIDTH
            a = tl.load(source + low, mask=is_half, other=0.0).to(tl.float32)
            b = tl.load(source + high, mask=is_half, other=0.0).to(tl.float32)
            c = tl.load(source + rest, mask=is_rest, other=0.0).to(tl.float32)
            if NORM == "ln":
                mean = (tl.sum(a, axis=1) + tl.sum(b, axis=1) + tl.sum(c, axis=1))[:, None] / WIDTH
                a = tl.where(is_half, a - mean, 0.0)
                b = tl.where(is_half, b - mean, 0.0)
                c = tl.where(is_rest, c - mean, 0.0)
            if NORM == "ln" or NORM == "rms":
                square = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1) + tl.sum(c * c, axis=1))[:, None]
                factor = 1.0 / tl.sqrt(square / WIDTH + eps)
                a = a * factor
                b = b * factor
                c = c * factor
            if NORM == "dyt":
                alpha = tl.load(rate + which)
                a = _tanh(alpha * a)
                b = _tanh(alpha * b)
                c = _tanh(alpha * c)
            new_a = a * tl.load(cos + table + low, mask=is_half, other=0.0)
            new_a += b * tl.load(sin + table + low, mask=is_half, other=0.0)
            new_b = b * tl.load(cos + table + high, mask=is_half, other=0.0)
            new_b += a * tl.load(sin + table + high, mask=is_half, other=0.0)
            new_c = c * tl.load(cos + table + rest, mask=is_rest, other=0.0)
            if HAS_SHIFT:
                new_a += tl.load(shift + table + low, mask=is_half, other=0.0)
                new_b += tl.load(shift + table + high, mask=is_half, other=0.0)
                new_c += tl.load(shift + table + rest, mask=is_rest, other=0.0)
            tl.store(target + low, new_a, mask=is_half)
            tl.store(target + high, new_b, mask=is_half)
            tl.store(target + rest, new_c, mask=is_rest)


@triton.jit
def _normed_heads(x, gamma, out, groups, heads, width, eps, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (channel < width)
    place = token * heads * width + head * width + channel
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    values = values / tl.sqrt(tl.sum(values * values, axis=1)[:, None] / width + eps)
    gain = tl.load(gamma + (token % groups) * width + channel, mask=channel < width, other=0.0).to(tl.float32)
    tl.store(out + place, values * gain, mask=inside)


@triton.jit
def _difference(x, out, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    plain = tl.load(x + 2 * token * width + column, mask=inside, other=0.0).to(tl.float32)
    primed = tl.load(x + (2 * token + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, plain - primed, mask=inside)


@triton.jit
def _squashed(x, alpha, out, num_values, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_values
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * tl.load(alpha)
    tl.store(out + place, _tanh(values), mask=inside)


@triton.jit
def _add_squashed(x, update, alpha, out, num_values, IS_SQUASHED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_values
    # Squash the stored sum: a half x rounds it.
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    values = (values + tl.load(update + place, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
    tl.store(x + place, values, mask=inside)
    if IS_SQUASHED:
        tl.store(out + place, _tanh(values.to(tl.float32) * tl.load(alpha)), mask=inside)


@triton.jit
def _gated(x, out, inner, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner
    value = tl.load(x + 2 * token * inner + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + (2 * token + 1) * inner + column, mask=inside, other=0.0).to(tl.float32)
    if IS_SILU:
        gate = gate * tl.sigmoid(gate)
    else:
        gate = tl.sin(3.141592653589793 * gate)
    tl.store(out + token * inner + column, value * gate, mask=inside)
