"""What the commands that make sound read and write: source audio, recipes, regions, and the files of a take."""

from __future__ import annotations

import codecs
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import typer

from stable_audio_serve.client import Clip, Take

STDIN = "-"  # and standard output
_LONGEST_NAME = 60


def check_inputs(prompt: str, audio: str | bytes | None) -> None:
    """Raises ValueError if both are standard input."""
    if prompt == STDIN == audio:
        raise ValueError("either the prompt or the audio can be standard input")


def check_outputs(out: str, *, as_json: bool) -> None:
    """Raises ValueError if JSON and audio would both go to standard output."""
    if as_json and out == STDIN:
        raise ValueError("--json and --out - would both write to standard output")


def read_audio(audio: str) -> bytes:
    """Returns the content of source audio. Raises OSError."""
    return sys.stdin.buffer.read() if audio == STDIN else Path(audio).read_bytes()


def read_prompt(prompt: str) -> str:
    """Returns the prompt, which may be on standard input."""
    return typer.get_text_stream("stdin").read().strip() if prompt == STDIN else prompt


def read_recipe(content: bytes) -> dict[str, Any]:
    """Returns the recipe in a JSON file or in an audio file. Raises ValueError."""
    text: str | bytes | None = content
    if not content:
        raise ValueError("the file is empty")
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
        from stable_audio_serve.audio.embedded_text import extract

        text = extract(io.BytesIO(content))
    if text is None:
        raise ValueError("the file carries no recipe")
    try:
        recipe = json.loads(text)
    except RecursionError as error:
        raise ValueError("the recipe is nested too deeply") from error
    if not isinstance(recipe, dict):
        raise ValueError("the recipe is no JSON object")
    return recipe


def length_s(content: bytes) -> float:
    """Returns the length of an audio file. Raises ValueError."""
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(content)).duration)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"the audio cannot be read: {error}; --from says how much of it to keep") from error


def parse_region(text: str) -> tuple[float, float]:
    """Returns [start, end) in seconds. Raises ValueError."""
    start, _, end = text.partition(":")
    try:
        start_s, end_s = float(start), float(end)
    except ValueError as error:
        raise ValueError(f"--region: {text!r} is not START:END in seconds, such as 2:4.5") from error
    if not start_s < end_s:
        raise ValueError(f"--region {text}: the start must be before the end")
    return start_s, end_s


def save(take: Take, out: str, *, prompt: str) -> list[Path]:
    """Write a take to `out`: a folder, a file, or - for standard output. Returns the files. Raises OSError, ValueError.

    A folder exists or has a name that ends with a slash; its files are named after prompt and seed and replace none.
    With several variations, a file named `take.wav` becomes `take-<seed>.wav`.
    """
    if out == STDIN:
        if len(take.clips) > 1:
            raise ValueError("standard output takes one variation: name a folder with --out")
        sys.stdout.buffer.write(take.content)
        sys.stdout.buffer.flush()
        return []
    path = Path(out)
    if path.is_dir() or out.endswith(("/", "\\")):
        path.mkdir(parents=True, exist_ok=True)
        return [_save_new(clip, path, stem=f"{slug(prompt)}-{clip.seed}") for clip in take.clips]
    if len(take.clips) == 1:
        return [take.save(path)]
    return [clip.save(path.with_stem(f"{path.stem}-{clip.seed}")) for clip in take.clips]


def report(take: Take, files: list[Path], *, as_json: bool) -> None:
    """Print the files on standard output, and warnings about the request on standard error."""
    for warning in take.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if not as_json:
        for file in files:
            typer.echo(str(file))
        if take.replay == "close":
            typer.echo("close: made on another device or version; the last bits may differ", err=True)
        return
    clips = [
        {
            "file": str(file),
            "seed": clip.seed,
            "peak": clip.peak,
            "loudness": clip.loudness_lufs,
            "silent": clip.is_silent,
        }
        for file, clip in zip(files, take.clips, strict=True)
    ]
    replay = {} if take.replay is None else {"replay": take.replay}
    typer.echo(
        json.dumps({"model": take.model, "sample_rate": take.sample_rate_hz, **replay, "clips": clips}, indent=2)
    )


def slug(prompt: str) -> str:
    """Returns the prompt in a form that fits in a file name.

    The form has lower-case words, letters and digits of any script, joined by hyphens.
    """
    words = re.findall(r"[^\W_]+", prompt.lower())
    return "-".join(words)[:_LONGEST_NAME].rstrip("-") or "audio"


def _save_new(clip: Clip, folder: Path, *, stem: str) -> Path:
    suffix = Path(clip.file_name).suffix
    for number in range(1, 100_000):
        name = f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}"
        try:
            with (folder / name).open("xb") as file:
                file.write(clip.content)
        except FileExistsError:
            continue
        return folder / name
    raise OSError(f"there are too many files called {stem} in {folder}")
