from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stable_audio_serve.cli.sound_files import save
from stable_audio_serve.client import Clip, Result
from stable_audio_serve.client.answers import whole_file


def test_a_file_replaces_the_old_one_with_default_permissions(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / ("雨" * 80)
    other.write_bytes(b"")
    path.write_bytes(b"former")
    with whole_file(path) as file:
        file.write(b"sound")
        assert path.read_bytes() == b"former"
    assert path.read_bytes() == b"sound"
    assert path.stat().st_mode == other.stat().st_mode
    assert len(os.listdir(tmp_path)) == 2


def test_an_interrupted_file_leaves_nothing_behind(tmp_path: Path) -> None:
    def break_off() -> None:
        with whole_file(tmp_path / "take.wav") as file:
            file.write(b"sou")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        break_off()
    assert os.listdir(tmp_path) == []


@contextmanager
def full_disk() -> Iterator[None]:
    """Let each file grow to 10 bytes only."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_clip_that_cannot_be_written_leaves_the_former_file(tmp_path: Path) -> None:
    clip = Clip("take.wav", b"sound" * 10_000, seed=7, peak=0.5, loudness_lufs=None, is_silent=False)
    path = tmp_path / "take.wav"
    path.write_bytes(b"former")
    with full_disk(), pytest.raises(OSError, match="large") as caught:
        clip.save(path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"former"
    with full_disk(), pytest.raises(OSError, match="large"):
        save(Result((clip,), "demo", 44100), str(tmp_path), prompt="rain")
    assert os.listdir(tmp_path) == ["take.wav"]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "take.wav"
    with pytest.raises(FileNotFoundError) as caught, whole_file(path):
        pass
    assert caught.value.filename == str(path)


def test_links_keep_their_place_and_pipes_are_written_directly(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"former")
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write(b"sound")
    assert link.is_symlink()
    assert target.read_bytes() == b"sound"
    os.mkfifo(pipe)
    heard: list[bytes] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    with whole_file(pipe) as file:
        file.write(b"sound")
    reader.join()
    assert heard == [b"sound"]
    assert pipe.is_fifo()
