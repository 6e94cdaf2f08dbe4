"""A GPU kernel in Triton: attention, plain or differential, in which a query sees only nearby keys of its sequence.

It reads queries, keys and values in place. Torch's attention would need a mask, and copies of all three. For inference
only.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

_QUERIES = 64  # of a program; one warp group of a Hopper GPU multiplies matrices of 64 rows
_KEYS = 64  # that a program reads at a time
_WIDTHS = (16, 32, 64, 128)  # of heads
_FIRST_CAPABILITY = (8, 0)  # on older GPUs, Triton multiplies matrices without tensor cores


def has_local_attention(q: Tensor) -> bool:
    """Whether `local_attention` can be used for queries of this dtype and head width on this device."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in _WIDTHS:
        return False
    return q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) >= _FIRST_CAPABILITY


def local_attention(q: Tensor, k: Tensor, v: Tensor, *, radius: int) -> Tensor:
    """Returns `softmax(q k) v`, or `softmax(q k) v - softmax(q' k') v` for differential attention.

    Query i sees keys i - radius to i + radius of its sequence. Scores are scaled by 1 / sqrt(head width), and the
    softmax is computed in float32. The queries and keys are (batch, tokens, heads, head width), as `rotated_heads`
    returns them; for differential attention they have twice as many heads, those of q' and k' last. The values and the
    result are (batch, tokens, heads, head width). Use it only if `has_local_attention(q)`.
    """
    batch, tokens, heads, width = v.shape
    sets = q.shape[2] // heads
    assert q.shape == k.shape == (batch, tokens, sets * heads, width)
    assert q.stride() == k.stride()
    assert q.stride()[2:] == v.stride()[2:] == (width, 1)
    out = v.new_empty(v.shape)
    with torch.cuda.device_of(q):
        _local_attention[batch * triton.cdiv(tokens, _QUERIES) * heads,](
            q,
            k,
            v,
            out,
            tokens,
            radius,
            heads,
            q.stride(0),
            q.stride(1),
            v.stride(0),
            v.stride(1),
            width**-0.5 * math.log2(math.e),
            SETS=sets,
            WIDTH=width,
            QUERIES=_QUERIES,
            KEYS=_KEYS,
            num_warps=4,
            num_stages=2,
        )
    return out


# Kernels are not type-checked: Triton compiles their source.


@triton.jit
def _attend_to(query, keys, values, visible, scale, most, total, out):
    """Adds some keys to a softmax. `most` is the largest score so far, `total` the sum of weights relative to it."""
    scores = tl.where(visible, tl.dot(query, tl.trans(keys)) * scale, float("-inf"))
    largest = tl.maximum(most, tl.max(scores, axis=1))
    weights = tl.exp2(scores - largest[:, None])
    kept = tl.exp2(most - largest)
    out = out * kept[:, None] + tl.dot(weights.to(values.dtype), values)
    return largest, total * kept + tl.sum(weights, axis=1), out


@triton.jit(do_not_specialize=["tokens", "radius"])
def _local_attention(
    q,
    k,
    v,
    out,
    tokens,
    radius,
    heads,
    q_row_stride,
    q_stride,
    v_row_stride,
    v_stride,
    scale,
    SETS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    # Programs of adjacent heads follow each other, because their queries, keys and values are adjacent in memory.
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads
    blocks = tl.cdiv(tokens, QUERIES)
    row = (block // blocks).to(tl.int64)
    first = (block % blocks) * QUERIES
    channel = tl.arange(0, WIDTH)[None, :]
    # Queries after the end repeat the last one, because a softmax without any visible key would divide by zero.
    query = tl.minimum(first + tl.arange(0, QUERIES), tokens - 1)
    primed = heads * WIDTH  # distance of q' from q and of k' from k
    place = q + row * q_row_stride + head * WIDTH + query[:, None].to(tl.int64) * q_stride + channel
    queries = tl.load(place)
    out_a = tl.zeros([QUERIES, WIDTH], tl.float32)
    # Not -inf, because the difference of two infinities is not a number.
    most_a = tl.full([QUERIES], -1e30, tl.float32)
    total_a = tl.zeros([QUERIES], tl.float32)
    if SETS == 2:
        primed_queries = tl.load(place + primed)
        out_b, most_b, total_b = out_a, most_a, total_a
    k_row = k + row * q_row_stride + head * WIDTH
    v_row = v + row * v_row_stride + head * WIDTH
    for start in range(tl.maximum(first - radius, 0), tl.minimum(first + QUERIES + radius, tokens), KEYS):
        key = start + tl.arange(0, KEYS)
        inside = (key < tokens)[:, None]
        visible = (tl.abs(query[:, None] - key[None, :]) <= radius) & (key < tokens)[None, :]
        place = k_row + key[:, None].to(tl.int64) * q_stride + channel
        keys = tl.load(place, mask=inside, other=0.0)
        values = tl.load(v_row + key[:, None].to(tl.int64) * v_stride + channel, mask=inside, other=0.0)
        most_a, total_a, out_a = _attend_to(queries, keys, values, visible, scale, most_a, total_a, out_a)
        if SETS == 2:
            keys = tl.load(place + primed, mask=inside, other=0.0)
            most_b, total_b, out_b = _attend_to(primed_queries, keys, values, visible, scale, most_b, total_b, out_b)
    result = out_a / total_a[:, None]
    if SETS == 2:
        result -= out_b / total_b[:, None]
    token = first + tl.arange(0, QUERIES)[:, None]
    place = ((row * tokens + token) * heads + head) * WIDTH + channel
    tl.store(out + place, result, mask=token < tokens)
