"""Input and output of the commands that generate audio: source audio, recipes, regions, and the files of a result."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from stable_audio_serve.cli.messages import print_json
from stable_audio_serve.client import Clip, Result

STDIN = "-"  # as the name of an input file, means standard input; as the name of an output file, standard output
_ONE_CLIP = "only one variation can go to standard output; name a folder with --out"
_SLASHES = ("/", "\\")  # the name of a folder ends with one of these
_LONGEST_NAME = 60


def check_outputs(out: str, *, as_json: bool, num_clips: int = 1) -> None:
    """Raise ValueError or OSError if `save` or `report` would fail, before time is spent on the audio."""
    path = Path(out)
    if out == STDIN:
        if as_json:
            raise ValueError("--json and --out - would both write to standard output")
        if num_clips > 1:
            raise ValueError(_ONE_CLIP)
        if sys.stdout is None:
            raise ValueError("standard output is closed; name a file with --out")
        return
    if path.exists() and not path.is_dir() and not path.is_file():
        return  # a device or pipe
    is_folder = out.endswith(_SLASHES) or path.is_dir()
    if is_folder and path.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "it is not a folder", out)
    if not is_folder and not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    folder = path if is_folder else Path(os.path.realpath(path)).parent  # a link is followed
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no file can be written to this folder", str(folder))


def read_audio(audio: str) -> bytes:
    """Return the content of the file `audio`, or of standard input if `audio` is "-". Raises OSError, ValueError."""
    if audio != STDIN:
        return Path(audio).read_bytes()
    _require_stdin()
    return sys.stdin.buffer.read()


def read_prompt(prompt: str) -> str:
    """Return the prompt, read from standard input if it is "-". Raises ValueError if it is not text."""
    if prompt != STDIN:
        return prompt
    _require_stdin()
    try:
        return typer.get_text_stream("stdin").read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on standard input is not {error.encoding.upper()} text") from error


def _require_stdin() -> None:
    if sys.stdin is None:
        raise ValueError("standard input is closed")


def read_recipe(content: bytes) -> dict[str, Any]:
    """Return the recipe in the content of a JSON file or an audio file. Raises ValueError."""
    text: str | bytes | None = content
    if not content:
        raise ValueError("the file is empty")
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"{":
        from stable_audio_serve.audio.embedded_text import extract

        text = extract(io.BytesIO(content))
    if text is None:
        raise ValueError("the file contains no recipe")
    try:
        recipe = json.loads(text)
    except RecursionError as error:
        raise ValueError("the recipe is nested too deeply") from error
    if not isinstance(recipe, dict):
        raise ValueError("the recipe is not a JSON object")
    return recipe


def parse_region(text: str) -> tuple[float, float]:
    """Parse START:END. Returns [start, end) in seconds. Raises ValueError."""
    start, _, end = text.partition(":")
    try:
        start_s, end_s = float(start), float(end)
    except ValueError as error:
        raise ValueError(f"--region: {text!r} is not START:END in seconds, such as 2:4.5") from error
    if not start_s < end_s:
        raise ValueError(f"--region {text}: the start must be before the end")
    return start_s, end_s


def parse_sections(texts: Sequence[str] | None, *, overlap_s: float | None) -> dict[str, Any]:
    """Parse SECONDS or SECONDS:PROMPT of each section. Returns the fields of the HTTP API. Raises ValueError."""
    if not texts:
        if overlap_s is not None:
            raise ValueError("--overlap needs --section")
        return {}
    sections = []
    for text in texts:
        seconds, _, prompt = text.partition(":")
        try:
            section: dict[str, Any] = {"duration": float(seconds)}
        except ValueError as error:
            raise ValueError(f"--section: {text!r} is not SECONDS or SECONDS:PROMPT, such as 30:rain") from error
        sections.append(section | ({"prompt": prompt.strip()} if prompt.strip() else {}))
    return {"sections": sections, "overlap_s": overlap_s}


def save(result: Result, out: str, *, prompt: str) -> list[Path]:
    """Write a result to `out`: a folder, a file, or - for standard output. Returns the written files.

    `out` is a folder if such a folder exists or `out` ends with a slash. Files in a folder are named after the prompt
    and the seed, and never replace existing files. If `out` is a file `clip.wav` and there are several variations, the
    files are named `clip-<seed>.wav`, or `clip-1.wav`, ... if some have the same seed. Raises OSError, ValueError.
    """
    if out == STDIN:
        if len(result.clips) > 1:
            raise ValueError(_ONE_CLIP)
        sys.stdout.buffer.write(result.content)
        sys.stdout.buffer.flush()
        return []
    path = Path(out)
    if path.is_dir() or out.endswith(_SLASHES):
        path.mkdir(parents=True, exist_ok=True)
        prompts = (str((clip.recipe or {}).get("prompt", prompt)) for clip in result.clips)
        return [
            _save_new(clip, path, stem=f"{slug(own)}-{clip.seed}")
            for clip, own in zip(result.clips, prompts, strict=True)
        ]
    if len(result.clips) == 1:
        return [result.save(path)]
    seeds = [clip.seed for clip in result.clips]
    numbers = seeds if len(set(seeds)) == len(seeds) else range(1, len(seeds) + 1)
    return [
        clip.save(path.with_stem(f"{path.stem}-{number}")) for clip, number in zip(result.clips, numbers, strict=True)
    ]


def report(result: Result, files: list[Path], *, as_json: bool) -> None:
    """Print the paths of the files, or a JSON object, to standard output. Print warnings to standard error."""
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if not as_json:
        for file in files:
            typer.echo(str(file))
        if result.replay == "close":
            typer.echo("close: the original was made on another device or version; the last bits may differ", err=True)
        return
    clips = [
        {
            "file": str(file),
            "seed": clip.seed,
            "peak": clip.peak,
            "loudness": clip.loudness_lufs,
            "silent": clip.is_silent,
            **({} if clip.true_peak_dbtp is None else {"true_peak": clip.true_peak_dbtp}),
        }
        for file, clip in zip(files, result.clips, strict=True)
    ]
    replay = {} if result.replay is None else {"replay": result.replay}
    print_json({"model": result.model, "sample_rate": result.sample_rate_hz, **replay, "clips": clips})


def slug(prompt: str) -> str:
    """Convert a prompt to a part of a file name: lower-case words of letters and digits, joined by hyphens."""
    words = re.findall(r"[^\W_]+", prompt.lower())
    return "-".join(words)[:_LONGEST_NAME].rstrip("-") or "audio"


def _save_new(clip: Clip, folder: Path, *, stem: str) -> Path:
    suffix = Path(clip.file_name).suffix
    for number in range(1, 100_000):
        path = folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            return clip.save(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    raise OSError(f"there are too many files called {stem} in {folder}")
