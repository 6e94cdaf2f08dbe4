"""Our dialect's successful answers: audio files with their headers."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse

from stable_audio_serve.api.service import Output
from stable_audio_serve.audio.encode import AudioFormat, EncodedFile

# What a page on another origin may read.
EXPOSED_HEADERS = (
    *("Content-Disposition", "Retry-After", "Server-Timing"),
    *("X-Model", "X-Output-Count", "X-Request-Id", "X-Sample-Rate", "X-Seed"),
)
_STREAM_ABOVE_BYTES = 1_048_576


def file_stem(model: str) -> str:
    """How files of a model are named, without extension."""
    return f"stable-audio-3-{model}"


def audio_answer(output: Output, file_format: AudioFormat) -> Response:
    """One file, or the ZIP of several, in chunks but with its length known from the start."""
    result = output.result
    stem = file_stem(result.model)
    name = f"{stem}.{file_format}" if len(result.audio) == 1 else f"{stem}-batch.zip"
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Content-Length": str(output.file.num_bytes),
        "X-Model": result.model,
        "X-Sample-Rate": str(result.sample_rate_hz),
        "X-Output-Count": str(len(result.audio)),
        "X-Seed": str(result.seeds[0]),
        "Server-Timing": _server_timing(output),
    }
    if output.file.num_bytes <= _STREAM_ABOVE_BYTES:
        return Response(output.file.to_bytes(), headers=headers, media_type=output.file.media_type)
    return StreamingResponse(_chunks(output.file), headers=headers, media_type=output.file.media_type)


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
