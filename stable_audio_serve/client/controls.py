"""The optional fields of requests, with the names of the HTTP API.

The decorator `accepts` makes them keyword parameters of the clients' methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec, Required, TypedDict, TypeVar, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")

_HEAD = "Optional fields; None selects the default of the server or the model:"


class Lora(TypedDict, total=False):
    """An adapter that a request uses. `strength` is 1 by default.

    `interval` is the range of noise levels at which the adapter applies: 1 is pure noise, and 0 is the finished clip.
    By default it is (0, 1).
    """

    name: Required[str]
    strength: float
    interval: tuple[float, float]


class Loudness(TypedDict, total=False):
    """The target loudness of a clip, in LUFS. A limiter limits the true peak to `true_peak_dbtp`, by default -1."""

    target_lufs: Required[float]
    true_peak_dbtp: float


class Controls(TypedDict, total=False):
    """Optional fields of every request, except requests of `Client.loop`."""

    model: Annotated[str | None, "Name or alias of a served model."]
    negative_prompt: Annotated[str | None, "What to avoid; takes effect with cfg_scale above 1."]
    duration: Annotated[float | None, "Length, seconds; default 7, also if the source audio is longer."]
    steps: Annotated[int | None, "Denoising steps."]
    cfg_scale: Annotated[float | None, "Guidance: how closely the audio follows the prompt."]
    batch_size: Annotated[int | None, "Number of variations; seeds count up from `seed`."]
    seed: Annotated[int | None, "The same seed gives the same audio; -1 = random."]
    prompts: Annotated[Sequence[str] | None, "A prompt for each variation, in place of `prompt`."]
    seeds: Annotated[Sequence[int] | None, "A seed for each variation, in place of `seed`."]
    chunked_decode: Annotated[bool | None, "Decode in windows."]
    apg_scale: Annotated[float | None, "Adaptive projected guidance; 0 = plain guidance."]
    duration_padding_sec: Annotated[float | None, "Audio that is generated after the clip and cut off, seconds."]
    response_format: Annotated[
        str | None, "File format: wav, flac, mp3, ogg, opus, pcm, ulaw or alaw; on some servers m4a and aac."
    ]
    bitrate: Annotated[int | None, "Bit rate of a lossy format, kbit/s."]
    bit_depth: Annotated[Literal[16, 24, "float"] | None, "Bits of a sample; of wav 16, 24 or float, of flac 16 or 24."]
    sample_rate: Annotated[int | None, "Sample rate of the file, hertz; by default the model's."]
    deadline_s: Annotated[float | None, "Time budget, seconds; after it DeadlineExceededError is raised."]
    priority: Annotated[Literal["interactive", "batch"] | None, "Interactive requests run before batch requests."]
    peaks: Annotated[str | None, "What is done to peaks above full scale: limit, scale or clip."]
    loudness: Annotated[Loudness | None, 'Target loudness, such as `{"target_lufs": -14}`; from 0.4 s.']
    fade_in_s: Annotated[float | None, "Linear fade at the start, seconds."]
    fade_out_s: Annotated[float | None, "Linear fade at the end, seconds."]
    manifest: Annotated[bool | None, "Adds a manifest to the ZIP file of several variations."]
    sampler_kwargs: Annotated[
        Mapping[str, str | float | bool | None] | None, "Options of the sampler, such as `sampler_type`."
    ]
    loras: Annotated[
        Sequence[str | tuple[str, float] | Lora] | None,
        "Adapters in this order: names, pairs of name and strength, or mappings that may have an interval too.",
    ]
    lora_stacking: Annotated[Literal["chained", "summed"] | None, "How several adapters combine."]


class GenerateControls(Controls, total=False):
    """Optional fields of a request for audio from a prompt alone."""

    loop: Annotated[bool | None, "Make a clip that repeats without a seam."]
    bpm: Annotated[float | None, "With loop: tempo, beats per minute. Name it in the prompt too."]
    bars: Annotated[int | None, "With loop and bpm: number of bars of four beats, in place of `duration`."]


class EditControls(Controls, total=False):
    """Optional fields of a request for a variation of source audio."""

    init_noise_level: Annotated[float | None, "Strength, 0 to 1: low keeps more of the source."]
    edit_schedule: Annotated[
        Literal["even", "scaled", "reference"] | None,
        "Noise levels of a flow model's variation: even, scaled or reference.",
    ]


class InpaintControls(Controls, total=False):
    """Optional fields of a request that regenerates regions of source audio, or extends it."""

    extend_before_s: Annotated[float | None, "New audio before the source, seconds."]
    extend_after_s: Annotated[float | None, "New audio after the source, seconds."]
    init_noise_level: Annotated[float | None, "Strength, 0 to 1: regions start from the source. By default from noise."]
    keep: Annotated[
        Literal["source", "model"] | None,
        "Outside the regions: the source's own samples (default) or the model's.",
    ]


class LoopControls(TypedDict, total=False):
    """Optional fields of a request for a loop."""

    bars: Annotated[Literal[1, 2, 4, 8] | None, "Length in bars; by default the largest of 8, 4, 2 and 1 that fits."]
    loop_type: Annotated[Literal["auto", "drums", "instruments"] | None, "Content of the loop."]
    steps: Annotated[int | None, "Denoising steps."]
    cfg_scale: Annotated[float | None, "Guidance: how closely the audio follows the prompt."]
    seed: Annotated[int | None, "The same seed gives the same audio; -1 = random."]
    style_strength: Annotated[float | None, "With audio: strength, 0.1 to 1; low keeps more of the source."]
    model_type: Annotated[Literal["standard", "finetune"] | None, "finetune = the model that `finetune_repo` names."]
    finetune_repo: Annotated[str | None, "A served model's name or alias."]


class JobFields(TypedDict, total=False):
    """Optional fields of every job."""

    webhook_url: Annotated[str | None, "URL called when the job ends."]


class Section(TypedDict, total=False):
    """A section of a long piece: its length in seconds, and its prompt (by default the job's prompt)."""

    duration: Required[float]
    prompt: str


class JobControls(JobFields, GenerateControls, total=False):
    """Optional fields of a job that generates audio from a prompt."""

    sections: Annotated[
        Sequence[Section] | None, "Sections of a piece that may be longer than the model's maximum, in order."
    ]
    overlap_s: Annotated[float | None, "With sections: how much audio each section continues, seconds."]


class JobEditControls(JobFields, EditControls, total=False):
    """Optional fields of a job that makes a variation of source audio."""


class JobInpaintControls(JobFields, InpaintControls, total=False):
    """Optional fields of a job that regenerates regions of source audio."""


def accepts(controls: type, *, without: Collection[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that adds the fields of `controls`, except `without`, to a method's signature and docstring.

    Python itself accepts any keyword argument for `**controls: Unpack[...]`. The decorated method raises TypeError for
    a keyword that is not a field.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        hints = get_type_hints(controls, include_extras=True)
        fields = {name: hint for name, hint in hints.items() if name not in without}
        own = inspect.signature(method)
        parameters = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint.__origin__)
            for name, hint in fields.items()
        ]
        signature = own.replace(parameters=parameters)

        @wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{method.__name__}() {error}") from None
            return method(*args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        checked.__doc__ = _document(inspect.getdoc(method) or "", fields)
        return checked

    return decorate


def _document(text: str, fields: Mapping[str, Any]) -> str:
    lines = (f"    {name}: {hint.__metadata__[0]}" for name, hint in fields.items())
    return "\n".join((text, "", _HEAD, "", *lines))
