"""Predicts how much device memory each clip (row) needs, so that a clip starts only if it fits into memory.

The prediction is the sum of the clip's registers (latents between steps), one tensor of noise, its final latents, its
conditioning, and the temporary tensors of its largest device call. How much a model needs per latent frame is measured
once, by tracking every tensor of a few small calls.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stable_audio_serve.core.errors import ConfigError, InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine.hardware.arena import PAGE_FRAMES, pages_of
from stable_audio_serve.engine.scheduling.windows import window_lengths
from stable_audio_serve.models.protocol import (
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    ModelSpec,
    RowPlan,
    StepBatch,
)
from stable_audio_serve.models.windows import LONGEST_FRAMES
from stable_audio_serve.sampling.noise import NoiseSource

_DURATION_SHARES = (1 / 64, 1 / 16)  # measure clips of these durations, as shares of the model's longest duration
_WINDOW = 32  # measure encoder and decoder calls of this many latent frames
_REGISTER_BYTES = 4  # float32
_EXTRA_PARTS = 2  # the noise of one step and the final latents; each is as large as a register
# Values that are kept between steps are in arenas, tensors that double in size when they are full. An arena is
# therefore at most twice as large as its contents. While it is copied to a larger one, the old one, of half that size,
# still exists. Together they are three times as large as the contents.
_ARENA_GROWTH = 3


@dataclass(frozen=True, slots=True)
class RowShape:
    """The sizes of a clip (row) that determine its memory. `encode_window` and `decode_window` are the latent frames of
    its longest windows.
    """

    frames: int
    num_registers: int
    num_branches: int
    encode_window: int
    decode_window: int

    def cut(self, frames: int) -> RowShape:
        """Return the sizes of the same clip if it had only `frames` latent frames."""
        windows = min(self.encode_window, frames), min(self.decode_window, frames)
        return replace(self, frames=frames, encode_window=windows[0], decode_window=windows[1])


def row_shape(plan: RowPlan, *, is_fixed: bool) -> RowShape:
    """Return the sizes of a planned row. With `is_fixed`, the audio is decoded in exactly the planned windows."""
    sources = [source for source in (plan.init_source, plan.inpaint_source) if source is not None]
    decoded = max(window_lengths(plan.decode_windows))
    if plan.decode_rule is not None and not is_fixed:
        decoded = max(decoded, min(plan.decode_windows[-1].stop, LONGEST_FRAMES))
    return RowShape(
        frames=plan.frames,
        num_registers=plan.sampler.num_registers,
        num_branches=2 if any(evaluation.guided for evaluation in plan.sampler.evaluations) else 1,
        encode_window=max((max(window_lengths(source.windows)) for source in sources), default=0),
        decode_window=decoded,
    )


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """A model's memory use in bytes. The conditioning of a branch (conditional or unconditional) takes `branch`, plus
    `branch_frame` per latent frame. The other fields are the temporary tensors of a call, per latent frame.
    """

    branch: float = 0.0
    branch_frame: float = 0.0
    denoise_frame: float = 0.0
    encode_frame: float = 0.0
    decode_frame: float = 0.0

    def row_bytes(self, shape: RowShape, *, latent_channels: int) -> int:
        """Return the largest amount of device memory in bytes that a row of these sizes takes at any time."""
        paged = PAGE_FRAMES * pages_of(shape.frames)
        frame = _REGISTER_BYTES * latent_channels
        kept = frame * paged * shape.num_registers + shape.num_branches * (self.branch + self.branch_frame * paged)
        extra = frame * shape.frames * _EXTRA_PARTS
        largest_call = max(
            shape.num_branches * shape.frames * self.denoise_frame,
            shape.encode_window * self.encode_frame,
            shape.decode_window * self.decode_frame,
        )
        return math.ceil(_ARENA_GROWTH * kept + extra + largest_call)


class RowMemory:
    """Predicts the device memory of each row (clip). `max_bytes` is the limit for all clips in progress together."""

    def __init__(
        self, spec: ModelSpec, *, max_bytes: int | None, is_fixed: bool, setting: str = "max_memory_bytes"
    ) -> None:
        """If `max_bytes` is None, memory is neither limited nor measured.

        With `is_fixed`, the audio is decoded in exactly the planned windows. `setting` is the name of the operator's
        setting that determines `max_bytes`; error messages contain it.
        """
        self._spec = spec
        self._is_fixed = is_fixed
        self._setting = setting
        self.max_bytes = max_bytes
        self.use = MemoryUse()

    def measure(self, model: DiffusionModel, noise_factory: Callable[[int], NoiseSource]) -> None:
        """Measure the model's memory use. Must be called on the engine thread before the first request.

        Raises ConfigError if even a short clip needs more than `max_bytes`.
        """
        if self.max_bytes is None:
            return
        self.use = measure_use(model, noise_factory(0))
        shortest = model.plan(_request(self._spec, _DURATION_SHARES[0]))[0]
        if (needed := self.row_bytes(shortest)) > self.max_bytes:
            raise ConfigError(
                f"{self._setting} leaves {self.max_bytes / 1e9:.3g} GB of the device's memory for variations in "
                f"progress, and the shortest takes {needed / 1e9:.3g} GB: {needed - self.max_bytes} bytes are missing",
                field=self._setting,
            )

    def row_bytes(self, plan: RowPlan) -> int:
        """Return the predicted device memory of a row in bytes; 0 if memory is not limited."""
        return 0 if self.max_bytes is None else self._bytes(row_shape(plan, is_fixed=self._is_fixed))

    def check(self, plan: RowPlan, request: GenerationRequest) -> None:
        """Raise InvalidRequestError, with the allowed durations, if the row alone needs more than `max_bytes`."""
        if self.max_bytes is None or (needed := self.row_bytes(plan)) <= self.max_bytes:
            return
        allowed = f"0..{self._longest_s(plan, request):.4g}"
        message = (
            f"a clip of {request.duration_s:g} s takes {needed / 1e9:.3g} GB of the device's memory, "
            f"of which {self._setting} leaves {self.max_bytes / 1e9:.3g} GB; allowed: {allowed} s"
        )
        raise InvalidRequestError(message, field="duration", allowed=allowed)

    def _bytes(self, shape: RowShape) -> int:
        return self.use.row_bytes(shape, latent_channels=self._spec.card.latent_channels)

    def _longest_s(self, plan: RowPlan, request: GenerationRequest) -> float:
        """Return the longest duration in seconds for which this request's clip would fit; 0 if none does."""
        shape, fits = row_shape(plan, is_fixed=self._is_fixed), 0
        step = 2 ** plan.frames.bit_length()
        while step := step // 2:
            if fits + step < plan.frames and self._bytes(shape.cut(fits + step)) <= (self.max_bytes or 0):
                fits += step
        frame_s = self._spec.hop / self._spec.card.sample_rate_hz
        return max(request.duration_s - (plan.frames - fits) * frame_s, 0.0)


