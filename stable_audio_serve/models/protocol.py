"""The protocol between the engine and a model, with the values they exchange. Knows no family and no request queue.

Alphabet: B batch rows, C channels, S audio samples, F latent frames, D latent channels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.segments import Segments
from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Facts about a loaded model: its card, which the checkpoint's own config has filled in, and what only the engine
    needs to know.
    """

    card: ModelCard
    hop: int  # audio samples per latent frame
    max_frames: int  # latent frames of the longest window, headroom included
    default_sampler: str
    noisy_source_encoder: bool  # encoding a source draws noise, so each row needs its own encoding
    tail_samples: int = 0  # of the longest window behind its last whole frame: a source's last latents depend on them
    pads_rows: bool = True  # the network leaves invalid frames out; otherwise rows of equal length only share a call
    packs_rows: bool = False  # the network takes packed batches
    packs_segments: bool = False  # ... whose lengths only the device knows, and is fast at it
    num_prefix: int = 0  # tokens of the network's own before each row's frames
    is_compiled: bool = False  # the first call of a kind takes seconds, and calls of another shape may round otherwise
    dtype: torch.dtype = torch.float32  # of the denoiser
    captures_decode: bool = False  # decoding is device work only, of latents and draws, wherever a window begins


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Prompts as tokens: `told` is ids and mask, (B, 2, T) int64 on the host, mask 1 for real tokens.

    `chars_read` is how many of each prompt's first characters they stand for, None = all.
    """

    told: Tensor
    chars_read: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One encoded prompt: `tokens` (T, width) on the model's device, `mask` (T,) bool, true for real tokens.

    `chars_read` is how many of the prompt's first characters the tokens stand for, None = all.
    """

    prompt: str
    tokens: Tensor
    mask: Tensor
    chars_read: int | None = None

    @classmethod
    def each(
        cls, prompts: Sequence[str], tokens: Tensor, *, mask: Tensor, chars_read: Sequence[int | None]
    ) -> list[TextEmbedding]:
        """Returns the prompts' own parts of tokens (B, T, width) and mask (B, T), where B may be larger."""
        real = mask.bool()
        # Cloned, so that a cached prompt does not hold the whole batch's memory.
        return [
            cls(prompt, tokens[i].clone(), real[i].clone(), chars)
            for i, (prompt, chars) in enumerate(zip(prompts, chars_read, strict=True))
        ]

    @property
    def num_bytes(self) -> int:
        """Memory held by the tensors."""
        return self.tokens.nbytes + self.mask.nbytes


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """A window over latent frames [start, stop) of which only [keep_start, keep_stop) is written to the output."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True, slots=True)
class WindowRule:
    """How latents may be cut into windows of any length that join to the whole: `halo` frames beside those that are
    kept, the first frame a multiple of `multiple`. The halo is such a multiple, too.
    """

    halo: int
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Source audio made ready for the encoder: `samples` (C, S) float32 on the CPU at the model's rate, padded or
    cropped to the row's frames and the window's tail; `windows` in latent frames."""

    samples: Tensor
    windows: tuple[WindowSpan, ...]

    def cut(self, span: WindowSpan, *, hop: int) -> Tensor:
        """Returns one window's samples (C, S_window); the last one also has what follows the last whole frame."""
        stop = None if span is self.windows[-1] else span.stop * hop
        return self.samples[:, span.start * hop : stop]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Everything about one variation that is decided before it reaches the device.

    `frames` is the row's own latent length with headroom, of which the first `valid_frames` take part in attention.
    `output_samples` is the exact length of the result. `negative_prompt` is None unless some evaluation is guided
    with one; `negative_numbers` None are those of the prompt. `keep_mask` (F,) float32, 1 = keep the source's latent,
    0 = generate, or None without inpainting. A model that conditions on the mask gets it in `condition`; one that does
    not blends its `sampler` (`sampling/blend.py`), and the engine keeps the frames. With a `decode_rule` the engine may
    cut the frames that `decode_windows` cover otherwise.
    """

    seed: int
    frames: int
    valid_frames: int
    output_samples: int
    prompt: str
    negative_prompt: str | None
    numbers: Mapping[str, float]
    sampler: SamplerPlan
    guidance: Guidance
    init_source: SourcePlan | None
    inpaint_source: SourcePlan | None
    keep_mask: Tensor | None
    decode_windows: tuple[WindowSpan, ...]
    decode_rule: WindowRule | None = None
    negative_numbers: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class EncodeWindow:
    """One window of source audio: `samples` (C, S) float32, first latent frame `start`, `stage` init or inpaint."""

    samples: Tensor
    start: int
    stage: str
    noise: NoiseSource


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """One window of finished latents: `latents` (D, F) float32 on the model's device, first frame `start`."""

    latents: Tensor
    start: int
    noise: NoiseSource


