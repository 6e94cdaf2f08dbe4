"""Extend a clip repeatedly in one growing WAV file, until Ctrl-C. The file can be played at any time.

    python endless_continuation.py "slow rain on a tin roof" --out rain.wav
    python endless_continuation.py "more of this" --clip start.wav --out long.wav

Each new piece continues the last seconds of the file and is crossfaded with its end.
"""

from __future__ import annotations

import argparse
import io
import sys
import wave
from array import array
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeAlias

from stable_audio_serve.client import Client
from stable_audio_serve.core.errors import StableAudioError

FADE_S = 0.05
LONGEST_S = 6 * 3600.0  # a WAV file is at most 4 GB

Samples: TypeAlias = "array[int]"  # 16-bit samples with interleaved channels


def read(content: bytes) -> tuple[Samples, wave._wave_params]:
    """Returns the samples and parameters of a WAV file. Raises ValueError unless it has 16 bits per sample."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            if file.getsampwidth() == 2:
                return array("h", file.readframes(file.getnframes())), file.getparams()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"this is no WAV file: {error}") from error
    raise ValueError("only WAV files of 16 bit can be continued")


def write(samples: Samples, params: wave._wave_params) -> bytes:
    """Returns the bytes of a WAV file with the given samples."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams(params)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def crossfade(old: Samples, new: Samples) -> Samples:
    """Returns a linear crossfade from `old` to `new`, which have the same length."""
    return array("h", (round(a + (b - a) * i / len(old)) for i, (a, b) in enumerate(zip(old, new, strict=True))))


class GrowingWav:
    """A WAV file to which pieces of audio are added. The file is valid at any time.

    The last `FADE_S` seconds of a piece are written together with the next piece, because the pieces are crossfaded.
    """

    def __init__(self, path: Path, params: wave._wave_params) -> None:
        self.path = path
        self.file = wave.open(str(path), "wb")  # noqa: SIM115  `close` does
        self.file.setparams(params)
        self.end: Samples = array("h")  # end of the audio, the source of the next continuation

    def count(self, seconds: float) -> int:
        return round(seconds * self.file.getframerate()) * self.file.getnchannels()

    @property
    def length_s(self) -> float:
        return self.file.tell() / self.file.getframerate() + FADE_S

    def add(self, piece: Samples, *, context_s: float) -> None:
        """Append `piece`, which must begin with the audio of `self.end`. That audio is not written twice.

        Then `self.end` becomes the last `context_s` seconds of the audio.
        """
        fade = self.count(FADE_S)
        start = max(0, len(self.end) - fade)
        old = self.end[start:]
        new = crossfade(old, piece[start : len(self.end)]) + piece[len(self.end) :]
        self.file.writeframes(new[:-fade].tobytes())
        self.end = (self.end[:start] + new)[-self.count(context_s) :]

    def close(self) -> None:
        self.file.writeframes(self.end[-self.count(FADE_S) :].tobytes())
        print(f"\r{self.path}: {self.file.tell() / self.file.getframerate():.1f} s")
        self.file.close()


def grow(client: Client, arguments: argparse.Namespace) -> None:
    """Write the first clip, then append continuations until the file is `--until` seconds long."""
    prompt, more_s = arguments.prompt, arguments.more
    clip = arguments.clip.read_bytes() if arguments.clip else client.generate(prompt, duration=more_s).content
    samples, params = read(clip)
    with closing(GrowingWav(arguments.out, params)) as wav:
        wav.add(samples, context_s=arguments.context)
        while wav.length_s < arguments.until:
            source = write(wav.end, params)
            piece, made = read(client.extend(source, prompt, extend_after_s=more_s).content)
            if made[:3] != params[:3]:
                raise ValueError(
                    f"--clip must have the format of the model: {made.nchannels} channels at {made.framerate} Hz"
                )
            wav.add(piece, context_s=arguments.context)
            print(f"\r{arguments.out}: {wav.length_s:.1f} s", end="", flush=True)


def main() -> None:
    """Run the program. Ctrl-C is its usual end, so the exit code is then 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--clip", type=Path, help="WAV file to extend; without it, generate a clip first")
    parser.add_argument("--context", type=float, default=8.0, help="seconds of audio that each piece continues")
    parser.add_argument("--more", type=float, default=8.0, help="seconds that each piece adds")
    parser.add_argument("--until", type=float, default=LONGEST_S, help="stop at this length, seconds")
    parser.add_argument("--out", type=Path, default=Path("endless.wav"))
    arguments = parser.parse_args()
    if min(arguments.context, arguments.more) <= FADE_S:
        parser.error(f"--context and --more must be longer than {FADE_S} s")
    with suppress(KeyboardInterrupt), Client() as client:
        grow(client, arguments)


if __name__ == "__main__":
    try:
        main()
    except (StableAudioError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
