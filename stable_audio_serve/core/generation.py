"""Requests and results that all layers exchange: frozen value objects, independent of FastAPI, Ray and torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


SEED_LIMIT = 2**63  # seeds are in 0..SEED_LIMIT - 1
# The denoising times when a flow model edits source audio. even: evenly spaced in log-SNR. scaled: the times of a run
# from pure noise, multiplied by the noise level. reference: as in the model's original code.
EditSchedule = Literal["even", "scaled", "reference"]
# When regions of source audio are regenerated: whether the samples outside the regions are the source's or the model's.
Keep = Literal["source", "model"]
# Where a clip that repeats without a seam begins. bars: where the generated clip begins, so that its bars keep their
# positions. free: the same, but if the clip begins with an attack, its last 50 ms are moved before the attack.
LoopStart = Literal["free", "bars"]
Role = Literal["init", "inpaint"]  # what source audio is used for: init = a variation, inpaint = regenerating regions
Priority = Literal["interactive", "batch"]  # interactive requests run first; batch requests keep some device time


@dataclass(frozen=True, slots=True)
class SourceAudio:
    """Input audio: `samples` (channels, samples) float32, nominally in -1..1, at `sample_rate_hz`.

    `sha256` is the hexadecimal digest of the file that the samples were decoded from. It is empty if there is no file,
    or if the samples were changed after decoding. Mixing to mono, which sets `is_mixed`, does not count as a change.
    """

    samples: npt.NDArray[np.float32]
    sample_rate_hz: int
    sha256: str = ""
    is_mixed: bool = False

    @property
    def duration_s(self) -> float:
        return self.samples.shape[1] / self.sample_rate_hz

    def resampled_length(self, *, to_hz: int) -> int:
        """Return the number of samples that the audio has at another sample rate (see `audio.prepare`)."""
        return -(-self.samples.shape[1] * to_hz // self.sample_rate_hz)

    def to_mono(self) -> SourceAudio:
        """Return the audio with one channel, the mean of all channels."""
        return replace(self, samples=self.samples.mean(axis=0, keepdims=True), is_mixed=True)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a long piece: `duration_s` seconds of audio that continue the sections before it.

    If `prompt` is None, the section has the prompt of the whole piece.
    """

    duration_s: float
    prompt: str | None = None


