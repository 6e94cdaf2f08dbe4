"""The protocol between the engine and a model, and the values that they exchange. Independent of families and queues.

Alphabet: B batch rows, C channels, S audio samples, F latent frames, D latent channels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

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
    """Facts about a loaded model: its card, completed from the checkpoint's config, and values that only the engine
    needs.
    """

    card: ModelCard
    hop: int  # audio samples per latent frame
    max_frames: int  # latent frames of the longest window, headroom included
    default_sampler: str
    noisy_source_encoder: bool  # encoding a source draws noise, so each row needs its own encoding
    tail_samples: int = 0  # samples after the longest window's last whole frame; a source's last latents depend on them
    pads_rows: bool = True  # the network masks invalid frames; if False, only rows of equal length share a call
    packs_rows: bool = False  # the network accepts packed batches
    packs_segments: bool = False  # the network accepts segments (row lengths on the device) and is fast with them
    num_prefix: int = 0  # tokens that the network puts before each row's frames
    is_compiled: bool = False  # the first call of a kind takes seconds, and results may depend on the call's shape
    dtype: torch.dtype = torch.float32  # the denoiser's precision
    captures_decode: bool = False  # decoding is device work only and does not depend on the window's start


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Prompts as tokens. `ids_and_mask` is (B, 2, T) int64 on the host; the mask is 1 for real tokens.

    `chars_read` is the number of leading characters of each prompt that the tokens cover; None: all.
    """

    ids_and_mask: Tensor
    chars_read: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One encoded prompt: `tokens` (T, width) on the model's device; `mask` (T,) bool, true for real tokens.

    `chars_read` is the number of leading characters of the prompt that the tokens cover; None: all.
    """

    prompt: str
    tokens: Tensor
    mask: Tensor
    chars_read: int | None = None

    @classmethod
    def each(
        cls, prompts: Sequence[str], tokens: Tensor, *, mask: Tensor, chars_read: Sequence[int | None]
    ) -> list[TextEmbedding]:
        """Split tokens (B, T, width) and mask (B, T) by prompt; B may exceed the number of prompts."""
        real = mask.bool()
        # Clone, so that a cached prompt does not keep the whole batch in memory.
        return [
            cls(prompt, tokens[i].clone(), real[i].clone(), chars)
            for i, (prompt, chars) in enumerate(zip(prompts, chars_read, strict=True))
        ]

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors in bytes."""
        return self.tokens.nbytes + self.mask.nbytes


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """A window over latent frames [start, stop), of which only [keep_start, keep_stop) is written to the output."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True, slots=True)
class WindowRule:
    """Constraints on windows over latents, so that their joined results equal the result of the whole.

    A window has `halo` frames on each side of the frames that it keeps. Its first frame and `halo` are multiples of
    `multiple`. It may have any length.
    """

    halo: int
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Source audio prepared for the encoder: `samples` (C, S) float32 on the CPU at the model's rate, padded or cropped
    to the row's frames and the window's tail. `windows` are in latent frames.
    """

    samples: Tensor
    windows: tuple[WindowSpan, ...]

    def cut(self, span: WindowSpan, *, hop: int) -> Tensor:
        """Returns one window's samples (C, S_window). The last window includes the tail after its last whole frame."""
        stop = None if span is self.windows[-1] else span.stop * hop
        return self.samples[:, span.start * hop : stop]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Everything about one variation that is decided before it reaches the device.

    `frames` is the row's latent length with headroom; the first `valid_frames` take part in attention.
    `output_samples` is the exact length of the result. `negative_prompt` is None if no evaluation is guided by one. If
    `negative_numbers` is None, the prompt's numbers apply. `keep_mask` (F,) float32 is 1 to keep the source's latent,
    0 to generate; None without inpainting. A model with a mask input gets the mask in `condition`. For other models
    the `sampler` blends the source into every step (`sampling/blend.py`), and the engine restores the kept frames at
    the end. With a `decode_rule` the engine may replace `decode_windows` by other windows over the same frames.
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
    """Per-request constants of one denoiser input, by name. Only the model interprets the names.

    `constants` have the same shape for every request; `by_frame` are (channels, F) with the row's F. A missing name
    means zeros; a name missing in all branches of a call takes no memory.
    """

    constants: Mapping[str, Tensor]
    by_frame: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Device memory of all values in bytes."""
        return sum(value.nbytes for value in (*self.constants.values(), *self.by_frame.values()))


@dataclass(frozen=True, slots=True)
class RowConditioning:
    """The conditional branch and, if some evaluation is guided, the unconditional or negative branch.

    A tensor shared by both branches is stored once.
    """

    conditional: BranchConditioning
    unconditional: BranchConditioning | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows that step together; a guided row appears twice, once per branch.

    Padded: `x` (B, D, F) float32 (already scaled), `t` (B,) float32, `valid` (B, F) bool. Invalid frames are neither
    queries nor keys, and their output is unspecified. F is at least every row's frames.

    Packed, for a model with `packs_rows`: `x` (1, D, N) holds the rows' `frames` one after another; each row's first
    `valid_frames` are valid, and `valid` is None. Adjacent rows of equal length are faster.

    In both cases `constants` (B, ...) and `by_frame` (B, channels, F) hold the branches' values by name. A name that no
    branch has is absent.

    With `segments`, for a model with `packs_segments`: `x` (1, D, N) and `by_frame` (1, channels, N) are indexed by
    token, with zeros at prefix tokens. `constants` (S, ...) hold the values of S slots. `slots` (B,) int32, by name,
    give each row's slot.
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
        """Build a padded batch from each row's conditioning, for callers that keep no conditioning in device memory."""
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
    """Stack the values along a new batch axis, with zeros for missing ones."""
    like = next(value for value in values if value is not None)
    return torch.stack([torch.zeros_like(like) if value is None else value for value in values])


class DiffusionModel(Protocol):
    """A loaded model. All calls except `plan` run on the engine's thread; `plan` is pure and runs on any thread."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def device(self) -> torch.device:
        """The device of all tensor arguments and results, unless stated otherwise."""
        ...

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        """Returns one plan per variation. `frames` overrides the latent length (for a row of a reference batch).

        Raises InvalidRequestError naming the field for a request that the model cannot serve.
        """
        ...

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Embed prompts; row-independent."""
        ...

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        """Returns latents (D, F_window) float32 of windows of equal length; row-independent."""
        ...

    def condition(
        self,
        plan: RowPlan,
        *,
        prompt: TextEmbedding,
        negative: TextEmbedding | None,
        inpaint_latents: Tensor | None,
    ) -> RowConditioning:
        """Returns a row's per-request constants. `inpaint_latents` is (D, frames); None without inpainting or if the
        sampler blends.
        """
        ...

    def denoise(self, batch: StepBatch) -> Tensor:
        """Returns the network output (B, D, F) float32, velocity or v as the plan's sampler expects; row-independent.

        For a packed batch it is (1, D, N).
        """
        ...

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """Returns audio (C, hop * F_window) float32 of windows of equal length, not clamped; row-independent."""
        ...
