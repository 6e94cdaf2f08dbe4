"""Turn a model's audio into the client's file: bring peaks into -1..1, measure each clip, and encode the file or ZIP.

The functions need much CPU time: call them from worker threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat, zip_longest
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stable_audio_serve.audio.encode import (
    MOST_OPUS_TEXT_CHARS,
    EncodedFile,
    as_in_file,
    encode_audio,
    encode_wav,
    make_zip,
)
from stable_audio_serve.audio.formats import TEXT_FORMATS, file_rate
from stable_audio_serve.audio.level import fade, to_dbtp, to_loudness
from stable_audio_serve.audio.loudness import describe_clip
from stable_audio_serve.audio.pcm import to_full_scale_pcm16
from stable_audio_serve.audio.peaks import treat_peaks
from stable_audio_serve.audio.recipe import MOST_BYTES, Recipe, RecipeSource, write_recipes
from stable_audio_serve.audio.true_peak import measure_true_peak
from stable_audio_serve.core.generation import GeneratedSpan, GenerationRequest, GenerationResult, Role, SourceAudio
from stable_audio_serve.core.sound import AS_IS, PLAIN_WAV, AudioFormat, ClipFacts, Encoding, Finishing, Peaks

if TYPE_CHECKING:
    import numpy.typing as npt

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class FileOrder:
    """The properties of the file that a client requested. If `origin` is None, no recipe is embedded in the file."""

    peaks: Peaks
    encoding: Encoding = PLAIN_WAV
    stem: str = "audio"
    with_manifest: bool = False  # add a manifest to the ZIP archive of several variations
    origin: ClipOrigin | None = None
    finishing: Finishing = AS_IS


@dataclass(frozen=True, slots=True)
class ClipOrigin:
    """What a recipe is written from: a generation request, and the hashes of the request's source files."""

    request: GenerationRequest
    sources: Mapping[Role, RecipeSource]

    @classmethod
    def of(cls, request: GenerationRequest) -> ClipOrigin | None:
        """Return the origin of a request, or None if any source audio of the request has no file hash."""
        given: dict[Role, SourceAudio | None] = {"init": request.init_audio, "inpaint": request.inpaint_audio}
        found = {role: source for role, source in given.items() if source is not None}
        if not all(source.sha256 for source in found.values()):
            return None
        return cls(
            request, {role: RecipeSource(sha256=s.sha256, is_mixed=s.is_mixed or None) for role, s in found.items()}
        )


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """The client's file, with the measurements and, if requested, the recipe of each variation in it."""

    file: EncodedFile
    sample_rate_hz: int  # of the file
    clips: tuple[ClipFacts, ...]
    recipes: tuple[Recipe, ...] = ()


def finish_clip(
    audio: npt.NDArray[np.float32],
    sample_rate_hz: int,
    *,
    seed: int,
    peaks: Peaks,
    finishing: Finishing = AS_IS,
    generated: Sequence[GeneratedSpan] | None = None,
    is_loop: bool = False,
) -> tuple[npt.NDArray[np.float32], ClipFacts]:
    """Finish a clip and measure it. Returns the clip (C, S) float32 in -1..1, and its measurements.

    With a target loudness (`finishing.loudness`), a limiter lets no true peak exceed the target's `true_peak_dbtp`.

    `generated` are the parts of the clip that the model generated. None means the whole clip. `is_loop` is whether the
    clip repeats without a seam.
    """
    finished = None
    if finishing.loudness is not None:
        source = audio if peaks == "limit" else treat_peaks(audio, sample_rate_hz, peaks=peaks)
        finished = to_loudness(source, sample_rate_hz, loudness=finishing.loudness, is_loop=is_loop)
    if finished is None:
        finished = treat_peaks(audio, sample_rate_hz, peaks=peaks, generated=generated, is_loop=is_loop)
    finished = fade(finished, sample_rate_hz, finishing=finishing)
    facts = describe_clip(finished, sample_rate_hz, seed=seed)
    if finishing.loudness is not None:
        facts = replace(facts, true_peak_dbtp=to_dbtp(measure_true_peak(finished)))
    return finished, facts


