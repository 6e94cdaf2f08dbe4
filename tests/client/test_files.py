from __future__ import annotations

import os
from pathlib import Path

import pytest

from stable_audio_serve.client.operations import whole_file


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