def measure_use(model: DiffusionModel, noise: NoiseSource) -> MemoryUse:
    """Measure a model's memory use, from the conditioning of clips of two lengths and one small call of each kind."""
    spec, device = model.spec, model.device
    prompt = model.encode_text(["memory"])[0]
    constants: list[tuple[int, int]] = []
    for share in _DURATION_SHARES:
        plan = model.plan(_request(spec, share))[0]
        branch = model.condition(plan, prompt=prompt, negative=None, inpaint_latents=None).conditional
        constants.append((plan.frames, branch.num_bytes))
    (frames, few), (more_frames, many) = constants
    per_frame = max(many - few, 0) / max(more_frames - frames, 1)
    channels = spec.card.latent_channels
    batch = StepBatch.of(
        torch.zeros(1, channels, more_frames, device=device),
        t=torch.full((1,), 0.5, device=device),
        valid=torch.ones(1, more_frames, dtype=torch.bool, device=device),
        branches=[branch],
    )
    latents, samples = (
        torch.zeros(channels, _WINDOW, device=device),
        torch.zeros(spec.card.channels, _WINDOW * spec.hop),
    )
    return MemoryUse(
        branch=max(few - per_frame * frames, 0.0),
        branch_frame=per_frame,
        denoise_frame=peak_bytes(lambda: model.denoise(batch)) / more_frames,
        encode_frame=peak_bytes(lambda: model.encode_audio([EncodeWindow(samples, 0, "init", noise)])) / _WINDOW,
        decode_frame=peak_bytes(lambda: model.decode([DecodeWindow(latents, 0, noise)])) / _WINDOW,
    )


def _request(spec: ModelSpec, share: float) -> GenerationRequest:
    """Return a request for a clip whose duration is `share` times the model's longest duration."""
    duration_s = spec.card.max_duration_s * share
    return GenerationRequest(prompt="memory", duration_s=duration_s, seed=0, duration_padding_s=0.0)


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that the tensors created by `run` take together at any time. Calls `run` twice.

    Compiled layers run uncompiled, because torch cannot compile while a dispatch mode counts tensors.
    """
    with torch.compiler.set_stance("force_eager"):
        run()  # creates tensors that are kept for all later calls, which must not count
        with _TensorBytes() as counted:
            run()
    return counted.peak


class _TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create within this context, until they are freed (`peak` is the
    most at any time). Tensors that existed before do not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(  # noqa: PLR0917  # torch's signature
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._follow(value, is_new=False)
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            self._follow(value, is_new=True)
        self.peak = max(self.peak, self._live)
        return made

    def _follow(self, value: object, *, is_new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        num_bytes = storage.nbytes() if is_new else 0
        self._live += num_bytes
        weakref.finalize(storage, self._forget, id(storage), num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live -= num_bytes
