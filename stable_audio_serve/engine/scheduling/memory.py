"""Predicts how much device memory each clip in progress (row) needs, so that a row starts only if it fits.

The registers (latents between steps) and the conditioning of rows are stored in arenas. Arenas are tensors that are
allocated at start and never move, because CUDA graphs contain their addresses. The rest of the memory is for temporary
tensors. The memory that a model needs per latent frame is measured once, by tracking every tensor of a few small calls.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stable_audio_serve.core.errors import ConfigError, InvalidRequestError
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.engine.hardware.arena import PAGE_FRAMES, pages_of
from stable_audio_serve.engine.hardware.share import MemoryPlan
from stable_audio_serve.models.protocol import (
    BranchConditioning,
    DecodeWindow,
    DiffusionModel,
    EncodeWindow,
    ModelSpec,
    RowPlan,
    StepBatch,
)
from stable_audio_serve.models.windows import LONGEST_FRAMES, window_lengths
from stable_audio_serve.sampling.noise import NoiseSource
from stable_audio_serve.sampling.update import KEPT_PARTS, MAX_REGISTERS

# Durations as fractions of the model's longest duration: of the clip that is measured, and of a clip that must fit.
_MEASURED, _SHORTEST = 1 / 16, 1 / 64
_WINDOW = 32  # measure encoder and decoder calls of this many latent frames
_FLOAT_BYTES = 4  # registers and the tensors of the sampler are float32
# A step creates two tensors of the size of a register for each register, and this many more: noise, network input and
# output, and final latents.
_STEP_TENSORS = 6
_FRAME_COPIES = 2  # a step copies conditioning twice: it reads the pages, and then joins them
# Memory is divided as if this fraction of the rows in progress edits a source. Such rows have much more conditioning.
_EDITED_SHARE = 0.25
# If there is memory for at least `_FEW_ROWS` of the longest rows, conditioning slots are added for short rows, as long
# as all slots together take at most this fraction of the memory for rows.
_MOST_CONTEXT = 0.25
_FEW_ROWS = 2
_MOST_DECODE = 0.25  # of the memory for rows, at most this share is set aside for the second queue


@dataclass(frozen=True, slots=True)
class RowShape:
    """The sizes of a clip (row) that determine how much memory it needs.

    `num_parts` tensors of `frames` latent frames are stored between steps. `encode_window` and `decode_window` are the
    lengths of the longest windows in latent frames. `is_edited` says whether the network gets the latents of a source
    as conditioning.
    """

    frames: int
    num_parts: int
    num_branches: int
    encode_window: int
    decode_window: int
    is_edited: bool = False

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
    blends = plan.sampler.start_blend is not None
    return RowShape(
        frames=plan.frames,
        num_parts=plan.sampler.num_registers + KEPT_PARTS * blends,
        num_branches=2 if any(evaluation.guided for evaluation in plan.sampler.evaluations) else 1,
        encode_window=max((max(window_lengths(source.windows)) for source in sources), default=0),
        decode_window=decoded,
        is_edited=plan.keep_mask is not None and not blends,
    )


@dataclass(frozen=True, slots=True)
class RowNeeds:
    """The memory that a row takes while it is in progress, or the memory for all rows.

    `pages` counts pages of registers. `slots`, `frame_pages` and `edit_pages` count slots and pages of conditioning.
    `call_bytes` is the size of temporary tensors.
    """

    pages: int = 0
    slots: int = 0
    frame_pages: int = 0
    edit_pages: int = 0
    call_bytes: float = 0.0

    def share_of(self, room: RowNeeds) -> float:
        """Return the largest ratio of a field of this value to the same field of `room`.

        Rows whose shares add up to at most 1 fit into `room` together.
        """
        return max(own / max(total, 1e-9) for own, total in zip(astuple(self), astuple(room), strict=True))


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """A model's memory use in bytes.

    A register takes `register_frame` per latent frame. The conditioning of a branch (conditional or unconditional)
    takes `branch` and, per latent frame, `branch_frame`. If the row edits a source, its conditioning takes `edit_frame`
    more per latent frame. The other fields are the temporary tensors of a call, per latent frame.
    """

    register_frame: float = 0.0
    branch: float = 0.0
    branch_frame: float = 0.0
    edit_frame: float = 0.0
    denoise_frame: float = 0.0
    encode_frame: float = 0.0
    decode_frame: float = 0.0

    @property
    def step_frame(self) -> float:
        """The bytes of a step's temporary tensors per latent frame: the network's tensors and copies of the
        conditioning.
        """
        return self.denoise_frame + _FRAME_COPIES * (self.branch_frame + self.edit_frame)

    def needs(self, shape: RowShape) -> RowNeeds:
        """Return the most memory that a row of these sizes takes at any time.

        A step copies the conditioning of its rows. If any row edits a source, the copies of all rows are as large as
        for an edited row, so `edit_frame` counts for every row.
        """
        pages, branches = pages_of(shape.frames), shape.num_branches
        return RowNeeds(
            pages=pages * shape.num_parts,
            slots=branches,
            frame_pages=pages * branches if self.branch_frame else 0,
            edit_pages=pages * branches if self.edit_frame and shape.is_edited else 0,
            call_bytes=self.register_frame * shape.frames * (2 * shape.num_parts + _STEP_TENSORS)
            + max(
                branches * (self.branch + shape.frames * self.step_frame),
                shape.encode_window * self.encode_frame,
                shape.decode_window * self.decode_frame,
            ),
        )

    def context_bytes(self, needs: RowNeeds) -> float:
        by_frame = self.branch_frame * needs.frame_pages + self.edit_frame * needs.edit_pages
        return self.branch * needs.slots + PAGE_FRAMES * by_frame

    def num_bytes(self, needs: RowNeeds) -> float:
        return self.register_frame * PAGE_FRAMES * needs.pages + self.context_bytes(needs) + needs.call_bytes


@dataclass(frozen=True, slots=True)
class FixedMemory:
    """The fixed sizes of an engine's arenas: pages of registers, and slots and pages of conditioning.

    `frame_pages` has the number of pages for each name of conditioning. `examples` contains a value of every name.
    `step_frame` and `decode_frame` are the temporary tensors of calls, in bytes per latent frame.
    """

    pages: int
    slots: int
    frame_pages: Mapping[str, int]
    examples: tuple[BranchConditioning, ...]
    step_frame: float
    decode_frame: float


class RowMemory:
    """Divides the memory for rows in progress among arenas and temporary tensors, and predicts how much of it a row
    needs. `plan.rows` is the size of this memory in bytes.
    """

    def __init__(
        self, spec: ModelSpec, plan: MemoryPlan, *, max_rows: int, is_fixed: bool, has_second_queue: bool = False
    ) -> None:
        """If `plan.rows` is None, memory is not limited, and the arenas are large enough for `max_rows` of the longest
        rows.

        With `is_fixed`, the audio is decoded in exactly the planned windows.
        """
        self._spec = spec
        self._max_rows = max_rows
        self._is_fixed = is_fixed
        self._has_second_queue = has_second_queue
        self.use = MemoryUse()
        self._room = RowNeeds()
        self.plan = plan

    def measure(self, model: DiffusionModel, noise_factory: Callable[[int], NoiseSource]) -> FixedMemory:
        """Measure the model's memory use, and divide the memory for rows. Returns the sizes of the arenas.

        Must be called on the engine thread before the first request. Raises ConfigError if not even a clip of 1/64 of
        the longest duration fits.
        """
        plan = plan_share(model, _MEASURED)
        examples = example_conditioning(model, plan)
        self.use = measure_use(model, examples, frames=plan.frames, noise=noise_factory(0))
        self._divide(self._longest(model))
        shortest = row_shape(plan_share(model, _SHORTEST), is_fixed=self._is_fixed)
        if self.plan.rows is not None and self._share(shortest) > 1.0:
            needed = self.use.num_bytes(self.use.needs(shortest))
            raise ConfigError(
                f"{self.plan.setting} leaves {self.plan.rows / 1e9:.3g} GB of the device's memory for variations in "
                f"progress, and the shortest takes {needed / 1e9:.3g} GB; raise it, lower lora_cache_bytes, or stop "
                "other programs that use the device",
                field=self.plan.setting,
            )
        room = self._room
        plain, edited = examples
        frame_pages = dict.fromkeys(edited.by_frame, room.edit_pages)
        frame_pages |= dict.fromkeys(plain.by_frame, room.frame_pages)
        return FixedMemory(
            room.pages,
            room.slots,
            frame_pages,
            examples,
            step_frame=self.use.step_frame,
            decode_frame=self.use.decode_frame,
        )

    def row_bytes(self, plan: RowPlan) -> int:
        """Return the row's share of the memory for rows in progress, in bytes; 0 if memory is not limited."""
        if self.plan.rows is None:
            return 0
        return int(self._share(row_shape(plan, is_fixed=self._is_fixed)) * self.plan.rows)

    def check(self, plan: RowPlan, request: GenerationRequest) -> None:
        """Raise InvalidRequestError, with the allowed durations, if the row does not fit even when it runs alone."""
        if self.plan.rows is None or (needed := self.row_bytes(plan)) <= self.plan.rows:
            return
        allowed = f"0..{self._longest_s(plan, request):.4g}"
        message = (
            f"a clip of {request.duration_s:g} s takes {needed / 1e9:.3g} GB of the device's memory, "
            f"of which {self.plan.setting} leaves {self.plan.rows / 1e9:.3g} GB; allowed: {allowed} s"
        )
        raise InvalidRequestError(message, field="duration", allowed=allowed)

    def _share(self, shape: RowShape) -> float:
        return self.use.needs(shape).share_of(self._room)

    def _longest(self, model: DiffusionModel) -> RowShape:
        """Return the sizes of the largest row: the longest clip, guided, with an edited source."""
        request = GenerationRequest(prompt="memory", duration_s=self._spec.card.max_duration_s, seed=0)
        shape = row_shape(model.plan(request)[0], is_fixed=self._is_fixed)
        return replace(
            shape,
            num_parts=MAX_REGISTERS + KEPT_PARTS,
            num_branches=2,
            encode_window=shape.decode_window,
            is_edited=self.use.edit_frame > 0,
        )

    def _divide(self, longest: RowShape) -> None:
        """Divide the memory for rows among arenas and temporary tensors, in the proportions that `longest` needs."""
        one, use, total = self.use.needs(longest), self.use, self.plan.rows
        edits = PAGE_FRAMES * use.edit_frame * one.edit_pages
        cost = use.num_bytes(one) - (1.0 - _EDITED_SHARE) * edits
        decode = 0.0
        if total is None:
            count = float(self._max_rows)
        else:
            if self._has_second_queue:  # torch does not reuse the memory of one stream for the other
                decode = min(longest.decode_window * use.decode_frame, _MOST_DECODE * total)
            count = min(self._max_rows, (total - decode) / cost)
        room = RowNeeds(
            pages=math.ceil(count * one.pages),
            slots=self._num_slots(count, total),
            frame_pages=math.ceil(count * one.frame_pages),
            edit_pages=math.ceil(max(_EDITED_SHARE * count, min(count, 1.0)) * one.edit_pages),
        )
        if total is None:
            self._room = replace(room, call_bytes=math.inf)
            return
        context = use.context_bytes(room)
        kept = use.num_bytes(room)
        self._room = replace(room, call_bytes=max(total - decode - kept, 0.0))
        self.plan = replace(self.plan, context=int(context), decode=int(decode))

    def _num_slots(self, count: float, total: int | None) -> int:
        """Return the number of conditioning slots: two for each of the `count` longest rows that fit, and more if the
        memory allows them, because more short rows fit.
        """
        least = math.ceil(2 * max(count, 1.0))
        if total is None or not self.use.branch or count < _FEW_ROWS:
            return least
        return max(least, min(2 * self._max_rows, int(_MOST_CONTEXT * total / self.use.branch)))

    def _longest_s(self, plan: RowPlan, request: GenerationRequest) -> float:
        """Return the longest duration in seconds with which the request's clip would fit; 0 if no duration fits."""
        shape, fits = row_shape(plan, is_fixed=self._is_fixed), 0
        step = 2 ** plan.frames.bit_length()
        while step := step // 2:
            if fits + step < plan.frames and self._share(shape.cut(fits + step)) <= 1.0:
                fits += step
        frame_s = self._spec.hop / self._spec.card.sample_rate_hz
        return max(request.duration_s - (plan.frames - fits) * frame_s, 0.0)