@dataclass(frozen=True, slots=True)
class BranchConditioning:
    """Per-request constants of one denoiser input, by names that mean something to the model only.

    `constants` have the same shape for every request; `by_frame` are (channels, F) with the row's own F. A name that a
    branch leaves out stands for zeros, and takes nothing where all leave it out. So an adapter's low-rank terms,
    stacked to one rank, can be constants: another adapter is another value, for which no call is captured again.
    """

    constants: Mapping[str, Tensor]
    by_frame: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Device memory of all values."""
        return sum(value.nbytes for value in (*self.constants.values(), *self.by_frame.values()))


@dataclass(frozen=True, slots=True)
class RowConditioning:
    """The conditional branch and, when some evaluation is guided, the unconditional (or negative) one.

    A tensor that both branches have is kept once.
    """

    conditional: BranchConditioning
    unconditional: BranchConditioning | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows that step together; a guided row appears twice, once per branch.

    Padded: `x` (B, D, F) float32 (already scaled), `t` (B,) float32, `valid` (B, F) bool: invalid frames are neither
    queries nor keys, and their output is unspecified. F is at least every row's frames.

    Packed, for a model whose spec says `packs_rows`: `x` (1, D, N) holds the rows' `frames` one after another, of which
    each row's first `valid_frames` are valid; `valid` is None. Equal lengths side by side are faster.

    Either way `constants` (B, ...) and `by_frame` (B, channels, F) hold the branches' values by name; a name that no
    branch has is missing.

    With `segments`, for a model whose spec says `packs_segments`: `x` (1, D, N) and `by_frame` (1, channels, N) are by
    token, zeros where no latent frame is. `constants` (S, ...) are whole memories of such values, and `slots` (B,)
    int32 by name say which is each row's.
    """

    x: Tensor
    t: Tensor
    valid: Tensor | None
    constants: Mapping[str, Tensor]
    by_frame: Mapping[str, Tensor] = field(default_factory=dict)
    frames: tuple[int, ...] = ()
    valid_frames: tuple[int, ...] = ()
    segments: Segments | None = None
    slots: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, x: Tensor, *, t: Tensor, valid: Tensor, branches: Sequence[BranchConditioning]) -> StepBatch:
        """Returns a padded batch of rows with their own conditioning each, for callers that keep none on the device."""
        constants = {name: _stack([branch.constants.get(name) for branch in branches]) for name in _names(branches)}
        padded = [
            {name: F.pad(value, (0, x.shape[-1] - value.shape[-1])) for name, value in branch.by_frame.items()}
            for branch in branches
        ]
        by_frame = {
            name: _stack([values.get(name) for values in padded]) for name in {name for own in padded for name in own}
        }
        return cls(x, t, valid, constants, by_frame)


def _names(branches: Sequence[BranchConditioning]) -> set[str]:
    return {name for branch in branches for name in branch.constants}


def _stack(values: Sequence[Tensor | None]) -> Tensor:
    """Returns the values, zeros for missing ones, with a batch axis in front."""
    like = next(value for value in values if value is not None)
    return torch.stack([torch.zeros_like(like) if value is None else value for value in values])


class DiffusionModel(Protocol):
    """A loaded model. All calls but `plan` happen on the engine's thread; `plan` is pure and runs anywhere."""

    @property
    def spec(self) -> ModelSpec:
        """Facts about the model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tensors given to and returned by the other methods live."""
        ...

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        """Returns one plan per variation. `frames` forces the latent length (a row that shares a reference batch).

        Raises InvalidRequestError naming the field for what the model cannot do.
        """
        ...

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Embed prompts; row-independent."""
        ...

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        """Returns latents (D, F_window) float32 of windows that have one length; row-independent."""
        ...

    def condition(
        self,
        plan: RowPlan,
        *,
        prompt: TextEmbedding,
        negative: TextEmbedding | None,
        inpaint_latents: Tensor | None,
    ) -> RowConditioning:
        """Returns per-request constants of a row; `inpaint_latents` (D, frames), None without any or with a blend."""
        ...

    def denoise(self, batch: StepBatch) -> Tensor:
        """Returns network output (B, D, F) float32, velocity or v as the plan's sampler expects; row-independent.

        Of a packed batch (1, D, N).
        """
        ...

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """Returns audio (C, hop * F_window) float32 of windows that have one length, not clamped; row-independent."""
        ...


@runtime_checkable
class TokenModel(Protocol):
    """A model whose `encode_text` is host work, then device work only: `tokenize`, then `embed_tokens`."""

    @property
    def text_size(self) -> tuple[int, int]:
        """Tokens T of every prompt, padding included, and the width of their embeddings."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Returns the prompts' tokens, cut or padded to T."""
        ...

    def embed_tokens(self, told: Tensor) -> Tensor:
        """Returns tokens (B, T, width) float32 of ids and mask (B, 2, T) on the device; row-independent."""
        ...
