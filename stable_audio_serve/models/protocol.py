"""The interface through which the engine uses a model of any family, and the values that engine and model exchange.

Shapes: B batch rows, C channels, S audio samples, F latent frames, D latent channels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from sys import getsizeof
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.segments import Segments
from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.plan import Guidance, SamplerPlan


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Properties of a loaded model: its public description (`card`), and values that only the engine needs."""

    card: ModelCard
    hop: int  # audio samples per latent frame
    max_frames: int  # largest number of latent frames that the network accepts
    default_sampler: str
    noisy_source_encoder: bool  # encoding source audio draws noise, so each row needs its own encoding
    tail_samples: int = 0  # samples after the last whole frame of the longest window; the encoder reads them too
    pads_rows: bool = True  # the network masks padding; if False, a batch needs rows of equal length
    packs_rows: bool = False  # the network accepts packed batches: rows of different lengths without padding
    packs_segments: bool = False  # the network accepts, and is fast with, packed batches with row lengths on the device
    has_fused_kernels: bool = False  # the network uses the kernels of `blocks.kernels`, see `SwitchableModel`
    num_prefix: int = 0  # number of tokens that the network puts before each row's frames
    is_compiled: bool = False  # uses torch.compile: a new shape can take seconds, and results may depend on the shape
    dtype: torch.dtype = torch.float32  # the denoiser's precision
    captures_decode: bool = False  # `decode` can be captured as a CUDA graph for any window
    attention: str = ""  # on a GPU, the kernels of attention, without and with a mask


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Prompts as tokens. `ids_and_mask` is (prompts, 2, tokens) int64 on the host; the mask is 1 for real tokens.

    `chars_read` has one entry per prompt: how many characters at its beginning the tokens cover; None: all characters.
    """

    ids_and_mask: Tensor
    chars_read: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One encoded prompt: embeddings `tokens` (number of tokens, width) on the model's device, and their `mask`.

    `mask` is true for real tokens and false for padding. `chars_read` is how many characters at the beginning of the
    prompt the tokens cover; None: all characters.
    """

    prompt: str
    tokens: Tensor
    mask: Tensor
    chars_read: int | None = None

    @classmethod
    def each(
        cls, prompts: Sequence[str], tokens: Tensor, *, mask: Tensor, chars_read: Sequence[int | None]
    ) -> list[TextEmbedding]:
        """Split a batch of `tokens` (rows, tokens, width) and `mask` (rows, tokens) into one embedding per prompt.

        Rows after the last prompt are ignored.
        """
        real = mask.bool()
        # Clone: a view would keep the tensor of the whole batch in memory as long as one of its embeddings is cached.
        return [
            cls(prompt, tokens[i].clone(), real[i].clone(), chars)
            for i, (prompt, chars) in enumerate(zip(prompts, chars_read, strict=True))
        ]

    @property
    def num_bytes(self) -> int:
        """The memory of `tokens`, `mask` and the text of the prompt in bytes."""
        return self.tokens.nbytes + self.mask.nbytes + getsizeof(self.prompt)


