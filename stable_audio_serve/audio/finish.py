"""Makes the file for a client from a model's audio: treats peaks, measures facts, encodes a file or ZIP. CPU work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stable_audio_serve.audio.encode import AudioFormat, EncodedFile, encode_audio, make_zip
from stable_audio_serve.audio.loudness import describe_clip
from stable_audio_serve.audio.peaks import treat_peaks
from stable_audio_serve.core.generation import GenerationRequest, GenerationResult
from stable_audio_serve.core.sound import ClipFacts, Peaks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class FileOrder:
    """Which file a client wants. `manifest_of` is the request that the ZIP's manifest describes; None = no manifest."""

    peaks: Peaks
    file_format: AudioFormat = AudioFormat.WAV
    stem: str = "audio"
    manifest_of: GenerationRequest | None = None


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """A file to deliver, and the facts of each variation in it."""

    file: EncodedFile
    clips: tuple[ClipFacts, ...]


def finish_clip(
    audio: npt.NDArray[np.float32], sample_rate_hz: int, *, seed: int, peaks: Peaks
) -> tuple[npt.NDArray[np.float32], ClipFacts]:
    """Returns a whole clip (C, S) float32 as it is delivered, in -1..1, and its facts."""
    finished = treat_peaks(audio, sample_rate_hz, peaks=peaks)
    return finished, describe_clip(finished, sample_rate_hz, seed=seed)


def finish(result: GenerationResult, order: FileOrder) -> FinishedFile:
    """Returns the file of one variation, or for several a ZIP of `<stem>-01.<format>`, `<stem>-02.<format>`, ..."""
    finished = [
        finish_clip(audio, result.sample_rate_hz, seed=seed, peaks=order.peaks)
        for audio, seed in zip(result.audio, result.seeds, strict=True)
    ]
    clips = tuple(facts for _, facts in finished)
    files = [encode_audio(audio, result.sample_rate_hz, file_format=order.file_format) for audio, _ in finished]
    if len(files) == 1:
        return FinishedFile(files[0], clips)
    names = [f"{order.stem}-{number:02d}.{order.file_format}" for number in range(1, len(files) + 1)]
    entries = list(zip(names, files, strict=True))
    if order.manifest_of is not None:
        entries.append((MANIFEST, _make_manifest(order.manifest_of, result, names=names, clips=clips)))
    return FinishedFile(make_zip(entries), clips)


def clip_dict(clip: ClipFacts) -> dict[str, Any]:
    """Returns the facts that clients see as JSON values: the peak rounded to 4 decimals, LUFS to 1."""
    loudness = None if clip.loudness_lufs is None else round(clip.loudness_lufs, 1)
    return {"seed": clip.seed, "peak": round(clip.peak, 4), "loudness": loudness, "silent": clip.is_silent}


def _make_manifest(
    request: GenerationRequest, result: GenerationResult, *, names: Sequence[str], clips: Sequence[ClipFacts]
) -> EncodedFile:
    content = {
        "model": result.model,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "duration": request.duration_s,
        "steps": request.steps,
        "cfg_scale": request.cfg_scale,
        "sample_rate": result.sample_rate_hz,
        "device": result.made_on.device,
        "dtype": result.made_on.dtype,
        "files": [{"name": name, **clip_dict(clip)} for name, clip in zip(names, clips, strict=True)],
    }
    return EncodedFile("application/json", (json.dumps(content, indent=2).encode(),))