def plan_share(model: DiffusionModel, share: float) -> RowPlan:
    """Return the plan of a clip whose duration is `share` times the model's longest duration."""
    duration_s = model.spec.card.max_duration_s * share
    return model.plan(GenerationRequest(prompt="memory", duration_s=duration_s, seed=0, duration_padding_s=0.0))[0]


def example_conditioning(model: DiffusionModel, plan: RowPlan) -> tuple[BranchConditioning, BranchConditioning]:
    """Return the conditioning of the planned clip without a source, and of an edit of the same length."""
    prompt = model.encode_text(["memory"])[0]
    source = torch.zeros(model.spec.card.latent_channels, plan.frames, device=model.device)
    editing = replace(plan, keep_mask=torch.ones(plan.frames))
    plain, edited = (
        model.condition(own, prompt=prompt, negative=None, inpaint_latents=latents).conditional
        for own, latents in ((plan, None), (editing, source))
    )
    return plain, edited


def example_batch(
    model: DiffusionModel, branches: Sequence[BranchConditioning], *, frames: int, valid_frames: int
) -> StepBatch:
    """Return a padded batch of zeros with the conditioning `branches`, one for each row."""
    rows, device = len(branches), model.device
    return StepBatch.of(
        torch.zeros(rows, model.spec.card.latent_channels, frames, device=device),
        t=torch.full((rows,), 0.5, device=device),
        valid=(torch.arange(frames) < valid_frames).expand(rows, frames).to(device),
        branches=branches,
    )


