from __future__ import annotations

import io
import wave


def read_wav(data: bytes) -> tuple[int, int, int, int]:
    """Returns sample rate (hertz), channels, bytes per sample and samples per channel of a WAV file."""
    with wave.open(io.BytesIO(data)) as file:
        return file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()
