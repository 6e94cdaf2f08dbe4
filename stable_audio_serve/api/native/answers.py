"""Success responses of the native API: audio files and ZIPs, as attachments."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from stable_audio_serve.api.answers import attachment, encoded_answer, result_headers
from stable_audio_serve.api.native.convert import to_encoding, to_finishing
from stable_audio_serve.api.native.ignored import warning_headers
from stable_audio_serve.api.native.schemas import Fields
from stable_audio_serve.api.service import Output
from stable_audio_serve.audio.finish import ClipOrigin, FileOrder
from stable_audio_serve.core.catalog import ModelCard
from stable_audio_serve.core.generation import GenerationRequest
from stable_audio_serve.core.settings import AudioSettings
from stable_audio_serve.core.sound import AudioFormat


def file_stem(model: str) -> str:
    """Return the name of a model's files: `stable-audio-3-<model>`, or `model` if it begins with `stable-audio-`."""
    return model if model.startswith("stable-audio-") else f"stable-audio-3-{model}"


def file_order(fields: Fields, card: ModelCard, *, generation: GenerationRequest, settings: AudioSettings) -> FileOrder:
    """Return the properties of the file to create (format, name, peaks, ...) from the fields of a request.

    Raises RequestValidationError.
    """
    return FileOrder(
        fields.peaks or settings.peaks,
        encoding=to_encoding(fields),
        stem=file_stem(card.name),
        with_manifest=fields.manifest,
        origin=ClipOrigin.of(generation),
        finishing=to_finishing(fields, generation),
    )


def audio_answer(request: Request, output: Output, *, file_format: AudioFormat) -> Response:
    """Return the response with an audio file, or with a ZIP archive of several variations."""
    stem = file_stem(output.result.model)
    name = f"{stem}.{file_format}" if len(output.result.audio) == 1 else f"{stem}-batch.zip"
    headers = attachment(name) | result_headers(output) | warning_headers(request, output.result.made_on)
    return encoded_answer(output.file, headers)
