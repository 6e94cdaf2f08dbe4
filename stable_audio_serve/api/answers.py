"""Successful answers of every dialect: a file with its length known from the start, and what is said about it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from starlette.responses import Response, StreamingResponse

from stable_audio_serve.api.service import Output
from stable_audio_serve.audio.encode import EncodedFile
from stable_audio_serve.core.file_names import content_disposition

# What a page on another origin may read.
EXPOSED_HEADERS = (
    *("Content-Disposition", "Idempotent-Replayed", "Retry-After", "Server-Timing"),
    *("X-Model", "X-Output-Count", "X-Request-Id", "X-Sample-Rate", "X-Seed"),
)
_STREAM_ABOVE_BYTES = 1_048_576


def encoded_answer(file: EncodedFile, headers: Mapping[str, str]) -> Response:
    """The file, in chunks when it is large."""
    headers = {**headers, "Content-Length": str(file.num_bytes)}
    if file.num_bytes <= _STREAM_ABOVE_BYTES:
        return Response(file.to_bytes(), headers=headers, media_type=file.media_type)
    return StreamingResponse(_chunks(file), headers=headers, media_type=file.media_type)


def result_headers(output: Output) -> dict[str, str]:
    """What was made, and where the time went."""
    result = output.result
    return {
        "X-Model": result.model,
        "X-Sample-Rate": str(result.sample_rate_hz),
        "X-Output-Count": str(len(result.audio)),
        "X-Seed": str(result.seeds[0]),
        "Server-Timing": _server_timing(output),
    }


def attachment(file_name: str) -> dict[str, str]:
    """The header that names a download."""
    return {"Content-Disposition": content_disposition(file_name)}


async def _chunks(file: EncodedFile) -> AsyncIterator[bytes]:
    for chunk in file.chunks():
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
