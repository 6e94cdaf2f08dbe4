"""Helpers for tests of the Stable Audio Open Small dialect."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import soundfile

WINDOW_SAMPLES = 524_288

CLIP_KEYS = {
    "prompt",
    "negative_prompt",
    "steps",
    "cfg_scale",
    "seed",
    "sample_rate",
    "duration_seconds",
    "generation_time",
    "realtime_factor",
    "detected_bpm",
    "device",
}
STYLE_KEYS = CLIP_KEYS | {"style_strength", "input_audio_shape"}
RIFF_KEYS = {
    "prompt",
    "original_prompt",
    "negative_prompt",
    "loop_type",
    "detected_bpm",
    "bars",
    "loop_duration_seconds",
    "style_transfer",
    "style_strength",
    "steps",
    "cfg_scale",
    "seed",
    "sample_rate",
    "generation_time",
    "device",
    "key",
    "source",
}
LOOP_KEYS = RIFF_KEYS - {"key", "source"} | {
    "calculated_duration_seconds",
    "available_audio_seconds",
    "seconds_per_bar",
    "model_type",
}


def read_pcm(data: bytes) -> npt.NDArray[np.int16]:
    """Returns the samples of a 16-bit stereo WAV file at 44.1 kHz, as an array (samples, 2)."""
    info = soundfile.info(io.BytesIO(data))
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("WAV", "PCM_16", 2, 44_100)
    return np.asarray(soundfile.read(io.BytesIO(data), dtype="int16")[0])


def expect_wav(reply: httpx.Response, *, name: str) -> npt.NDArray[np.int16]:
    """Check that the response is a WAV file whose name matches the pattern `name`. Returns its samples."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "audio/wav"
    assert int(reply.headers["content-length"]) == len(reply.content)
    assert reply.headers["x-sample-rate"] == "44100"
    assert reply.headers["x-output-count"] == "1"
    assert re.fullmatch(f'attachment; filename="{name}"', reply.headers["content-disposition"])
    return read_pcm(reply.content)


def expect_base64(reply: httpx.Response) -> tuple[npt.NDArray[np.int16], dict[str, Any]]:
    """Check that the response has a WAV file as base64 in JSON. Returns its samples and metadata."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"success", "audio_base64", "metadata"}
    assert body["success"] is True
    return read_pcm(base64.b64decode(body["audio_base64"], validate=True)), body["metadata"]


def expect_refusal(reply: httpx.Response, sentence: str) -> None:
    """Assert that the response is a 400 with exactly this error message."""
    assert reply.status_code == 400, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"error": sentence}
