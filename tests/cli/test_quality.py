"""`stable-audio-serve quality`: make, list, compare, pin and remove a report."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from stable_audio_serve.cli.main import app
from stable_audio_serve.verification.quality.report import VERSION, LastGood, Source, dump, last_good_id
from tests.goldens import SA3_GOLDENS
from tests.models.revisions import copy_checkpoint, scale, spoil


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    copy_checkpoint(SA3_GOLDENS / "tiny-s", tmp_path / "model")
    configure(tmp_path)
    return tmp_path


def configure(folder: Path, **model: object) -> None:
    args = {
        "models": [{"name": "tiny", "path": str(folder / "model"), "engine": {"warmup_budget_s": 0}, **model}],
        "device": "cpu",
        "output_dir": str(folder / "outputs"),
    }
    application = {"import_path": "stable_audio_serve.serving.app:build", "args": args}
    (folder / "serve_config.yaml").write_text(json.dumps({"applications": [application]}))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quality", *arguments])


@pytest.mark.server  # slow, because the command loads the model twice
def test_a_report_is_made_listed_pinned_and_removed(folder: Path) -> None:
    assert run().stdout == ""
    made = run("tiny")
    assert made.exit_code == 0, made.output
    report_id = made.stdout.partition("quality report ")[2][:32]
    report, record = run().stdout.splitlines()
    assert report.startswith(f"{report_id} tiny weights ")
    assert "last good weights of tiny" in record
    spoil(folder / "model", partial(scale, factor=1.5))
    configure(folder, quality_report=report_id)  # without it, new weights may be louder by 3.5 dB
    failed = run("tiny")
    assert (failed.exit_code, "+3.52 dB" in failed.output) == (1, True)
    assert run("--forget", report_id).exit_code == 0
    assert report_id not in run().stdout


def test_wrong_names_are_reported_in_one_sentence(folder: Path) -> None:
    unknown = run("nobody")
    assert (unknown.exit_code, "configured: tiny" in unknown.output) == (2, True)
    assert run("--forget", "../../etc/passwd").exit_code == 1


def test_last_good_weights_of_an_unknown_model_are_listed(folder: Path) -> None:
    good = LastGood("retired", "ab" * 32, Source(folder=str(folder / "old")), kind="last good", version=VERSION)
    (folder / "outputs" / "quality").mkdir(parents=True)
    (folder / "outputs" / "quality" / last_good_id("retired")).write_bytes(dump(good))
    assert run().stdout == f"{last_good_id('retired')} last good weights of retired: {'ab' * 6} {folder / 'old'}\n"


def test_a_broken_report_is_listed_by_name(folder: Path) -> None:
    (folder / "outputs" / "quality").mkdir(parents=True)
    (folder / "outputs" / "quality" / ("0" * 32)).write_text("\x1b[2Jnot a report")
    listed = run()
    assert listed.exit_code == 0
    assert "0" * 32 in listed.stdout
    assert "\x1b" not in listed.stdout
