"""Success responses of all dialects: a generated or stored file, with its length and the headers that describe it.

Stored files are streamed from their store. They are never held in memory as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
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

# OpenAPI descriptions of the headers that `sound_headers` returns.
SOUND_HEADERS: dict[str, Any] = {
    name: {"schema": {"type": kind}, "description": text}
    for name, kind, text in (
        ("X-Seed", "integer", "Seed of the first variation."),
        ("X-Seeds", "string", "Seed of each variation, comma-separated; only with several variations."),
        ("X-Audio-Peak", "string", "Largest absolute sample of each variation, comma-separated; 1 = full scale."),
        ("X-Audio-Loudness", "string", "Integrated loudness of each variation, LUFS; null under 0.4 s."),
        ("X-Audio-Silent", "string", "Whether each variation stays below -70 dBFS: true or false."),
        ("X-Audio-True-Peak", "string", "True peak of each variation, dBTP; only with a target loudness."),
        (
            "X-Device",
            "string",
            "Device that made the audio: cuda, mps or cpu. Reproducing the bytes needs the same one.",
        ),
        ("X-Dtype", "string", "Precision of the denoiser: float32, float16 or bfloat16."),
    )
}
RECIPE = "X-Recipe"
REPLAY = "X-Replay"
RECIPE_HEADER: dict[str, Any] = {
    RECIPE: {
        "schema": {"type": "string"},
        "description": "Recipe of each variation as JSON, comma-separated. Above 4 kB prompts and regions are left "
        "out and named in `left_out`; the file always has them. Absent if still above 4 kB.",
    }
}
# OpenAPI descriptions of the answers to requests for a part of a file, and for a file that the client has already.
PART_RESPONSES: dict[int | str, dict[str, Any]] = {
    206: {"description": "The part of the file that the header Range names."},
    304: {"description": "The file is one that the header If-None-Match names."},
}
_MOST_RECIPE_BYTES = 4096
# Response headers that web pages of other origins may read (Access-Control-Expose-Headers).
EXPOSED_HEADERS = (
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Range",
    "ETag",
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
# The first and perhaps the last byte of a part, or the number of bytes at the end of the file.
_RANGE = re.compile(r"bytes=(?:([0-9]{1,30})-([0-9]{0,30})|-([0-9]{1,30}))")
_BYTES = "application/octet-stream"
_AUDIO = re.compile(
    r"audio/[a-z0-9.-]{1,60}(; ?[A-Za-z0-9=.+-]{1,60})?"
)  # a type with "+" does not match, because browsers render types that end in +xml


def encoded_answer(file: EncodedFile, headers: Mapping[str, str]) -> Response:
    """Return a response with an encoded file, streamed in chunks if the file is large."""
    headers = {**headers, "Content-Length": str(file.num_bytes)}
    if file.num_bytes <= _STREAM_ABOVE_BYTES:
        return Response(file.to_bytes(), headers=headers, media_type=file.media_type)
    return StreamingResponse(file_chunks(file), headers=headers, media_type=file.media_type)


async def file_answer(
    request: Request, file: StoredFile, *, jobs: JobQueue, recipes: Sequence[Recipe] = ()
) -> Response:
    """Return the response to a download of a stored file, or of the part that the header `Range` names.

    Browsers need such parts to seek in audio, and Safari to play it at all. A HEAD request gets only the headers. A
    response header lists `recipes`, one for each clip in the file. Raises HTTPException 404 when the file no longer
    exists, and 416 when it ends before the part.
    """
    etag, is_head = f'"{file.sha256}"', request.method == "HEAD"
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    is_known = not known.isdisjoint({etag, "*"})
    part = None if is_head or is_known else _find_part(request, num_bytes=file.num_bytes, etag=etag)
    start, stop = part or (0, file.num_bytes)
    is_whole = (start, stop) == (0, file.num_bytes)
    files = jobs.artifacts
    chunks = files.read(file) if is_whole else files.read_part(file, start=start, stop=stop)
    try:
        first = await anext(chunks, b"")
    except FileNotFoundError as error:
        raise HTTPException(404, "the file no longer exists") from error
    headers = {
        **attachment(file.file_name),
        **sound_headers(file.clips, file.made_on),
        **_recipe_header(recipes),
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Content-Length": str(stop - start),
    }
    media_type = file.media_type if file.media_type == "application/zip" else audio_type(file.media_type)
    if is_head or is_known:
        await chunks.aclose()
        return Response(None, 304, {"ETag": etag}) if is_known else Response(headers=headers, media_type=media_type)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.num_bytes}"
    return StreamingResponse(chain(first, chunks), 200 if part is None else 206, headers, media_type)


def _find_part(request: Request, *, num_bytes: int, etag: str) -> tuple[int, int] | None:
    """Return the bytes [start, stop) that the header `Range` of a request asks for, None for the whole file.

    As RFC 9110 allows, the whole file is also sent if the header is invalid or names several ranges. It must be sent if
    the header `If-Range` names another file. Raises HTTPException 416.
    """
    found = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if found is None or request.headers.get("if-range", etag) != etag:
        return None
    first, last, num_last = found.groups()
    if num_last:
        start, stop = max(num_bytes - int(num_last), 0), num_bytes
    else:
        start, stop = int(first), min(int(last) + 1, num_bytes) if last else num_bytes
        if last and int(last) < start:
            return None
    if start >= stop:
        headers = {"Content-Range": f"bytes */{num_bytes}"}
        raise HTTPException(416, f"Range: the file has {num_bytes} bytes", headers)
    return start, stop


def result_headers(output: Output) -> dict[str, str]:
    """Return the headers with the model, the properties of the audio and the duration of each stage."""
    result = output.result
    return {
        "X-Model": result.model,
        "X-Sample-Rate": str(output.sample_rate_hz),
        "X-Output-Count": str(len(result.audio)),
        **sound_headers(output.clips, result.made_on),
        **_recipe_header(output.recipes),
        "Server-Timing": _server_timing(output),
    }


def _recipe_header(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Return the header with the recipes, or {} without recipes.

    Proxies limit headers to 4 to 16 kB. Long recipes are shortened. The header is left out if it is still too long.
    """
    text = ""
    # Add up the prompt lengths before creating JSON: the JSON of a long recipe can have 600 kB.
    if sum(recipe.num_prompt_chars for recipe in recipes) <= _MOST_RECIPE_BYTES:
        text = ", ".join(recipe.to_json() for recipe in recipes)
    if not 0 < len(text) <= _MOST_RECIPE_BYTES:
        text = ", ".join(recipe.to_short_json() for recipe in recipes)
    return {RECIPE: text} if 0 < len(text) <= _MOST_RECIPE_BYTES else {}