@dataclass(frozen=True, slots=True)
class WindowSpan:
    """One window of a clip. Latent frames [start, stop) are processed; only the result of [keep_start, keep_stop) is
    used.
    """

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@dataclass(frozen=True, slots=True)
class WindowRule:
    """How to cut a clip into windows so that decoding them separately gives the same audio as decoding the whole clip.

    A window has `halo` additional frames before and after the frames whose result is used. The window's first frame and
    `halo` are multiples of `multiple`. A window may have any length.
    """

    halo: int
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Source audio prepared for the encoder: `samples` (channels, samples) float32 on the CPU, at the model's rate.

    `samples` are padded or cropped to `frames` latent frames. The encoder processes them in `windows`, whose bounds are
    latent frames. The engine sets latents that no window keeps to 0.
    """

    samples: Tensor
    frames: int
    windows: tuple[WindowSpan, ...]

    def cut(self, span: WindowSpan, *, hop: int) -> Tensor:
        """Returns the samples of one window, (channels, samples). The last frame includes all remaining samples."""
        stop = None if span.stop == self.frames else span.stop * hop
        return self.samples[:, span.start * hop : stop]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Everything about one variation of a request that is decided before the variation reaches the device.

    `frames` is the number of latent frames to generate. It can exceed the clip's length. The first `valid_frames` of
    them take part in attention. `output_samples` is the exact length of the result. `negative_prompt` is None if no
    step uses a negative prompt. If `negative_numbers` is None, the negative prompt gets the prompt's `numbers`.

    `keep_mask` (frames,) float32 is 1 to keep the source's latent and 0 to generate; None without inpainting. A model
    with a mask input gets the mask in `condition`. For other models the `sampler` blends the source into every step
    (`sampling/blend.py`), and the engine restores the kept frames at the end. If `decode_rule` is not None, the engine
    may replace `decode_windows` by other windows over the same frames.
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
    """One window of source audio: `samples` (channels, samples) float32, beginning at latent frame `start`.

    `stage` is the purpose of the source: "init" or "inpaint".
    """

    samples: Tensor
    start: int
    stage: str
    noise: NoiseSource


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """One window of finished latents, beginning at latent frame `start` of the clip.

    `latents` is (latent channels, frames) float32 on the model's device.
    """

    latents: Tensor
    start: int
    noise: NoiseSource


@dataclass(frozen=True, slots=True)
class BranchConditioning:
    """The conditioning of one branch (conditional or unconditional) of a request. It is the same in all steps.

    Both mappings have tensors by name; only the model interprets the names. A tensor in `constants` has the same shape
    for every request. A tensor in `by_frame` is (channels, the row's frames). A missing name means zeros.
    """

    constants: Mapping[str, Tensor]
    by_frame: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowConditioning:
    """The conditioning of a row: the conditional branch and, for classifier-free guidance, the unconditional branch.

    `unconditional` contains the negative prompt if the request has one. It is None if no step uses guidance. The
    branches may share tensors.
    """

    conditional: BranchConditioning
    unconditional: BranchConditioning | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The input of one denoiser call: B rows. A request with guidance has two rows, one for each branch.

    A batch has one of three layouts. In all of them, `x` is float32 and already scaled, and `t` is (B,) float32.

    Padded: `x` is (B, D, F) and `valid` (B, F) bool. F is at least the number of frames of every row. Invalid frames
    are padding: they are not keys, and their output is unspecified.

    Packed, for a model with `packs_rows`: `x` (1, D, N) has the frames of all rows one after another. `frames` has the
    number of frames of each row, N in total. Only the first `valid_frames` frames of each row are valid; `valid` is
    None. Adjacent rows of equal length are faster.

    In these two layouts, `constants` (B, ...) and `by_frame` (B, channels, F) have the conditioning of all rows, by
    name. A name is absent if no row has it.

    With `segments`, for a model with `packs_segments`: `x` (1, D, N) and `by_frame` (1, channels, N) have the N tokens
    of all rows, with zeros at prefix tokens. Each tensor in `constants` has the conditioning of many requests on its
    first axis. `slots` (B,) int32 has, under the same name, each row's index on that axis.
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
        """Build a padded batch from the conditioning of each row (`branches`)."""
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
    """A loaded model. `plan` has no side effects and may run in any thread. Only the engine's thread calls the other
    methods.
    """

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def device(self) -> torch.device:
        """The device of all tensor arguments and results, unless stated otherwise."""
        ...

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        """Returns one plan for each variation of the request.

        `frames` overrides the number of latent frames. It serves to compare a row with a reference implementation that
        pads the row to the length of its batch. Raises InvalidRequestError naming the field if the model cannot serve
        the request.
        """
        ...

    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Returns the embedding of each prompt. An embedding does not depend on the other prompts."""
        ...

    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        """Returns the latents (latent channels, frames) float32 of each window. All windows must have the same length.

        The result for a window does not depend on the other windows.
        """
        ...

    def condition(
        self,
        plan: RowPlan,
        *,
        prompt: TextEmbedding,
        negative: TextEmbedding | None,
        inpaint_latents: Tensor | None,
    ) -> RowConditioning:
        """Returns a row's conditioning, which is the same in all steps.

        `inpaint_latents` (latent channels, frames) are the source's latents; None without inpainting, or if the sampler
        blends the source into every step.
        """
        ...

    def denoise(self, batch: StepBatch) -> Tensor:
        """Returns the network's output in the shape of `batch.x`, float32.

        It is a velocity or a v prediction, whichever the samplers of the model expect. The output of a row does not
        depend on the other rows.
        """
        ...

    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """Returns the audio (channels, hop * frames) float32 of each window, not clamped to -1..1.

        All windows must have the same length. The result for a window does not depend on the other windows.
        """
        ...


@runtime_checkable
class SwitchableModel(Protocol):
    """A model whose speed features can be switched off."""

    def use_features(self, *, fast_decoding: bool, fused_kernels: bool) -> None:
        """From now on, use only these features.

        `fast_decoding` decodes in the configured precision, else with float32 matrix products. `fused_kernels` uses the
        kernels of `blocks.kernels` if they work on the model's device, else torch's operations. Without it, no such
        kernel ever runs.
        """
        ...


@runtime_checkable
class AdaptableModel(Protocol):
    """A model whose linear layers adapters can change."""

    @property
    def adaptable(self) -> Mapping[str, nn.Module]:
        """The networks that adapters can change. A key is the prefix of the network's layers in adapter files."""
        ...

    def runs_in_steps(self, layer: str) -> bool:
        """Whether `denoise` runs the layer that adapter files name `layer`. Other layers run in `condition`."""
        ...
