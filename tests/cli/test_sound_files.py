"""What commands make of a prompt, of a recipe in a file, and of a job's progress."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from stable_audio_serve.audio.encode import encode_audio
from stable_audio_serve.cli.sound_files import check_outputs, read_audio, read_prompt, read_recipe, slug
from stable_audio_serve.cli.tables import progress_line
from stable_audio_serve.client import JobProgress
from stable_audio_serve.core.sound import AudioFormat, Encoding
from tests.backends import RATE_HZ


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("Rain on a Tin roof!", "rain-on-a-tin-roof"), ("../../etc", "etc"), ("雨 の 音", "雨-の-音"), ("?!", "audio")],
)
def test_slugs_of_prompts_are_file_names(prompt: str, name: str) -> None:
    assert slug(prompt) == name
    assert len(slug(prompt * 100)) <= 60


@pytest.mark.parametrize("text", ["[1]", "1", '{"a":' * 100_000, "{"])
def test_a_file_with_an_invalid_recipe_is_refused(text: str) -> None:
    audio = np.zeros((1, 100), dtype=np.float32)
    file = encode_audio(audio, RATE_HZ, encoding=Encoding(AudioFormat.FLAC), text=text).to_bytes()
    with pytest.raises(ValueError, match=r"recipe|Expecting"):
        read_recipe(file)


def test_closed_streams_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sets a stream to None if the shell closed it, as in `generate - <&-`."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    for read in (read_audio, read_prompt):
        with pytest.raises(ValueError, match=r"^standard input is closed$"):
            read("-")
    with pytest.raises(ValueError, match=r"^standard output is closed; name a file with --out$"):
        check_outputs("-", as_json=False)


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rain.wav").touch()
    check_outputs(f"{tmp_path}/new/", as_json=False)
    check_outputs(f"{tmp_path}/rain.wav", as_json=False)
    with pytest.raises(NotADirectoryError, match="it is not a folder"):
        check_outputs(f"{tmp_path}/rain.wav/", as_json=False)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_outputs(f"{tmp_path}/missing/rain.wav", as_json=False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root, who may run this test, can write anywhere
    for out in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/rain.wav", f"{tmp_path}/new.wav"):
        with pytest.raises(PermissionError, match="no file can be written"):
            check_outputs(out, as_json=False)
    check_outputs("/dev/null", as_json=False)


@pytest.mark.parametrize(
    ("progress", "texts"),
    [
        (JobProgress("queued", 0.0, None, 0), ["queued, next"]),
        (JobProgress("queued", 0.0, 31.2, 4), ["queued, 4 ahead", "31 s left"]),
        (JobProgress("denoise", 0.5, 12.4, None), ["denoise", "12 s left"]),
        (JobProgress("denoise", 0.5, 9.6, None, sections_done=2, num_sections=5), ["section 3 of 5", "10 s left"]),
    ],
    ids=["next", "queued", "running", "long piece"],
)
def test_a_terminal_shows_the_stage_and_the_remaining_time(
    progress: JobProgress, texts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # write as to a terminal
    for is_quiet in (False, True):
        with progress_line(quiet=is_quiet) as show:
            show(progress)
        shown = capsys.readouterr().err
        assert [text in shown for text in texts] == [not is_quiet] * len(texts)