def finish(result: GenerationResult, order: FileOrder) -> FinishedFile:
    """Return a result's file: an audio file, or for several variations a ZIP archive.

    The files in the archive are named `<stem>-01.<format>`, `<stem>-02.<format>`, and so on.
    """
    encoding, rate_hz = order.encoding, result.sample_rate_hz
    file_rate_hz = file_rate(encoding, rate_hz)
    # Resampling changes peaks and loudness, so it comes first, unless the limiter must not change a source's samples.
    if order.finishing.loudness is not None or result.generated is None:
        in_file = partial(as_in_file, sample_rate_hz=rate_hz, encoding=encoding, loop_s=result.loop_s)
        result = replace(result, audio=tuple(map(in_file, result.audio)), generated=None)
        rate_hz = file_rate_hz
    finished = [
        finish_clip(
            audio,
            rate_hz,
            seed=seed,
            peaks=order.peaks,
            finishing=order.finishing,
            generated=generated,
            is_loop=result.loop_s is not None,
        )
        for audio, seed, generated in zip(
            result.audio, result.seeds, result.generated or repeat(None, len(result.audio)), strict=True
        )
    ]
    clips = tuple(facts for _, facts in finished)
    recipes = _recipes_of(result, order.origin, encoding=encoding, peaks=order.peaks, finishing=order.finishing)
    files = [
        encode_audio(
            audio,
            rate_hz,
            encoding=encoding,
            text=text_of(recipe, file_format=encoding.file_format),
            loop_s=result.loop_s,
        )
        for (audio, _), recipe in zip_longest(finished, recipes)
    ]
    if len(files) == 1:
        return FinishedFile(files[0], file_rate_hz, clips, recipes)
    names = [f"{order.stem}-{number:02d}.{encoding.file_format}" for number in range(1, len(files) + 1)]
    entries = list(zip(names, files, strict=True))
    if order.with_manifest and order.origin is not None:
        request, facts = order.origin.request, list(zip(names, clips, recipes, strict=True))
        entries.append((MANIFEST, _make_manifest(request, result, rate_hz=file_rate_hz, files=facts)))
    return FinishedFile(make_zip(entries), file_rate_hz, clips, recipes)


def text_of(recipe: Recipe | None, *, file_format: AudioFormat) -> str | None:
    """Return the recipe as text to embed in a file, or None if the format cannot contain text of this length."""
    text = None if recipe is None or file_format not in TEXT_FORMATS else recipe.to_json()
    most = MOST_OPUS_TEXT_CHARS if file_format is AudioFormat.OPUS else MOST_BYTES
    return None if text is None or len(text) > most else text


def _recipes_of(
    result: GenerationResult,
    origin: ClipOrigin | None,
    *,
    encoding: Encoding,
    peaks: Peaks | Literal["full"],
    finishing: Finishing = AS_IS,
    samples: int | None = None,
) -> tuple[Recipe, ...]:
    """Return the recipe of each variation, or an empty tuple if `origin` is None."""
    if origin is None:
        return ()
    return write_recipes(
        origin.request,
        sources=origin.sources,
        model=result.model,
        seeds=result.seeds,
        made_on=result.made_on,
        encoding=encoding,
        peaks=peaks,
        finishing=finishing,
        samples=samples,
    )


def finish_window(result: GenerationResult, *, num_samples: int | None, origin: ClipOrigin | None) -> FinishedFile:
    """Return the WAV file that the routes of the Stable Audio Open Small API send.

    The audio is scaled so that its peak is at full scale, and then cut to its first `num_samples` samples.
    """
    pcm = to_full_scale_pcm16(result.audio[0])[:num_samples]
    audio = np.divide(pcm.T, np.float32(32767), dtype=np.float32, order="C")  # (C, S), as `describe_clip` expects
    facts = describe_clip(audio, result.sample_rate_hz, seed=result.seeds[0])
    recipes = _recipes_of(result, origin, encoding=PLAIN_WAV, peaks="full", samples=len(pcm))
    text = text_of(recipes[0] if recipes else None, file_format=AudioFormat.WAV)
    return FinishedFile(encode_wav(pcm, result.sample_rate_hz, text=text), result.sample_rate_hz, (facts,), recipes)


def clip_dict(clip: ClipFacts) -> dict[str, Any]:
    """Return a clip's measurements as JSON values, with the peak rounded to 4 decimals and levels in decibels to 1."""
    loudness = None if clip.loudness_lufs is None else round(clip.loudness_lufs, 1)
    facts = {"seed": clip.seed, "peak": round(clip.peak, 4), "loudness": loudness, "silent": clip.is_silent}
    return facts if clip.true_peak_dbtp is None else {**facts, "true_peak": round(clip.true_peak_dbtp, 1)}


def _make_manifest(
    request: GenerationRequest,
    result: GenerationResult,
    *,
    rate_hz: int,
    files: Sequence[tuple[str, ClipFacts, Recipe]],
) -> EncodedFile:
    content = {
        "model": result.model,
        "prompt": list(request.prompts) if request.variation_prompts else request.prompt,
        "negative_prompt": request.negative_prompt,
        "duration": request.duration_s,
        "steps": request.steps,
        "cfg_scale": request.cfg_scale,
        "sample_rate": rate_hz,
        "device": result.made_on.device,
        "dtype": result.made_on.dtype,
        "files": [
            {"name": name, **clip_dict(clip), "recipe": recipe.model_dump(mode="json")} for name, clip, recipe in files
        ],
    }
    return EncodedFile("application/json", (json.dumps(content, indent=2).encode(),))
