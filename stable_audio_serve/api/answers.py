"""Successful answers of every dialect: a file, made or stored, with its length and the headers that describe it.

Knows no dialect. Files are streamed from their store, never held in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from stable_audio_serve.api.service import Output
from stable_audio_serve.artifacts.store import StoredFile
from stable_audio_serve.audio.encode import EncodedFile
from stable_audio_serve.audio.finish import clip_dict
from stable_audio_serve.audio.recipe import Recipe
from stable_audio_serve.core.file_names import content_disposition
from stable_audio_serve.core.generation import MadeOn
from stable_audio_serve.core.sound import ClipFacts
from stable_audio_serve.jobs.queue import JobQueue

# OpenAPI descriptions of the headers of `sound_headers`.
SOUND_HEADERS: dict[str, Any] = {
    name: {"schema": {"type": kind}, "description": text}
    for name, kind, text in (
        ("X-Seed", "integer", "Seed of the first variation."),
        ("X-Seeds", "string", "Of several variations, the seed of each; as all lists, with commas."),
        ("X-Audio-Peak", "string", "Largest absolute sample of each variation, 1 = full scale."),
        ("X-Audio-Loudness", "string", "Integrated loudness of each, LUFS; null under 0.4 s."),
        ("X-Audio-Silent", "string", "Whether each stays below -70 dBFS: true or false."),
        ("X-Device", "string", "What made the audio: cuda, mps or cpu; a seed repeats a clip on the same."),
        ("X-Dtype", "string", "Precision of the denoiser there: float32, float16 or bfloat16."),
    )
}
RECIPE = "X-Recipe"
REPLAY = "X-Replay"
RECIPE_HEADER: dict[str, Any] = {
    RECIPE: {
        "schema": {"type": "string"},
        "description": "What made the file, as JSON; of several variations one each, with commas. Above 4 kB without "
        "prompts and regions, which `left_out` names then: the file has them. Absent if that is above 4 kB, too.",
    }
}
_MOST_RECIPE_BYTES = 4096
# Headers that a page on another origin may read.
EXPOSED_HEADERS = (
    "Content-Disposition",
    "Idempotent-Replayed",
    "Retry-After",
    "Server-Timing",
    "Warning",
    "X-Error-Kind",
    "X-Model",
    "X-Output-Count",
    "X-Request-Id",
    "X-Sample-Rate",
    RECIPE,
    REPLAY,
    *SOUND_HEADERS,
)
_STREAM_ABOVE_BYTES = 1_048_576
_BYTES = "application/octet-stream"
_AUDIO = re.compile(
    r"audio/[a-z0-9.-]{1,60}(; ?[A-Za-z0-9=.+-]{1,60})?"
)  # without +: browsers render what ends in +xml


def encoded_answer(file: EncodedFile, headers: Mapping[str, str]) -> Response:
    """Returns the file, streamed in chunks where it is large."""
    headers = {**headers, "Content-Length": str(file.num_bytes)}
    if file.num_bytes <= _STREAM_ABOVE_BYTES:
        return Response(file.to_bytes(), headers=headers, media_type=file.media_type)
    return StreamingResponse(_chunks(file), headers=headers, media_type=file.media_type)


async def file_answer(file: StoredFile, jobs: JobQueue, *, is_head: bool, recipes: Sequence[Recipe] = ()) -> Response:
    """Returns the stored file as a download with its length; for HEAD only its headers. `recipes` are of its clips.

    Raises HTTPException 404 when the file is gone.
    """
    chunks = jobs.read(file)
    try:
        first = await anext(chunks, b"")
    except FileNotFoundError as error:
        raise HTTPException(404, "the file is gone") from error
    headers = {
        **attachment(file.file_name),
        **sound_headers(file.clips, file.made_on),
        **_recipe_header(recipes),
        "Content-Length": str(file.num_bytes),
    }
    media_type = file.media_type if file.media_type == "application/zip" else audio_type(file.media_type)
    if is_head:
        await chunks.aclose()
        return Response(headers=headers, media_type=media_type)
    return StreamingResponse(_chain(first, chunks), headers=headers, media_type=media_type)


def result_headers(output: Output) -> dict[str, str]:
    """Returns the headers that say what was generated and how long each stage took."""
    result = output.result
    return {
        "X-Model": result.model,
        "X-Sample-Rate": str(result.sample_rate_hz),
        "X-Output-Count": str(len(result.audio)),
        **sound_headers(output.clips, result.made_on),
        **_recipe_header(output.recipes),
        "Server-Timing": _server_timing(output),
    }


def _recipe_header(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Returns the recipes whole, else without what makes them long: proxies take 4 to 16 kB of all headers together."""
    if not recipes:
        return {}
    text = ""
    if sum(recipe.num_prompt_chars for recipe in recipes) <= _MOST_RECIPE_BYTES:  # else texts of 600 kB were written
        text = ", ".join(recipe.to_json() for recipe in recipes)
    if not 0 < len(text) <= _MOST_RECIPE_BYTES:
        text = ", ".join(recipe.to_short_json() for recipe in recipes)
    return {RECIPE: text} if len(text) <= _MOST_RECIPE_BYTES else {}


def sound_headers(clips: Sequence[ClipFacts], made_on: MadeOn | None) -> dict[str, str]:
    """Returns headers that describe the audio of a file as JSON values, separated by commas for several variations,
    and name what it was made on.

    Without what is not known. `X-Seed` is the first variation's seed; `X-Seeds` is there for several only.
    """
    told = {"X-Device": made_on.device, "X-Dtype": made_on.dtype} if made_on else {}
    if not clips:
        return told
    facts = [clip_dict(clip) for clip in clips]
    headers = {
        name: ", ".join(json.dumps(fact[key]) for fact in facts)
        for name, key in (
            ("X-Seeds", "seed"),
            ("X-Audio-Peak", "peak"),
            ("X-Audio-Loudness", "loudness"),
            ("X-Audio-Silent", "silent"),
        )
    }
    if len(clips) == 1:
        del headers["X-Seeds"]
    return {"X-Seed": str(clips[0].seed), **headers, **told}


def attachment(file_name: str) -> dict[str, str]:
    """Returns the headers of a download, which no browser shows or runs as something else."""
    return {"Content-Disposition": content_disposition(file_name), "X-Content-Type-Options": "nosniff"}


def audio_type(media_type: str | None) -> str:
    """Returns the type of a file that a client brought, as it is served: an audio type, or that of plain bytes.

    Our own pages and the scripts that they trust come from the same origin as such files.
    """
    text = (media_type or "").lower()
    return text if _AUDIO.fullmatch(text) else _BYTES


async def _chunks(file: EncodedFile) -> AsyncIterator[bytes]:
    for chunk in file.chunks():
        yield chunk


async def _chain(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _server_timing(output: Output) -> str:
    timings = output.result.timings
    stages = {
        "queue": timings.queue_ms,
        "text": timings.text_ms,
        "source": timings.source_ms,
        "denoise": timings.denoise_ms,
        "decode": timings.decode_ms,
        "encode": output.encode_ms,
        "total": timings.total_ms + output.encode_ms,
    }
    return ", ".join(f"{name};dur={duration_ms:.1f}" for name, duration_ms in stages.items())
