"""The encoder of a T5Gemma, the text encoder of Stable Audio 3 models.

Shapes: B prompts, T tokens, W width, H heads of width E. Every prompt token attends to all tokens of its prompt. The
windows of layers with sliding attention are never shorter than a prompt (`load_text_encoder` checks this), so all
layers are equal. Operations and their order are those of transformers, so that the results are equal bit for bit where
`blocks.text` multiplies like torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stable_audio_serve.models.blocks.text import ACTIVATIONS, MAX_VOCABULARY, Linear, multiply
from stable_audio_serve.models.config_reader import MAX_DEPTH, ConfigReader
from stable_audio_serve.models.text_encoder import EncoderNetwork


class T5GemmaEncoder(EncoderNetwork):
    """The network that `encoder` in a T5Gemma's config.json describes. Submodules have the names in checkpoints."""

    inv_freq: Tensor  # radians per token, one for each pair of a head's channels

    def __init__(self, config: ConfigReader) -> None:
        super().__init__()
        width, eps = config.integer("hidden_size", default=2304), config.number("rms_norm_eps", default=1e-6)
        self.embed_tokens = nn.Embedding(config.integer("vocab_size", default=256_000, at_most=MAX_VOCABULARY), width)
        self.layers = nn.ModuleList(
            _Layer(config, width=width, eps=eps)
            for _ in range(config.integer("num_hidden_layers", default=26, at_most=MAX_DEPTH))
        )
        self.norm = _Norm(width, eps=eps)
        head_width = config.even("head_dim", default=256)
        rotary = config.section("rope_parameters", optional=True)
        rotary.require(rope_type="default")
        config.require(rope_scaling=None)
        base = rotary.number("rope_theta", default=config.number("rope_theta", default=10000.0))
        # On the CPU, because networks are built on the meta device.
        powers = torch.arange(0, head_width, 2, dtype=torch.float32, device="cpu") / head_width
        self.register_buffer("inv_freq", 1.0 / base**powers, persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the hidden states (B, T, W) of tokens (B, T). `mask` (B, 1, 1, T) is added to the scores."""
        hidden: Tensor = self.embed_tokens(ids)
        hidden = hidden * torch.tensor(hidden.shape[-1] ** 0.5, dtype=hidden.dtype)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        rotary = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, rotary=rotary)
        normalized: Tensor = self.norm(hidden)
        return normalized


class _Norm(nn.Module):
    """Divides by the root mean square and multiplies by 1 + weight, in float32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return (exact * (1.0 + self.weight.float())).type_as(x)


class _Layer(nn.Module):
    def __init__(self, config: ConfigReader, *, width: int, eps: float) -> None:
        super().__init__()
        self.self_attn = _Attention(config, width=width)
        self.mlp = _FeedForward(config, width=width)
        self.pre_self_attn_layernorm, self.post_self_attn_layernorm = _Norm(width, eps=eps), _Norm(width, eps=eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = _Norm(width, eps=eps), _Norm(width, eps=eps)

    def forward(self, hidden: Tensor, *, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        attended = self.self_attn(self.pre_self_attn_layernorm(hidden), mask=mask, rotary=rotary)
        hidden = hidden + self.post_self_attn_layernorm(attended)
        return hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))


class _FeedForward(nn.Module):
    def __init__(self, config: ConfigReader, *, width: int) -> None:
        super().__init__()
        inner = config.integer("intermediate_size", default=9216)
        name = config.choice("hidden_activation", tuple(ACTIVATIONS), default="gelu_pytorch_tanh")
        self.activation = ACTIVATIONS[name]
        self.gate_proj, self.up_proj = (Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return projected


class _Attention(nn.Module):
    """Attention in which several heads may share keys and values, with rotary positions and bounded scores.

    No fused kernel can bound scores (soft-capping), so the softmax is computed explicitly, in float32.
    """

    def __init__(self, config: ConfigReader, *, width: int) -> None:
        super().__init__()
        heads, keys = config.integer("num_attention_heads", default=8), config.integer("num_key_value_heads", default=4)
        if heads % keys:
            raise config.unusable("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        self.head_width = config.even("head_dim", default=256)
        self.heads_per_key = heads // keys
        self.scale = config.number("query_pre_attn_scalar", default=256, at_least=1e-9) ** -0.5
        self.cap = config.number_or_null("attn_logit_softcapping", default=50.0)
        bias = config.flag("attention_bias", default=False)
        self.q_proj = Linear(width, heads * self.head_width, bias=bias)
        self.k_proj, self.v_proj = (Linear(width, keys * self.head_width, bias=bias) for _ in range(2))
        self.o_proj = Linear(heads * self.head_width, width, bias=bias)

    def forward(self, x: Tensor, *, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        if self.heads_per_key > 1:
            k, v = (part.repeat_interleave(self.heads_per_key, dim=1) for part in (k, v))
        scores = multiply(q, k.transpose(2, 3)) * self.scale
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        shares = (scores + mask).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        attended: Tensor = self.o_proj(multiply(shares, v).transpose(1, 2).flatten(2))
        return attended


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, H, T, E): channel i of the first half with channel i of the second."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
