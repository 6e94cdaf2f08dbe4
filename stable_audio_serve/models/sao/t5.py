"""The encoder of a T5, the text encoder of Stable Audio Open models.

Shapes: B prompts, T tokens, W width, H heads of width E. Operations and their order are those of transformers, so that
the results are equal bit for bit where `blocks.text` multiplies like torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.models.blocks.text import ACTIVATIONS, MAX_VOCABULARY, Linear
from stable_audio_serve.models.config_reader import MAX_DEPTH, ConfigReader
from stable_audio_serve.models.text_encoder import EncoderNetwork

_GATED = "gated-"


class T5Encoder(EncoderNetwork):
    """The network that a T5's config.json describes. Submodules have the names in checkpoints."""

    def __init__(self, config: ConfigReader) -> None:
        super().__init__()
        width, eps = config.integer("d_model", default=512), config.number("layer_norm_epsilon", default=1e-6)
        buckets = config.integer("relative_attention_num_buckets", default=32, at_least=4)
        self.embed_tokens = nn.Embedding(config.integer("vocab_size", default=32_128, at_most=MAX_VOCABULARY), width)
        self.block = nn.ModuleList(
            _Block(config, width=width, eps=eps, buckets=0 if number else buckets)
            for number in range(config.integer("num_layers", default=6, at_most=MAX_DEPTH))
        )
        self.final_layer_norm = _Norm(width, eps=eps)
        self.max_distance = config.integer("relative_attention_max_distance", default=128, at_least=buckets // 4 + 1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns the hidden states (B, T, W) of tokens (B, T). `mask` (B, 1, 1, T) is added to the scores."""
        hidden: Tensor = self.embed_tokens(ids)
        table: nn.Embedding = self.block[0].layer[0].SelfAttention.relative_attention_bias  # type: ignore
        positions = torch.arange(ids.shape[1], device=ids.device)
        distances = positions[None, :] - positions[:, None]
        buckets = _bucket(distances, num_buckets=table.num_embeddings, max_distance=self.max_distance)
        bias = table(buckets).permute(2, 0, 1)[None]  # (1, H, T, T), the same for all layers
        added = (bias + mask).contiguous()
        for block in self.block:
            hidden = block(hidden, added)
        normalized: Tensor = self.final_layer_norm(hidden)
        return normalized


def _bucket(distances: Tensor, *, num_buckets: int, max_distance: int) -> Tensor:
    """Returns the number of the bucket, below `num_buckets`, for each distance from a query to a key in tokens.

    Keys after the query have the upper half of the buckets. In each half, the first buckets contain one distance each.
    The others contain more, on a logarithmic scale, up to `max_distance`.
    """
    half = num_buckets // 2
    exact = half // 2
    lengths = distances.abs()
    logarithmic = torch.log(lengths.float() / exact) / math.log(max_distance / exact) * (half - exact)
    longer = (exact + logarithmic.to(torch.long)).clamp(max=half - 1)
    return (distances > 0).to(torch.long) * half + torch.where(lengths < exact, lengths, longer)


class _Norm(nn.Module):
    """Divides by the root mean square and multiplies by the weight. The root mean square is computed in float32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype)


class _Block(nn.Module):
    def __init__(self, config: ConfigReader, *, width: int, eps: float, buckets: int) -> None:
        super().__init__()
        attention = _AttentionLayer(config, width=width, eps=eps, buckets=buckets)
        self.layer = nn.ModuleList([attention, _FeedForwardLayer(config, width=width, eps=eps)])

    def forward(self, hidden: Tensor, added: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return _finite(feed_forward(_finite(attention(hidden, added))))


def _finite(hidden: Tensor) -> Tensor:
    """Replace infinite values, which the sums of large T5s have in float16, in each prompt on its own."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(torch.float16).max
    bound = torch.where(hidden.isinf().any(dim=(1, 2), keepdim=True), largest - 1000, largest).half()
    return hidden.clamp(min=-bound, max=bound)


class _AttentionLayer(nn.Module):
    def __init__(self, config: ConfigReader, *, width: int, eps: float, buckets: int) -> None:
        super().__init__()
        self.SelfAttention = _Attention(config, width=width, buckets=buckets)
        self.layer_norm = _Norm(width, eps=eps)

    def forward(self, hidden: Tensor, added: Tensor) -> Tensor:
        attended: Tensor = self.SelfAttention(self.layer_norm(hidden), added)
        return hidden + attended


class _Attention(nn.Module):
    """Attention without scaled scores. If `buckets` is not 0, it has the table of biases, which all layers share."""

    def __init__(self, config: ConfigReader, *, width: int, buckets: int) -> None:
        super().__init__()
        heads, self.head_width = config.integer("num_heads", default=8), config.integer("d_kv", default=64)
        inner = heads * self.head_width
        self.q, self.k, self.v = (Linear(width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, width, bias=False)
        if buckets:
            self.relative_attention_bias = nn.Embedding(buckets, heads)

    def forward(self, x: Tensor, added: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=1.0)
        projected: Tensor = self.o(attended.transpose(1, 2).flatten(2))
        return projected


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: ConfigReader, *, width: int, eps: float) -> None:
        super().__init__()
        self.DenseReluDense = _FeedForward(config, width=width)
        self.layer_norm = _Norm(width, eps=eps)

    def forward(self, hidden: Tensor) -> Tensor:
        added: Tensor = self.DenseReluDense(self.layer_norm(hidden))
        return hidden + added


class _FeedForward(nn.Module):
    """Two linear layers with an activation between them; the first one may be gated, as in T5 1.1."""

    def __init__(self, config: ConfigReader, *, width: int) -> None:
        super().__init__()
        kinds = [gate + name for gate in ("", _GATED) for name in ACTIVATIONS]
        kind, inner = config.choice("feed_forward_proj", kinds, default="relu"), config.integer("d_ff", default=2048)
        name = kind.removeprefix(_GATED)
        self.activation = ACTIVATIONS["gelu_new" if kind == "gated-gelu" else name]
        self.parts = ("wi",) if name == kind else ("wi_0", "wi_1")
        for part in self.parts:
            self.add_module(part, Linear(width, inner, bias=False))
        self.wo = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, *gated = (getattr(self, part)(x) for part in self.parts)
        activated = self.activation(first)
        projected: Tensor = self.wo(activated * gated[0] if gated else activated)
        return projected
