"""A slow, simple implementation of Stable Audio Open models for one clip.

Tests compare the package with it for sizes that have no stored reference values. It needs only the tensors and the
config of a checkpoint and the hidden states of the text encoder, and uses no code of the package. All arithmetic is
float64. The autoencoder adds no noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tokens = tuple[Tensor, Tensor]  # hidden states (tokens, width) and mask (tokens,) of a prompt


@dataclass(frozen=True)
class PlainModel:
    """A model with the `weights` of a checkpoint, by their keys, in float64."""

    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def diffusion(self) -> dict[str, Any]:
        return self.config["model"]["diffusion"]

    @property
    def network(self) -> dict[str, Any]:
        return self.diffusion["config"]

    @property
    def pretransform(self) -> dict[str, Any]:
        return self.config["model"]["pretransform"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.2", F.silu(self.linear(f"{name}.0", x)))

    # Conditioning.

    def tokens(self, prompt: Tokens) -> Tensor:
        hidden, mask = prompt
        name = "conditioner.conditioners.prompt.proj_out"
        hidden = self.linear(name, hidden) if f"{name}.weight" in self.weights else hidden
        return hidden * mask[:, None]

    def number(self, id_: str, value: float) -> Tensor:
        (stated,) = (each["config"] for each in self.config["model"]["conditioning"]["configs"] if each["id"] == id_)
        low, high = stated["min_val"], stated["max_val"]
        share = (min(max(value, low), high) - low) / (high - low)
        name = f"conditioner.conditioners.{id_}.embedder.embedding"
        angles = 2 * math.pi * share * self.weights[f"{name}.0.weights"]
        return self.linear(f"{name}.1", torch.cat([torch.tensor([share]).double(), angles.sin(), angles.cos()]))

    def context(self, prompt: Tokens, numbers: dict[str, float]) -> Tensor:
        parts = [
            self.tokens(prompt) if id_ == "prompt" else self.number(id_, numbers[id_])[None]
            for id_ in self.diffusion["cross_attention_cond_ids"]
        ]
        return torch.cat(parts)

    def global_vector(self, numbers: dict[str, float]) -> Tensor:
        return torch.cat([self.number(id_, numbers[id_]) for id_ in self.diffusion["global_cond_ids"]])

    # The transformer.

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.gamma"], self.weights[f"{name}.beta"], 1e-5)

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def heads(self, x: Tensor) -> Tensor:
        width = self.network["embed_dim"] // self.network["num_heads"]
        return x.unflatten(-1, (-1, width)).transpose(0, 1)

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, *, rotary: bool) -> Tensor:
        """Returns the attention of queries (heads, tokens, width) to keys and values with as many heads or fewer."""
        if self.network.get("attn_kwargs", {}).get("qk_norm") == "ln":
            q, k = self.head_norm(f"{name}.q_norm", q), self.head_norm(f"{name}.k_norm", k)
        if rotary:
            q, k = rotate(q), rotate(k)
        k, v = (each.repeat_interleave(len(q) // len(each), dim=0) for each in (k, v))
        mixed = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.linear(f"{name}.to_out", mixed.transpose(0, 1).flatten(1))

    def denoise(self, x: Tensor, t: float, *, context: Tensor, global_vector: Tensor) -> Tensor:
        """Returns the network's output for latents x (channels, frames)."""
        net = "model.model"
        # float32, because a rounding error of an angle is larger than the tolerance of the tests
        angles = (
            2 * math.pi * torch.tensor(t).float() * self.weights[f"{net}.timestep_features.weight"][:, 0].float()
        ).double()
        keys = self.mlp(f"{net}.to_cond_embed", context)
        first = self.mlp(f"{net}.to_global_embed", global_vector)
        first = first + self.mlp(f"{net}.to_timestep_embed", torch.cat([angles.cos(), angles.sin()]))
        x = x + self.weights[f"{net}.preprocess_conv.weight"][..., 0] @ x
        h = torch.cat([first[None], self.linear(f"{net}.transformer.project_in", x.T)])
        for number in range(self.network["depth"]):
            layer = f"{net}.transformer.layers.{number}"
            q, k, v = map(
                self.heads, self.linear(f"{layer}.self_attn.to_qkv", self.norm(f"{layer}.pre_norm", h)).chunk(3, -1)
            )
            h = h + self.attend(f"{layer}.self_attn", q, k, v, rotary=True)
            q = self.heads(self.linear(f"{layer}.cross_attn.to_q", self.norm(f"{layer}.cross_attend_norm", h)))
            k, v = map(self.heads, self.linear(f"{layer}.cross_attn.to_kv", keys).chunk(2, -1))
            h = h + self.attend(f"{layer}.cross_attn", q, k, v, rotary=False)
            value, gate = self.linear(f"{layer}.ff.ff.0.proj", self.norm(f"{layer}.ff_norm", h)).chunk(2, -1)
            h = h + self.linear(f"{layer}.ff.ff.2", value * F.silu(gate))
        out = self.linear(f"{net}.transformer.project_out", h)[1:].T
        return out + self.weights[f"{net}.postprocess_conv.weight"][..., 0] @ out

    # The autoencoder.

    def conv(self, name: str, x: Tensor, *, stride: int = 1, dilation: int = 1, transposed: bool = False) -> Tensor:
        name = f"pretransform.model.{name}"
        v = self.weights[f"{name}.weight_v"]
        kernel = self.weights[f"{name}.weight_g"] * v / v.flatten(1).norm(dim=1)[:, None, None]
        bias = self.weights.get(f"{name}.bias")
        if stride > 1:
            conv = F.conv_transpose1d if transposed else F.conv1d
            return conv(x[None], kernel, bias, stride=stride, padding=math.ceil(stride / 2))[0]
        return F.conv1d(x[None], kernel, bias, padding=kernel.shape[-1] // 2 * dilation, dilation=dilation)[0]

    def snake(self, name: str, x: Tensor) -> Tensor:
        alpha, beta = (self.weights[f"pretransform.model.{name}.{part}"].exp()[:, None] for part in ("alpha", "beta"))
        return x + (alpha * x).sin() ** 2 / (beta + 1e-9)

    def residual_units(self, name: str, x: Tensor, *, first: int) -> Tensor:
        for number, dilation in enumerate((1, 3, 9), first):
            unit = f"{name}.layers.{number}.layers"
            y = self.conv(f"{unit}.1", self.snake(f"{unit}.0", x), dilation=dilation)
            x = x + self.conv(f"{unit}.3", self.snake(f"{unit}.2", y))
        return x

    def encode(self, audio: Tensor) -> Tensor:
        """Audio (channels, samples) -> the mean of the latents (latent channels, frames)."""
        strides = self.pretransform["config"]["encoder"]["config"]["strides"]
        x = self.conv("encoder.layers.0", audio)
        for number, stride in enumerate(strides, 1):
            block = f"encoder.layers.{number}"
            x = self.residual_units(block, x, first=0)
            x = self.conv(f"{block}.layers.4", self.snake(f"{block}.layers.3", x), stride=stride)
        last = len(strides) + 1
        x = self.conv(f"encoder.layers.{last + 1}", self.snake(f"encoder.layers.{last}", x))
        return x[: len(x) // 2] / self.pretransform.get("scale", 1.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (latent channels, frames) -> audio (channels, samples)."""
        decoder = self.pretransform["config"]["decoder"]["config"]
        x = self.conv("decoder.layers.0", latents * self.pretransform.get("scale", 1.0))
        for number, stride in enumerate(decoder["strides"][::-1], 1):
            block = f"decoder.layers.{number}"
            x = self.conv(f"{block}.layers.1", self.snake(f"{block}.layers.0", x), stride=stride, transposed=True)
            x = self.residual_units(block, x, first=2)
        last = len(decoder["strides"]) + 1
        x = self.conv(f"decoder.layers.{last + 1}", self.snake(f"decoder.layers.{last}", x))
        return x.tanh() if decoder.get("final_tanh", True) else x


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to the first channels of x (heads, tokens, width): half of the channels, at least 32."""
    num = max(x.shape[-1] // 2, 32)
    rates = 10_000 ** (-torch.arange(0, num, 2).double() / num)
    angles = torch.arange(x.shape[1])[:, None] * rates
    low, high, rest = x[..., : num // 2], x[..., num // 2 : num], x[..., num:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin(), rest], dim=-1)
