"""Requests and results that all layers exchange: frozen value objects, independent of FastAPI, Ray and torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


SEED_LIMIT = 2**63  # seeds are in 0..SEED_LIMIT - 1
# Time steps of a flow model's edit. even: evenly spaced. scaled: the steps of a full run, scaled by the noise level.
# reference: as in the original implementation.
EditSchedule = Literal["even", "scaled", "reference"]
# Where the samples of an edit outside its regions come from: the source or the model.
Keep = Literal["source", "model"]
Role = Literal["init", "inpaint"]  # use of the source audio: init = a variation, inpaint = regenerating regions
Priority = Literal["interactive", "batch"]  # batch work yields to interactive work but keeps a minimum share


@dataclass(frozen=True, slots=True)
class SourceAudio:
    """Input audio: `samples` (C, S) float32, nominally in -1..1, at `sample_rate_hz`.

    `sha256` is the hexadecimal digest of the file that the samples were decoded from. It is empty without a file, or if
    the samples were changed after decoding. Mixing to mono (`is_mixed`) does not count as a change.
    """

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int
    sha256: str = ""
    is_mixed: bool = False

    def to_mono(self) -> SourceAudio:
        """Return the audio with one channel, the mean of all channels."""
        return replace(self, samples=self.samples.mean(axis=0, keepdims=True), is_mixed=True)


@dataclass(frozen=True, slots=True)
class ScheduleShift:
    """Replaces the model's own shift of time steps. `kind` is logsnr, flux, full or none; `options` parameterize it."""

    kind: str
    options: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for `batch_size` variations that differ only in their seed (`seed`, `seed + 1`, ...).

    None selects the model's default, except in three fields. `conditioned_total_s` defaults to the end of the clip,
    `start_s + duration_s`. `negative_start_s` and `negative_total_s` default to the values of the prompt. `seed` is
    never "random": the API has drawn it already.

    `init_noise_level` is a share of noise in 0..1; with 1 the source has no influence. For samplers that run over sigma
    it is a sigma instead, and replaces `sigma_max`.
    """

    prompt: str
    duration_s: float
    seed: int
    start_s: float = 0.0  # start of the clip in a longer piece, seconds; only for models with this conditioner
    conditioned_total_s: float | None = None  # length of the longer piece, seconds
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
    rho: float | None = None  # spacing of the sigmas: 1 = even in ln sigma
    apg_scale: float | None = None
    cfg_rescale: float = 0.0  # scale_phi in the reference code, 0..1
    cfg_norm_threshold: float = 0.0  # 0 = off
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # lowest and highest sigma with guidance, inclusive
    duration_padding_s: float | None = None  # audio generated past the end of the clip and cut off, seconds
    init_audio: SourceAudio | None = None
    init_noise_level: float = 1.0
    edit_schedule: EditSchedule | None = None  # only for flow models
    inpaint_audio: SourceAudio | None = None
    inpaint_regions_s: tuple[tuple[float, float], ...] = ()  # [start, end) of each regenerated region, seconds
    keep: Keep = "source"
    chunked_decode: bool | None = None
    deadline_s: float | None = None  # time budget from submission to audio, seconds
    priority: Priority = "interactive"
    start_within_s: float | None = None  # longest time from submission to the first step, seconds
    checkpoint: str | None = None  # required hash of the weights (`models.weight_hash`); None = any
    request_id: str = ""
    client: str = ""  # the client that sent the request, for fair queues; "" = unknown

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each variation. A request for one variation with this seed gives the same audio."""
        return tuple((self.seed + index) % SEED_LIMIT for index in range(self.batch_size))


Stage = Literal["queued", "encoding", "denoising", "decoding", "done"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a request over all its variations. `fraction` is in 0..1."""

    stage: Stage
    fraction: float
    steps_done: int = 0
    steps_total: int = 0
    queue_position: int | None = None


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Wall time of each stage of one request, in milliseconds; the stages sum to `total_ms` within 2 %.

    `denoise_ms` includes `stalled_ms`, the time in which the request waited for steps of other requests.
    """

    queue_ms: float = 0.0
    text_ms: float = 0.0
    source_ms: float = 0.0
    denoise_ms: float = 0.0
    stalled_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


Mode = Literal["strict", "fast"]  # strict: a request's bytes do not depend on the other requests in its batch


@dataclass(frozen=True, slots=True)
class Loaded:
    """Properties of a loaded engine that affect its audio.

    `checkpoint` is the hash from `models.weight_hash`, None if it was not computed. `networks` is a
    `catalog.NetworkBackend`.
    """

    checkpoint: str | None = None
    decode_precision: str | None = None
    networks: str = "native"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Software, processor and parameters of a generation. Its exact bytes depend on these and on the request.

    `processor` names the CPU's instruction sets or the GPU. `threads` (CPU threads) and `slots` (rows per call) are
    None if the bytes do not depend on them. `steps` to `edit_schedule` are the request's values, or the model's
    defaults for unset fields. The model reads the first `prompt_chars` and `negative_prompt_chars` characters of the
    prompts; None means all.
    """

    version: str  # version of this package
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
    """The device and the software that made the audio, stored with each file.

    `device` is cuda, mps or cpu. `dtype` is the precision of the denoiser: float32, float16 or bfloat16. `provenance`
    is None if the engine did not report it.
    """

    device: str
    dtype: str
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """The device that a request ran on. `kind` is cuda, mps or cpu. `dtype` is the precision of the denoiser.

    On CUDA, `memory_used_bytes` is the memory in use at the end of the request, and `memory_peak_bytes` the most since
    the process started. Both are None on other devices.
    """

    kind: str = "cpu"
    memory_used_bytes: int | None = None
    memory_peak_bytes: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class GeneratedSpan:
    """The samples [start, stop) of an edit, which the model made. Samples outside all spans come from the source.

    The span fades in and out where it meets the source. `head` and `tail` (C, n) float32 are the model's samples there,
    without the source. They are empty if there is no fade.
    """

    start: int
    stop: int
    head: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Generated audio before encoding: one (C, S) float32 array per variation.

    Full scale is -1..1. Loud clips exceed it, and `audio.peaks` brings them into range when a file is written.
    `generated` lists the spans that the model made, for each variation. None means that it made all samples.
    """

    audio: tuple[npt.NDArray[np.float32], ...]
    sample_rate_hz: int
    model: str
    seeds: tuple[int, ...]
    timings: StageTimings = field(default_factory=StageTimings)
    device: DeviceUse = field(default_factory=DeviceUse)
    provenance: Provenance | None = None
    generated: tuple[tuple[GeneratedSpan, ...], ...] | None = None

    @property
    def made_on(self) -> MadeOn:
        """The device and the software that made the audio."""
        return MadeOn(self.device.kind, self.device.dtype, self.provenance)
