"""A slow, simple implementation of the Stable Audio 3 networks for one clip.

Tests compare the package's networks with it for sizes that have no stored reference values. It needs only the tensors
and the config of a checkpoint, and uses no code of the package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def below(weights: Weights, prefix: str) -> Weights:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.2", F.silu(linear(w, f"{name}.0", x)))


def rms(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gamma


def dyt(w: Weights, name: str, x: Tensor) -> Tensor:
    return w[f"{name}.gamma"] * torch.tanh(w[f"{name}.alpha"] * x) + w[f"{name}.beta"]


def head_norm(w: Weights, name: str, x: Tensor, kind: str) -> Tensor:
    if kind == "rms":
        return rms(x, w[f"{name}.gamma"], 1e-6)
    if kind == "ln":
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    if kind == "l2":
        return F.normalize(x, dim=-1, eps=1e-6)
    return dyt(w, name, x) if kind == "dyt" else x


def rope(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.arange(len(x), dtype=torch.float32)[:, None] * inv_freq
    half = len(inv_freq)
    a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], dim=-1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def self_attention(
    w: Weights, x: Tensor, inv_freq: Tensor, seen: Tensor, *, heads: int, differential: bool, norm: str
) -> Tensor:
    """Returns the self-attention of x (tokens, width). `seen` (queries, keys) is True where a query may see a key."""
    parts = linear(w, "to_qkv", x).chunk(5 if differential else 3, dim=-1)
    outs = []
    for h in range(heads):
        q, k, v, *primed = (part.chunk(heads, dim=-1)[h] for part in parts)

        def one(q: Tensor, k: Tensor, v: Tensor = v) -> Tensor:
            q, k = head_norm(w, "q_norm", q, norm), head_norm(w, "k_norm", k, norm)
            return softmax_attention(rope(q, inv_freq), rope(k, inv_freq), v, seen)

        outs.append(one(q, k) - one(*primed) if differential else one(q, k))
    return linear(w, "to_out", torch.cat(outs, dim=-1))


def cross_attention(w: Weights, x: Tensor, context: Tensor, *, heads: int, differential: bool, norm: str) -> Tensor:
    """Returns the cross-attention of x (tokens, width) to `context` (context tokens, width)."""
    queries = linear(w, "to_q", x).chunk(2 if differential else 1, dim=-1)
    *keys, values = linear(w, "to_kv", context).chunk(3 if differential else 2, dim=-1)
    everything = torch.ones(len(x), len(context), dtype=torch.bool)
    outs = []
    for h in range(heads):
        v = values.chunk(heads, dim=-1)[h]
        halves = [
            softmax_attention(
                head_norm(w, "q_norm", query.chunk(heads, dim=-1)[h], norm),
                head_norm(w, "k_norm", key.chunk(heads, dim=-1)[h], norm),
                v,
                everything,
            )
            for query, key in zip(queries, keys, strict=True)
        ]
        outs.append(halves[0] - halves[1] if differential else halves[0])
    return linear(w, "to_out", torch.cat(outs, dim=-1))


def gated(w: Weights, x: Tensor, *, sine: bool = False) -> Tensor:
    value, gate = linear(w, "ff.0.proj", x).chunk(2, dim=-1)
    return linear(w, "ff.2", value * (torch.sin(math.pi * gate) if sine else F.silu(gate)))


def fourier(x: Tensor, width: int) -> Tensor:
    ramp = torch.linspace(0, 1, width // 2)
    frequencies = torch.exp(ramp * (math.log(1e4) - math.log(0.5)) + math.log(0.5))
    angles = x[:, None] * frequencies * 2 * math.pi
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def denoise(
    w: Weights, config: dict[str, Any], x: Tensor, t: float, *, context: Tensor | None, glob: Tensor,
    local: Tensor | None, num_valid: int,
) -> Tensor:  # fmt: skip
    """Returns the network's velocity for one clip, at x (channels, frames) and time t.

    The conditioning is `context` (tokens, width), `glob` (width,), and `local` (channels, frames). `config` is the
    section `model.diffusion.config` of the checkpoint's config, and `w` has the checkpoint's weights below
    `model.model.`.
    """
    heads, norm = config.get("num_heads", 8), config.get("attn_kwargs", {}).get("qk_norm", "none")
    options = {
        "heads": heads, "norm": norm, "differential": config.get("attn_kwargs", {}).get("differential", False),
    }  # fmt: skip
    eps = config.get("norm_kwargs", {}).get("eps", 1e-5)
    time = torch.tensor([t])
    if config.get("timestep_features_logsnr"):
        time = (5 - torch.log((1 - time) / time).clamp(-12, 5)) / 17
    features = fourier(time, config.get("timestep_features_dim", 256))
    g = mlp(w, "to_global_embed", glob[None]) + mlp(w, "to_timestep_embed", features)
    tokens = mlp(w, "to_cond_embed", torch.zeros(1, config["cond_token_dim"]) if context is None else context)
    x = x + w["preprocess_conv.weight"][:, :, 0] @ x
    h = linear(w, "transformer.project_in", x.T)
    memory = config.get("num_memory_tokens", 0)
    if memory:
        h = torch.cat([w["transformer.memory_tokens"], h])
    seen = (torch.arange(len(h)) < memory + num_valid).expand(len(h), -1)
    modulation = mlp(w, "transformer.global_cond_embedder", g)[0]
    for i in range(config.get("depth", 12)):
        layer = below(w, f"transformer.layers.{i}.")
        parts = (layer["to_scale_shift_gate"] + modulation).chunk(6)
        normed = rms(h, layer["pre_norm.gamma"], eps) * (1 + parts[0]) + parts[1]
        inv_freq = w["transformer.rotary_pos_emb.inv_freq"]
        h = h + torch.sigmoid(1 - parts[2]) * self_attention(
            below(layer, "self_attn."), normed, inv_freq, seen, **options
        )
        crossed = rms(h, layer["cross_attend_norm.gamma"], eps)
        h = h + cross_attention(below(layer, "cross_attn."), crossed, tokens, **options)
        if local is not None:
            h = h + F.pad(mlp(layer, "to_local_embed", local.T), (0, 0, memory, 0))
        normed = rms(h, layer["ff_norm.gamma"], eps) * (1 + parts[3]) + parts[4]
        h = h + torch.sigmoid(1 - parts[5]) * gated(below(layer, "ff."), normed)
    out = linear(w, "transformer.project_out", h[memory:]).T
    return out + w["postprocess_conv.weight"][:, :, 0] @ out


def resample_tokens(w: Weights, config: dict[str, Any], x: Tensor, *, decoding: bool) -> Tensor:
    """Run the transformer of a resampling block on x (tokens, width)."""
    group = config["strides"][0] + 1
    depth = config["transformer_depths"][0]
    width = config["channels"] * config["c_mults"][0]
    heads = width // config.get("dim_heads", 128)
    differential = config.get("differential", True)
    sines = (config.get("sinusoidal_blocks") or [0])[0] if decoding else 0

    def run(x: Tensor, j: int, seen: Tensor) -> Tensor:
        layer = below(w, f"transformers.{j}.")
        x = x + self_attention(
            below(layer, "self_attn."), dyt(layer, "pre_norm", x), layer["rope.inv_freq"], seen,
            heads=heads, differential=differential, norm="dyt",
        )  # fmt: skip
        return x + gated(below(layer, "ff."), dyt(layer, "ff_norm", x), sine=depth - j < sines)

    if config.get("sliding_window"):
        radius = config["sliding_window"][0] * group
        positions = torch.arange(len(x))
        for j in range(depth):
            x = run(x, j, (positions[:, None] - positions).abs() <= radius)
        return x
    chunk = config.get("chunk_size", 128) // config["strides"][0] * group
    whole = torch.ones(chunk, chunk, dtype=torch.bool)
    shifted = config.get("chunk_midpoint_shift", False)
    for j in range(depth):
        if shifted and j == depth // 2:
            x = torch.cat([x[: chunk // 2], x, x[-(chunk // 2) :]])
        x = torch.cat([run(part, j, whole) for part in x.split(chunk)])
    return x[chunk // 2 : -(chunk // 2)] if shifted else x


def map_frames(w: Weights, x: Tensor) -> Tensor:
    """Apply the convolution, whose weight is stored as direction and norm, to x (channels, frames)."""
    v = w["mapping.weight_v"]
    weight = w["mapping.weight_g"] * v / v.flatten(1).norm(dim=1)[:, None, None]
    return F.conv1d(x[None], weight, w["mapping.bias"], padding=v.shape[-1] // 2)[0]


def latent_multiple(config: dict[str, Any]) -> int:
    return 1 if config.get("sliding_window") else config.get("chunk_size", 128) // config["strides"][0]


def encode(w: Weights, config: dict[str, Any], audio: Tensor) -> Tensor:
    """Encode audio (channels, samples) without noise. Returns latents (channels, frames)."""
    patch, half = config["pretransform"]["config"]["patch_size"], config["encoder"]["config"]
    stride = half["strides"][0]
    audio = F.pad(audio, (0, -audio.shape[1] % patch))
    frames = torch.cat([channel.reshape(-1, patch).T for channel in audio])
    frames = F.pad(frames, (0, -frames.shape[1] % (stride * latent_multiple(half))))
    block = below(w, "encoder.layers.0.")
    mapped = map_frames(block, frames).T
    groups = [torch.cat([part, block["new_tokens"][0]]) for part in mapped.split(stride)]
    tokens = resample_tokens(block, half, torch.cat(groups), decoding=False)
    raw = linear(w, "encoder.layers.2", tokens[stride :: stride + 1]).T
    scaled = raw * w["bottleneck.scaling_factor"][0] + w["bottleneck.bias"][0]
    return scaled / w.get("bottleneck.running_std", 1.0)


def decode(w: Weights, config: dict[str, Any], latents: Tensor) -> Tensor:
    """Decode latents (channels, frames) without noise. Returns audio (channels, samples)."""
    half, patch = config["decoder"]["config"], config["pretransform"]["config"]["patch_size"]
    stride = half["strides"][0]
    leading = linear(w, "decoder.layers.1", (latents * w.get("bottleneck.running_std", 1.0)).T)
    leading = F.pad(leading, (0, 0, 0, -len(leading) % latent_multiple(half)))
    block = below(w, "decoder.layers.3.")
    learned = block["new_tokens"][0].expand(stride, -1)
    tokens = torch.cat([torch.cat([latent[None], learned]) for latent in leading])
    tokens = resample_tokens(block, half, tokens, decoding=True)
    kept = torch.cat([group[1:] for group in tokens.split(stride + 1)])
    frames = map_frames(block, kept.T)
    return torch.stack([part.T.reshape(-1) for part in frames.split(patch)])