# How the adapters of one request combine. chained: each adapter changes the weights that the previous adapters have
# already changed. summed: each adapter's change of the original weights is multiplied by its strength, and the changes
# are added.
Stacking = Literal["chained", "summed"]


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter that a request uses, in one of the formats of `models.adapters`.

    The adapter applies to the network evaluations whose denoising time is in `interval`, both ends included. Time 1 is
    the first step of a clip from pure noise, and 0 is the end. `source` is the location of the adapter's file: a path,
    an S3 URL, or a repository of the Hugging Face hub, optionally with a file in it. `sha256` is the hash that the file
    must have; "" = any. With `has_conditioners`, the file's tensors for conditioners are used too.
    """

    name: str
    strength: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    source: str = ""
    sha256: str = ""
    has_conditioners: bool = False


MAX_PROMPT_CHARS = 100_000  # of a prompt or a negative prompt; a text encoder takes seconds to read a megabyte


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for `batch_size` variations that differ only in their seed (`seed`, `seed + 1`, ...) and their prompt.

    If `variation_prompts` is set, it has the prompt of each variation, and `prompt` is the first of them. Likewise,
    `variation_seeds` has the seed of each variation, and `seed` is the first of them.

    For a field that is None, the model's default applies, except for three fields. `conditioned_total_s` defaults to
    the end of the clip, `start_s + duration_s`. `negative_start_s` and `negative_total_s` default to `start_s` and
    `conditioned_total_s`. If the client wants a random seed, the API draws one and sets `seed`.

    `init_noise_level` is the share of noise that is mixed into `init_audio`, in 0..1. At 1, `init_audio` has no
    influence. For samplers that step over sigma, `init_noise_level` is a sigma instead, and replaces `sigma_max`.
    """

    prompt: str
    duration_s: float
    seed: int
    start_s: float = 0.0  # if the clip is part of a longer recording: its start there, seconds; not used by all models
    conditioned_total_s: float | None = None  # length of the longer recording, seconds
    negative_prompt: str | None = None
    negative_start_s: float | None = None
    negative_total_s: float | None = None
    batch_size: int = 1
    variation_prompts: tuple[str, ...] = ()
    variation_seeds: tuple[int, ...] = ()
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None  # spacing of the sampler's sigmas; 1 = evenly spaced in ln sigma
    apg_scale: float | None = None
    cfg_rescale: float = 0.0  # in 0..1; called scale_phi in the original code
    cfg_norm_threshold: float = 0.0  # 0 = off
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # guidance applies while sigma is between these two, inclusive
    duration_padding_s: float | None = None  # seconds of audio that are generated after the clip and cut off
    loop: LoopStart | None = None  # the clip repeats without a seam; see `audio.seams`
    init_audio: SourceAudio | None = None
    init_noise_level: float = 1.0
    edit_schedule: EditSchedule | None = None  # only for flow models
    inpaint_audio: SourceAudio | None = None
    source_start_s: float = 0.0  # where inpaint_audio begins in the clip, seconds
    inpaint_regions_s: tuple[tuple[float, float], ...] = ()  # start and end of each region to regenerate, seconds
    keep: Keep = "source"
    loras: tuple[Lora, ...] = ()  # in this order
    lora_stacking: Stacking | None = None  # None = chained
    chunked_decode: bool | None = None
    deadline_s: float | None = None  # longest time from submission to the finished audio, seconds
    priority: Priority = "interactive"
    start_within_s: float | None = None  # longest time from submission to the first denoising step, seconds
    checkpoint: str | None = None  # hash that the model's weights must have (`models.weight_hash`); None = any
    request_id: str = ""
    client: str = ""  # the client that sent the request, so that clients share the queue fairly; "" = unknown

    @property
    def starts_from_its_source(self) -> bool:
        """Whether `init_audio` and `inpaint_audio` are the same file.

        If they are, and the clip is longer than the file, `init_audio` is extended with repetitions of the file,
        because silence would make the generated audio quiet. If they are not, `init_audio` is extended with silence,
        as in the original code.
        """
        init, edited = self.init_audio, self.inpaint_audio
        return init is not None and edited is not None and bool(init.sha256) and init.sha256 == edited.sha256

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each variation.

        A request for one variation, with this seed and the variation's prompt, gives the same audio.
        """
        counted = ((self.seed + index) % SEED_LIMIT for index in range(self.batch_size))
        return self.variation_seeds or tuple(counted)

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.variation_prompts or (self.prompt,) * self.batch_size


Stage = Literal["queued", "encoding", "denoising", "decoding", "done"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a request, summed over its variations. `fraction` is in 0..1."""

    stage: Stage
    fraction: float
    steps_done: int = 0
    steps_total: int = 0
    queue_position: int | None = None


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Wall time of each stage of one request, in milliseconds; the stages sum to `total_ms` within 2 %.

    `denoise_ms` includes the time between the request's own steps in which the device ran steps of other requests.
    """

    queue_ms: float = 0.0
    text_ms: float = 0.0
    source_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


Mode = Literal["strict", "fast"]  # strict: the audio's bytes do not depend on the other requests in the same batch


@dataclass(frozen=True, slots=True)
class Loaded:
    """Properties of a loaded engine that affect its audio.

    `checkpoint` is the hash of the weights from `models.weight_hash`, None if it was not computed. `networks` is a
    value of `catalog.NetworkBackend`.
    """

    checkpoint: str | None = None
    decode_precision: str | None = None
    networks: str = "native"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Software, processor and parameters of a generation: what the audio's bytes depend on, apart from the request.

    `processor` names the CPU's instruction sets or the GPU. `threads` is the number of CPU threads, and `slots` is the
    fixed batch size of the network calls. Each is None if the bytes do not depend on it. The fields from `steps` to
    `edit_schedule` are the request's values, or the model's defaults for values that the request leaves unset.
    `prompt_chars` and `negative_prompt_chars` are how many characters of the prompts the model reads; None means all.
    """

    version: str  # version of this package
    torch: str
    mode: Mode
    processor: str
    loaded: Loaded
    threads: int | None = None
    slots: int | None = None
    is_compiled: bool = False
    profile: str | None = None  # profile of the engine's speed features on a GPU: plain or accelerated
    attention: str | None = None  # name of the attention kernels on a GPU
    has_fused_kernels: bool | None = None  # whether an engine on a GPU uses this package's fused kernels
    transformers: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    sampler: str | None = None
    apg_scale: float | None = None
    duration_padding_s: float | None = None
    edit_schedule: EditSchedule | None = None
    prompt_chars: int | None = None
    negative_prompt_chars: int | None = None
    loras: tuple[Lora, ...] = ()  # without their sources
    lora_stacking: Stacking | None = None


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
    """A part of an edited clip that the model generated: the samples from `start` up to, but not including, `stop`.

    Samples outside all spans come from the source audio. A crossfade joins the span and the source audio beside it.
    `head` and `tail`, (channels, samples) float32, are the model's samples in the crossfades at the start and the end,
    before they are mixed with the source. They are empty if there is no crossfade.
    """

    start: int
    stop: int
    head: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Generated audio before it is encoded to a file: one (channels, samples) float32 array per variation.

    Full scale is -1..1. Loud clips exceed it, and `audio.peaks` brings them into range when a file is written.
    `generated` has, for each variation, the spans that the model generated. None means that the model generated every
    sample.
    """

    audio: tuple[npt.NDArray[np.float32], ...]
    sample_rate_hz: int
    model: str
    seeds: tuple[int, ...]
    timings: StageTimings = field(default_factory=StageTimings)
    device: DeviceUse = field(default_factory=DeviceUse)
    provenance: Provenance | None = None
    generated: tuple[tuple[GeneratedSpan, ...], ...] | None = None
    loop_s: float | None = None  # exact length of audio that repeats without a seam, seconds; None = it does not repeat

    @property
    def made_on(self) -> MadeOn:
        return MadeOn(self.device.kind, self.device.dtype, self.provenance)
