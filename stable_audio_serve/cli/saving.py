"""Where a take's files go and what they are called. Never replaces a file that nobody named."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from stable_audio_serve.client import Clip, Take

STDOUT = "-"
_LONGEST_NAME = 60


def save(take: Take, out: str, *, prompt: str) -> list[Path]:
    """Write a take to `out`: a folder, a file, or - for standard output. Returns the files. Raises OSError, ValueError.

    A folder is one that exists or whose name ends with a slash; its files are named after prompt and seed. Of several
    variations, a file named `take.wav` becomes `take-<seed>.wav`.
    """
    if out == STDOUT:
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


def slug(prompt: str) -> str:
    """Returns a prompt as part of a file name: words of lower-case letters and digits of any script."""
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