def measure_use(
    model: DiffusionModel,
    examples: tuple[BranchConditioning, BranchConditioning],
    *,
    frames: int,
    noise: NoiseSource,
) -> MemoryUse:
    """Measure a model's memory use from `examples`, the conditioning of clips of `frames` latent frames, and from one
    small call of each kind.
    """
    spec, (plain, edited) = model.spec, examples
    batch = example_batch(model, [edited], frames=frames, valid_frames=frames)
    latents = torch.zeros(spec.card.latent_channels, _WINDOW, device=model.device)
    samples = torch.zeros(spec.card.channels, _WINDOW * spec.hop)
    return MemoryUse(
        register_frame=_FLOAT_BYTES * spec.card.latent_channels,
        branch=sum(value.nbytes for value in plain.constants.values()),
        branch_frame=sum(value.nbytes for value in plain.by_frame.values()) / frames,
        edit_frame=sum(value.nbytes for name, value in edited.by_frame.items() if name not in plain.by_frame) / frames,
        denoise_frame=peak_bytes(lambda: model.denoise(batch)) / frames,
        encode_frame=peak_bytes(lambda: model.encode_audio([EncodeWindow(samples, 0, "init", noise)])) / _WINDOW,
        decode_frame=peak_bytes(lambda: model.decode([DecodeWindow(latents, 0, noise)])) / _WINDOW,
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the largest total size in bytes of the tensors that `run` creates and has not freed yet.

    Calls `run` twice. Tensors that the first call leaves behind do not count.

    Compiled layers run uncompiled, because torch cannot compile while a dispatch mode counts tensors.
    """
    with torch.compiler.set_stance("force_eager"):
        run()  # creates the tensors that later calls reuse, which must not count
        with _TensorBytes() as counted:
            run()
    return counted.peak


class _TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create within this context and that are not freed yet. `peak` is
    the largest count so far. Tensors that existed before do not count.
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
