"""AAC files, written and read back with PyAV, which is an optional package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from stable_audio_serve.audio.formats import available_formats
from tests.packages import install_python
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.server, pytest.mark.slow]

PACKAGE = "av==18.1.0"
SCRIPT = """
import io, json
import av
import numpy as np
from stable_audio_serve.api.fields import ResponseFormat
from stable_audio_serve.audio.encode import encode_audio
from stable_audio_serve.core.sound import Encoding
from pydantic import TypeAdapter

t = np.arange(3 * 44_100 + 11) / 44_100
audio = np.stack([0.5 * np.sin(2 * np.pi * hertz * t) for hertz in (300, 500)]).astype(np.float32)
audio += 0.2 * np.random.default_rng(0).uniform(-1, 1, audio.shape).astype(np.float32)
found = {"schema": TypeAdapter(ResponseFormat).json_schema()["enum"]}
for name in ("m4a", "aac"):
    for kbps, rate_hz in ((None, None), (192, 44_100), (64, 24_000)):
        encoding = Encoding(TypeAdapter(ResponseFormat).validate_python(name), kbps, None, rate_hz)
        file = encode_audio(audio, 44_100, encoding=encoding)
        data = file.to_bytes()
        with av.open(io.BytesIO(data)) as container:
            (track,) = container.streams.audio
            num_samples = track.duration
            decoded = np.concatenate([frame.to_ndarray() for frame in container.decode(track)], axis=1)
        spectrum = np.abs(np.fft.rfft(decoded[:, track.rate : 2 * track.rate]))
        found[f"{name} {kbps} {rate_hz}"] = {
            "format": container.format.name,
            "codec": track.codec.name,
            "media_type": file.media_type,
            "rate": track.rate,
            "num_samples": num_samples,
            "decoded": decoded.shape[1] / track.rate,
            "kbps": len(data) * 8 / 3000,
            "tones": spectrum.argmax(axis=1).tolist(),
            "repeats": data == encode_audio(audio, 44_100, encoding=encoding).to_bytes(),
        }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Returns the output of SCRIPT, which a process with PyAV runs: properties of AAC files that it encodes."""
    path = os.pathsep.join([os.getcwd(), str(install_python(PACKAGE))])
    command = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize(("kbps", "rate_hz"), [(None, None), (192, 44_100), (64, 24_000)])
@pytest.mark.parametrize("name", ["m4a", "aac"])
def test_files_have_length_bit_rate_and_tones(
    found: dict[str, Any], name: str, kbps: int | None, rate_hz: int | None
) -> None:
    file = found[f"{name} {kbps} {rate_hz}"]
    assert (file["codec"], file["rate"], file["repeats"]) == ("aac", rate_hz or 44_100, True)
    assert (name in file["format"], file["media_type"]) == (True, "audio/mp4" if name == "m4a" else "audio/aac")
    if name == "m4a":  # AAC frames alone do not say where the audio ends
        assert file["num_samples"] == round((3 * 44_100 + 11) * file["rate"] / 44_100)
    assert file["decoded"] == pytest.approx(3, abs=2048 / file["rate"])
    assert file["kbps"] == pytest.approx(kbps or 128, rel=0.15)
    assert file["tones"] == [300, 500]


def test_schema_lists_the_formats_of_the_installation(found: dict[str, Any]) -> None:
    assert {"m4a", "aac"} <= set(found["schema"])
    assert set(available_formats()) <= set(found["schema"])