def sound_headers(clips: Sequence[ClipFacts], made_on: MadeOn | None) -> dict[str, str]:
    """Return the headers that describe a file's audio, and name the device that generated the audio.

    A header has one JSON value per variation, separated by commas. Unknown values are left out. `X-Seed` is the seed of
    the first variation. `X-Seeds` is sent only if the file has several variations.
    """
    device_headers = {"X-Device": made_on.device, "X-Dtype": made_on.dtype} if made_on else {}
    if not clips:
        return device_headers
    facts = [clip_dict(clip) for clip in clips]
    headers = {
        name: ", ".join(json.dumps(fact.get(key)) for fact in facts)
        for name, key in (
            ("X-Seeds", "seed"),
            ("X-Audio-Peak", "peak"),
            ("X-Audio-Loudness", "loudness"),
            ("X-Audio-Silent", "silent"),
            ("X-Audio-True-Peak", "true_peak"),
        )
        if any(key in fact for fact in facts)
    }
    if len(clips) == 1:
        del headers["X-Seeds"]
    return {"X-Seed": str(clips[0].seed), **headers, **device_headers}


def attachment(file_name: str) -> dict[str, str]:
    """Return the headers that make browsers save the response instead of displaying or running it."""
    return {"Content-Disposition": content_disposition(file_name), "X-Content-Type-Options": "nosniff"}


def audio_type(media_type: str | None) -> str:
    """Return `media_type` if it is an audio type, otherwise application/octet-stream.

    The files of clients have the same origin as the server's own pages, so a browser must not run them as scripts.
    """
    text = (media_type or "").lower()
    return text if _AUDIO.fullmatch(text) else _BYTES


async def file_chunks(file: EncodedFile) -> AsyncIterator[bytes]:
    """Yield the content of an encoded file."""
    for chunk in file.chunks():
        yield chunk


async def chain(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """Yield `first`, then `rest`, which is closed at the end."""
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
