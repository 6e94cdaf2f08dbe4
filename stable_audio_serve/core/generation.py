"""The request and result every layer exchanges: frozen value objects without web, Ray or torch types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


SEED_LIMIT = 2**63  # seeds are from 0 up to this, exclusive
# How a flow model's times for an edit are made: those of a run from pure noise, scaled by the level, or as upstream.
EditSchedule = Literal["even", "scaled", "reference"]
# What an edit has outside its regions: the source's own samples, or what the model makes of them.
Keep = Literal["source", "model"]
Role = Literal["init", "inpaint"]  # what source audio is for: a variation, or regions made anew
Priority = Literal["interactive", "batch"]  # batch work yields to interactive work but keeps a minimum share


@dataclass(frozen=True, slots=True)
class SourceAudio:
    """Audio that enters a model: `samples` (C, S) float32, nominally in -1..1, at `sample_rate_hz`.

    `sha256` is that of the file they were decoded from, hexadecimal, "" where there is none or more was done to them
    than to mix its channels to one.
    """

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int
    sha256: str = ""
    is_mixed: bool = False

    def to_mono(self) -> SourceAudio:
        """Returns the mean of all channels as one."""
        return replace(self, samples=self.samples.mean(axis=0, keepdims=True), is_mixed=True)


@dataclass(frozen=True, slots=True)
class ScheduleShift:
    """Overrides the model's timestep warp. `kind` is logsnr, flux, full or none; `options` its parameters."""

    kind: str
    options: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request for audio: `batch_size` variations that differ only in their seed (`seed`, `seed + 1`, ...).

    `None` means the model's own default, and for `conditioned_total_s` the end of the clip, `start_s + duration_s`;
    for the negative prompt's numbers those of the prompt. `seed` is already resolved: never "random" at this level.

    `init_noise_level` is a share of noise in 0..1 (1 = the source has no influence), but a noise level sigma for
    samplers that run over sigma, where it takes the place of `sigma_max` in an edit.
    """

    prompt: str
    duration_s: float
    seed: int
    start_s: float = 0.0  # start of the clip within a longer piece; only for models that condition on it
    conditioned_total_s: float | None = None  # length of that piece as the model is told it
    negative_prompt: str | None = None
    negative_start_s: float | None = None
    negative_total_s: float | None = None
    batch_size: int = 1
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    schedule_shift: ScheduleShift | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None  # spacing of the levels between: 1 = evenly in ln sigma
    apg_scale: float | None = None
    cfg_rescale: float = 0.0  # scale_phi of the references, 0..1
    cfg_norm_threshold: float = 0.0  # 0 = off
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # sigmas at which guidance is on, inclusive
    duration_padding_s: float | None = None  # headroom generated behind the clip, seconds
    init_audio: SourceAudio | None = None
    init_noise_level: float = 1.0
    edit_schedule: EditSchedule | None = None  # only for flow models
    inpaint_audio: SourceAudio | None = None
    inpaint_regions_s: tuple[tuple[float, float], ...] = ()  # [start, end) regenerated, the rest kept
    keep: Keep = "source"
    chunked_decode: bool | None = None
    deadline_s: float | None = None  # time budget from submission to audio, seconds
    priority: Priority = "interactive"
    start_within_s: float | None = None  # most time from submission to the first step, seconds
    checkpoint: str | None = None  # hash of the weights that must make it (`models.weight_hash`); None = any
    request_id: str = ""
    client: str = ""  # who asks, so that one client leaves room in a queue to others; "" = nobody in particular

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each variation. A request for one of these seeds alone gives the same variation."""
        return tuple((self.seed + index) % SEED_LIMIT for index in range(self.batch_size))


Stage = Literal["queued", "encoding", "denoising", "decoding", "done"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is: `fraction` in 0..1 over all its variations."""

    stage: Stage
    fraction: float
    steps_done: int = 0
    steps_total: int = 0
    queue_position: int | None = None


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Wall time of each stage of one request, in milliseconds; the stages sum to `total_ms` within 2 %.

    `denoise_ms` includes `stalled_ms`, the steps spent waiting for a turn.
    """

    queue_ms: float = 0.0
    text_ms: float = 0.0
    source_ms: float = 0.0
    denoise_ms: float = 0.0
    stalled_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


Mode = Literal["strict", "fast"]  # of an engine: whether a request's bytes depend on its neighbours


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an engine was loaded from and how, as far as its audio depends on it.

    `checkpoint` is the hash of `models.weight_hash`, None where nobody took it; `networks` is whose code runs.
    """

    checkpoint: str | None = None
    decode_precision: str | None = None
    networks: str = "native"


@dataclass(frozen=True, slots=True)
class Making:
    """How an engine made audio: what the last bits depend on, and what the request left to the model.

    `processor` names the instructions of a CPU or the GPU. `threads` are those of a call where the bytes may depend on
    their number, else None, and so are the `slots` of a call. `prompt_chars` and `negative_prompt_chars` are how many
    first characters of a prompt the model reads, None = all.
    """

    version: str  # of this package
    torch: str
    mode: Mode
    processor: str
    loaded: Loaded
    threads: int | None = None
    slots: int | None = None
    is_compiled: bool = False
    transformers: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    apg_scale: float | None = None
    duration_padding_s: float | None = None
    edit_schedule: EditSchedule | None = None
    prompt_chars: int | None = None
    negative_prompt_chars: int | None = None


@dataclass(frozen=True, slots=True)
class MadeOn:
    """What audio was made on, which its last bits depend on: `device` is cuda, mps or cpu, `dtype` the precision of the
    denoiser, float32, float16 or bfloat16. `making` has the rest, where the engine said it."""

    device: str
    dtype: str
    making: Making | None = None


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Where a request ran: `kind` is cuda, mps or cpu. Memory in bytes, on CUDA only: in use when the request ended,
    and the most that the process has ever used. `dtype` is the precision of the denoiser."""

    kind: str = "cpu"
    memory_used_bytes: int | None = None
    memory_peak_bytes: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class GeneratedSpan:
    """Samples [start, stop) that a model made, in audio that otherwise has its source's own.

    The first and the last of them fade from and to the source; `head` and `tail` (C, n) float32 are those of the model
    alone.
    """

    start: int
    stop: int
    head: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Audio before a file is made of it: one (C, S) float32 array per variation, with what was done.

    Full scale is -1..1. Loud clips exceed it; `audio.peaks` brings them back when a file is made. `generated` names the
    parts of each variation that the model made, None = all.
    """

    audio: tuple[npt.NDArray[np.float32], ...]
    sample_rate_hz: int
    model: str
    seeds: tuple[int, ...]
    timings: StageTimings = field(default_factory=StageTimings)
    device: DeviceUse = field(default_factory=DeviceUse)
    making: Making | None = None
    generated: tuple[tuple[GeneratedSpan, ...], ...] | None = None

    @property
    def made_on(self) -> MadeOn:
        """Returns what to name beside the seed, which repeats the audio there."""
        return MadeOn(self.device.kind, self.device.dtype, self.making)
