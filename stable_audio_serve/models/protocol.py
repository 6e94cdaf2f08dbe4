"""The protocol between the engine and a model, with the values they exchange. Knows no family and no request queue.

Alphabet: B batch rows, C channels, S audio samples, F latent frames, D latent channels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
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
    pads_rows: bool = True  # the network leaves invalid frames out; otherwise rows of equal length only share a call
    packs_rows: bool = False  # the network takes packed batches


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One encoded prompt: `tokens` (T, width) on the model's device, `mask` (T,) bool, true for real tokens."""

    prompt: str
    tokens: Tensor
    mask: Tensor

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
    cropped to the row's frames; `windows` in latent frames."""

    samples: Tensor
    windows: tuple[WindowSpan, ...]


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


class BranchConditioning(Protocol):
    """Per-request constants of one denoiser input (context, cross keys and values, local embeddings).

    Opaque to the engine, which only passes it back in a StepBatch and reads its size.
    """

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        ...


@dataclass(frozen=True, slots=True)
class RowConditioning:
    """The conditional branch and, when some evaluation is guided, the unconditional (or negative) one."""

    conditional: BranchConditioning
    unconditional: BranchConditioning | None

    @property
    def num_bytes(self) -> int:
        """Device memory held by both branches."""
        return self.conditional.num_bytes + (self.unconditional.num_bytes if self.unconditional else 0)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows that step together; a guided row appears twice, once per branch.

    Padded: `x` (B, D, F) float32 (already scaled), `t` (B,) float32, `valid` (B, F) bool: invalid frames are neither
    queries nor keys, and their output is unspecified. F is at least every row's frames.

    Packed, for a model whose spec says `packs_rows`: `x` (1, D, N) holds the rows' `frames` one after another, of which
    each row's first `valid_frames` are valid; `valid` is None. Equal lengths side by side are faster.
    """

    x: Tensor
    t: Tensor
    valid: Tensor | None
    branches: Sequence[BranchConditioning]
    frames: tuple[int, ...] = ()
    valid_frames: tuple[int, ...] = ()


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
