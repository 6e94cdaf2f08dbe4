"""Continues a clip again and again into one growing WAV, until Ctrl-C. The file can be played at any time.

    python endless_continuation.py "slow rain on a tin roof" --out rain.wav
    python endless_continuation.py "more of this" --clip start.wav --out long.wav

Each piece is made from the last seconds of what there is, and faded into it.
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

Samples: TypeAlias = "array[int]"  # of 16 bit, all channels in turn


def read(content: bytes) -> tuple[Samples, wave._wave_params]:
    """Returns a WAV's samples and its parameters. Raises ValueError for anything but 16 bit."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            if file.getsampwidth() == 2:
                return array("h", file.readframes(file.getnframes())), file.getparams()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"this is no WAV file: {error}") from error
    raise ValueError("only WAV files of 16 bit can be continued")


def write(samples: Samples, params: wave._wave_params) -> bytes:
    """Returns the WAV of samples."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams(params)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def crossfade(old: Samples, new: Samples) -> Samples:
    """Returns samples that begin as `old` and end as `new`, which is as long."""
    return array("h", (round(a + (b - a) * i / len(old)) for i, (a, b) in enumerate(zip(old, new, strict=True))))


class Growing:
    """A WAV file, whole after each piece. Its very last samples wait for the next piece, to be faded into that."""

    def __init__(self, path: Path, params: wave._wave_params) -> None:
        self.path = path
        self.file = wave.open(str(path), "wb")  # noqa: SIM115  `close` does
        self.file.setparams(params)
        self.end: Samples = array("h")  # what the next piece is made from

    def count(self, seconds: float) -> int:
        return round(seconds * self.file.getframerate()) * self.file.getnchannels()

    @property
    def length_s(self) -> float:
        return self.file.tell() / self.file.getframerate() + FADE_S

    def add(self, made: Samples, *, context_s: float) -> None:
        """Write what `made` has behind `end`, with which it begins."""
        fade = self.count(FADE_S)
        start = max(0, len(self.end) - fade)
        old = self.end[start:]
        new = crossfade(old, made[start : len(self.end)]) + made[len(self.end) :]
        self.file.writeframes(new[:-fade].tobytes())
        self.end = (self.end[:start] + new)[-self.count(context_s) :]

    def close(self) -> None:
        self.file.writeframes(self.end[-self.count(FADE_S) :].tobytes())
        print(f"\r{self.path}: {self.file.tell() / self.file.getframerate():.1f} s")
        self.file.close()


def grow(client: Client, arguments: argparse.Namespace) -> None:
    """Write the clip, then one piece after another."""
    prompt, more_s = arguments.prompt, arguments.more
    clip = arguments.clip.read_bytes() if arguments.clip else client.generate(prompt, duration=more_s).content
    samples, params = read(clip)
    with closing(Growing(arguments.out, params)) as growing:
        growing.add(samples, context_s=arguments.context)
        while growing.length_s < arguments.until:
            source_s = len(growing.end) / growing.count(1)
            source = write(growing.end, params)
            made, its = read(client.extend(source, prompt, source_s=source_s, until_s=source_s + more_s).content)
            if its[:3] != params[:3]:
                raise ValueError(f"the model makes {its.nchannels} channels at {its.framerate} Hz, the clip has others")
            growing.add(made, context_s=arguments.context)
            print(f"\r{arguments.out}: {growing.length_s:.1f} s", end="", flush=True)


def main() -> None:
    """Ctrl-C is its usual end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--clip", type=Path, help="a WAV file to begin with; without it one is generated")
    parser.add_argument("--context", type=float, default=8.0, help="seconds that each piece is made from")
    parser.add_argument("--more", type=float, default=8.0, help="seconds that each piece adds")
    parser.add_argument("--until", type=float, default=LONGEST_S, help="length at which to stop, seconds")
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
