from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from stable_audio_serve.cli import app


def test_the_error_for_missing_numbers_names_where_to_find_them(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = CliRunner().invoke(app, ["verify", str(folder)])
        assert result.exit_code == 1
        assert result.output.startswith(
            f"goldens                 MISSED   {folder}/golden.json: file not found. Reference numbers are in "
            "tests/data/goldens of a source checkout; the installed package has none."
        )
