"""A model that implements the engine's protocol with the network, conditioners and autoencoder of the package
stable-audio-tools. Samplers, guidance and noise do not come from the package.

Only the steps of the network process batches; everything else runs one row at a time. Public methods run without
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stable_audio_serve.core.catalog import DecodePrecision
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.models.parts import WindowNoise
from stable_audio_serve.models.precision import decoder_products
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    DecodeWindow,
    EncodeWindow,
    ModelSpec,
    RowConditioning,
    RowPlan,
    StepBatch,
    TextEmbedding,
)
from stable_audio_serve.models.sao.planning import plan_rows
from stable_audio_serve.models.stable_audio_tools.config import Inputs
from stable_audio_serve.models.switches import exact
from stable_audio_serve.models.text_encoder import beginnings, chars_read, require_known
from stable_audio_serve.sampling.schedules import TimestepShift

_CONTEXT, _CONTEXT_MASK, _PREPENDED = "cross_attn_cond", "cross_attn_mask", "prepend_cond"


class PackageModel:
    """Implements `DiffusionModel` around the package's `ConditionedDiffusionModelWrapper`."""

    def __init__(
        self,
        wrapper: nn.Module,
        *,
        inputs: Inputs,
        spec: ModelSpec,
        shift: TimestepShift,
        device: torch.device,
        decode_precision: DecodePrecision = "float32",
    ) -> None:
        # Type Any, because the package's modules have attributes and methods that nn.Module does not declare.
        self.wrapper: Any = wrapper
        self.inputs = inputs
        self._spec = spec
        self._shift = shift
        self._device = device
        self._decode_precision: DecodePrecision = decode_precision
        self._products = decoder_products(decode_precision, device)

    def use_features(self, *, fast_decoding: bool, fused_kernels: bool) -> None:
        """See `SwitchableModel`. The package's networks have no fused kernels."""
        self._products = decoder_products(self._decode_precision if fast_decoding else "float32", self._device)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self._device

    def plan(self, request: GenerationRequest, *, frames: int | None = None) -> tuple[RowPlan, ...]:
        """See `DiffusionModel`. Audio is encoded and decoded as a single window, as in the package."""
        return plan_rows(request, spec=self._spec, autoencoder=None, shift=self._shift, frames=frames)

    @torch.inference_mode()
    @exact
    def encode_text(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Returns each prompt's embedding (tokens, width), zero at padding, and its mask, true at real tokens.

        Raises InvalidRequestError if a prompt has a token that the text encoder lacks.
        """
        text = self.wrapper.conditioner.conditioners[self.inputs.prompt.id]
        # Tokenized here, too, because the package neither checks nor returns its tokens.
        texts = beginnings(prompts, max_length=text.max_length)
        encoded = text.tokenizer(texts, truncation=True, max_length=text.max_length)
        require_known(max(chain(*encoded["input_ids"]), default=0), text.model.encoder)
        tokens, mask = text(texts, self._device)
        read = chars_read(encoded, prompts, max_length=text.max_length)
        return TextEmbedding.each(prompts, tokens, mask=mask, chars_read=read)

    @torch.inference_mode()
    @exact
    def encode_audio(self, windows: Sequence[EncodeWindow]) -> list[Tensor]:
        """See `DiffusionModel`. The random numbers of the package's autoencoder are values of the window's `noise`."""
        latents = []
        for window in windows:
            with _OwnNoise(WindowNoise(window.noise, window.stage, window.start)):
                audio = window.samples[None].to(self._device, torch.float32)
                latents.append(self.wrapper.pretransform.encode(audio)[0].float())
        return latents

    @torch.inference_mode()
    @exact
    def condition(
        self,
        plan: RowPlan,
        *,
        prompt: TextEmbedding,
        negative: TextEmbedding | None,
        inpaint_latents: Tensor | None,
    ) -> RowConditioning:
        """See `DiffusionModel`. As in the package, the unconditional branch has the context of the negative prompt, or
        zeros without a negative prompt. Its prepended tokens are zero. Its other inputs are the same as in the
        conditional branch.
        """
        own = self._arguments(prompt, plan.numbers)
        conditional = BranchConditioning(own)
        if not any(evaluation.guided for evaluation in plan.sampler.evaluations):
            return RowConditioning(conditional, None)
        replaced = {key: torch.zeros_like(own[key]) for key in (_CONTEXT, _PREPENDED) if key in own}
        if negative is not None and _CONTEXT in own:
            other = self._arguments(negative, plan.negative_numbers or plan.numbers)
            replaced[_CONTEXT] = torch.where(other[_CONTEXT_MASK].bool()[..., None], other[_CONTEXT], 0.0)
        return RowConditioning(conditional, BranchConditioning({**own, **replaced}))

    @torch.inference_mode()
    @exact
    def denoise(self, batch: StepBatch) -> Tensor:
        """See `DiffusionModel`. All frames must be valid (no padding)."""
        # Each row's value has a batch axis of length 1. Merge this axis with the batch axis of `constants`.
        arguments = {key: value.flatten(0, 1) for key, value in batch.constants.items()}
        output: Tensor = self.wrapper.model(batch.x, batch.t, **arguments, cfg_scale=1.0)
        return output.float()

    @torch.inference_mode()
    def decode(self, windows: Sequence[DecodeWindow]) -> list[Tensor]:
        """See `DiffusionModel`. Decoders with an odd stride return too few samples; the missing ones are silence."""
        audio = []
        for window in windows:
            with self._products(), _OwnNoise(WindowNoise(window.noise, "decode", window.start)):
                latents = window.latents[None].to(self._device, torch.float32)
                decoded = self.wrapper.pretransform.decode(latents)[0].float()
                audio.append(F.pad(decoded, (0, latents.shape[-1] * self._spec.hop - decoded.shape[-1])))
        return audio

    def _arguments(self, prompt: TextEmbedding, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        """Returns the network's arguments for one row, except latents and time."""
        conditioners = self.wrapper.conditioner.conditioners
        values = {
            number.id: conditioners[number.id]([number.value(numbers)], self._device) for number in self.inputs.numbers
        }
        values[self.inputs.prompt.id] = (prompt.tokens[None], prompt.mask[None])
        arguments: Mapping[str, Tensor | None] = self.wrapper.get_conditioning_inputs(values)
        return {key: value for key, value in arguments.items() if value is not None}


class _OwnNoise(TorchFunctionMode):
    """While active, `torch.randn` and `torch.randn_like` return a window's noise, other values in each call.

    The package draws noise of shape (1, channels, frames).
    """

    def __init__(self, noise: WindowNoise) -> None:
        super().__init__()
        self._noise = noise
        self._num_draws = 0

    def __torch_function__(  # noqa: PLR0917  # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.randn_like:
            return self._draw(args[0].shape, device=args[0].device).to(args[0].dtype)
        if func is torch.randn:
            return self._draw(args, device=torch.device("cpu"))
        return func(*args, **(kwargs or {}))

    def _draw(self, shape: Sequence[int], *, device: torch.device) -> Tensor:
        name = f"bottleneck{self._num_draws or ''}"
        self._num_draws += 1
        return self._noise.draw(name, tuple(shape[1:]), frame_axis=len(shape) - 2, device=device)[None]
